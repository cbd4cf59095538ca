"""The recipe of a drafter: what a file for `cascade train distil` says. Unknown keys are refused, every bound is checked here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ByteSize, Field, model_validator

from engine.config import ModelSource, Section

Learns = Literal["all", "adapter"]
Name = Annotated[str, Field(min_length=1, pattern=r"^[^:\s]+$")]


class InitConfig(Section):
    """What the drafter begins with."""

    embedding: Literal["random", "target"] = Field(
        "target", description="target: the target's own where it is as wide, else its directions of largest variance; or random"
    )
    drafter: str | None = Field(
        None,
        min_length=1,
        description="folder of a drafter of this shape, to train further; a vocabulary of its size stays, the rest is ignored",
    )
    from_target_layers: tuple[Annotated[int, Field(ge=0)], ...] = Field((), description="one layer of the target for each of the drafter's")


class StateAdapterShape(Section):
    """What the drafter learns to read of its target's last states."""

    width: int = Field(ge=1, description="of its hidden layer")
    drafts: int = Field(1, ge=1, le=16, description="so many in a row learn to read, each the one before; further ones read nothing")


class DrafterShape(Section):
    """The model that is trained."""

    model_type: str = Field("llama", description="any that the engine serves")
    hidden_size: int = Field(ge=2)
    num_layers: int = Field(ge=1, le=512)
    num_heads: int = Field(ge=1)
    num_kv_heads: int | None = Field(None, ge=1, description="null: as many as num_heads")
    head_dim: int | None = Field(None, ge=2, description="null: hidden_size / num_heads")
    intermediate_size: int = Field(ge=1)
    tie_embeddings: bool = Field(True, description="the head is the embedding; means nothing where the target's are taken")
    embedding: Literal["own", "target"] = Field(
        "own", description="target: embedding and head are the target's, neither trained nor stored; needs its hidden_size"
    )
    draft_vocabulary: int | None = Field(None, ge=2, description="drafts only so many tokens, the most frequent of the data; null: all")
    init: InitConfig = InitConfig()
    state_adapter: StateAdapterShape | None = Field(None, description="null: it drafts from the text alone")
    dtype: Literal["float32", "float16", "bfloat16"] = Field("float16", description="of the exported weights; training keeps float32")
    options: dict[str, Any] = Field({}, description="further entries of the transformers config, such as rope_theta of a kind")

    @model_validator(mode="after")
    def _consistent(self) -> DrafterShape:
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size is {self.hidden_size} and must be a multiple of num_heads, which is {self.num_heads}")
        if self.num_heads % (self.num_kv_heads or self.num_heads):
            raise ValueError(f"num_heads is {self.num_heads} and must be a multiple of num_kv_heads, which is {self.num_kv_heads}")
        if self.init.from_target_layers and len(self.init.from_target_layers) != self.num_layers:
            raise ValueError(f"init.from_target_layers names {len(self.init.from_target_layers)} layers and must name {self.num_layers}")
        if self.draft_vocabulary is not None and not self.tie_embeddings and self.embedding == "own":
            raise ValueError("draft_vocabulary needs tie_embeddings: its head is some rows of the embedding")
        return self


class SelfSource(Section):
    """The target asks itself: it continues the bare start of a user's turn."""

    kind: Literal["self"] = "self"
    name: Name = "self"
    weight: float = Field(1.0, gt=0, allow_inf_nan=False, description="its share of the examples, relative to the others")
    temperature: float = Field(0.9, ge=0, le=10, allow_inf_nan=False, description="of the questions")
    top_p: float = Field(1.0, gt=0, le=1, description="of the questions; below 1 a step takes half as long again on a CPU")
    max_tokens: int = Field(192, ge=1, description="of a question")


class FileSource(Section):
    """Prompts from a file, a JSON object a line: prompt, question, turns, messages, or instruction with input or instances."""

    kind: Literal["file"]
    name: Name
    path: str = Field(min_length=1)
    weight: float = Field(1.0, gt=0, allow_inf_nan=False, description="its share of the examples, relative to the others")


Source = Annotated[SelfSource | FileSource, Field(discriminator="kind")]


class TemperatureShare(Section):
    """A temperature that answers are sampled at, and its share of them."""

    temperature: float = Field(ge=0, le=10, allow_inf_nan=False)
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)


