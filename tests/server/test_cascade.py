"""Rules over HTTP: what a request may ask for, what it is told, and that what it gets has the rule's law."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.client import ThreadClient
from engine.config import FixedLengthConfig
from engine.dials import DIALS
from engine.request import Round, SamplingParams
from server.app import create_app
from server.settings import Deployment
from server.text import TextTokenizer
from tests.fakes import Part
from tests.reference import NaiveModel, Pair, Row, pi_of, processed, softmax
from tests.server.conftest import Served, chunks_of, listen, serve
from tests.tiny import Setup, drafter_model, make_core, target_model
from tests.verify.requests import RULES

CASCADES = [entry for entry in RULES if entry[0] in DIALS and entry[0] != "exact"]


def deployment(**speculation: Any) -> Deployment:
    return Deployment.model_validate(
        {
            "model": {"name": "tiny", "target": {"source": "anywhere"}, "drafter": {"kind": "model", "source": "anywhere"}},
            "speculation": {
                "rule": "token_v3",
                "alpha": 0.3,
                "presets": {"exact": {"rule": "exact"}, "fast": {"alpha": 0.6}, "sure": {"rule": "chow"}},
                **speculation,
            },
            "server": {"max_queued_requests": 300},
        }
    )


@pytest.fixture
async def served(folder: Path) -> AsyncIterator[Served]:
    async with serve(folder, deployment(), rules=tuple(DIALS)) as it:
        yield it


# ---------------------------------------------------------------------- who judges
@pytest.mark.parametrize(
    ("model", "own", "rule", "alpha"),
    [
        ("tiny", None, "token_v3", 0.3),
        ("tiny:exact", None, "exact", 0.0),
        ("tiny:fast", None, "token_v3", 0.6),
        ("tiny:sure", None, "chow", DIALS["chow"].default),
        ("tiny", {"alpha": 0.1}, "token_v3", 0.1),
        ("tiny", {"alpha": 1}, "token_v3", 1.0),
        ("tiny", {"rule": "opt"}, "opt", DIALS["opt"].default),
        ("tiny", {"rule": "opt", "alpha": -7.5}, "opt", -7.5),
        ("tiny:fast", {"rule": "exact"}, "exact", 0.0),
        ("tiny:fast", {"rule": "token_v3"}, "token_v3", 0.6),
    ],
)
async def test_the_request_wins_over_the_preset_and_the_preset_over_the_deployment(
    served: Served, model: str, own: dict[str, Any] | None, rule: str, alpha: float
) -> None:
    answer = (await served.chat(model=model, speculation=own)).json()
    asked = served.engine.requests[-1].speculation
    assert (asked.rule, asked.alpha) == (rule, alpha)
    assert (answer["metrics"]["cascade"]["rule"], answer["metrics"]["cascade"]["alpha"]) == (rule, alpha)


@pytest.mark.parametrize(
    ("own", "param", "said"),
    [
        ({"alpha": 1.1}, "speculation.alpha", "alpha is 1.1 and must be at most 1 for the rule token_v3"),
        ({"rule": "exact", "alpha": 0.2}, "speculation.alpha", "must be left out for the rule exact"),
        ({"rule": "lossy", "alpha": -0.1}, "speculation.alpha", "must be at least 0"),
        ({"rule": "best"}, "speculation.rule", "'exact', 'lossy', 'chow'"),
        ({"alpha": "much"}, "speculation.alpha", "number"),
    ],
)
async def test_what_a_rule_cannot_take_names_the_bound(served: Served, own: dict[str, Any], param: str, said: str) -> None:
    response = await served.chat(speculation=own)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert said in error["message"]


async def test_a_deployment_bounds_what_requests_ask_for(folder: Path) -> None:
    bounds = deployment(allow_rules=["exact", "opt"], max_alpha={"token_v3": 0.4, "opt": 0.05})
    async with serve(folder, bounds, rules=tuple(DIALS)) as served:
        refused = (await served.chat(speculation={"rule": "lossy"})).json()["error"]
        assert (refused["param"], refused["message"]) == (
            "speculation.rule",
            "The rule lossy is not allowed here; a request may ask for exact, opt.",
        )
        refused = (await served.chat(speculation={"alpha": 0.5})).json()["error"]
        assert refused["message"] == "alpha is 0.5 and must be at most 0.4 for the rule token_v3."
        assert (await served.chat(speculation={"rule": "opt"})).json()["metrics"]["cascade"]["alpha"] == 0.05
        assert (await served.chat(model="tiny:fast")).json()["metrics"]["cascade"]["alpha"] == 0.6, "presets are the deployer's own"


async def test_a_drafter_without_probabilities_refuses_rules_that_read_them(folder: Path) -> None:
    able = tuple(rule for rule, dial in DIALS.items() if not dial.needs_q)
    async with serve(folder, rules=able) as served:
        error = (await served.chat(speculation={"rule": "chow"})).json()["error"]
        assert "reads the drafter's probabilities, and this drafter has none" in error["message"]
        assert (await served.chat(speculation={"rule": "token_v2"})).status_code == 200


# ---------------------------------------------------------------------- who wrote it
async def test_provenance_is_there_when_asked_for(served: Served) -> None:
    parts = [Part((10,)), Part((11, 12, 13), Round(3, 2, 0b100, 0b10), drafted_mask=0b011), Part((14, 15), drafted_mask=0b10)]
    served.answer_with(parts=parts)
    whole = (await served.complete(speculation={"provenance": True})).json()["choices"][0]
    assert [token["token_id"] for token in whole["provenance"]] == [10, 11, 12, 13, 14, 15]
    assert [token["by"] for token in whole["provenance"]] == ["target", "drafter", "drafter", "target", "target", "drafter"]
    assert [token["lossy"] for token in whole["provenance"]] == [False, False, True, False, False, False]
    assert "".join(token["text"] for token in whole["provenance"]) == whole["text"]
    for shape, path in (("chat", served.chat), ("completions", served.complete)):
        chunks = chunks_of(await path(stream=True, speculation={"provenance": True}))
        streamed = [token for chunk in chunks for choice in chunk["choices"] for token in choice.get("provenance", [])]
        assert streamed == whole["provenance"], shape
    plain = (await served.chat()).json()["choices"][0]
    assert "provenance" not in plain


async def test_tokens_behind_a_stop_string_have_no_provenance(served: Served, tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode("xyz!x")
    served.answer_with(parts=[Part(tuple(ids), drafted_mask=0b1111)], at_once=True)
    choice = (await served.complete(stop="y", speculation={"provenance": True})).json()["choices"][0]
    assert [token["token_id"] for token in choice["provenance"]] == list(ids[:2])


# ---------------------------------------------------------------------- what it gets
@pytest.mark.parametrize(("rule", "alpha"), CASCADES)
async def test_two_tokens_have_the_law_of_their_rule(rule: str, alpha: float, folder: Path) -> None:
    """Chi-square over a socket, at fixed seeds, against the product of pi's of the two models' own rows."""
    head, num_requests, num_choices = [1, 2, 3, 1, 2], 32, 128
    setup = Setup(vocab=300, path=folder, policy=FixedLengthConfig(max=1), num_blocks=800, max_sequences=128, max_step_tokens=1000)
    client = ThreadClient(lambda: make_core(setup), 300)
    seen: Counter[tuple[int, ...]] = Counter()
    body = {"model": "tiny", "prompt": head, "max_tokens": 2, "temperature": 1, "top_k": 4, "n": num_choices}
    own = {"rule": rule, "alpha": alpha, "provenance": True}
    async with listen(create_app(client, deployment())) as (_, url), httpx.AsyncClient(base_url=url, timeout=60) as http:
        for seed in range(num_requests):
            response = await http.post("/v1/completions", json=body | {"seed": seed, "speculation": own})
            seen.update(tuple(token["token_id"] for token in choice["provenance"]) for choice in response.json()["choices"])
    target, drafter = NaiveModel(target_model(vocab=300)), NaiveModel(drafter_model(vocab=300))
    sampling = SamplingParams(max_tokens=2, temperature=1.0, top_k=4)

    def pi(text: list[int]) -> Row:
        q, p = drafter.logits(text), target.logits(text)
        return pi_of(rule, alpha, Pair(softmax(q), softmax(p), processed(q, sampling), processed(p, sampling)))

    num = num_requests * num_choices
    expected = {(x, y): num * a * b for x, a in enumerate(pi(head)) if a for y, b in enumerate(pi([*head, x])) if b}
    assert seen.keys() <= expected.keys()
    common = {text: e for text, e in expected.items() if e >= 5}
    chi2 = sum((seen[text] - e) ** 2 / e for text, e in common.items())
    assert len(common) >= 4
    assert chi2 < len(common) + 4.5 * (2 * len(common)) ** 0.5  # exceeded by chance about once in 100,000
