"""One conversation on the page: what is shown of an answer, that it can be stopped and asked again, and what happens to errors."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser

from engine.errors import QueueFull
from engine.request import FinishReason, Round
from server.app import create_app
from server.text import TextTokenizer
from tests.fakes import FakeEngine, Part, make_info
from tests.server.conftest import Served, listen, make_deployment, until
from tests.web.conftest import Site, tokens_of, visit

pytestmark = pytest.mark.asyncio(loop_scope="session")

ROUNDS = [
    Part((10,), num_target_calls=1),
    Part((11, 12, 13), Round(4, 2, 0, 0b10), num_target_calls=2, drafted_mask=0b011),
    Part((14, 15, 16), Round(2, 2), num_target_calls=3, drafted_mask=0b011),
    Part((17, 18), Round(2, 1), num_target_calls=4, drafted_mask=0b01),
]
KINDS = ["plain", "accepted", "lossy", "recovered", "accepted", "accepted", "bonus", "accepted", "recovered"]


async def test_an_answer_streams_and_its_colours_are_the_apis_provenance(site: Site) -> None:
    site.served.answer_with(parts=ROUNDS, delay=0.3)
    await site.ask()
    streaming = await site.ends("streaming")
    await streaming.locator(".token").nth(1).wait_for()
    assert await streaming.get_attribute("data-state") == "streaming", "tokens are shown before the answer is complete"
    shown = await tokens_of(await site.ends())
    told = (await site.served.chat(speculation={"provenance": True})).json()["choices"][0]["provenance"]
    assert [text for text, _ in shown] == [token["text"] for token in told]
    assert [kind for _, kind in shown] == KINDS
    assert [("drafter" if kind in ("accepted", "lossy") else "target") for _, kind in shown] == [token["by"] for token in told]
    assert [kind == "lossy" for _, kind in shown] == [token["lossy"] for token in told]


async def test_kinds_differ_in_more_than_colour(site: Site) -> None:
    styles: dict[str, list[str]] = await site.page.evaluate(
        """() => Object.fromEntries([...document.querySelectorAll(".legend .token")].map((token) => {
            const { textDecorationLine, textDecorationStyle, backgroundColor } = getComputedStyle(token);
            return [token.classList[2], [`${textDecorationLine} ${textDecorationStyle}`, backgroundColor]];
        }))"""
    )
    assert set(styles) == set(KINDS)
    assert len({underline for underline, _ in styles.values()}) == 5
    assert len({back for _, back in styles.values()}) == 5


async def test_the_strip_counts_while_an_answer_streams(site: Site) -> None:
    site.served.answer_with(parts=[Part((11, 12, 13), Round(4, 2), drafted_mask=0b011)], delay=0.02, endless=True)
    await site.ask()
    await site.page.wait_for_function("() => document.querySelectorAll('.text .token').length > 20")
    figures = await site.figures()
    assert (figures["acceptance"], figures["perCall"]) == ("50 %", "3.00")
    assert float(figures["perSecond"]) > 1
    assert re.fullmatch(r"\d+ ms|[\d.]+ s", figures["firstToken"])
    await site.page.click("#stop")
    await site.ends("stopped")


async def test_at_the_end_the_strip_has_the_servers_own_numbers(site: Site) -> None:
    site.served.answer_with(parts=[*ROUNDS, Part((19, 20), Round(7, 1), num_target_calls=8, drafted_mask=0b01)])
    await site.ask()
    await site.ends()
    figures = await site.figures()
    assert (figures["acceptance"], figures["perCall"]) == ("40 %", "1.38"), "6 of 15 drafts; 11 tokens in 8 calls"


@pytest.mark.parametrize("means", ["button", "key"])
async def test_stop_ends_the_answer_at_the_engine_and_keeps_what_came(site: Site, means: str) -> None:
    site.served.answer_with(parts=ROUNDS, delay=0.02, endless=True)
    await site.ask()
    await site.page.locator(".text .token").nth(3).wait_for()
    await (site.page.click("#stop") if means == "button" else site.page.keyboard.press("Escape"))
    answer = await site.ends("stopped")
    await until(lambda: site.served.engine.aborted)
    assert len(await tokens_of(answer)) > 3
    assert "Stopped." in await answer.inner_text()
    assert await site.page.inner_text("#status") == f"stopped, {len(await tokens_of(answer))} tokens."
    site.served.answer_with(parts=ROUNDS)
    await site.ask("again")
    await site.ends()


def asked(site: Site, tokenizer: TextTokenizer) -> str:
    """The latest prompt, without its special tokens."""
    return re.sub(r"<\|im_\w+\|>", "", tokenizer.text_of(site.served.engine.requests[-1].prompt_ids))


async def test_the_conversation_goes_along(site: Site, tokenizer: TextTokenizer) -> None:
    site.served.answer_with(parts=[Part(tuple(tokenizer.encode("hello world")))])
    await site.ask("the quick")
    await site.ends()
    await site.ask("brown fox")
    await site.page.wait_for_selector(".turn:nth-of-type(3) [data-state=done]")
    prompt = asked(site, tokenizer)
    assert prompt == "user\nthe quick\nassistant\nhello world\nuser\nbrown fox\nassistant\n"
    await site.page.click("text=Regenerate")
    await site.ends()
    assert asked(site, tokenizer) == prompt, "the same question, not one more"
    assert await site.page.locator(".turn").count() == 2
    await site.page.click("#fresh")
    assert await site.page.locator(".turn").count() == 0
    await site.ask("hello")
    await site.ends()
    assert asked(site, tokenizer) == "user\nhello\nassistant\n"


async def test_a_new_chat_forgets_an_answer_that_was_running(site: Site, tokenizer: TextTokenizer) -> None:
    site.served.answer_with(parts=ROUNDS, delay=0.02, endless=True)
    await site.ask("the quick")
    await site.page.locator(".text .token").nth(3).wait_for()
    await site.page.click("#fresh")
    await site.page.wait_for_selector("#send:visible")
    site.served.answer_with(parts=ROUNDS)
    await site.ask("hello")
    await site.ends()
    assert asked(site, tokenizer) == "user\nhello\nassistant\n"


# ---------------------------------------------------------------------- what goes wrong
async def test_a_refusal_is_shown_and_the_page_goes_on(site: Site) -> None:
    site.expected = "status of 503"
    site.served.answer_with(refusal=QueueFull(4, 4))
    await site.ask()
    answer = await site.ends("failed")
    message = str(site.served.engine.script.refusal)
    assert await answer.get_by_role("alert").inner_text() == message
    site.served.answer_with(parts=ROUNDS)
    await site.ask()
    await site.ends()


async def test_an_answer_that_breaks_off_keeps_its_beginning_and_says_why(site: Site) -> None:
    site.served.answer_with(parts=ROUNDS, dies_after=2)
    await site.ask()
    answer = await site.ends("failed")
    assert await answer.get_by_role("alert").inner_text() == "The engine stopped at an internal error."
    assert len(await tokens_of(answer)) == 4


async def test_a_server_that_went_away_is_said(browser: Browser, folder: Path) -> None:
    async with visit(browser, folder) as site:
        site.expected = "ERR_FAILED"
        await site.open()
        await site.page.route("**/v1/chat/completions", lambda route: route.abort())
        await site.ask()
        assert await (await site.ends("failed")).get_by_role("alert").inner_text() == "The server cannot be reached."


async def test_text_is_never_html(site: Site, tokenizer: TextTokenizer) -> None:
    evil = '<img src=x onerror="alert(1)"><script>alert(2)</script>'
    site.served.answer_with(parts=[Part(tuple(tokenizer.encode(evil)))])
    await site.ask(evil)
    answer = await site.ends()
    assert await answer.locator(".text").inner_text() == evil
    assert await site.page.inner_text(".asked") == evil
    assert await site.page.locator("main img, main script").count() == 0


async def test_half_a_character_at_the_end_is_not_lost(site: Site, tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode("ab€")
    site.served.answer_with(parts=[Part((token,)) for token in ids[:-1]], finish=FinishReason.LENGTH)
    await site.ask()
    assert await (await site.ends()).locator(".text").inner_text() == "ab�"


async def test_a_key_is_asked_for_and_kept_for_the_tab(browser: Browser, folder: Path) -> None:
    async with visit(browser, folder, make_deployment(api_keys=["secret"])) as site:
        site.expected = "status of 401"
        page = site.page
        await page.goto(site.url)
        await page.wait_for_selector("#key-dialog[open]")
        assert "API key" in await page.inner_text("#key-reason")
        await page.fill("#key-input", "wrong")
        await page.press("#key-input", "Enter")
        await page.wait_for_selector("#key-dialog[open]")
        await page.fill("#key-input", "secret")
        await page.click("text=Use it")
        await page.wait_for_selector("#send:enabled")
        await site.ask()
        await site.ends()
        await page.reload()
        await page.wait_for_selector("#send:enabled")
        assert await page.evaluate("Object.keys(localStorage).length") == 0
        await page.click("#key")
        await page.click("text=Forget it")
        await page.wait_for_selector("#key-dialog[open]")


async def test_a_key_that_no_longer_counts_is_asked_for_again(site: Site) -> None:
    site.expected = "status of 401"
    body = '{"error": {"message": "Incorrect API key.", "type": "invalid_request_error", "param": null, "code": "invalid_api_key"}}'
    await site.page.route("**/v1/chat/completions", lambda route: route.fulfill(status=401, body=body))
    await site.ask()
    await site.ends("failed")
    assert await site.page.inner_text("#key-dialog[open] #key-reason") == "Incorrect API key."


async def test_it_waits_for_a_model_that_is_being_loaded(browser: Browser, folder: Path) -> None:
    loaded = asyncio.Event()

    class Slow(FakeEngine):
        async def start(self) -> None:
            await loaded.wait()
            await super().start()

    engine = Slow(make_info(str(folder), end_token_ids=(2,)))
    app = create_app(engine, make_deployment(), waits_for_engine=False)
    async with listen(app) as (_, url), await browser.new_page() as page:
        await page.goto(url)
        await page.wait_for_function("() => document.getElementById('served').textContent === 'The model is being loaded.'")
        assert await page.is_disabled("#send")
        loaded.set()
        await page.wait_for_selector("#send:enabled", timeout=10_000)
        assert await page.inner_text("#served") == "tiny-target, drafted by tiny drafter"


async def test_it_works_behind_a_prefix(browser: Browser, served: Served) -> None:
    """A proxy that takes a prefix off, as most do."""

    async def proxied(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            assert scope["path"].startswith("/some/where/"), "the page asked outside of its prefix"
            scope = scope | {"path": scope["path"].removeprefix("/some/where")}
            await served.app(scope, receive, send)
            return
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})

    served.answer_with(parts=ROUNDS)
    async with listen(proxied) as (_, url), await browser.new_page() as page:  # type: ignore[arg-type]  # any ASGI application
        await page.goto(f"{url}/some/where/")
        await page.wait_for_selector("#send:enabled")
        await page.fill("#prompt", "hello")
        await page.press("#prompt", "Enter")
        await page.wait_for_selector("[data-state=done]")
