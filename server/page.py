"""The page at /: files of server/web as they are, kept in memory. Open to everybody; what it asks of /v1 wants the keys.

Nothing on it comes from elsewhere, and its policy lets nothing in: no inline script or style, no other origin, no frame around it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

FOLDER = Path(__file__).parent / "web"
TYPES: Mapping[str, str] = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS: Mapping[str, str] = {
    "Cache-Control": "no-cache",  # ask each time: another version of the server has other files under the same names
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

router = APIRouter(include_in_schema=False)


@dataclass(frozen=True)
class File:
    """One of them, with the headers that it is sent with."""

    content: bytes
    headers: Mapping[str, str]


@router.api_route("/", methods=["GET", "HEAD"])
async def page(request: Request) -> Response:
    """The page."""
    return _sent(files()["index.html"], request)


@router.api_route("/web/{name}", methods=["GET", "HEAD"])
async def asset(name: str, request: Request) -> Response:
    """What the page loads."""
    if name not in files():
        raise HTTPException(404)
    return _sent(files()[name], request)


@lru_cache(maxsize=1)
def files() -> Mapping[str, File]:
    """All of them by name. Read once: they belong to the program."""
    return {path.name: _read(path) for path in sorted(FOLDER.iterdir()) if path.suffix in TYPES}


def _read(path: Path) -> File:
    content = path.read_bytes()
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    return File(content, {**HEADERS, "ETag": tag, "Content-Type": TYPES[path.suffix]})


def _sent(file: File, request: Request) -> Response:
    """The file, or 304 for a client that has it; a HEAD is cut by the server."""
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if file.headers["ETag"] in known or "*" in known:
        return Response(status_code=304, headers={key: file.headers[key] for key in (*HEADERS, "ETag")})
    return Response(file.content, headers=dict(file.headers))