class DataConfig(Section):
    """Answers of the target, kept as shards."""

    folder: str = Field(min_length=1, description="where shards are kept; one that is there is not made again")
    num_tokens: int = Field(ge=1, description="tokens of answers; shards are made until there are so many")
    sources: tuple[Source, ...] = Field(default=(SelfSource(),), min_length=1)
    temperatures: tuple[TemperatureShare, ...] = Field(
        default=(TemperatureShare(temperature=0.0, weight=0.4), TemperatureShare(temperature=1.0, weight=0.6)), min_length=1
    )
    max_tokens: int = Field(512, ge=1, description="of an answer")
    max_prompt_tokens: int = Field(512, ge=1, description="longer prompts are left out")
    examples_per_shard: int = Field(512, ge=1, le=1_000_000)
    batch: int = Field(64, ge=1, le=4096, description="answers that are written at the same time")
    kv_cache: ByteSize = Field(ByteSize(4 << 30), ge=1, description="memory for their keys and values")
    seed: int = Field(0, ge=0, le=2**63 - 1)

    @model_validator(mode="after")
    def _names_differ(self) -> DataConfig:
        names = [source.name for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"sources: the name {name!r} is used twice")
        return self


class TrainingConfig(Section):
    """How the drafter learns. Tokens are those of answers; prompts are read and not learnt."""

    folder: str = Field(min_length=1, description="where checkpoint and log are kept; a run that was ended goes on from there")
    tokens: int | None = Field(None, ge=1, description="how many are learnt from, repeats included; this or steps")
    steps: int | None = Field(None, ge=1)
    batch_tokens: int = Field(4096, ge=1, description="of an optimizer step, at least")
    pass_tokens: int = Field(4096, ge=1, description="of one pass, prompts and padding included; decides memory, not what is learnt")
    logit_rows: int = Field(512, ge=1, description="rows over the vocabulary that are held at a time; likewise")
    learning_rate: float = Field(1e-3, gt=0, allow_inf_nan=False)
    final_learning_rate: float = Field(0.05, ge=0, le=1, description="relative to learning_rate, at the end of the cosine")
    warmup: float = Field(0.02, ge=0, lt=1, description="share of the run in which the learning rate rises")
    weight_decay: float = Field(0.01, ge=0, allow_inf_nan=False, description="of matrices, the embedding aside")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    gradient_clip: float = Field(1.0, gt=0, description="largest norm of the gradient of a mean over tokens")
    loss: Literal["kl", "tv"] = "kl"
    learns: Learns = Field("all", description="adapter: drafter.state_adapter alone; the model stays as it begins")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the products of both models; what is trained, and losses, stay float32"
    )
    keep_states: bool = Field(
        False, description="keep the target's last hidden states on disk, so that only the first time through the data runs the target"
    )
    validation_share: float = Field(0.02, ge=0, le=0.5, description="of the prompts, none of which is trained on")
    validation_tokens: int = Field(8192, ge=1, description="at most so many of each source")
    validate_every: int = Field(200, ge=1, description="steps")
    checkpoint_every: int = Field(100, ge=1, description="steps")
    seed: int = Field(0, ge=0, le=2**63 - 1)

    @model_validator(mode="after")
    def _one_length(self) -> TrainingConfig:
        if (self.tokens is None) == (self.steps is None):
            raise ValueError("training needs exactly one of tokens and steps")
        return self


class DistilConfig(Section):
    """Everything that makes one drafter."""

    target: ModelSource
    drafter: DrafterShape
    data: DataConfig
    training: TrainingConfig
    output: str = Field(min_length=1, description="folder of the finished drafter")
    max_file_size: ByteSize = Field(ByteSize(15 << 20), ge=4096, description="of its files; larger weights are spread over several")
    licence: str = Field("Apache-2.0", min_length=1, description="for the card")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads; null leaves it to torch")

    @model_validator(mode="after")
    def _something_to_learn(self) -> DistilConfig:
        if self.training.learns == "adapter" and (self.drafter.state_adapter is None or self.drafter.init.drafter is None):
            raise ValueError("training.learns is adapter, which needs drafter.state_adapter and drafter.init.drafter")
        return self
