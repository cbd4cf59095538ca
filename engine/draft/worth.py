"""Whether drafts pay: what a step's tokens would have taken without them, by what passes of the target were measured to cost.

An estimate for people, whatever drafter and policy there are; nothing is decided by it. It knows as much of small passes as were seen: the
last token of an answer is never drafted for, so some always are.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.draft.costs import PassCosts


@dataclass(frozen=True, slots=True)
class StepWork:
    """What a step did."""

    num_plain_rows: int  # of the target's pass, without drafts
    num_drafts: int
    num_answers: int  # that emitted something
    num_emitted: int  # tokens


class WithoutDrafts:
    """Learns what passes cost from every step, and says what the step would have taken without drafts."""

    def __init__(self, costs: PassCosts | None = None):
        """`costs` of a pass, as far as they were measured."""
        self._costs = costs or PassCosts({})

    def seconds(self, work: StepWork, verify_seconds: float, schedule_seconds: float) -> float:
        """The pass without the drafts' rows, then one more for all answers for every further token that each emitted.

        What checking drafts takes beside their rows is not told from what rows take here (CostsByBatch): it makes both look dearer.
        """
        if work.num_plain_rows + work.num_drafts:
            self._costs.observe(work.num_plain_rows + work.num_drafts, verify_seconds)
        first = self._costs.at(work.num_plain_rows) if work.num_drafts else verify_seconds
        num_further = max(0.0, work.num_emitted / work.num_answers - 1) if work.num_answers else 0.0
        return schedule_seconds + first + num_further * (self._costs.at(work.num_answers) + schedule_seconds)
