"""The sweep: every prompt under every point, in turns, each answer written down as it comes. What is there already is not made again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.evaluate.likelihood import Likelihood
from benchmarks.evaluate.player import Played, Player, Question
from benchmarks.evaluate.points import DRAFTER, Point
from benchmarks.evaluate.record import Journal, Record
from benchmarks.evaluate.tasks import Item
from server.text import TextTokenizer


@dataclass(frozen=True)
class Asked:
    """An item and what the engine is asked for it."""

    item: Item
    question: Question


@dataclass
class Stage:
    """Everything that answers and judges."""

    pair: Player
    drafter: Player | None  # alone, for the point of that name
    tokenizer: TextTokenizer
    likelihood: Likelihood
    _judged: dict[tuple[str, tuple[int, ...]], tuple[float, str | None]] = field(default_factory=dict)

    def player(self, point: Point) -> Player:
        if point != DRAFTER:
            return self.pair
        assert self.drafter is not None, "a curve without a drafter has no such point"
        return self.drafter

    def forget(self) -> None:
        """Nobody asks for the judged texts again."""
        self._judged.clear()

    def record(self, asked: Asked, point: Point, played: Played) -> Record:
        """Judge an answer. Points often give the same one, which is judged once."""
        ids, text = tuple(played.token_ids), self.tokenizer.decode(played.token_ids)
        key = (asked.item.name, ids)
        if key not in self._judged:
            judge = asked.item.judge
            self._judged[key] = self.likelihood.nats(asked.question.prompt_ids, ids), judge(text) if judge else None
        nats, verdict = self._judged[key]
        is_alone = point == DRAFTER  # its engine calls it the target
        return Record(
            point=point.label,
            prompt=asked.item.name,
            category=asked.item.category,
            token_ids=ids,
            text=text,
            finish_reason=played.finish_reason,
            seconds=played.seconds,
            first_seconds=played.first_seconds,
            num_first=played.num_first,
            num_target_calls=0 if is_alone else played.num_target_calls,
            num_drafter_calls=played.num_target_calls if is_alone else played.num_drafter_calls,
            num_draft_tokens=played.num_draft_tokens,
            num_accepted_tokens=played.num_accepted_tokens,
            num_lossy_tokens=played.num_lossy_tokens,
            num_cached_tokens=played.num_cached_tokens,
            nats=nats,
            verdict=verdict,
        )


@dataclass(frozen=True)
class Plan:
    """How it is asked, and what to call after every answer."""

    concurrency: int = 1
    tick: Callable[[], None] = lambda: None


def sweep(stage: Stage, asked: Sequence[Asked], points: Sequence[Point], journal: Journal, plan: Plan) -> None:
    """Ask `plan.concurrency` prompts together under every point before the next ones; who comes first changes with every group."""
    size, have = plan.concurrency, {(record.point, record.prompt) for record in journal.records}
    for number, begin in enumerate(range(0, len(asked), size)):
        group, first = asked[begin : begin + size], number % len(points)
        # a group is asked again as a whole, or its streams would be fewer than those of the others
        missing = [point for point in (*points[first:], *points[:first]) if any((point.label, one.item.name) not in have for one in group)]
        for _ in range(len(group) * (len(points) - len(missing))):
            plan.tick()
        if missing:
            _play_group(stage, group, missing, journal, plan.tick)


def _play_group(stage: Stage, group: Sequence[Asked], points: Sequence[Point], journal: Journal, tick: Callable[[], None]) -> None:
    for player in {id(player): player for player in map(stage.player, points)}.values():
        for one in group:
            player.warm(one.question)
    for point in points:
        played = stage.player(point).play([one.question for one in group], point)
        journal.append(stage.record(one, point, answer) for one, answer in zip(group, played, strict=True))
        for _ in group:
            tick()
    stage.forget()


def complete(records: Sequence[Record], points: Sequence[Point], asked: Sequence[Asked]) -> Mapping[str, list[Record]]:
    """Records by point, in the order of the prompts. The last of several counts."""
    found = {(record.point, record.prompt): record for record in records}
    return {point.label: [found[point.label, one.item.name] for one in asked] for point in points}
