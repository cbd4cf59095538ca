"""Passes of a target outside the step loop: one sequence, alone in its engine, with drafts behind its pending tokens."""

from __future__ import annotations

import time
from statistics import median

from engine.core import EngineCore
from engine.plan import Chunk, DraftBatch, QKind, StepPlan
from engine.request import Choice, Request, SamplingParams
from engine.sequence import Sequence


def alone(core: EngineCore, prompt: tuple[int, ...], max_tokens: int) -> Sequence:
    """A sequence with the first blocks of an engine that has no other."""
    seq = Sequence(Request(id="alone", prompt_ids=prompt, sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0)), Choice())
    seq.block_table = list(range(-(-(len(prompt) + max_tokens) // core.info.block_size)))
    return seq


def computed(core: EngineCore, prompt: tuple[int, ...], max_tokens: int) -> Sequence:
    """The same with the KV of all of its prompt but the last token."""
    seq = alone(core, prompt, max_tokens)
    core._parts.runner.forward(*window(seq, num_tokens=len(prompt)))  # the very pass that a step runs; nothing public runs it alone
    seq.num_computed = len(prompt) - 1
    return seq


def window(seq: Sequence, num_tokens: int, drafts: tuple[int, ...] = ()) -> tuple[StepPlan, DraftBatch]:
    """One sequence with drafts behind its pending tokens."""
    plan = StepPlan((Chunk(seq, num_tokens, completes=True, max_draft=len(drafts)),))
    batch = DraftBatch(
        lengths=(len(drafts),),
        ids=[list(drafts)],
        kinds=[[*([int(QKind.ONE_HOT)] * len(drafts)), int(QKind.NONE)]],
        rows=None,
        drafter_computed=(0,),
        lagging=(False,),
        num_calls=(0,),
    )
    return plan, batch


def window_milliseconds(core: EngineCore, seq: Sequence, num_draft: int, passes: int) -> float:
    """Of a pass over the last token and some drafts, head included: the median of a few."""
    drafts = tuple(seq.tokens[:num_draft])  # which tokens does not matter to the time
    times = []
    for _ in range(passes):
        start = time.perf_counter()
        logits, _, _ = core._parts.runner.forward(*window(seq, num_tokens=1, drafts=drafts))
        float(logits[0, 0])  # waits for the device
        times.append(1000 * (time.perf_counter() - start))
    return median(times)
