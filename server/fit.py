"""What single values of the settings must look like. Each function takes a text, and returns it or raises ValueError with one sentence."""

from __future__ import annotations

import ipaddress
import re

DIGEST = "sha256:"  # what an API key begins with that stands there as its digest
# how routes begin
OWN_PATHS = frozenset({"v1", "health", "ready", "metrics", "version", "openapi.json", "tokenize", "detokenize", "web"})


def fit_key(key: str) -> str:
    """An API key, or its digest, as it may stand in a file. Raises ValueError."""
    if key.startswith(DIGEST) and not re.fullmatch("[0-9a-fA-F]{64}", key.removeprefix(DIGEST)):
        raise ValueError(f"what begins with {DIGEST} must be a digest, 64 hexadecimal digits; `cascade hash-key` makes one")
    return key


def fit_origin(origin: str) -> str:
    """An origin as browsers write it, or '*'. Raises ValueError."""
    if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s?#@A-Z]+", origin):
        raise ValueError("an origin is a scheme, a host in small letters and, if need be, a port, such as https://example.org, or '*'")
    return origin


def fit_root_path(path: str) -> str:
    """A path that can stand before those of the routes and never be taken for one of them. Raises ValueError."""
    if path and not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", path):
        raise ValueError("a path begins with a slash, ends without one and needs no escapes, such as /llm; leave it empty for none")
    if path and path.split("/")[1] in OWN_PATHS:
        raise ValueError("this server's own paths begin like that; choose another")
    return path


def fit_proxy(proxy: str) -> str:
    """An address, a network, or '*' for everybody. Raises ValueError."""
    if proxy != "*":
        try:
            ipaddress.ip_network(proxy)
        except ValueError as error:
            raise ValueError(f"must be an address such as 10.0.0.7, a network such as 10.0.0.0/8, or '*' ({error})") from error
    return proxy
