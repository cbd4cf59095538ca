"""The engine's part of a deployment file. Unknown keys are refused, every bound is checked here, nothing is changed later.

Plug-ins are tagged unions: the drafter by `kind`, the draft-length policy by `policy`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, model_validator

from engine.dials import DIALS


class Section(BaseModel):
    """A group of keys: frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Quantization = Literal["none", "int8", "fp8"]
Dtype = Literal["auto", "float64", "float32", "bfloat16", "float16"]
CudaGraphs = Literal["auto", "off"]
AttentionName = Literal["auto", "gather", "triton", "varlen", "flashinfer"]  # as in engine/model/attention_choice.py
MOST_DRAFTS = 63  # of a round: with the token behind them they have a bit each in a number of 64, see TokenDelta.drafted_mask


class ModelSource(Section):
    """Weights, configs and tokenizer of one model."""

    source: str = Field(min_length=1, description="hub id, folder, .gguf file, or package:MODULE/FILE")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    dtype: Dtype = Field("auto", description="auto: the checkpoint's own on a GPU, float32 on a CPU")
    quantization: Quantization = Field("none", description="int8: weights of 8 bits; fp8: activations as well, on a GPU")


class NoDrafterConfig(Section):
    """The target alone."""

    has_probabilities: ClassVar[bool] = False
    kind: Literal["none"] = "none"


class NGramDrafterConfig(Section):
    """Prompt lookup: what followed the last few tokens when they last occurred in prompt or answer."""

    has_probabilities: ClassVar[bool] = False
    kind: Literal["ngram"] = "ngram"
    max_n: int = Field(3, ge=1, le=8, description="longest run of tokens that is looked up first")
    min_n: int = Field(1, ge=1, le=8, description="shortest run that is looked up")

    @model_validator(mode="after")
    def _ordered(self) -> NGramDrafterConfig:
        if self.min_n > self.max_n:
            raise ValueError(f"min_n is {self.min_n} and must be at most max_n, which is {self.max_n}")
        return self


class CopyingConfig(Section):
    """Part of the drafter's distribution goes to what followed the last few tokens when they last occurred."""

    doubt: float = Field(2.0, gt=0, le=1000, description="how long a run must be to get half; less copies more")


class ModelDrafterConfig(ModelSource):
    """A second, smaller model of the same vocabulary."""

    has_probabilities: ClassVar[bool] = True
    kind: Literal["model"] = "model"
    copying: CopyingConfig | None = Field(None, description="mix its rows with what followed the last tokens before; null: do not")
    target_states: bool = Field(
        True, description="read the target's last state, if it has learnt to, for exact requests, greedy or without a seed"
    )


DrafterConfig = Annotated[NoDrafterConfig | NGramDrafterConfig | ModelDrafterConfig, Field(discriminator="kind")]


class FixedLengthConfig(Section):
    """Always `max` drafts, as far as budget and memory allow."""

    policy: Literal["fixed"] = "fixed"
    max: int = Field(4, ge=0, le=MOST_DRAFTS)


class HeuristicLengthConfig(Section):
    """Two more after a round in which all drafts were accepted, one fewer otherwise."""

    policy: Literal["heuristic"] = "heuristic"
    start: int = Field(4, ge=1, le=MOST_DRAFTS)
    max: int = Field(8, ge=1, le=MOST_DRAFTS)

    @model_validator(mode="after")
    def _ordered(self) -> HeuristicLengthConfig:
        if self.start > self.max:
            raise ValueError(f"start is {self.start} and must be at most max, which is {self.max}")
        return self


class ConfidenceLengthConfig(Section):
    """Stops drafting behind a row of which the drafter is unsure. The threshold adapts to what becomes of the drafts."""

    policy: Literal["confidence"] = "confidence"
    max: int = Field(8, ge=0, le=MOST_DRAFTS)
    threshold: float = Field(0.4, ge=0, le=1, description="to begin with")
    cumulative: bool = Field(False, description="compare the product of all confidences of a round, not the newest one")


class AdaptiveLengthConfig(Section):
    """As many drafts, zero included, as bring most tokens a second, by what stood so far and what passes cost here."""

    policy: Literal["adaptive"] = "adaptive"
    max: int = Field(8, ge=0, le=MOST_DRAFTS)


LengthConfig = Annotated[
    FixedLengthConfig | HeuristicLengthConfig | ConfidenceLengthConfig | AdaptiveLengthConfig, Field(discriminator="policy")
]

RuleName = Literal[
    "exact", "lossy", "chow", "diff", "opt", "token_v1", "token_v2", "token_v3", "chow_log", "diff_log", "bild"
]  # as in engine/dials.py
Alpha = Annotated[float | None, Field(description="the rule's dial: larger trusts the drafter more; null: the rule's default")]


