"""Asks an engine in a thread of this process, through the server's own code for templates, parameters and text, without HTTP.

What differs from a server is the transport alone, so the difference between the two is the transport's cost.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from pydantic import ValidationError

from benchmarks.body import BodyMaker
from benchmarks.errors import RequestFailed
from benchmarks.load import Answer, Drafting
from benchmarks.prompts import Prompt
from engine.client import EngineClient
from engine.errors import EngineError
from engine.stats import EngineInfo
from server.app import create_app
from server.deps import Serving
from server.errors import entry_of
from server.generate import Generation, Job
from server.openai.answer import metrics_of, usage_of
from server.openai.convert import chat_job, completion_job
from server.openai.schema import ChatBody, CompletionBody
from server.record import RequestRecord
from server.settings import Deployment


@dataclass(frozen=True)
class EngineTarget:
    """One endpoint's worth of a deployment, without the endpoint."""

    serving: Serving
    maker: BodyMaker

    @property
    def info(self) -> EngineInfo:
        return self.serving.info

    async def ask(self, prompt: Prompt, number: int) -> Answer:
        sent_at, delivered_at, texts = time.perf_counter(), list[float](), list[str]()
        try:
            async with Generation(await self._job(prompt, number), self.serving) as generation:
                async for deltas in generation:
                    if text := "".join(delta.text for delta in deltas):
                        delivered_at.append(time.perf_counter())
                        texts.append(text)
        except ValidationError as error:
            first = error.errors()[0]
            raise RequestFailed("invalid request", f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        except EngineError as error:
            raise RequestFailed(entry_of(error).code or "invalid request", str(error)) from error
        return self._answer(generation.record, sent_at, tuple(delivered_at), "".join(texts))

    async def _job(self, prompt: Prompt, number: int) -> Job:
        body = self.maker.body(prompt, number)
        if self.maker.endpoint == "chat":
            return await chat_job(ChatBody.model_validate(body), self.serving)
        return await completion_job(CompletionBody.model_validate(body), self.serving)

    def _answer(self, record: RequestRecord, sent_at: float, delivered_at: tuple[float, ...], text: str) -> Answer:
        ended_at = time.perf_counter()
        usage, metrics = usage_of(record), metrics_of(record, self.info.drafter)
        drafts = metrics.speculative_decoding
        return Answer(
            sent_at=sent_at,
            delivered_at=delivered_at,
            ended_at=ended_at,
            num_prompt_tokens=usage.prompt_tokens,
            num_cached_tokens=usage.prompt_tokens_details.cached_tokens,
            num_output_tokens=usage.completion_tokens,
            finish_reason=record.choices[0].finish_reason or "",
            drafting=None if drafts is None else Drafting(drafts.num_draft_tokens, drafts.num_accepted_draft_tokens, drafts.num_spec_steps),
            num_target_calls=metrics.cascade.target_calls,
            fingerprint=self.serving.fingerprint,
            text=text,
        )


@asynccontextmanager
async def open_engine(engine: EngineClient, deployment: Deployment) -> AsyncIterator[Serving]:
    """Load a deployment, and close it at the end. Raises ConfigError."""
    app = create_app(engine, deployment)
    async with app.router.lifespan_context(app):
        serving: Serving = app.state.serving
        yield serving
