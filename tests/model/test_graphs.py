"""Which passes are recorded, that they give what launched ones give, and what becomes of the others. Here a repetition calls again."""

from __future__ import annotations

import copy
import random
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.model.attention import AttentionKind, Segment
from engine.model.cuda_graphs import recorder_of
from engine.model.gather_attention import GATHER
from engine.model.graphs import ROWS, Bound, Bucket, Passes, buckets
from engine.model.paged import PagedModel, rows_run
from engine.model.stack import DecoderStack
from engine.model.timing import measure, pass_seconds
from tests.recording import CallingRecorder, FixedGather
from tests.tiny import ARCHITECTURES, VOCAB, target_model

PASSES = Passes(num_sequences=6, window=4, num_rows=32, num_positions=48)
BLOCK = 4
HIDDEN = 16  # of the tiny models


def full(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def broken(*_: object) -> None:
    raise RuntimeError("operation not permitted when stream is capturing\nand more")


def model_of(architecture: str = "llama", kind: AttentionKind | None = None) -> PagedModel:
    own = copy.deepcopy(target_model(architecture=architecture))
    return PagedModel(DecoderStack(own, choose_attention=lambda _: kind or FixedGather()), 96, BLOCK)


def recorded(
    recorder: CallingRecorder, architecture: str = "llama", passes: Passes = PASSES, bound: int = 1 << 30
) -> tuple[PagedModel, list[str]]:
    model, said = model_of(architecture), list[str]()
    model.record(recorder, passes, Bound(bound, "target", said.append))
    return model, said


def batch(*segments: tuple[int, int], seed: int = 0) -> tuple[list[Segment], Tensor]:
    """Starts and tokens, in blocks from all over the pool."""
    rng = random.Random(seed)
    free = rng.sample(range(96), 96)
    placed = [Segment([free.pop() for _ in range(-(-(start + num) // BLOCK))], start, num) for start, num in segments]
    return placed, torch.tensor([rng.randrange(VOCAB) for _ in range(sum(num for _, num in segments))])


# ---------------------------------------------------------------------- which
def test_buckets_cover_what_is_usual_and_no_more() -> None:
    assert buckets(Passes(1, 1, 256, 999), [4, 16]) == [Bucket(rows, 4) for rows in (4, 2, 1)]
    assert buckets(Passes(1, 6, 256, 999), [4, 16]) == [Bucket(rows, 16) for rows in (16, 8)] + [Bucket(rows, 4) for rows in (4, 2, 1)]
    many = buckets(Passes(32, 9, 256, 999), [4, 16])
    assert many == sorted(many, reverse=True), "largest first, for whose memory the others need no more"
    assert [own.num_rows for own in many if own.window == 4] == [rows for rows in reversed(ROWS) if rows <= 128]
    assert [own.num_rows for own in many if own.window == 16] == [rows for rows in reversed(ROWS) if rows >= 8]
    assert {own.window for own in buckets(Passes(8, 65, 256, 999), [4, 16])} == {4, 65}, "longer windows take several tiles"
    assert max(buckets(Passes(4096, 9, 99_999, 999), [4, 16])).num_rows == 256
    assert max(buckets(Passes(64, 1, 40, 999), [4, 16])).num_rows == 48, "no more than a step runs, filled up"


@pytest.mark.parametrize("windows", [[4, 16], [16, 64], [1], [2]])
@pytest.mark.parametrize("window", [1, 2, 6, 9, 33])
@pytest.mark.parametrize("num_sequences", [1, 3, 32])
def test_every_usual_pass_has_a_bucket(num_sequences: int, window: int, windows: list[int]) -> None:
    found = buckets(Passes(num_sequences, window, 256, 999), windows)
    assert len(found) == len(set(found)) <= 2 * len(ROWS)
    for running in range(1, num_sequences + 1):
        for num in range(1, window + 1):
            assert running * num > 256 or any(own.num_rows >= running * num and own.window >= num for own in found)


# ---------------------------------------------------------------------- equal
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_repeated_passes_equal_launched_ones_whatever_fills_them_up(architecture: str) -> None:
    """Random mixtures, in passes of every number of rows; what was written is read by the next ones."""
    recorder = CallingRecorder()
    own, _ = recorded(recorder, architecture)
    launched, rng = model_of(architecture), random.Random(1)
    free = rng.sample(range(96), 96)
    tables, done = [[free.pop() for _ in range(12)] for _ in range(6)], [0] * 6
    num_rows, repeated = set[int](), recorder.num_repeated
    while min(done) < 40:
        running = [i for i in range(6) if done[i] < 44 and rng.random() < 0.8] or [done.index(min(done))]
        segments = [Segment(tables[i], done[i], rng.choice((1, 1, 2, 4))) for i in running]
        ids = torch.tensor([rng.randrange(VOCAB) for _ in range(sum(segment.num_tokens for segment in segments))])
        rows = sorted(rng.sample(range(len(ids)), rng.randint(-(-len(ids) // 4), len(ids))))
        got, want = (model.forward(segments, ids, rows) for model in (own, launched))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
        num_rows.add(len(ids))
        repeated += 1
        assert recorder.num_repeated == repeated
        for i, segment in zip(running, segments, strict=True):
            done[i] += rng.randint(0, segment.num_tokens)  # the rest is rolled back, and written again
    assert len(num_rows) > 10


def test_all_rows_of_a_pass_are_good_until_the_next() -> None:
    own, _ = recorded(CallingRecorder())
    segments, ids = batch((3, 2), (9, 1))
    first = own.states(segments, ids, range(3))
    kept = first.clone()
    assert first.shape == (3, HIDDEN)
    own.states(segments, ids.flip(0), range(3))
    assert not torch.equal(first, kept), "the docstring says so"


@pytest.mark.parametrize(
    ("segments", "wanted"),
    [
        pytest.param([(0, 5)], 5, id="a longer segment"),
        pytest.param([(0, 4)] * 7, 28, id="more rows than were recorded"),
        pytest.param([(47, 2)], 2, id="beyond the positions"),
    ],
)
def test_what_does_not_fit_is_launched(segments: list[tuple[int, int]], wanted: int) -> None:
    recorder = CallingRecorder()
    own, _ = recorded(recorder, passes=replace(PASSES, num_rows=24))
    placed, ids = batch(*segments)
    before = recorder.num_repeated
    torch.testing.assert_close(own.forward(placed, ids, range(wanted)), model_of().forward(placed, ids, range(wanted)), rtol=0, atol=1e-12)
    assert recorder.num_repeated == before


def test_a_part_of_a_vocabulary_is_given() -> None:
    cut = PagedModel(DecoderStack(copy.deepcopy(target_model()), choose_attention=lambda _: FixedGather()), 96, BLOCK, VOCAB - 4)
    segments, ids = batch((0, 2))
    want = cut.forward(segments, ids, [0, 1])
    cut.record(CallingRecorder(), PASSES, Bound(1, "target", print))
    assert torch.equal(cut.forward(segments, ids, [0, 1]), want)
    assert want.shape == (2, VOCAB - 4)


def test_a_reduced_vocabulary_is_given() -> None:
    ids = torch.tensor([3, 4, 9])
    cut = PagedModel(DecoderStack(copy.deepcopy(target_model()), draft_ids=ids, choose_attention=lambda _: FixedGather()), 96, BLOCK)
    segments, tokens = batch((0, 2))
    want = cut.forward(segments, tokens, [0, 1])
    recorder = CallingRecorder()
    cut.record(recorder, PASSES, Bound(1 << 30, "drafter", print))
    before = recorder.num_repeated
    assert torch.equal(cut.forward(segments, tokens, [0, 1]), want)
    assert recorder.num_repeated == before + 1


# ---------------------------------------------------------------------- rows
def test_a_pass_costs_what_its_bucket_costs() -> None:
    own, _ = recorded(CallingRecorder())
    assert [own.rows_run(num) for num in (1, 2, 3, 5, 9, 17, 25, 33)] == [1, 2, 4, 8, 16, 24, 32, rows_run(33)]
    assert [model_of().rows_run(num) for num in (1, 5, 17)] == [rows_run(1), rows_run(5), rows_run(17)]


def test_times_are_those_of_repeated_passes(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    stack = DecoderStack(copy.deepcopy(target_model()), choose_attention=lambda _: FixedGather())
    recorder = CallingRecorder()
    found = measure(stack, (1, 6, 32), recorder)
    assert tuple(found) == (1, 6, 32)
    assert recorder.num_repeated == recorder.num_recorded + 3 * 6, "each tried once, then measured"
    monkeypatch.setattr("engine.model.timing._WORTH_KEEPING_SECONDS", 0.0)
    monkeypatch.setattr("engine.model.timing.measure", lambda stack, sizes=(1,), recorder=None: {1: 1.0 if recorder else 2.0})
    assert pass_seconds(stack, {}, tmp_path, recorder) == {1: 1.0}  # type: ignore[arg-type]
    assert pass_seconds(stack, {}, tmp_path) == {1: 2.0}, "kept apart"  # type: ignore[arg-type]


# ---------------------------------------------------------------------- bounds and failures
def test_progress_and_what_came_of_it_are_said() -> None:
    recorder = CallingRecorder(cost=3 << 20)
    _, said = recorded(recorder)
    num = len(buckets(PASSES, (2, 4)))
    assert recorder.num_recorded == num
    assert [line.partition(" target ")[2] for line in said[:2]] == [f"[{'.' * 20}] 0 of {num}", f"[{'#' * 6}{'.' * 14}] 3 of {num}"]
    assert said[-1].startswith(f"CUDA graphs of the target: {num} of {num} in {3 * num} MiB")
    assert "more than 24 rows, are launched kernel by kernel" in said[-1]


def test_the_bound_is_kept() -> None:
    recorder = CallingRecorder(cost=10 << 20)
    model, said = recorded(recorder, bound=35 << 20)
    assert len(recorder.alive) == 3, "the fourth was one too many"
    assert any("3 of" in line for line in said)
    segments, ids = batch((0, 1))
    before = recorder.num_repeated
    want = model_of().forward(segments, ids, [0])
    torch.testing.assert_close(model.forward(segments, ids, [0]), want, rtol=0, atol=1e-12)
    assert recorder.num_repeated == before + 1, "a larger one serves it"
    assert recorded(CallingRecorder(cost=10 << 20), bound=5 << 20)[0].rows_run(1) == rows_run(1)


def test_what_passes_leave_takes_half_of_the_bound_at_most() -> None:
    recorder = CallingRecorder()
    model, _ = recorded(recorder, bound=2 * 9 * HIDDEN * 8)  # 9 rows of states in float64
    assert max(bucket.num_rows for bucket in model._graphs.buckets) == 8
    assert model.rows_run(9) == rows_run(9)
    for bound in (0, -1, HIDDEN):
        recorder = CallingRecorder()
        model, said = recorded(recorder, bound=bound)
        assert recorder.num_recorded == 0
        assert model._graphs.buckets == []
        assert said == ["No CUDA graphs of the target: of 0 MiB for them its states alone would take too much"]


def test_a_bucket_without_memory_is_left_out_and_smaller_ones_are_tried() -> None:
    recorder = CallingRecorder(spoil=lambda number: full() if recorder.num_recorded == 0 and not next(twice, True) else None)
    twice = iter([False, False])  # the two largest
    model, said = recorded(recorder)
    num = len(buckets(PASSES, (2, 4)))
    assert any(f"{num - 2} of {num}" in line for line in said)
    assert model.rows_run(24) == rows_run(24)
    assert model.rows_run(16) == 16


def test_what_cannot_be_recorded_is_launched_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    recorder = CallingRecorder(spoil=lambda number: broken() if number == 2 else None)
    model, _ = recorded(recorder)
    assert recorder.num_recorded == len(recorder.alive) == 2, "no further ones are tried"
    assert [record.message for record in caplog.records] == [
        "Passes of the target over 16 rows in windows of up to 2 cannot be recorded "
        "(operation not permitted when stream is capturing); no more are"
    ]
    segments, ids = batch((0, 1), (7, 2))
    torch.testing.assert_close(model.forward(segments, ids, range(3)), model_of().forward(segments, ids, range(3)), rtol=0, atol=1e-12)


def test_a_recording_that_gives_other_logits_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    class Forgetful(CallingRecorder):
        def record(self, run: object) -> object:  # type: ignore[override]
            return lambda: None

    model, _ = recorded(Forgetful())
    assert model.rows_run(1) == rows_run(1)
    assert re.search(r"cannot be recorded \(its logits are off by [1-9]\S* of the largest\)", caplog.text)


def test_attention_without_fixed_places_is_launched_and_said() -> None:
    recorder, said = CallingRecorder(), list[str]()
    model = model_of(kind=GATHER)
    model.record(recorder, PASSES, Bound(1 << 30, "drafter", said.append))
    assert said == ["No CUDA graphs of the drafter: attention by gather cannot be recorded, by triton it can"]
    assert recorder.num_recorded == 0
    assert model.rows_run(1) == rows_run(1)


def test_on_a_cpu_nothing_is_recorded() -> None:
    assert recorder_of("auto", torch.device("cpu")) is None
