"""OpenAI's responses as types, with what this server adds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field, SerializerFunctionWrapHandler, model_serializer

from server.record import TokenRole


class Sparse(BaseModel):
    """A part of a response of which some fields are there only where they say something."""

    left_out: ClassVar[tuple[str, ...]] = ()  # where they are None

    @model_serializer(mode="wrap")
    def _if_said(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = serialise(self)
        for name in self.left_out:
            if content[name] is None:
                del content[name]
        return content


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class CompletionTokensDetails(Sparse):
    left_out = ("reasoning_tokens", "accepted_prediction_tokens", "rejected_prediction_tokens")

    reasoning_tokens: int | None = Field(None, description="of models that mark their thinking: its tokens, the marks included")
    accepted_prediction_tokens: int | None = Field(None, description="of the prediction, drafted and part of the answer")
    rejected_prediction_tokens: int | None = Field(None, description="of the prediction, drafted and refused: time, and no output")


class Usage(Sparse):
    left_out = ("completion_tokens_details",)

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | None = None


class SpeculativeDecoding(BaseModel):
    """What became of the drafts of one answer, in the shape that benchmark clients know from vLLM."""

    mean_acceptance_length: float = Field(description="tokens a round: 1 + accepted drafts / rounds")
    draft_acceptance_rate: float
    acceptance_histogram: list[int] = Field(description="rounds by accepted drafts, from 0 to num_spec_tokens")
    num_spec_steps: int
    num_draft_tokens: int
    num_accepted_draft_tokens: int
    num_spec_tokens: int


class Cascade(BaseModel):
    """Which rule judged, and what it did."""

    rule: str
    alpha: float | None = Field(description="the rule's dial; 0 for exact, which has none; null where it is infinite")
    drafter: str
    deferred_tokens: int
    lossy_kept_tokens: int
    target_calls: int
    drafter_calls: int


class Latency(BaseModel):
    """Times in the server; null where there is nothing to measure."""

    queue_ms: float
    time_to_first_token_ms: float | None = Field(description="from arrival to the first delivery")
    generation_ms: float | None = Field(description="from the first delivery to the last")
    mean_itl_ms: float | None = Field(description="mean gap between two deliveries of a choice")
    tokens_per_second: float | None = Field(description="tokens of all choices over the time from arrival to the last delivery")


class ResponseMetrics(BaseModel):
    speculative_decoding: SpeculativeDecoding | None
    cascade: Cascade
    latency: Latency


class FunctionCall(BaseModel):
    name: str
    arguments: str = Field(description="JSON, as the model wrote it")


class ToolCall(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class AssistantMessage(Sparse):
    left_out = ("reasoning_content", "tool_calls")

    role: Literal["assistant"] = "assistant"
    content: str | None = Field(description="null where there is none beside thinking or calls")
    refusal: None = None
    reasoning_content: str | None = Field(None, description="what the model thought, if it marks that")
    tool_calls: list[ToolCall] | None = None


class TokenOrigin(BaseModel):
    """Who wrote a token."""

    token_id: int
    text: str = Field(description="what it adds to the text; empty within a character, and for an end token")
    by: Literal["drafter", "target"] = Field(description="drafter: its word stands; target: drawn from its row, or foreseen")
    lossy: bool = Field(description="the drafter's word stands although exact verification would have rejected it")
    role: TokenRole = Field(
        description="accepted: a draft that stands; recovered: drawn where a draft was rejected; bonus: behind drafts that all stand; "
        "plain: nothing was drafted in front of it"
    )
    drafted: int | None = Field(description="how many drafts the round had that ends with this token; null for one that ends none")


class TopLogprob(BaseModel):
    """A token, and how likely the target itself found it: at temperature 1, in front of masks, biases and penalties."""

    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ContentLogprob]
    refusal: None = None


class TextLogprobs(BaseModel):
    """Entry by entry the same tokens."""

    tokens: list[str] = Field(description="what is no whole character as its bytes, such as bytes:\\xf0\\x9f")
    token_logprobs: list[float | None] = Field(description="null for the first token of a prompt, in front of which nothing is")
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int] = Field(description="where the token begins in the choice's text, or would if a stop string were part of it")


class Traced(Sparse):
    """A choice that can say where its tokens come from. The field is there only if it was asked for."""

    left_out = ("provenance",)

    provenance: list[TokenOrigin] | None = None


class ChatChoice(Traced):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None


class ChatDeltaChoice(Traced):
    index: int
    delta: dict[str, Any]
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None


class TextChoice(Traced):
    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: str | None


Choice = ChatChoice | ChatDeltaChoice | TextChoice


class Envelope(BaseModel):
    """What every response and every chunk of a stream begins with."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str


class Completion(Envelope):
    choices: Sequence[Choice]
    usage: Usage
    metrics: ResponseMetrics


class Chunk(Envelope):
    choices: Sequence[Choice]


class ChunkWithUsage(Chunk):
    """A chunk when the client asked for usage: null in all but the last."""

    usage: Usage | None = None


class UsageChunk(Chunk):
    usage: Usage
    metrics: ResponseMetrics


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "cascade-serve"
    root: str = Field(description="the deployment's own name")
    parent: str | None = Field(description="for a preset or an alias, the deployment's own name")
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]
