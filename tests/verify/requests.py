"""Requests for the tests of equal text: shared prefixes, every rule, both temperatures, truncation, biases, penalties, stop tokens, and
`enabled: false`."""

from __future__ import annotations

import random
from typing import Any

import msgspec
from llguidance import LLMatcher

from engine.request import Request, SamplingParams, SpeculationParams
from tests.reference import Change, answer, ruled, unchanged
from tests.tiny import END, VOCAB, naive_target

_rng = random.Random(7)
HEAD = tuple(_rng.randrange(VOCAB) for _ in range(9))
SAMPLING = (
    SamplingParams(max_tokens=1, temperature=0.0),
    SamplingParams(max_tokens=1, temperature=1.0),
    SamplingParams(max_tokens=1, temperature=0.7, top_k=5, top_p=0.9),
    SamplingParams(max_tokens=1, temperature=1.3, min_p=0.1),
)
# alphas at which the tiny pair is kept at some positions and deferred at others
RULES = (
    ("exact", 0.0),
    ("keep_none", 0.0),
    ("keep_all", 0.0),
    ("lossy", 0.5),
    ("chow", 0.7),
    ("diff", 0.02),
    ("opt", 0.3),
    ("token_v1", 0.1),
    ("token_v2", 0.1),
    ("token_v3", 0.5),
    ("chow_log", 1.8),
    ("diff_log", -0.1),
    ("bild", 0.3),
)


# over the letters of the tiny vocabulary: places where anything goes, where little does, and where one token alone does
PATTERNS = ("([a-k]{2}lm)*n", "a?(b|c[d-w]+)efg.*", "[a-w]*", "([a-w]{3}|b+c)(hij|k)*")


def prompt(i: int) -> tuple[int, ...]:
    """A prompt of 6 to 13 tokens; all share a head, some share more than a block."""
    rng = random.Random(i)
    return HEAD[: 5 + i % 5] + tuple(rng.randrange(VOCAB) for _ in range(1 + i % 4))


def wishes(i: int, every: int) -> dict[str, Any]:
    """What changes logits, in turn for each request of which `i` is a multiple of `every`."""
    kinds: tuple[dict[str, Any], ...] = (
        {"frequency_penalty": 0.6, "presence_penalty": -0.3},
        {"repetition_penalty": 1.4},
        {"logit_bias": {1: 1.5, 3: -100.0, 7: 1.0}},
        {"repetition_penalty": 0.8, "presence_penalty": 0.5, "logit_bias": {2: 0.7}},
    )
    return {"min_tokens": 4 * (i % 2), **(kinds[i // every % 4] if i % every == 0 else {})}


def greedy(num: int) -> list[Request]:
    """Greedy exact requests, unseeded; every third is `enabled: false`, every fourth can stop early."""
    return [
        Request(
            id=f"r{i}",
            prompt_ids=prompt(i),
            sampling=SamplingParams(
                max_tokens=6 + i % 7, temperature=0.0, stop_token_ids=(3, 5) if i % 4 == 3 else (), **wishes(i, every=2)
            ),
            speculation=SpeculationParams(enabled=i % 3 != 2),
        )
        for i in range(num)
    ]


def seeded() -> list[Request]:
    """Every rule greedy and in one way of sampling, exact and speculation switched off in all ways; all seeded."""
    kinds = [(rule, True, base) for i, rule in enumerate(RULES[1:]) for base in (SAMPLING[0], SAMPLING[1 + i % 3])]
    kinds += [(RULES[0], enabled, base) for base in SAMPLING for enabled in (True, False)]
    return [
        Request(
            id=f"s{i}",
            prompt_ids=prompt(i),
            sampling=SamplingParams(
                max_tokens=6 + i % 8,
                temperature=base.temperature,
                top_k=base.top_k,
                top_p=base.top_p,
                min_p=base.min_p,
                seed=i // 3 - 2,
                is_seeded=True,
                stop_token_ids=(7,) if i % 5 == 4 else (),
                **wishes(i, every=3),
            ),
            speculation=SpeculationParams(rule=rule, alpha=alpha, enabled=enabled, max_draft=2 if i % 7 == 6 else None),
        )
        for i, ((rule, alpha), enabled, base) in enumerate(kinds)
    ]


def guided(requests: list[Request]) -> list[Request]:
    """Half of the requests with a grammar, or with a prediction that is right but for a few tokens, or with both."""
    return [_guided(i // 2, request) if i % 2 else request for i, request in enumerate(requests)]


def mask_of(request: Request) -> Change:
    """What the grammar of a guided request leaves of a row, for the oracle."""
    return unchanged if request.grammar is None else ruled(_pattern_of[request.grammar], request, END)


_pattern_of = {LLMatcher.grammar_from_regex(pattern): pattern for pattern in PATTERNS}


def _guided(i: int, request: Request) -> Request:
    if i % 3:
        sampling = msgspec.structs.replace(request.sampling, min_tokens=0, stop_token_ids=(*request.sampling.stop_token_ids, END))
        request = msgspec.structs.replace(request, grammar=list(_pattern_of)[i % len(_pattern_of)], sampling=sampling)
    if i % 3 != 1:
        guess = list(answer(request, naive_target(), mask=mask_of(request)))
        guess[i % len(guess)] = 1  # an identifier is changed,
        del guess[len(guess) // 2 : len(guess) // 2 + i % 2]  # and something left out
        request = msgspec.structs.replace(request, prediction_ids=tuple(guess))
    return request
