"""What the engine says about itself, as plain data. Who turns it into Prometheus metrics or a table is not its business."""

from __future__ import annotations

import msgspec

from engine.request import TokenDelta


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What is being served; fixed for the life of an engine."""

    incarnation: str  # another one after every restart
    target: str  # the configured source
    drafter: str  # "none", "ngram", or "model:" and the source
    target_path: str  # folder with the target's tokenizer and configs, in the transformers format
    device: str
    dtype: str
    vocab_size: int
    max_model_len: int  # tokens of prompt and answer together: the smaller of model and pool
    end_token_ids: tuple[int, ...]  # union of model and generation config
    has_grammars: bool = False  # answers can be held to one: the tokenizer and an end token are known
    rules: tuple[str, ...]
    max_draft: int
    max_sequences: int
    num_blocks: int
    block_size: int
    weight_bytes: int  # target and drafter together
    kv_bytes: int


class StepStats(msgspec.Struct, frozen=True, kw_only=True):
    """One step. Counters are of this step alone; what is labelled by request is in the TokenDeltas."""

    step_seconds: float
    num_running: int
    num_waiting: int
    num_blocks: int
    num_used_blocks: int  # held by answers that run
    num_target_tokens: int  # rows of the target's pass: prompt, recomputed, pending and draft tokens
    num_emitted_tokens: int
    num_preemptions: int
    num_prefix_queried_tokens: int  # tokens of sequences admitted in this step
    num_prefix_hit_tokens: int  # of these, found in published blocks

    # Where the time went. The first three are about all of step_seconds.
    schedule_seconds: float = 0.0  # planning, and committing what was emitted
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0  # the target's pass, and judging the drafts
    wait_seconds: float = 0.0  # from the end of the step before to this one's beginning: without work, or handing over and taking in
    undrafted_seconds: float = 0.0  # what the same tokens would have taken without drafts, by what passes cost here

    num_sequences: int = 0  # answers that had a part in the target's pass
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    draft_lengths: tuple[int, ...] = ()  # by number of drafts, answers for which so many were made in this step; from 0

    num_cached_blocks: int = 0  # that nobody holds, and whose KV may be found again
    num_waiting_for_place: int = 0  # max_sequences answers ran
    num_waiting_for_memory: int = 0  # too few blocks were free
    num_waiting_for_leader: int = 0  # another answer was computing what they need, or their grammar was being compiled
    num_waiting_for_budget: int = 0  # the step's tokens were given out


class StepOutput(msgspec.Struct, frozen=True, kw_only=True):
    """What crosses the seam after a step: one message for all sequences."""

    deltas: tuple[TokenDelta, ...]
    stats: StepStats