class ModelPair(Section):
    """What is served, and what drafts for it."""

    name: str = Field(min_length=1, pattern=r"^[^:\s]+$", description="the model id that clients send")
    aliases: tuple[Annotated[str, Field(min_length=1, pattern=r"^[^:\s]+$")], ...] = Field((), description="further ids for it")
    target: ModelSource
    drafter: DrafterConfig = NoDrafterConfig()


class Preset(Section):
    """Speculation settings served under a model id of their own, NAME:PRESET."""

    enabled: bool = True
    rule: RuleName | None = Field(None, description="null: the deployment's")
    alpha: Alpha = None
    max_draft: int | None = Field(None, ge=0, le=MOST_DRAFTS)


class SpeculationConfig(Section):
    """How drafts are judged and how many there are, unless the request says otherwise."""

    rule: RuleName = "exact"
    alpha: Alpha = None
    verification: Literal["token", "block"] = Field("token", description="block: more drafts stand, and a seed fixes the law, not the text")
    draft_length: LengthConfig = AdaptiveLengthConfig()
    presets: dict[Annotated[str, Field(min_length=1, pattern=r"^[^:\s]+$")], Preset] = {}
    allow_rules: tuple[RuleName, ...] | None = Field(None, description="rules that a request may ask for; null: all")
    max_alpha: dict[RuleName, float] = Field({}, description="the largest alpha that a request may ask for, by rule")

    def judged_by(self, preset: Preset | None = None) -> tuple[RuleName, float]:
        """Rule and alpha of requests that name none."""
        if preset is None or preset.rule in (None, self.rule):
            rule, alpha = self.rule, self.alpha
        else:
            rule, alpha = preset.rule, None
        alpha = preset.alpha if preset is not None and preset.alpha is not None else alpha
        return rule, DIALS[rule].default if alpha is None else alpha


def _none_if_auto(value: object) -> object:
    return None if value == "auto" else value


class RuntimeConfig(Section):
    """Device, memory and batch."""

    device: str = Field("auto", description="auto, cpu, cuda or cuda:N; auto takes a GPU when there is one")
    max_sequences: int = Field(32, ge=1, le=4096, description="answers that run at the same time")
    max_step_tokens: int = Field(256, ge=1, le=1_048_576, description="tokens of a target pass: prompt chunks and verify windows")
    max_drafter_tokens: int | None = Field(None, ge=1, description="tokens that the drafter runs in a step; null: max_step_tokens")
    block_size: int = Field(16, ge=1, le=1024, description="positions in a KV block")
    kv_cache: Annotated[Annotated[ByteSize, Field(ge=1)] | None, BeforeValidator(_none_if_auto)] = Field(
        None, description="memory for KV of target and drafter together, such as 1GiB; auto: on a CPU 1GiB, on a GPU what is left"
    )
    gpu_memory_fraction: float = Field(0.9, gt=0, le=1, description="of a GPU's memory, what weights, kv_cache: auto and steps may take")
    max_model_len: int | None = Field(None, ge=2, description="tokens of prompt and answer; null: what model and kv_cache allow")
    attention: AttentionName = Field("auto", description="auto: gather on a CPU; on a GPU what is fastest there of all that is installed")
    cuda_graphs: CudaGraphs = Field("auto", description="auto: on a GPU, record small passes at the start, where attention can be recorded")
    cuda_graph_memory: Annotated[ByteSize, Field(ge=1)] = Field(
        ByteSize(1 << 30), description="what recorded passes of both models may take of a GPU's memory, such as 1GiB"
    )
    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads for tensor work; null leaves it to torch")


class EngineConfig(Section):
    """Everything that builds one engine."""

    model: ModelPair
    speculation: SpeculationConfig = SpeculationConfig()
    engine: RuntimeConfig = RuntimeConfig()

    @model_validator(mode="after")
    def _can_judge(self) -> EngineConfig:
        """Every rule that the file names can read what this drafter gives, and every alpha means something to its rule."""
        speculation, drafter = self.speculation, self.model.drafter
        named = {"": (speculation.rule, speculation.alpha)}
        named |= {f"presets.{name}.": (speculation.judged_by(preset)[0], preset.alpha) for name, preset in speculation.presets.items()}
        for place, (rule, alpha) in named.items():
            if DIALS[rule].needs_q and not drafter.has_probabilities:
                raise ValueError(
                    f"speculation.{place}rule: {rule} - reads the drafter's probabilities, and a drafter of kind {drafter.kind} has none"
                )
            _check_alpha(f"speculation.{place}alpha", rule, alpha)
        for rule, bound in speculation.max_alpha.items():
            _check_alpha(f"speculation.max_alpha.{rule}", rule, bound)
        return self


def _check_alpha(key: str, rule: RuleName, alpha: float | None) -> None:
    if alpha is not None and (mistake := DIALS[rule].mistake(alpha)):
        raise ValueError(f"{key}: {alpha:g} - {mistake} for the rule {rule}")
