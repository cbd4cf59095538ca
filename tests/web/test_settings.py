"""The page's settings: what they send, what they refuse, the comparison of two of them, and copying."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser

from engine.client import Stream
from engine.dials import DIALS
from engine.request import Request, Round, SpeculationParams
from server.settings import Deployment
from server.text import TextTokenizer
from tests.fakes import Part, Script, make_info
from tests.web.conftest import Site, tokens_of, visit

pytestmark = pytest.mark.asyncio(loop_scope="session")


def deployment() -> Deployment:
    presets = {"fast": {"rule": "opt", "alpha": 0.1}, "plain": {"enabled": False}, "short": {"max_draft": 2}}
    return Deployment.model_validate(
        {
            "model": {"name": "tiny", "target": {"source": "anywhere"}, "drafter": {"kind": "model", "source": "anywhere"}},
            "speculation": {"rule": "token_v3", "presets": presets, "max_alpha": {"token_v3": 0.5}},
            "server": {"api_keys": ["secret"]},
        }
    )


@pytest_asyncio.fixture(loop_scope="session")
async def site(browser: Browser, folder: Path) -> AsyncIterator[Site]:
    permissions = ["clipboard-read", "clipboard-write"]
    async with visit(browser, folder, deployment(), permissions=permissions) as it:
        it.served.engine.given_info = make_info(str(folder), end_token_ids=(2,), rules=tuple(DIALS), max_draft=8)
        await it.page.add_init_script("sessionStorage.setItem('cascade-api-key', 'secret')")
        await it.open()
        yield it


def asked(site: Site) -> SpeculationParams:
    return site.served.engine.requests[-1].speculation


async def choose(site: Site, label: str, value: str) -> None:
    field = site.page.get_by_label(label, exact=True)
    if await field.evaluate("field => field.tagName") == "SELECT":
        await field.select_option(value)
    else:
        await field.fill(value)


async def test_what_nobody_touched_is_left_to_the_preset(site: Site) -> None:
    for preset, expected in {
        "tiny": SpeculationParams(rule="token_v3", alpha=0.2),
        "tiny:fast": SpeculationParams(rule="opt", alpha=0.1),
        "tiny:plain": SpeculationParams(enabled=False, rule="token_v3", alpha=0.2),
        "tiny:short": SpeculationParams(rule="token_v3", alpha=0.2, max_draft=2),
    }.items():
        await choose(site, "Preset", preset)
        await site.page.click("#fresh")
        await site.ask()
        await site.ends()
        assert asked(site) == expected


async def test_every_setting_is_sent(site: Site) -> None:
    await choose(site, "Preset", "tiny:plain")
    await site.page.get_by_label("Draft ahead").check()
    await choose(site, "Rule", "lossy")
    await choose(site, "Alpha", "0.35")
    await choose(site, "Drafts at a time, at most", "3")
    await choose(site, "Temperature", "0.7")
    await choose(site, "Seed", "42")
    await choose(site, "Max tokens", "5")
    await site.ask()
    answer = await site.ends()
    assert asked(site) == SpeculationParams(enabled=True, rule="lossy", alpha=0.35, max_draft=3)
    sampling = site.served.engine.requests[-1].sampling
    assert (sampling.temperature, sampling.seed, sampling.is_seeded, sampling.max_tokens) == (0.7, 42, True, 5)
    assert await answer.locator("h2").inner_text() == "tiny:plain · lossy 0.35, up to 3 drafts · temperature 0.7"


async def test_another_preset_undoes_what_was_set_for_drafting(site: Site) -> None:
    await site.page.get_by_label("Draft ahead").uncheck()
    await choose(site, "Preset", "tiny:fast")
    assert await sent(site) == {"provenance": True}
    await choose(site, "Rule", "lossy")
    await choose(site, "Alpha", "0.4")
    await choose(site, "Rule", "bild")
    assert await sent(site) == {"provenance": True, "rule": "bild"}, "nor does another rule keep the alpha"


async def sent(site: Site) -> Any:
    """What the page's next request says of drafting."""
    async with site.page.expect_request("**/v1/chat/completions") as request:
        await site.ask()
    await site.page.wait_for_selector("#send:visible")
    return json.loads((await request.value).post_data or "")["speculation"]


