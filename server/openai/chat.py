"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter, Request, Response

from server.deps import Served
from server.generate import TextDelta
from server.openai import schema
from server.openai.answer import Likelihood, answer
from server.openai.convert import chat_job
from server.stream import DOCUMENTED

router = APIRouter()


class ChatShape:
    """Messages; a stream begins with the role."""

    prefix = "chatcmpl-"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def choice(self, index: int, text: str, finish_reason: str | None) -> schema.ChatChoice:
        return schema.ChatChoice(index=index, message=schema.AssistantMessage(content=text), finish_reason=finish_reason)

    def opening(self, index: int) -> schema.ChatDeltaChoice:
        return schema.ChatDeltaChoice(index=index, delta={"role": "assistant", "content": ""}, finish_reason=None)

    def delta(self, delta: TextDelta) -> schema.ChatDeltaChoice:
        content = {"content": delta.text} if delta.text else {}
        return schema.ChatDeltaChoice(index=delta.index, delta=content, finish_reason=delta.finish_reason)

    def note_logprobs(self, choice: schema.Choice, tokens: Sequence[Likelihood], offset: int) -> None:
        assert not isinstance(choice, schema.TextChoice)
        content = [
            schema.ContentLogprob(
                token=token.text,
                logprob=token.logprob,
                bytes=list(token.raw),
                top_logprobs=[schema.TopLogprob(token=top.text, logprob=top.logprob, bytes=list(top.raw)) for top in token.top],
            )
            for token in tokens
        ]
        choice.logprobs = schema.ChatLogprobs(content=content)


@router.post("/chat/completions", response_model=schema.Completion, responses=DOCUMENTED)
async def create_chat_completion(body: schema.ChatBody, serving: Served, request: Request) -> Response:
    """Answer a conversation."""
    return await answer(await chat_job(body, serving), serving, ChatShape(), request)
