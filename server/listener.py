"""The address of a server, taken before anything slow happens. Imports nothing heavy, so that a taken port is said at once."""

from __future__ import annotations

import errno
import socket

from engine.errors import ConfigError
from server.settings import ServerSettings


def bind(settings: ServerSettings) -> socket.socket:
    """The configured address, taken but not yet listened on. Raises ConfigError."""
    listener: socket.socket | None = None
    try:
        family, _, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # asyncio sends small writes at once only where the protocol is named; else a body waits 40 ms for the receipt of its headers
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restart need not wait for old connections to time out
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux: connections have it from here. Whoever reads nothing would hold an answer forever
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * settings.send_timeout_seconds))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # and whoever is gone without a word
        listener.bind(address)
    except (OSError, ValueError) as error:  # ValueError: a host that no name can be, such as a..b
        if listener is not None:
            listener.close()
        raise refused(settings, error) from error
    return listener


def refused(settings: ServerSettings, error: OSError | ValueError) -> ConfigError:
    """Why the address cannot be had, and what to do."""
    if not isinstance(error, OSError):
        return ConfigError(f"server.host: {settings.host!r} - is no address and no host name ({error}).")
    if error.errno == errno.EADDRINUSE:
        return ConfigError(f"server.port: Port {settings.port} on {settings.host} is in use; choose another with --port.")
    return ConfigError(f"server.host: {settings.host!r}, server.port: {settings.port} - cannot be listened on: {error.strerror}.")