async def test_the_slider_and_the_number_are_one_dial(site: Site) -> None:
    slider = site.page.get_by_label("Alpha, as a slider")
    assert [await slider.get_attribute(name) for name in ("min", "max")] == ["-1", "0.5"], "the deployment's bound"
    await slider.fill("-0.4")
    assert await site.page.get_by_label("Alpha", exact=True).input_value() == "-0.4"
    await site.ask()
    await site.ends()
    assert asked(site).alpha == -0.4
    await choose(site, "Rule", "exact")
    assert not await slider.is_visible(), "exact has no dial"


async def test_a_value_out_of_bounds_is_not_sent(site: Site) -> None:
    await choose(site, "Alpha", "0.6")
    await site.ask("a question")
    assert await site.page.locator(".turn").count() == 0
    assert await site.page.input_value("#prompt") == "a question", "nothing that was typed is lost"
    assert await site.page.evaluate("document.activeElement.dataset.name") == "Alpha"
    await choose(site, "Alpha", "0.5")
    await site.page.press("#prompt", "Enter")
    await site.ends()


# ---------------------------------------------------------------------- A and B
def scripted(site: Site, tokenizer: TextTokenizer, with_drafts: str, without: str, delay: float = 0.0) -> None:
    """Answers that depend on whether something is drafted."""
    engine = site.served.engine
    submit = engine.submit

    def submit_scripted(request: Request) -> Stream:
        ids = tuple(tokenizer.encode(with_drafts if request.speculation.enabled else without))
        parts = [Part(ids[i : i + 2], Round(2, 1), i + 1, drafted_mask=0b01) for i in range(0, len(ids), 2)]
        engine.script = Script(parts=parts, delay=delay)
        return submit(request)

    engine.submit = submit_scripted  # type: ignore[assignment, method-assign]


async def compare(site: Site) -> None:
    await site.page.click("#compare")
    await site.page.get_by_label("Preset (B)").select_option("tiny:plain")


async def test_two_settings_answer_side_by_side_and_the_parting_is_marked(site: Site, tokenizer: TextTokenizer) -> None:
    scripted(site, tokenizer, "the quick brown fox", "the quick dog")
    await site.ask("before")
    await site.ends()
    await compare(site)
    await site.ask("hello")
    a, b = await site.ends(side="A"), await site.ends(side="B")
    await site.page.wait_for_selector("#send:visible")
    tokens = [[text for text, _ in await tokens_of(answer)] for answer in (a, b)]
    assert ["".join(text) for text in tokens] == ["the quick brown fox", "the quick dog"]
    for answer, texts in zip((a, b), tokens, strict=True):
        before = await answer.locator(".parting").evaluate("mark => mark.previousElementSibling.textContent")
        num = next(i for i in range(len(texts)) if tokens[0][i] != tokens[1][i])
        assert before == texts[num - 1]
    assert "The texts part after" in await site.page.inner_text(".verdict")
    assert "The texts part after" in await site.page.inner_text("#status")
    tops = [await answer.evaluate("answer => answer.getBoundingClientRect().top") for answer in (a, b)]
    assert tops[0] == tops[1], "side by side"
    requests = site.served.engine.requests[-2:]
    assert [request.speculation.enabled for request in requests] == [True, False]
    assert requests[0].prompt_ids == requests[1].prompt_ids == tuple(tokenizer.encode_chat([{"role": "user", "content": "hello"}]))
    assert (await site.figures(0))["perCall"] != (await site.figures(1))["perCall"]


async def test_equal_texts_are_said_to_be_equal(site: Site, tokenizer: TextTokenizer) -> None:
    scripted(site, tokenizer, "the quick", "the quick")
    await compare(site)
    await site.ask()
    await site.ends(side="B")
    await site.page.wait_for_selector("#send:visible")
    assert await site.page.inner_text(".verdict") == "The two texts are the same."
    assert await site.page.locator(".parting").count() == 0


async def test_a_text_that_only_goes_on_parts_where_the_other_ends(site: Site, tokenizer: TextTokenizer) -> None:
    scripted(site, tokenizer, "the quick", "the quick brown")
    await compare(site)
    await site.ask()
    await site.ends(side="B")
    await site.page.wait_for_selector("#send:visible")
    assert await site.page.locator("[data-side=A] .text > :last-child").get_attribute("class") == "parting"
    await site.page.click("text=Regenerate")
    await site.ends(side="B")
    assert await site.page.locator(".turn").count() == 1


