"""The path under which a proxy shows this server, such as /llm. Takes it away; makes no URL and believes no header.

Proxies come in two kinds: those that take the path away themselves and those that hand it on, and probes know nothing of it. So requests
are served with it and without, and everything further inside sees them without. A path that could mean either is refused by the settings.
"""

from __future__ import annotations

from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send


class RootPath:
    """Middleware: /llm/health is /health. To be the outermost, so that nothing within judges a path that has the prefix."""

    def __init__(self, app: ASGIApp, prefix: str):
        self._app = app
        self._prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["path"] == self._prefix:  # relative links of the page at / would lead out of the prefix
            await RedirectResponse(f"{self._prefix}/")(scope, receive, send)
        elif scope["path"].startswith(f"{self._prefix}/"):
            await self._app({**scope, "path": scope["path"].removeprefix(self._prefix)}, receive, send)
        else:
            await self._app(scope, receive, send)
