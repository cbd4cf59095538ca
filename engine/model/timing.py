"""How long a pass of a model takes on this device, by the rows that it runs. Measured once for a model, device and torch, and kept.

A table that was measured while the machine was busy would mislead every start from then on, so each start looks at one pass: where it is
far quicker than what was kept, all is measured again, and the lesser times stay. A table that cannot be read or written is measured again
and said; it costs a start a second or two, nothing else.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import tempfile
import time
from collections.abc import Mapping
from collections.abc import Sequence as ListLike
from pathlib import Path

import torch

from engine.model.attention import Segment
from engine.model.graphs import Bound, Passes, Recorder
from engine.model.paged import PagedModel
from engine.model.stack import DecoderStack

_log = logging.getLogger(__name__)

MEASURED_ROWS = (1, 2, 4, 6, 8, 16, 32)
_CONTEXT = 128  # positions in front of every row
_REPETITIONS = 5
_BUDGET_SECONDS = 2.0  # no further number of rows is begun behind it; what a large model does not get measured here it learns as it runs
_WORTH_KEEPING_SECONDS = 0.5
_FAR_QUICKER = 0.8  # than what was kept


def pass_seconds(stack: DecoderStack, key: Mapping[str, str], cache_dir: Path, recorder: Recorder | None = None) -> dict[int, float]:
    """Seconds by rows, of recorded passes where there is a recorder. `key` says whose they are; processor, threads, torch, block size
    and whether passes are recorded are added to it.

    Raise "kernels" when passes begin to take another time for the same weights.
    """
    device = torch.cuda.get_device_name(stack.device) if stack.device.type == "cuda" else platform.processor() or platform.machine()
    whose = {
        **key,
        "statistic": "least",
        "kernels": "4",
        "device": device,
        "threads": str(torch.get_num_threads()),
        "block_size": str(stack.block_size),
        "torch": torch.__version__,
        "recorded": str(recorder is not None),
    }
    file = cache_dir / "costs" / f"{hashlib.sha256(json.dumps(whose, sort_keys=True).encode()).hexdigest()[:16]}.json"
    known = _read(file, whose)
    if known is not None:
        first = min(known)
        if measure(stack, (first,), recorder)[first] >= _FAR_QUICKER * known[first]:
            return known
    began = time.perf_counter()
    found = measure(stack, recorder=recorder)
    if time.perf_counter() - began > _WORTH_KEEPING_SECONDS or known is not None:
        found = {rows: min(seconds, (known or found).get(rows, seconds)) for rows, seconds in found.items()}
        _write(file, whose, found)
    return found


@torch.inference_mode()
def measure(stack: DecoderStack, sizes: ListLike[int] = MEASURED_ROWS, recorder: Recorder | None = None) -> dict[int, float]:
    """Least seconds of passes over each of `sizes`, a row being one token of a sequence with some context, whose keys are zeros.

    The least: what disturbs a pass only ever makes it longer.
    """
    num_blocks = (_CONTEXT + max(sizes)) // stack.block_size + 1
    model, table = PagedModel(stack, num_blocks, stack.block_size), list(range(num_blocks))
    if recorder is not None:
        passes = Passes(1, max(sizes), max(sizes), num_blocks * stack.block_size)
        model.record(recorder, passes, Bound(recorder.free_bytes() // 2, "model whose passes are timed", _log.debug))
    found: dict[int, float] = {}
    began = time.perf_counter()
    for rows in sizes:
        if found and time.perf_counter() - began > _BUDGET_SECONDS:
            break
        _seconds(model, table, _CONTEXT, rows)  # the first of a shape compiles and allocates
        found[rows] = min(_seconds(model, table, _CONTEXT, rows) for _ in range(_REPETITIONS))
    return found


def _seconds(model: PagedModel, table: list[int], start: int, rows: int) -> float:
    ids = torch.zeros(rows, dtype=torch.long, device=model.stack.device)
    began = time.perf_counter()
    states = model.states([Segment(table, start, rows)], ids, range(rows))
    if (adapter := model.stack.adapter) is not None:
        states = adapter(states, states.new_zeros(rows, adapter.target_hidden_size), is_targets=True)
    float(model.logits(states)[-1, 0])  # waits for the device
    return time.perf_counter() - began


def _read(file: Path, whose: Mapping[str, str]) -> dict[int, float] | None:
    try:
        content = json.loads(file.read_text("utf-8"))
        found = {int(rows): float(seconds) for rows, seconds in content["seconds"].items()}
        is_ours = content["key"] == dict(whose) and set(found) <= set(MEASURED_ROWS) and all(seconds > 0 for seconds in found.values())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("The times kept in %s cannot be read (%s); they are measured again", file, error)
        return None
    return found if is_ours and found else None


def _write(file: Path, whose: Mapping[str, str], seconds: Mapping[int, float]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".part", delete=False, encoding="utf-8") as out:
            json.dump({"key": dict(whose), "seconds": dict(seconds)}, out)
        os.replace(out.name, file)
    except OSError as error:
        _log.warning("Measured times cannot be kept in %s (%s); the next start measures them again", file.parent, error)
