"""A headless Chromium on the page of an app over a fake engine. Skipped where there is none; what it complains about is a failure."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Locator, Page, async_playwright

from server.settings import Deployment
from tests.server.conftest import Served, both, folder, serve_socket, served, tokenizer

__all__ = ["both", "folder", "served", "tokenizer"]  # fixtures

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser() -> AsyncIterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    async with async_playwright() as playwright:
        # a container has no sandbox for root, and little shared memory
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        await browser.close()


class Site:
    """The page in a tab, the app behind it, and what the browser had to complain about."""

    def __init__(self, served: Served, page: Page, url: str):
        self.served = served
        self.page = page
        self.url = url
        self.expected = ""  # a complaint that the test brings about
        self._complaints: list[str] = []
        page.on("console", lambda message: self._note(message.type, message.text))
        page.on("pageerror", lambda error: self._note("error", str(error)))
        page.on("request", lambda request: self._require_own(request.url))

    async def open(self) -> None:
        await self.page.goto(self.url)
        await self.page.wait_for_selector("#send:enabled")

    async def ask(self, prompt: str = "hello") -> None:
        await self.page.fill("#prompt", prompt)
        await self.page.press("#prompt", "Enter")

    async def ends(self, state: str = "done", side: str = "") -> Locator:
        """The latest answer, once it is in that state."""
        answer = self.page.locator(f".answer[data-side='{side}']").last
        await self.page.wait_for_function(
            "([side, state]) => [...document.querySelectorAll(`.answer[data-side='${side}']`)].at(-1)?.dataset.state === state",
            arg=[side, state],
        )
        return answer

    async def figures(self, row: int = 0) -> dict[str, str]:
        """What the strip says."""
        strip = self.page.locator(".strip").nth(row)
        return {
            name: await strip.locator(f"[data-figure={name}]").inner_text() for name in ("acceptance", "perCall", "perSecond", "firstToken")
        }

    def check(self) -> None:
        unforeseen = [text for text in self._complaints if not self.expected or self.expected not in text]
        assert not unforeseen, unforeseen

    def _note(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self._complaints.append(f"{kind}: {text}")

    def _require_own(self, url: str) -> None:
        if urlsplit(url).netloc != urlsplit(self.url).netloc:
            self._complaints.append(f"request to {url}")


async def tokens_of(answer: Locator) -> list[tuple[str, str]]:
    """Text and kind of each token that is shown."""
    shown: list[list[str]] = await answer.evaluate(
        "answer => [...answer.querySelectorAll('.text .token')].map((token) => [token.textContent, token.classList[1]])"
    )
    return [(text, kind) for text, kind in shown]


@asynccontextmanager
async def visit(browser: Browser, folder: Path, deployment: Deployment | None = None, **context: Any) -> AsyncIterator[Site]:
    """The page in a tab of its own, not yet opened. What the browser complains about fails the test at the end."""
    async with serve_socket(folder, deployment) as served, await browser.new_context(**context) as tab:
        site = Site(served, await tab.new_page(), str(served.http.base_url))
        site.page.set_default_timeout(15_000)
        yield site
        site.check()


@pytest_asyncio.fixture(loop_scope="session")
async def site(browser: Browser, folder: Path) -> AsyncIterator[Site]:
    async with visit(browser, folder) as it:
        await it.open()
        yield it
