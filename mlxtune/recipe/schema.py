"""The keys of a recipe, their types, bounds and defaults."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainValidator,
    field_validator,
    model_validator,
)

from mlxtune.recipe.judge import JudgeSection
from mlxtune.recipe.objectives import DEFAULTS, TABLES, DpoSection
from mlxtune.recipe.section import Name, Names, PositiveInt, Section, listed


def _whole_above_one(value: float) -> float:
    if value >= 1 and value != int(value):
        raise ValueError("is a share below 1 or a whole number of records")
    return value


def _blocks(value: object) -> object:
    """What `lora.layers` may be; told in one sentence rather than a type at a time."""
    if value is None or (type(value) is int and value >= 1):
        return value
    if isinstance(value, str) and "-" in value:
        value = listed(value)
    if not isinstance(value, list | tuple) or not value:
        raise ValueError('is a number of blocks or a list such as [0, 1, "8-15"]')
    for part in value:
        if type(part) is int and part >= 0:
            continue
        ends = part.split("-") if isinstance(part, str) else []
        if len(ends) != 2 or not all(end.strip().isdecimal() for end in ends):
            raise ValueError(f'{part!r} is neither a block number nor a range such as "8-15"')
        if int(ends[0]) > int(ends[1]):
            raise ValueError(f"{part!r} runs backwards")
    return tuple(value)


TemplateValue = bool | int | float | str | list[str]
Blocks = Annotated[int | tuple[int | str, ...] | None, PlainValidator(_blocks)]


class ModelSection(Section):
    """`[model]`: what is trained.

    `path` is a hub id, a folder, a `.gguf` file, `pkg:PACKAGE/FILE` or `ollama:NAME`.
    `quantize` packs the projections to that many bits, or in that mode, while loading
    (QLoRA), and `double_quantization` the scales of `nf4`; `dequantize` does the opposite
    to a packed model: faster steps, more memory. `quantized_matmul` says whether products
    take packed weights as they are or expand them first. `chat_template` names a Jinja file
    that replaces the model's own template, and `chat_template_kwargs` are values for its
    variables, such as `enable_thinking = false`; by default, whether the model is asked to think
    is what the data has. `chat_template_date`, the day of the run by default, is the date that
    templates write which write today's.
    """

    path: str = Field(min_length=1)
    revision: str | None = None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    quantize: Literal[2, 3, 4, 5, 6, 8, "mxfp4", "mxfp8", "nvfp4", "nf4"] | None = None
    double_quantization: bool = True
    dequantize: bool = False
    quantized_matmul: Literal["auto", "packed", "expand"] = "auto"
    chat_template: str | None = None
    chat_template_kwargs: dict[str, TemplateValue] = Field(default={})
    chat_template_date: str | None = None

    @field_validator("chat_template_kwargs")
    @classmethod
    def _names(cls, values: dict[str, Any]) -> dict[str, Any]:
        for name in values:
            if not name.isidentifier():
                raise ValueError(f"{name!r} is no name of a template's variable")
        return values

    @field_validator("chat_template_date")
    @classmethod
    def _a_day(cls, value: str | None) -> str | None:
        try:
            return value if value is None else date.fromisoformat(value).isoformat()
        except ValueError:
            raise ValueError("should be a date such as 2026-01-31") from None

    @model_validator(mode="after")
    def _one_way(self) -> ModelSection:
        if self.dequantize and self.quantize is not None:
            raise ValueError("quantize and dequantize exclude each other")
        if not self.double_quantization and self.quantize != "nf4":
            raise ValueError('double_quantization goes with quantize = "nf4"')
        if self.quantized_matmul == "packed" and self.quantize == "nf4":
            raise ValueError("MLX multiplies by no packed nf4: leave quantized_matmul out")
        return self


class LoraSection(Section):
    """`[lora]`: the adapter. Its scale is alpha / rank, or alpha / sqrt(rank) with rslora.

    `target_modules` and `exclude_modules` name projections as `models.targets` reads
    them. `layers` is how many of the last blocks are adapted, or a list of their numbers
    from 0 and ranges such as "8-15", both ends in. With `init_from`, a run or an adapter's
    folder, training starts from that adapter.
    """

    rank: PositiveInt = 8
    alpha: float = Field(default=16.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: Names = ("all-linear",)
    exclude_modules: Annotated[tuple[str, ...], Field(strict=False)] = ()
    layers: Blocks = None
    rslora: bool = False
    dora: bool = False
    init_from: str | None = Field(default=None, min_length=1)

    @property
    def scale(self) -> float:
        """Factor on the low-rank update."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


