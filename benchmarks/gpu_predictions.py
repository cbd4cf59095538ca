"""The bars of `benchmarks.gpu`: what is promised, on what weights, and what is expected, with its arithmetic. Measures nothing."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.speed import Bar

RANDOM = "random weights"
TUNED = "random weights, agreement tuned to {}, drafter: the target's first layer and its head"
REAL = "real weights and text"


@dataclass(frozen=True, kw_only=True)
class GpuBar(Bar):
    """What is promised, on what weights, and what is expected."""

    weights: str = RANDOM
    predicted: float
    why: str  # the arithmetic of the prediction


# Predictions are for one H100 SXM (3.35 TB/s, of which copies reach 2.9; 650 Tflop/s of 989 for real matrices) and were written on
# 2026-11-22, before this engine had run there with these shapes. A kernel that is launched by itself takes 10 us of the host, one that was
# recorded 2 us of the GPU. Passes of drafter and target are recorded but for prompts and those over more than 256 rows.
BARS: dict[str, GpuBar] = {
    "decode-1": GpuBar(
        "8B, one stream, no drafts: bytes of weights and KV read a second, of the bytes copied a second",
        75.0,
        "at least",
        " %",
        predicted=70.0,
        why="15.0 GB are 5.2 ms of copying; 32 layers of 16 small kernels, recorded, 1.1 ms; and 1.1 ms sample and schedule: 7.4 ms",
    ),
    "decode-64": GpuBar(
        "8B, 64 streams of 1,000 tokens, no drafts: the same",
        60.0,
        "at least",
        " %",
        predicted=60.0,
        why="15.0 GB and 8.9 GB of KV are 8.2 ms of copying; KV read where it lies, sampling and scheduling of 64 take 5 ms more",
    ),
    "verify-6": GpuBar(
        "8B, a pass over 6 tokens over a pass over 1: time",
        1.10,
        "at most",
        "x",
        predicted=1.03,
        why="the weights are read once for both; 6 rows leave the tensor cores idle as 1 does; KV and head are a little more",
    ),
    "idle-32": GpuBar(
        "8B, 32 streams, no drafts: the share of a step in which the GPU does nothing",
        8.0,
        "at most",
        " %",
        predicted=17.0,
        why="busy for 15.0 GB and small kernels: 7.4 ms; 1.5 ms of planning and of reading the verdict lie between",
    ),
    "prefill": GpuBar(
        "8B, a prompt of 8,192 tokens: operations a second, of those of a product of matrices",
        55.0,
        "at least",
        " %",
        predicted=50.0,
        why="132 Tflop are 0.20 s at 650 Tflop/s; norms, rotation, activations and KV move 0.3 TB (0.1 s); attention at half the rate",
    ),
    "draft-step": GpuBar(
        "0.6B, one stream: time of a drafted token over that of copying the weights it reads",
        1.5,
        "at most",
        "x",
        predicted=3.0,
        why="1.14 GB are 0.39 ms of copying; 28 layers of 12 small kernels, recorded, 0.6 ms; drawing 0.2 ms. Launched one by one: 14",
    ),
    "fused": GpuBar(
        "8B, a pass over 1 token with torch's operations between products over one with our kernels: time",
        1.0,
        "at least",
        "x",
        predicted=1.2,
        why="a layer launches 4 kernels for 23 and 12 for 31 in all: busy for 5.2 ms and 2 us a kernel, 7.2 over 6.0 ms, recorded or not",
    ),
    "int8": GpuBar(
        "8B, one stream, no drafts, 8-bit weights: tokens/s over bfloat16",
        1.0,
        "at least",
        "x",
        predicted=1.4,
        why="7.5 GB for 15.0: 2.6 ms less of 7.4; a prompt takes a copy of weights",
    ),
    "fp8": GpuBar(
        "8B, one stream, no drafts, 8-bit floating point: tokens/s over bfloat16",
        1.0,
        "at least",
        "x",
        predicted=1.2,
        why="2.6 ms less of reading, but 129 layers round inputs with 5 kernels each: recorded 1.3 ms more",
    ),
    "recorded-1": GpuBar(
        "8B, one stream, no drafts: tokens/s with recorded passes over kernels that are launched one by one",
        1.0,
        "at least",
        "x",
        predicted=1.15,
        why="7.4 ms; one by one 640 launches are 6.4 ms beside 6.3 ms of reading and small kernels, and hide what samples: 8.5 ms",
    ),
    "recorded-drafts": GpuBar(
        "8B, one stream, five drafts at a time: tokens/s with recorded passes over kernels that are launched one by one",
        1.0,
        "at least",
        "x",
        weights=TUNED.format(0.8),
        predicted=1.25,
        why="a round of 7.4 ms and 5 drafts of 0.75 ms for one of 8.5 ms and 5 of 1.1 ms: 11.1 ms for 14",
    ),
    "generate": GpuBar(
        "8B, one stream, five drafts at a time: tokens/s over transformers' generate, no drafts",
        4.0,
        "at least",
        "x",
        weights=TUNED.format(0.8),
        predicted=5.5,
        why="generate takes 25 ms a token; a round takes 8 ms and 5 drafts of 1.2 ms, and brings 3.7 tokens: 3.8 ms, prompt included 4.5",
    ),
    "generate-assisted": GpuBar(
        "8B, one stream, five drafts at a time: tokens/s over generate with the same drafter as its assistant_model",
        3.0,
        "at least",
        "x",
        weights=TUNED.format(0.8),
        predicted=2.8,
        why="its round takes 28 ms and 5 drafts of 3 ms, ours 14 ms, for the same 3.7 tokens",
    ),
    "agreement-0.8": GpuBar(
        "8B, one stream, five drafts at a time: tokens/s over no drafts",
        2.0,
        "at least",
        "x",
        weights=TUNED.format(0.8),
        predicted=2.1,
        why="(1 - 0.8^6) / 0.2 = 3.69 tokens for a pass and 5 drafts of 9.3 % of its bytes each: 2.5; launches make a draft 15 %",
    ),
    "agreement-0.7": GpuBar(
        "8B, one stream, five drafts at a time: tokens/s over no drafts",
        1.0,
        "at least",
        "x",
        weights=TUNED.format(0.7),
        predicted=1.7,
        why="(1 - 0.7^6) / 0.3 = 2.94 tokens for the same",
    ),
    "agreement-0.6": GpuBar(
        "8B, one stream, five drafts at a time: tokens/s over no drafts",
        1.0,
        "at least",
        "x",
        weights=TUNED.format(0.6),
        predicted=1.35,
        why="(1 - 0.6^6) / 0.4 = 2.38 tokens for the same",
    ),
    **{
        f"adaptive-{num}": GpuBar(
            f"8B, {num} stream{'s' * (num > 1)}, adaptive lengths: tokens/s over no drafts",
            0.98,
            "at least",
            "x",
            weights=TUNED.format(0.8),
            predicted=predicted,
            why=why,
        )
        for num, predicted, why in (
            (1, 2.0, "as agreement-0.8, less what choosing costs"),
            (8, 1.8, "48 rows still cost what 8 do; what each stream's drafts cost the host grows"),
            (32, 1.5, "192 rows are at the ridge of the tensor cores (650 Tflop/s over 2.9 TB/s: 224 rows)"),
            (128, 1.05, "128 rows are half way to the ridge: a draft more for each costs nearly what it brings"),
        )
    },
    "real-text": GpuBar(
        "the embedded pair of 135 million parameters, one stream, exact: tokens/s over no drafts",
        0.98,
        "at least",
        "x",
        weights=REAL,
        predicted=1.0,
        why="every pass of so small a model is launches alone, and a draft's are a tenth of them: drafts pay where they stand",
    ),
}
