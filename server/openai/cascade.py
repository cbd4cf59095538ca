"""GET /v1/cascade: what a client can set here, and within which bounds. The page at / and `cascade chat` build their controls from it.

It says what a request may ask for, not what was measured; folders and hub owners of models are not told.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from engine.config import Preset, RuleName
from engine.dials import DIALS
from server.deps import Served, Serving, last_part

router = APIRouter()

KEEPS: Mapping[RuleName, str] = {
    "exact": "Nothing is kept against the target: the answer is the target's alone.",
    "token_v3": "Keeps tokens that the target finds at least (1 - alpha) times as likely as its favourite.",
    "token_v2": "Keeps tokens whose probability under the target is at most alpha below that of its favourite.",
    "token_v1": "Keeps tokens whose probability under the drafter is at most alpha below that of the target's favourite.",
    "chow": "Keeps all where the drafter is at least 1 - alpha sure of its favourite.",
    "diff": "Keeps all where the drafter is as sure of its favourite as the target of its own, less alpha.",
    "opt": "Keeps all where the drafter is nearly as sure as the target; the margin is alpha times their distance.",
    "chow_log": "Keeps all where the drafter's entropy is at most alpha.",
    "diff_log": "Keeps all where the drafter's entropy is at most the target's plus alpha.",
    "bild": "Keeps all where drafter and target are at most alpha apart.",
    "lossy": "Keeps none for sure; accepts every draft as though the target found it 1 / (1 - alpha) times as likely.",
}


class AlphaRange(BaseModel):
    """A rule's dial. null: no bound, or no end."""

    low: float | None
    high: float | None = Field(description="the deployment's own bound included")
    default: float
    target_at: float | None = Field(description="the target alone, here and below")
    drafter_at: float | None = Field(description="the drafter alone, here and above")


class Rule(BaseModel):
    name: RuleName
    keeps: str = Field(description="which drafts stand, as a sentence")
    allowed: bool = Field(description="a request may ask for it; otherwise it is a preset's alone")
    alpha: AlphaRange | None = Field(description="null: it has no dial")


class Variant(BaseModel):
    """A model id, and what a request for it gets that says nothing else."""

    id: str
    preset: str | None
    enabled: bool = Field(description="false: the target alone")
    rule: RuleName
    alpha: float | None = Field(description="null where it is infinite")
    max_draft: int


class Controls(BaseModel):
    """Everything that can be set."""

    object: Literal["cascade"] = "cascade"
    version: str
    model: str
    target: str
    drafter: str
    context_length: int = Field(description="tokens of prompt and answer together")
    max_draft: int = Field(description="at most so many drafts a round")
    models: list[Variant] = Field(description="the deployment's own name first, then its presets")
    rules: list[Rule]


@router.get("/cascade")
async def get_cascade(serving: Served) -> Controls:
    """What a request may set: presets, rules with their dials, bounds."""
    info, deployment = serving.info, serving.deployment
    presets = [_variant(serving, name, preset) for name, preset in deployment.speculation.presets.items()]
    return Controls(
        version=serving.version,
        model=deployment.model.name,
        target=last_part(info.target),
        drafter=last_part(info.drafter),
        context_length=info.max_model_len,
        max_draft=info.max_draft,
        models=[_variant(serving, None, None), *presets],
        rules=_rules(serving),
    )


def _variant(serving: Serving, name: str | None, preset: Preset | None) -> Variant:
    model, most = serving.deployment.model.name, serving.info.max_draft
    rule, alpha = serving.deployment.speculation.judged_by(preset)
    return Variant(
        id=model if name is None else f"{model}:{name}",
        preset=name,
        enabled=most > 0 if preset is None else preset.enabled and most > 0,
        rule=rule,
        alpha=_finite(alpha),
        max_draft=most if preset is None or preset.max_draft is None else min(preset.max_draft, most),
    )


def _rules(serving: Serving) -> list[Rule]:
    """Those that this engine can judge by and that somebody may use, in the order in which KEEPS explains them."""
    able, speculation = serving.info.rules, serving.deployment.speculation
    asked = able if speculation.allow_rules is None else speculation.allow_rules
    preset = {speculation.judged_by(None)[0], *(speculation.judged_by(preset)[0] for preset in speculation.presets.values())}
    return [
        Rule(name=name, keeps=keeps, allowed=name in asked, alpha=_alpha(name, speculation.max_alpha.get(name)))
        for name, keeps in KEEPS.items()
        if name in able and (name in asked or name in preset)
    ]


def _alpha(name: RuleName, highest: float | None) -> AlphaRange | None:
    dial = DIALS[name]
    if dial.low == dial.high:
        return None
    high = dial.high if highest is None else min(dial.high, highest)
    return AlphaRange(
        low=_finite(dial.low),
        high=_finite(high),
        default=min(dial.default, high),
        target_at=_finite(dial.target_at),
        drafter_at=_finite(dial.drafter_at),
    )


def _finite(value: float) -> float | None:
    """JSON has no infinities."""
    return value if math.isfinite(value) else None