FormatName = Literal[
    "auto",
    "shell",
    "messages",
    "sharegpt",
    "alpaca",
    "preference",
    "prompt_completion",
    "input_output",
    "text",
]
Columns = Annotated[dict[str, str], Field(strict=False)]


def _two_tags(tags: tuple[str, ...]) -> tuple[str, ...]:
    if len(tags) != 2 or not all(tag.strip() for tag in tags):
        raise ValueError('should be the tags before and after reasoning: ["<think>", "</think>"]')
    return tags


Tags = Annotated[tuple[str, ...], Field(strict=False), AfterValidator(_two_tags)]


class DataSource(Section):
    """`[[data]]`: a source of records, and what of them is trained.

    `path` is a file, a folder, a pattern or `hub:OWNER/NAME`; `split`, `train` by default,
    and `subset` are a folder's or a hub dataset's. `columns` says what the fields of the
    format are called in it. `system` is a system prompt for records that have none.
    `max_samples` takes the first so many records. In each epoch of the run every record
    is seen `epochs` times; with `weight` instead, on all sources, a source fills that
    part of the epoch. `truncate` says what becomes of a record over
    `train.max_seq_length`, `unusable` of one that cannot be trained on: damaged, of no known
    shape, refused by the chat template, or without a token that is trained.
    `missing_reasoning` says what becomes of an answer without reasoning where the chat template
    asks the model to think: its thought is `empty`, the record is left out (`skip`) or refused.
    `reasoning` says what becomes of the reasoning of an answer where the template has no place
    for it: the record is refused, or it is written into the answer between `reasoning_tags`
    (`inline`); with `drop` it is left out whatever the template. With `left_out = "warn"` other
    things that the template leaves out of a record are counted instead of refused.
    """

    path: str = Field(min_length=1)
    format: FormatName = "auto"
    columns: Columns = Field(default={})
    split: str | None = None
    subset: str | None = None
    system: str | None = Field(default=None, min_length=1)
    max_samples: PositiveInt | None = None
    epochs: float | None = Field(default=None, gt=0)
    weight: float | None = Field(default=None, gt=0)
    roles_to_train: Annotated[
        tuple[Literal["system", "user", "assistant", "tool"], ...],
        Field(strict=False, min_length=1),
    ] = ("assistant",)
    train_on_inputs: bool = False
    truncate: Literal["error", "left", "right", "drop"] = "error"
    unusable: Literal["error", "skip"] = "error"
    missing_reasoning: Literal["empty", "skip", "refuse"] = "empty"
    reasoning: Literal["refuse", "inline", "drop"] = "refuse"
    reasoning_tags: Tags = ("<think>", "</think>")
    left_out: Literal["refuse", "warn"] = "refuse"

    @model_validator(mode="after")
    def _one_share(self) -> DataSource:
        if self.epochs is not None and self.weight is not None:
            raise ValueError("epochs and weight exclude each other")
        return self


class PrepSection(Section):
    """`[prep]`: what `mlxtune data prep` does to records before they are trained on."""

    drop_unreadable: bool = True
    fix_encoding: bool = True
    drop_refusals: bool = True
    drop_empty: bool = True
    drop_echo: bool = True
    languages: Annotated[tuple[str, ...], Field(strict=False)] = ()
    min_chars: PositiveInt | None = None
    max_chars: PositiveInt | None = None
    scrub: Annotated[
        tuple[Literal["email", "ip", "phone", "card", "secret", "presidio"], ...],
        Field(strict=False),
    ] = ()
    phone_region: str = "US"
    dedup: Literal["off", "exact", "near"] = "near"
    dedup_threshold: float = Field(default=0.85, gt=0, le=1)
    dedup_permutations: int = Field(default=128, ge=16, le=1024)
    dedup_shingle: PositiveInt = 5
    val_size: float = Field(default=0.0, ge=0)
    group_by: str | None = None
    balance_by: str = "category"

    @field_validator("phone_region")
    @classmethod
    def _a_country(cls, value: str) -> str:
        if len(value) != 2 or not (value.isascii() and value.isalpha() and value.isupper()):
            raise ValueError("should be a country's two capital letters, such as US")
        return value

    @field_validator("val_size")
    @classmethod
    def _share_or_count(cls, value: float) -> float:
        return _whole_above_one(value)


