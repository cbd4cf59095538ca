"""That everybody can use the page: axe on each of its states, keyboard, phones, light and dark, and how soon it is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, Page

from engine.request import Round
from tests.fakes import Part
from tests.web.conftest import Site, visit

pytestmark = pytest.mark.asyncio(loop_scope="session")

ROUNDS = [Part((10,)), Part((11, 12, 13), Round(4, 2, 0, 0b10), drafted_mask=0b011), Part((14, 15), Round(1, 1), drafted_mask=0b01)]
SCREENS: dict[str, dict[str, Any]] = {
    "light": {"color_scheme": "light", "viewport": {"width": 1280, "height": 800}},
    "dark": {"color_scheme": "dark", "viewport": {"width": 1280, "height": 800}},
    "phone": {"color_scheme": "light", "viewport": {"width": 360, "height": 740}, "has_touch": True},
}


async def require_accessible(page: Page, state: str) -> None:
    """Nothing that axe finds, however slight it calls it."""
    found = (await Axe().run(page)).response["violations"]
    assert not found, (state, [(one["id"], one["impact"], [node["target"] for node in one["nodes"]]) for one in found])
    assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{state}: wider than the screen"


@pytest.mark.parametrize("screen", SCREENS)
async def test_axe_finds_nothing(browser: Browser, folder: Path, screen: str) -> None:
    async with visit(browser, folder, **SCREENS[screen]) as site:
        site.served.answer_with(parts=ROUNDS)
        page = site.page
        await site.open()
        await require_accessible(page, "welcome")
        await site.ask()
        await site.ends()
        await page.locator(".text").focus()
        await page.keyboard.press("ArrowRight")
        await require_accessible(page, "answer")
        await page.click("#compare")
        await site.ask()
        await site.ends(side="B")
        await require_accessible(page, "comparison")
        if screen == "phone":
            await page.click("#panel-toggle")
            await require_accessible(page, "settings")
            await page.keyboard.press("Escape")
        await page.click("#key")
        await require_accessible(page, "key")


async def test_an_error_is_accessible(browser: Browser, folder: Path) -> None:
    async with visit(browser, folder) as site:
        site.served.answer_with(parts=ROUNDS, dies_after=1)
        await site.open()
        await site.ask()
        await site.ends("failed")
        await require_accessible(site.page, "error")


async def test_everything_can_be_done_with_the_keyboard(site: Site) -> None:
    site.served.answer_with(parts=ROUNDS)
    page, reached = site.page, list[str]()
    await page.keyboard.press("Tab")
    assert await page.evaluate("document.activeElement.textContent") == "Skip to the prompt"
    await page.keyboard.press("Enter")
    await page.keyboard.type("hello")
    await page.keyboard.press("Enter")
    await site.ends()
    for _ in range(40):
        await page.keyboard.press("Tab")
        reached.append(await page.evaluate("(({ id, ariaLabel, textContent }) => id || ariaLabel || textContent)(document.activeElement)"))
    names = {"compare", "fresh", "key", "theme", "talk", "prompt", "send", "probabilities", "Preset", "Rule", "Temperature", "Seed"}
    assert names | {"Copy text", "Copy as curl", "Regenerate"} <= set(reached)
    assert any("arrow keys" in name for name in reached), "the answer itself"
    assert len(reached) > len(set(reached)), "the focus goes round, and is caught nowhere"


async def test_focus_is_visible(site: Site) -> None:
    await site.page.keyboard.press("Tab")
    for _ in range(12):
        await site.page.keyboard.press("Tab")
        outline = await site.page.evaluate(
            "(() => { const s = getComputedStyle(document.activeElement); return [s.outlineStyle, s.outlineWidth]; })()"
        )
        assert outline == ["solid", "2px"], await site.page.evaluate("document.activeElement.outerHTML")


async def test_a_screen_reader_hears_states_and_not_every_token(site: Site) -> None:
    assert await site.page.locator("[aria-live], [role=status], [role=alert], [role=log]").count() == 1
    site.served.answer_with(parts=ROUNDS)
    await site.ask()
    await site.ends()
    await site.page.wait_for_function("() => document.getElementById('status').textContent === 'answer complete, 6 tokens.'")


async def test_the_theme_follows_the_system_until_somebody_chooses(browser: Browser, folder: Path) -> None:
    async with visit(browser, folder, color_scheme="dark") as site:
        back = "() => getComputedStyle(document.body).backgroundColor"
        await site.open()
        dark = await site.page.evaluate(back)
        await site.page.click("text=Theme: auto")
        light = await site.page.evaluate(back)
        assert dark != light
        await site.page.reload()
        assert await site.page.inner_text("#theme") == "Theme: light"
        assert await site.page.evaluate(back) == light
        await site.page.emulate_media(color_scheme="light")
        await site.page.click("#theme")
        assert await site.page.evaluate(back) == dark


async def test_on_a_phone_the_settings_open_and_close(browser: Browser, folder: Path) -> None:
    async with visit(browser, folder, **SCREENS["phone"]) as site:
        page = site.page
        await site.open()
        toggle = page.locator("#panel-toggle")
        assert not await page.is_visible("#panel")
        await toggle.tap()
        assert await page.is_visible("#panel")
        assert await toggle.get_attribute("aria-expanded") == "true"
        await page.get_by_label("Max tokens").fill("0")
        await page.click("text=Back to the conversation")
        assert await page.evaluate("document.activeElement.id") == "panel-toggle"
        await site.ask()
        assert await page.is_visible("#panel"), "a setting that cannot be sent is shown"
        await page.get_by_label("Max tokens").fill("6")
        await page.keyboard.press("Escape")
        assert not await page.is_visible("#panel")
        await page.click("#send")
        answer = await site.ends()
        await answer.locator(".token").nth(2).tap()
        assert await page.is_visible("#inspector"), "a tap says what a pointer's rest does"
        await page.locator("#talk").tap(position={"x": 5, "y": 5})
        assert not await page.is_visible("#inspector")


async def test_the_first_paint_comes_within_a_second(browser: Browser, folder: Path) -> None:
    async with visit(browser, folder) as site:
        await site.open()  # the first load of a fresh tab: nothing is cached
        paint = await site.page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
        assert paint < 1000
        await site.page.wait_for_function("() => document.querySelectorAll('.controls').length === 1")
