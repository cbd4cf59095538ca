"""What the client asked, as token ids and parameters, and what comes back: the frozen structs that cross the engine's seam.

Prompt ids and already emitted output ids are kept apart, so that an answer that one engine began can be handed to another one
and continues with the same text. Nothing here knows text, HTTP or tensors.
"""

from __future__ import annotations

import enum
import time

import msgspec


class FinishReason(enum.Enum):
    """Why an answer ended."""

    STOP = "stop"  # an end token was emitted
    LENGTH = "length"  # max_tokens were emitted
    ERROR = "error"  # nothing could follow: its grammar got too complex
    MEMORY = "memory"  # the device had no memory for even one token of it
    ABORT = "abort"  # the caller gave it up


# Below this a temperature is 0: dividing logits by less overflows float32, and the law is that of the most likely token anyway.
GREEDY_TEMPERATURE = 1e-5


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How a token is chosen from a model's logits.

    Applied in this order: min_tokens, logit_bias and penalties (sampling/processors.py), temperature, top-k, top-p, min-p.
    """

    max_tokens: int  # tokens of the whole answer, those in Choice.output_ids included; 0 runs the prompt alone
    temperature: float = 1.0  # 0 takes the most likely token
    top_k: int = 0  # keep the k most likely tokens; 0 keeps all
    top_p: float = 1.0  # keep the most likely tokens that together reach this probability, in (0, 1]
    min_p: float = 0.0  # keep tokens at least this likely relative to the most likely one, in [0, 1]
    seed: int = 0  # 64 bits; a caller that was given none draws one
    is_seeded: bool = False  # the client gave the seed: what is sampled has a drafter's row at every position, see engine/README.md
    min_tokens: int = 0  # no stop token is emitted in front of that many others
    logit_bias: dict[int, float] = {}  # by token; added to logits
    repetition_penalty: float = 1.0  # positive; above 1 tokens of prompt and answer become less likely
    frequency_penalty: float = 0.0  # taken off the logit of a token for each time that the answer has it
    presence_penalty: float = 0.0  # taken off the logits of all tokens that the answer has
    stop_token_ids: tuple[int, ...] = ()  # emitted, and then the answer ends; callers include EngineInfo.end_token_ids

    num_logprobs: int | None = None  # how many of a position's likeliest tokens to report beside the emitted one; None reports nothing
    num_prompt_logprobs: int | None = None  # the same of every token of the prompt but its first: each row of the prompt is computed anew

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE


class SpeculationParams(msgspec.Struct, frozen=True, kw_only=True):
    """How much the drafter's word counts for this request."""

    enabled: bool = True  # False: no drafts, and every token is drawn from the target
    rule: str = "exact"
    alpha: float = 0.0  # the rule's dial; exact has none
    max_draft: int | None = None  # at most this many drafts a step; None leaves it to the deployment


class Choice(msgspec.Struct, frozen=True):
    """One of the answers that a request asks for."""

    index: int = 0
    output_ids: tuple[int, ...] = ()  # already emitted, when another engine began this answer


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What the client asked. Each choice becomes a Sequence of its own; they share the prompt's blocks."""

    id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    speculation: SpeculationParams = SpeculationParams()
    grammar: str | None = None  # what every answer must be, as engine/grammar/automaton.py reads it
    prediction_ids: tuple[int, ...] = ()  # what the answer is likely to be, in the client's opinion
    choices: tuple[Choice, ...] = (Choice(),)
    cache_salt: str = ""  # the prompt's KV is shared with requests of the same salt alone: finding it tells others nothing
    priority: int = 0  # a lower one comes first, 32 bits; equal ones come in the order of their arrival
    arrived_at: float = msgspec.field(default_factory=time.monotonic)  # the machine's monotonic clock, the same in all processes


class Round(msgspec.Struct, frozen=True):
    """What became of the drafts of one sequence in one step. Positions count from the first draft."""

    num_draft: int
    num_accepted: int  # leading drafts that stand; the token behind them was recovered or is the bonus
    deferred_mask: int = 0  # bit i: position i was verified and its draft was not in the rule's keep-set
    lossy_mask: int = 0  # bit i: draft i stands under the rule, and the same coin would have rejected it under exact
    predicted_mask: int = 0  # bit i: draft i comes from the request's prediction


class TokenLogprobs(msgspec.Struct, frozen=True):
    """How likely the target itself found a token of an answer or a prompt: at temperature 1, in front of masks, biases and penalties."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # token and log-probability, the likeliest first


class TokenDelta(msgspec.Struct, frozen=True, kw_only=True):
    """The tokens that one step added to one choice."""

    request_id: str
    choice: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    round: Round | None = None  # None where nothing was drafted
    logprobs: tuple[TokenLogprobs, ...] = ()  # of each token; empty unless asked for
    # of the prompt's next tokens, from its second on. Of a request's first choice alone, since they are those of all; a delta that has some
    # has nothing else, and no choice has a token before the last of them.
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    drafted_mask: int = 0  # bit i: token i is the drafter's own word, kept; the others were drawn by the target or from pi
    num_cached_tokens: int = 0  # leading prompt tokens that were not computed again
    queue_seconds: float = 0.0  # from arrival to the first step that ran a token of it
    num_target_calls: int = 0  # passes of the target that this choice took part in, so far
    num_drafter_calls: int = 0  # passes of the drafter that this choice took part in, so far