class TrainSection(Section):
    """`[train]`: how it is trained.

    The rate rises over `warmup_ratio` of all steps, or over `warmup_steps` of them.
    `decay_ratio` is the share of all steps over which `warmup_stable_decay` goes to zero,
    and `min_lr_ratio` the share of the rate that schedules end at instead of zero.
    With `lora_plus_ratio` the B matrices of adapters learn that many times faster. The
    `adam_` keys take the place of the optimizer's own values, where it has them. With
    `neftune_noise_alpha` embeddings carry noise in training (NEFTune).
    `gradient_checkpointing` computes blocks a second time instead of keeping what they
    computed: all of them, every k-th, or with `auto` no more than `memory_limit` asks for
    (GB; by default what the device recommends). `wired_memory` keeps a Mac from paging out the
    model's weights.
    """

    epochs: float = Field(default=3.0, gt=0)
    max_steps: PositiveInt | None = None
    batch_size: PositiveInt = 8
    gradient_accumulation_steps: PositiveInt = 1
    learning_rate: float = Field(default=2e-4, gt=0)
    lr_scheduler: Literal["constant", "linear", "cosine", "warmup_stable_decay"] = "cosine"
    warmup_ratio: float | None = Field(default=0.03, ge=0, lt=1)
    warmup_steps: int | None = Field(default=None, ge=0)
    decay_ratio: float = Field(default=0.1, gt=0, le=1)
    min_lr_ratio: float = Field(default=0.0, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, ge=0)
    optimizer: Literal["adamw", "adamw_8bit", "adafactor", "lion", "muon", "sgd"] = "adamw"
    adam_beta1: float | None = Field(default=None, ge=0, lt=1)
    adam_beta2: float | None = Field(default=None, ge=0, lt=1)
    adam_epsilon: float | None = Field(default=None, gt=0)
    adam_bias_correction: bool | None = None
    lora_plus_ratio: float = Field(default=1.0, gt=0)
    neftune_noise_alpha: float = Field(default=0.0, ge=0)
    max_seq_length: PositiveInt = 2048
    packing: bool = True
    gradient_checkpointing: bool | Literal["auto"] | PositiveInt = "auto"
    memory_limit: float | None = Field(default=None, gt=0)
    wired_memory: bool = True

    @model_validator(mode="before")
    @classmethod
    def _steps_for_share(cls, values: Any) -> Any:
        # The default share would stand beside the steps, and exclude them in a dumped recipe.
        if isinstance(values, dict) and values.get("warmup_steps") is not None:
            return {"warmup_ratio": None} | values
        return values

    @model_validator(mode="after")
    def _one_warmup(self) -> TrainSection:
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise ValueError("warmup_steps and warmup_ratio exclude each other")
        return self

    @model_validator(mode="after")
    def _has_an_end(self) -> TrainSection:
        if self.min_lr_ratio and self.lr_scheduler == "constant":
            raise ValueError("min_lr_ratio goes with a lr_scheduler that decays, not constant")
        return self

    @model_validator(mode="after")
    def _has_moments(self) -> TrainSection:
        owners = {
            "adam_beta1": ("adamw", "adamw_8bit", "lion"),
            "adam_beta2": ("adamw", "adamw_8bit", "lion"),
            "adam_epsilon": ("adamw", "adamw_8bit"),
            "adam_bias_correction": ("adamw", "adamw_8bit"),
        }
        for key, optimizers in owners.items():
            if getattr(self, key) is not None and self.optimizer not in optimizers:
                raise ValueError(f"{key} goes with {', '.join(optimizers)}, not {self.optimizer}")
        return self


class EvalSection(Section):
    """`[eval]`: held-out records: a file, or a share (below 1) or number taken from the data.

    The loss on them is measured every `steps` steps, and at the end of each epoch when
    `steps` is left out; training stops after `patience` measurements without a better one.
    `format`, `columns`, `split`, `subset` and `max_samples` of the
    file are as in `[[data]]`, but that a folder's or hub dataset's `split` is its validation
    split by default, or its test split; what becomes of a record, and its `system` prompt, is
    what the first source says. `max_overlap` is the share of held-out records that may be
    among those trained on as well: with more of them nothing is trained.
    `suite` is the file that says what `mlxtune eval` measures.
    """

    path: str | None = None
    format: FormatName = "auto"
    columns: Columns = Field(default={})
    split: str | None = None
    subset: str | None = None
    max_samples: PositiveInt | None = None
    val_size: float = Field(default=0.0, ge=0)
    max_overlap: float = Field(default=0.1, ge=0, le=1)
    steps: PositiveInt | None = None
    patience: PositiveInt | None = None
    suite: str | None = Field(default=None, min_length=1)

    @field_validator("val_size")
    @classmethod
    def _share_or_count(cls, value: float) -> float:
        return _whole_above_one(value)

    @model_validator(mode="after")
    def _one_source(self) -> EvalSection:
        if self.path is not None and self.val_size:
            raise ValueError("path and val_size exclude each other")
        if self.patience is not None and self.path is None and not self.val_size:
            raise ValueError("patience needs held-out records: path or val_size")
        default = EvalSection.model_fields
        for key in ("format", "columns", "split", "subset", "max_samples"):
            if self.path is None and getattr(self, key) != default[key].default:
                raise ValueError(f"{key} goes with path")
        return self


