"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from server.deps import Served
from server.generate import TextDelta
from server.openai import response_schema as schema
from server.openai.answer import Likelihood, answer
from server.openai.convert import chat_job
from server.openai.schema import ChatBody
from server.reading import CallPiece

router = APIRouter()


class ChatShape:
    """Messages; a stream begins with the role. Thinking and calls are there only where the model wrote some."""

    prefix = "chatcmpl-"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def choice(self, answer: TextDelta) -> schema.ChatChoice:
        calls = _whole_calls(answer.calls)
        content = None if not answer.text and (calls or answer.reasoning) else answer.text
        message = schema.AssistantMessage(content=content, reasoning_content=answer.reasoning or None, tool_calls=calls or None)
        return schema.ChatChoice(index=answer.index, message=message, finish_reason=answer.finish_reason)

    def opening(self, index: int) -> schema.ChatDeltaChoice:
        return schema.ChatDeltaChoice(index=index, delta={"role": "assistant", "content": ""}, finish_reason=None)

    def deltas(self, delta: TextDelta) -> list[schema.Choice]:
        reasoning = {"reasoning_content": delta.reasoning} if delta.reasoning else {}
        content = {"content": delta.text} if delta.text else {}
        calls = [{"tool_calls": [_call_delta(call)]} for call in delta.calls]
        contents: list[dict[str, Any]] = [reasoning | content, *calls] if reasoning or content or not calls else [*calls]
        choices: list[schema.Choice] = [schema.ChatDeltaChoice(index=delta.index, delta=each, finish_reason=None) for each in contents]
        choices[-1].finish_reason = delta.finish_reason
        return choices

    def note_logprobs(self, choice: schema.Choice, tokens: Sequence[Likelihood], offset: int) -> None:
        assert not isinstance(choice, schema.TextChoice)
        content = [
            schema.ContentLogprob(
                token=token.text,
                logprob=token.logprob,
                bytes=list(token.raw),
                top_logprobs=[
                    schema.TopLogprob(token=top.text, logprob=top.logprob, bytes=list(top.raw))
                    for top in token.top
                    if top.logprob is not None
                ],
            )
            for token in tokens
            if token.logprob is not None
        ]
        choice.logprobs = schema.ChatLogprobs(content=content)


def _whole_calls(pieces: Sequence[CallPiece]) -> list[schema.ToolCall]:
    calls: list[schema.ToolCall] = []
    for piece in pieces:
        if piece.id is not None and piece.name is not None:
            calls.append(schema.ToolCall(id=piece.id, function=schema.FunctionCall(name=piece.name, arguments="")))
        calls[piece.index].function.arguments += piece.arguments
    return calls


def _call_delta(piece: CallPiece) -> dict[str, Any]:
    """Who is called stands in the first piece alone; clients put the arguments together by the index."""
    if piece.id is None:
        return {"index": piece.index, "function": {"arguments": piece.arguments}}
    return {"index": piece.index, "id": piece.id, "type": "function", "function": {"name": piece.name, "arguments": piece.arguments}}


@router.post("/chat/completions", response_model=schema.Completion)
async def create_chat_completion(body: ChatBody, serving: Served, request: Request) -> Response:
    """Answer a conversation."""
    return await answer(await chat_job(body, serving), serving, ChatShape(), request)
