"""The line that `cascade serve` prints while it works: what the last seconds were like. No text of anybody's, and nothing while idle."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from engine.stats import StepStats

SECONDS = 10.0  # between two lines


class Status:
    """Sums the steps since the last line."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._last: StepStats | None = None
        self._clear()

    def observe_step(self, stats: StepStats) -> None:
        """Count one step of the engine."""
        self._last = stats
        self._num_emitted += stats.num_emitted_tokens
        self._num_drafted += stats.num_draft_tokens
        self._num_accepted += stats.num_accepted_tokens
        self._step_seconds += stats.step_seconds
        self._undrafted_seconds += stats.undrafted_seconds

    def line(self) -> str | None:
        """What to print of the time since the last call; None if there was no step."""
        now, last = time.monotonic(), self._last
        seconds, self._began = now - self._began, now
        if last is None:
            return None
        parts = [
            f"{self._num_emitted / seconds:.0f} tokens/s",
            f"{last.num_running} running",
            f"{last.num_waiting} waiting",
            f"KV {last.num_used_blocks / max(1, last.num_blocks):.0%}",
            *self._of_drafts(),
        ]
        self._clear()
        return ", ".join(parts)

    def _of_drafts(self) -> list[str]:
        if not self._num_drafted:
            return ["nothing drafted"]
        speed_up = self._undrafted_seconds / self._step_seconds
        return [f"{self._num_accepted / self._num_drafted:.0%} of drafts stand", f"about {speed_up:.2f}x the speed without them"]

    def _clear(self) -> None:
        self._last = None
        self._num_emitted = self._num_drafted = self._num_accepted = 0
        self._step_seconds = self._undrafted_seconds = 0.0


async def report(status: Status, say: Callable[[str], None], seconds: float = SECONDS) -> None:
    """Print a line so often, for ever."""
    while True:
        await asyncio.sleep(seconds)
        if (line := status.line()) is not None:
            say(line)
