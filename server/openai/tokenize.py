"""POST /tokenize, /detokenize and /v1/chat/completions/input_tokens: the text side alone; the engine hears of none of them.

Shapes are vLLM's, and llama.cpp's for the count of a chat. A conversation is rendered and read as the chat itself would be, and what a chat
would refuse is refused.
"""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from engine.errors import InvalidRequest
from server.deps import Served, Serving
from server.errors import UnknownModel
from server.openai.convert import chat_prompt, text_prompt, tokenised
from server.openai.schema import INT_MAX, MAX_MESSAGES, ChatBody, ChatMessage, TokenId
from server.openai.values import Body, Text

router = APIRouter()  # served with and without /v1
chat_router = APIRouter()


class TokenizeBody(ChatBody):
    """A prompt, or a chat request, of which only what makes the prompt matters."""

    model: Text = Field("", description="none: the deployment's own")
    messages: list[ChatMessage] = Field([], max_length=MAX_MESSAGES)
    prompt: Text | None = Field(None, description="instead of messages")
    add_special_tokens: bool | None = Field(None, description="of a prompt: false leaves out what the tokenizer adds, such as BOS")
    return_token_strs: bool | None = Field(None, description="true: the text of each token, too")


class Tokens(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = Field(description="U+FFFD stands for what is no whole character")


class DetokenizeBody(Body):
    """Token ids."""

    model: Text = Field("", description="none: the deployment's own")
    tokens: list[TokenId] = Field(max_length=INT_MAX)


class Prompt(BaseModel):
    prompt: str


class InputTokens(BaseModel):
    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, serving: Served) -> Tokens:
    """Text to token ids: of a prompt or of a conversation."""
    _check_model(body.model, serving)
    ids = await _ids(body.model_copy(update={"model": body.model or serving.deployment.model.name}), serving)
    texts = [serving.tokenizer.token_text(token_id)[0] for token_id in ids] if body.return_token_strs else None
    return Tokens(count=len(ids), max_model_len=serving.info.max_model_len, tokens=ids, token_strs=texts)


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, serving: Served) -> Prompt:
    """Token ids to text, special tokens by their names."""
    _check_model(body.model, serving)
    size = serving.info.vocab_size
    if (wrong := next((token_id for token_id in body.tokens if token_id >= size), None)) is not None:
        raise InvalidRequest(f"Token id {wrong} is outside the vocabulary of {size} tokens.", "tokens")
    return Prompt(prompt=await tokenised(lambda: serving.tokenizer.text_of(body.tokens), len(body.tokens)))


@chat_router.post("/chat/completions/input_tokens")
async def count_input_tokens(body: ChatBody, serving: Served) -> InputTokens:
    """How many tokens the prompt of a chat request has."""
    return InputTokens(input_tokens=len(await chat_prompt(body, serving)))


async def _ids(body: TokenizeBody, serving: Serving) -> list[int]:
    if (body.prompt is None) == (not body.messages):
        raise InvalidRequest("Either prompt or messages is needed, and not both.", "prompt")
    if body.prompt is not None:
        return await text_prompt(body.prompt, serving, adds_special=body.add_special_tokens is not False)
    if body.add_special_tokens:
        raise InvalidRequest("The model's chat template writes all special tokens of a conversation.", "add_special_tokens")
    return await chat_prompt(body, serving)


def _check_model(model: str, serving: Serving) -> None:
    served = serving.deployment.model_ids
    if model and model not in served:
        raise UnknownModel(model, tuple(served))