async def test_b_waits_for_a_unless_both_are_to_run(site: Site, tokenizer: TextTokenizer) -> None:
    scripted(site, tokenizer, "the quick brown fox", "the quick brown fox", delay=0.1)
    await compare(site)
    await site.ask()
    await site.ends("streaming", side="A")
    assert await site.page.locator(".answer[data-side=B]").get_attribute("data-state") == "waiting"
    await site.page.keyboard.press("Escape")
    await site.ends("stopped", side="A")
    await site.page.wait_for_selector("#send:visible")
    assert await site.page.locator(".answer[data-side=B]").get_attribute("data-state") == "waiting", "it is not begun after a stop"
    await site.page.check("#together")
    num = len(site.served.engine.requests)
    await site.ask()
    await site.ends("streaming", side="A")
    await site.ends("streaming", side="B")
    assert len(site.served.engine.requests) == num + 2
    await site.ends(side="A")
    await site.ends(side="B")


async def test_side_a_keeps_what_was_set(site: Site) -> None:
    await choose(site, "Preset", "tiny:short")
    await choose(site, "Rule", "bild")
    await choose(site, "Alpha", "0.15")
    await choose(site, "Temperature", "0.5")
    await site.page.click("#compare")
    assert await site.page.get_by_label("Rule (A)").input_value() == "bild"
    assert await site.page.get_by_label("Alpha (A)", exact=True).input_value() == "0.15"
    await site.page.click("#compare")
    await site.ask()
    await site.ends()
    assert asked(site) == SpeculationParams(rule="bild", alpha=0.15, max_draft=2)
    assert site.served.engine.requests[-1].sampling.temperature == 0.5


# ---------------------------------------------------------------------- copying, looking
async def test_the_command_that_is_copied_does_the_same(site: Site) -> None:
    await choose(site, "Rule", "opt")
    await site.ask('It\'s "two"\\n $HOME `id`')
    await site.ends()
    await site.page.click("text=Copy as curl")
    await site.page.wait_for_function("() => document.getElementById('status').textContent === 'Command copied.'")
    command: str = await site.page.evaluate("navigator.clipboard.readText()")
    assert "secret" not in command
    process = await asyncio.create_subprocess_exec(
        "bash", "-c", f"{command} --silent", env={"OPENAI_API_KEY": "secret", "PATH": "/usr/bin:/bin"}, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await asyncio.wait_for(process.communicate(), 20)
    assert output.endswith(b"data: [DONE]\n\n")
    asked_by_page, asked_by_curl = (
        (request.prompt_ids, request.speculation, request.sampling.temperature) for request in site.served.engine.requests[-2:]
    )
    assert asked_by_page == asked_by_curl


async def test_where_there_is_no_clipboard_a_field_is_shown(site: Site) -> None:
    await site.ask()
    await site.ends()
    await site.page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error('no')); }")
    await site.page.click("text=Copy as curl")
    await site.page.wait_for_selector("#copy-dialog[open]")
    body = (await site.page.input_value("#copy-text")).split("-d '")[1].removesuffix("'")
    assert json.loads(body)["messages"] == [{"role": "user", "content": "hello"}]


async def test_probabilities_are_shown_for_who_asks(site: Site, tokenizer: TextTokenizer) -> None:
    site.served.answer_with(parts=[Part(tuple(tokenizer.encode("the quick")), Round(3, 1), drafted_mask=1)])
    await site.ask()
    answer = await site.ends()
    assert [request.sampling.num_logprobs for request in site.served.engine.requests] == [None]
    await answer.locator(".token").first.hover()
    assert "Drafter, accepted" in await site.page.inner_text("#inspector")
    assert await site.page.locator("#inspector tr").count() == 0
    await site.page.check("#probabilities")
    await site.ask()
    await site.page.wait_for_selector(".turn:nth-of-type(3) [data-state=done]")
    assert [request.sampling.num_logprobs for request in site.served.engine.requests] == [None, 5]
    text = (await site.ends()).locator(".text")
    await text.focus()
    await site.page.keyboard.press("ArrowRight")
    await site.page.keyboard.press("ArrowRight")
    assert await site.page.locator("#inspector tr").count() == 6, "the token's own and five others"
    said = await site.page.inner_text("#status")
    assert "Target, after a rejection, < 0.1 %" in said
    await site.page.keyboard.press("Escape")
    assert await site.page.is_hidden("#inspector")