class CheckpointSection(Section):
    """`[checkpoint]`: every how many steps, and how many of them are kept."""

    steps: PositiveInt = 100
    keep: PositiveInt = 2


def _or_none(value: object) -> object:
    """`none`, as others write it, is an empty list."""
    return () if value == ("none",) else value


class LogSection(Section):
    """`[log]`: every how many steps figures are reported, and to which trackers.

    `report_to` is one of them or a list.
    """

    steps: PositiveInt = 5
    report_to: Annotated[
        tuple[Literal["tensorboard", "wandb", "mlflow"], ...],
        Field(strict=False),
        BeforeValidator(_or_none),
    ] = ()


FileType = Literal[
    "f32",
    "f16",
    "bf16",
    "q8_0",
    "q6_k",
    "q5_k_m",
    "q5_k_s",
    "q4_k_m",
    "q4_k_s",
    "q5_0",
    "q5_1",
    "q4_0",
    "q4_1",
    "q3_k_m",
    "q2_k",
]
MlxType = Literal["keep", "int4", "int8", "nvfp4", "mxfp4", "mxfp8"]


class ExportSection(Section):
    """`[export]`: what `mlxtune export` does when it isn't told otherwise.

    `quantize` is the type of the weights, of a GGUF or for Ollama's MLX engine; `auto` is q8_0
    for the one and `keep` for the other. `engine` says which of the two it is. `to` is the
    program that the model is handed to, `name` what Ollama calls it (the run's name by default).
    `num_ctx`, `temperature`, `system` and the text of the file `license` go into the Modelfile.
    """

    quantize: FileType | MlxType | Literal["auto"] = "auto"
    engine: Literal["auto", "gguf", "mlx"] = "auto"
    to: Literal["ollama", "llamacpp", "mistralrs"] | None = None
    name: str | None = Field(default=None, min_length=1)
    num_ctx: PositiveInt | None = None
    temperature: float | None = Field(default=None, ge=0)
    system: str | None = None
    license: str | None = Field(default=None, min_length=1)


class Recipe(Section):
    """A whole recipe.

    `objective` is what is trained for: `sft`, answers as they are, or `dpo`, chosen answers above
    rejected ones.
    """

    name: Name
    seed: int = Field(default=0, ge=0)
    objective: Literal["sft", "dpo"] = "sft"
    model: ModelSection
    lora: LoraSection = LoraSection()
    data: Annotated[tuple[DataSource, ...], Field(strict=False, min_length=1)]
    train: TrainSection = TrainSection()
    dpo: DpoSection | None = None
    eval: EvalSection = EvalSection()
    judge: JudgeSection | None = None
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()
    export: ExportSection = ExportSection()
    prep: PrepSection = PrepSection()

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_objective(cls, values: Any) -> Any:
        if not isinstance(values, dict) or (objective := values.get("objective")) not in TABLES:
            return values
        given: dict[str, Any] = {objective: {}} | values
        for section, defaults in DEFAULTS.get(objective, {}).items():
            own = given.get(section, {})
            given[section] = defaults | own if isinstance(own, dict) else own
        return given

    @model_validator(mode="after")
    def _own_objective(self) -> Recipe:
        for name in TABLES:
            if getattr(self, name) is not None and self.objective != name:
                raise ValueError(f'[{name}] goes with objective = "{name}", not "{self.objective}"')
        if self.objective == "sft":
            return self
        for source in self.data:
            if source.train_on_inputs or source.roles_to_train != ("assistant",):
                raise ValueError(
                    f'with objective = "{self.objective}" answers alone are trained: leave '
                    "roles_to_train and train_on_inputs out"
                )
        return self

    @model_validator(mode="after")
    def _weights_on_all(self) -> Recipe:
        weighted = [source.weight is not None for source in self.data]
        if any(weighted) and not all(weighted):
            raise ValueError("with weight on one [[data]] source, all need one")
        return self

    @property
    def system_prompt(self) -> str | None:
        """The system prompt that all sources put before records without one, if it is one."""
        prompts = {source.system for source in self.data}
        return prompts.pop() if len(prompts) == 1 else None

    @property
    def shipping(self) -> ExportSection:
        """`[export]`; where it has no system prompt, that of the data is asked with in use."""
        if self.export.system is not None:
            return self.export
        return self.export.model_copy(update={"system": self.system_prompt})
