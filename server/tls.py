"""The server's certificate, tried before anything slow happens. Opens no connection: uvicorn does, with the same two files."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import NoReturn

from engine.errors import ConfigError
from server.settings import ServerSettings


def check_certificate(settings: ServerSettings) -> None:
    """Raises ConfigError where the certificate and the key that are configured cannot be used."""
    if settings.tls_certificate is None or settings.tls_key is None:
        return
    for name, path in (("tls_certificate", settings.tls_certificate), ("tls_key", settings.tls_key)):
        _check_readable(name, path)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.tls_certificate, settings.tls_key, _no_password)
    except ssl.SSLError as error:
        reason = error.reason or "no certificate or no key in PEM format"
        raise ConfigError(f"server.tls_certificate: {settings.tls_certificate}, server.tls_key: {settings.tls_key} - {reason}.") from error


def _check_readable(name: str, path: Path) -> None:
    try:
        path.open("rb").close()
    except OSError as error:
        raise ConfigError(f"server.{name}: {path} - cannot be read: {error.strerror}.") from error


def _no_password() -> NoReturn:
    """Without it, the terminal would be asked."""
    raise ConfigError("server.tls_key: is encrypted; nobody can be asked for its password, so have one without.")
