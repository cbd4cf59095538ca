"""What a route may ask for: the state of its app, which hangs on the app and never on a module."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from engine.client import EngineClient
from engine.dials import DIALS
from engine.stats import EngineInfo
from server.dialect import Dialect
from server.drain import Draining
from server.errors import NotLoaded, ShuttingDown
from server.grammar_checker import Checker
from server.metrics import Metrics
from server.settings import Deployment
from server.text import TextTokenizer
from server.traces import NoTraces, Traces


@dataclass(frozen=True)
class Serving:
    """Everything that answering takes. Made when the model is loaded; what a restart may change is asked for."""

    engine: EngineClient
    version: str
    tokenizer: TextTokenizer
    deployment: Deployment
    metrics: Metrics
    draining: Draining
    started_at: int  # Unix time
    grammars: Checker
    dialect: Dialect
    traces: Traces = field(default_factory=NoTraces)
    unused_fields: set[str] = field(default_factory=set)  # names that were logged

    @property
    def info(self) -> EngineInfo:
        """What the engine says of itself. Raises EngineDead."""
        return self.engine.info

    @property
    def fingerprint(self) -> str:
        """What an answer depends on apart from the request: version, pair, dtype, device; readable, and fit for a header."""
        info, model = self.info, self.deployment.model
        pair = "+".join(last_part(name) + _held(part) for name, part in ((info.target, model.target), (info.drafter, model.drafter)))
        return re.sub(r"[^\w.+:-]", "_", f"cascade-{self.version}-{pair}-{info.dtype}-{info.device}", flags=re.ASCII)


def config_labels(deployment: Deployment, info: EngineInfo) -> dict[str, object]:
    """What a deployment serves, as an operator compares it with another one."""
    speculation = deployment.speculation
    return {
        "target": info.target,
        "drafter": info.drafter,
        "rule": speculation.rule,
        "alpha": format(DIALS[speculation.rule].default if speculation.alpha is None else speculation.alpha, "g"),
        "draft_policy": speculation.draft_length.policy,
        "max_draft": info.max_draft,
        "verification": speculation.verification,
        "device": info.device,
        "dtype": info.dtype,
        "quantization": deployment.model.target.quantization,
    }


def _held(part: object) -> str:
    """How weights are held, where that is another way than their dtype says, and whether a drafter copies."""
    quantization, copying = getattr(part, "quantization", "none"), getattr(part, "copying", None)
    return ("" if quantization == "none" else f"-{quantization}") + (f"-copying{copying.doubt:g}" if copying else "")


def last_part(source: str) -> str:
    """Of a path, a hub id or a package's file."""
    return re.split(r"[/\\]", source)[-1]


async def get_serving(request: Request) -> Serving:
    """The state of the app. Raises NotLoaded or ShuttingDown: whoever depends on it takes part in neither.

    A coroutine, since FastAPI would call a plain function in a thread.
    """
    serving: Serving | None = request.app.state.serving
    if serving is None:
        raise NotLoaded
    if serving.draining.is_draining:
        raise ShuttingDown
    return serving


Served = Annotated[Serving, Depends(get_serving)]
