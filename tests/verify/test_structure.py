"""No answer that has ended is ever an invalid document: over many schemas, under every rule, with every drafter, at any temperature."""

from __future__ import annotations

import copy
import itertools
import json
from contextlib import closing
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from pydantic import ByteSize
from transformers import AutoModelForCausalLM

from engine.build import Costs, Extras, assemble
from engine.config import (
    AdaptiveLengthConfig,
    CopyingConfig,
    DrafterConfig,
    EngineConfig,
    ModelDrafterConfig,
    ModelPair,
    ModelSource,
    NGramDrafterConfig,
    NoDrafterConfig,
    RuntimeConfig,
    SpeculationConfig,
)
from engine.core import EngineCore
from engine.model.member import Member
from engine.model.stack import DecoderStack
from engine.request import FinishReason, Request, SamplingParams, SpeculationParams, TokenDelta
from server.grammar_checker import Checker
from server.structure import Structure, grammar_of_structure
from server.text import TextTokenizer
from tests.server.conftest import build_tokenizer
from tests.tiny import tiny_config
from tests.verify.requests import RULES
from tests.verify.schemas import BY_HAND, at_random

SCHEMAS = (*BY_HAND, *at_random(70))
END, CONTEXT = 2, 600  # <|im_end|>
DRAFTERS: dict[str, DrafterConfig] = {
    "model": ModelDrafterConfig(source="drafter"),
    "copying": ModelDrafterConfig(source="drafter", copying=CopyingConfig(doubt=1)),
    "ngram": NGramDrafterConfig(),
    "none": NoDrafterConfig(),
}
_FORMATS = jsonschema.FormatChecker(("date", "uuid", "ipv4"))  # its "time" is that of an old draft, without a zone
_DRAFTS_PAY = Costs({1: 1.0, 64: 1.2}, {1: 0.05})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("letters")
    build_tokenizer().save(str(path / "tokenizer.json"))
    return path


def make_core(drafter: str, folder: Path) -> EngineCore:
    """Random models over a byte-level vocabulary; where it copies, the drafter lacks every third token."""
    vocab = build_tokenizer().get_vocab_size() + 5  # as matrices that are padded
    torch.manual_seed(3)
    model: Any = AutoModelForCausalLM.from_config(tiny_config(vocab=vocab, max_position_embeddings=CONTEXT)).double().eval()
    other = copy.deepcopy(model.requires_grad_(False))
    for weight in other.parameters():
        weight += 0.05 * torch.randn(weight.shape, dtype=torch.float64)
    some = torch.tensor([i for i in range(vocab) if i % 3]) if drafter == "copying" else None
    second = Member(DecoderStack(other, draft_ids=some), CONTEXT, Path("drafter")) if drafter in ("model", "copying") else None
    config = EngineConfig(
        model=ModelPair(name="tiny", target=ModelSource(source="target"), drafter=DRAFTERS[drafter]),
        speculation=SpeculationConfig(draft_length=AdaptiveLengthConfig(max=5)),
        engine=RuntimeConfig(device="cpu", kv_cache=ByteSize(2**26)),
    )
    return assemble(config, Member(DecoderStack(model), CONTEXT, folder, (END,)), second, Extras(costs=_DRAFTS_PAY))


async def requests(rules: tuple[str, ...], folder: Path) -> list[Request]:
    """Every schema, by rules and temperatures in turn. Signs that end something are likelier, or random models never do."""
    tokenizer = TextTokenizer.from_folder(folder)
    ending = {token: 4.0 for sign in '"]},:' for token in tokenizer.encode(sign)} | {END: 9.0}
    alphas = dict(RULES)
    with closing(Checker(folder, (END,))) as checker:
        grammars = [await grammar_of_structure(Structure("json", schema, "response_format"), checker) for schema in SCHEMAS]
    made = []
    for i, (grammar, rule) in enumerate(zip(grammars, itertools.cycle(rules), strict=False)):
        sampling = SamplingParams(
            max_tokens=CONTEXT - 9,
            temperature=(0.0, 1.0, 1.5, 0.7)[i // len(rules) % 4],
            top_p=0.95 if i % 3 else 1.0,
            seed=i,
            is_seeded=bool(i % 2),
            logit_bias=ending,
            repetition_penalty=1.1 if i % 5 == 0 else 1.0,
            stop_token_ids=(END,),
        )
        speculation = SpeculationParams(rule=rule, alpha=alphas[rule])
        made.append(Request(id=str(i), prompt_ids=(5, 6, 7 + i), sampling=sampling, speculation=speculation, grammar=grammar))
    return made


@pytest.mark.parametrize("drafter", DRAFTERS)
async def test_every_document_that_ends_is_valid(drafter: str, folder: Path) -> None:
    assert len(SCHEMAS) >= 100
    core, tokenizer = make_core(drafter, folder), TextTokenizer.from_folder(folder)
    answers: dict[str, list[int]] = {}
    ends: dict[str, FinishReason] = {}
    num_drafted = num_accepted = 0
    for request in await requests(core.info.rules, folder):
        core.add(request)
    while core.has_work:
        for delta in core.step().deltas:
            answers.setdefault(delta.request_id, []).extend(delta.token_ids)
            if delta.finish_reason is not None:
                ends[delta.request_id] = delta.finish_reason
            if delta.round is not None:
                num_drafted, num_accepted = num_drafted + delta.round.num_draft, num_accepted + delta.round.num_accepted
    ended = [i for i, reason in ends.items() if reason is FinishReason.STOP]
    assert FinishReason.ERROR not in ends.values()
    assert len(ended) > 0.8 * len(SCHEMAS), "too few documents ended to prove anything"
    assert drafter == "none" or 0.1 * num_drafted < num_accepted < 0.98 * num_drafted, (
        "what a schema forces always stands; other drafts may not"
    )
    for i in ended:
        assert answers[i][-1] == END
        document = json.loads(tokenizer.decode(answers[i]))
        jsonschema.validate(document, SCHEMAS[int(i)], format_checker=_FORMATS)


async def test_a_grammar_that_cannot_be_followed_ends_its_answer_alone(folder: Path) -> None:
    """The engine cannot check what the server did not: the answer ends with nothing, its neighbour goes on."""
    core = make_core("model", folder)
    sampling = SamplingParams(max_tokens=5, temperature=0.0, stop_token_ids=(END,))
    for name, grammar in (("broken", "start: (("), ("sound", None)):
        core.add(Request(id=name, prompt_ids=(5, 6, 7), sampling=sampling, grammar=grammar))
    deltas: list[TokenDelta] = []
    while core.has_work:
        deltas += core.step().deltas
        core.check()
    broken = [delta for delta in deltas if delta.request_id == "broken"]
    assert [(delta.token_ids, delta.finish_reason) for delta in broken] == [((), FinishReason.ERROR)]
    assert sum(len(delta.token_ids) for delta in deltas) == 5
