"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from fastapi import APIRouter, Request, Response

from server.deps import Served
from server.generate import TextDelta
from server.openai import response_schema as schema
from server.openai.answer import Likelihood, answer
from server.openai.convert import completion_job
from server.openai.schema import CompletionBody
from server.stream import DOCUMENTED

router = APIRouter()


class CompletionShape:
    """Plain text; a stream's chunks look like its response."""

    prefix = "cmpl-"
    object = "text_completion"
    chunk_object = "text_completion"

    def choice(self, answer: TextDelta) -> schema.TextChoice:
        return schema.TextChoice(index=answer.index, text=answer.text, finish_reason=answer.finish_reason)

    def opening(self, index: int) -> None:  # a text begins with its first piece
        return None

    def deltas(self, delta: TextDelta) -> list[schema.Choice]:
        return [self.choice(delta)]

    def note_logprobs(self, choice: schema.Choice, tokens: Sequence[Likelihood], offset: int) -> None:
        assert isinstance(choice, schema.TextChoice)
        choice.logprobs = schema.TextLogprobs(
            tokens=[_name(token) for token in tokens],
            token_logprobs=[token.logprob for token in tokens],
            # of tokens with the same text the likeliest; the emitted one in any case
            top_logprobs=[_likeliest(token) for token in tokens],
            text_offset=list(accumulate((token.length for token in tokens), initial=offset))[:-1],
        )


def _likeliest(token: Likelihood) -> dict[str, float] | None:
    return {_name(top): top.logprob for top in (*reversed(token.top), token) if top.logprob is not None} or None


def _name(token: Likelihood) -> str:
    """A token's text; what is no whole character by its bytes, as OpenAI writes them, or such tokens could not be told apart."""
    return token.text if token.text.encode() == token.raw else "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.raw)


@router.post("/completions", response_model=schema.Completion, responses=DOCUMENTED)
async def create_completion(body: CompletionBody, serving: Served, request: Request) -> Response:
    """Continue texts or token ids."""
    return await answer(await completion_job(body, serving), serving, CompletionShape(), request)
