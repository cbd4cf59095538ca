"""The README's picture: A and B on one prompt, from a server that runs.

cascade serve configs/default.yaml
python -m tests.web.picture http://127.0.0.1:8000 deploy/page.png
"""

from __future__ import annotations

import asyncio
import shutil
import sys
from pathlib import Path

from playwright.async_api import Page, async_playwright

PROMPT = "Write a short poem about the sea."


async def take(url: str, path: Path, prompt: str = PROMPT) -> None:
    async with async_playwright() as playwright:
        chromium = await playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = await chromium.new_page(viewport={"width": 1280, "height": 860}, color_scheme="light")
        page.set_default_timeout(120_000)
        await page.goto(url)
        await page.wait_for_selector("#send:enabled")
        await compare(page, prompt)
        await page.screenshot(path=path)
        await chromium.close()


async def compare(page: Page, prompt: str) -> None:
    """Exact verification beside a cascade, and what is known of one of the cascade's tokens."""
    await page.click("#compare")
    await page.get_by_label("Preset (A)").select_option(label="exact")
    await page.get_by_label("Rule (B)").select_option("token_v3")
    for side in "AB":
        await page.get_by_label(f"Max tokens ({side})").fill("72")
    await page.check("#probabilities")
    await page.locator("#panel").evaluate("panel => panel.scrollTo(0, 0)")
    await page.fill("#prompt", prompt)
    await page.press("#prompt", "Enter")
    await page.wait_for_selector(".answer[data-side=B][data-state=done]")
    await page.locator("#talk").evaluate("talk => talk.scrollTo(0, 0)")
    await page.locator("[data-side=B] .token.lossy").last.hover()


if __name__ == "__main__":
    asyncio.run(take(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:]))
