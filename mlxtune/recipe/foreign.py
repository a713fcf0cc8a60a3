"""Other trainers: what they call our keys, and whose recipe a file is that is none of ours."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

from mlxtune.errors import MlxtuneError, RecipeError
from mlxtune.install import program

# What other trainers call these keys: Hugging Face Trainer and PEFT, Axolotl,
# LLaMA-Factory, Unsloth, torchtune, mlx-lm.
FOREIGN_NAMES = {
    "base_model": "model.path",
    "model_name": "model.path",
    "model_name_or_path": "model.path",
    "load_in_4bit": "model.quantize = 4",
    "load_in_8bit": "model.quantize = 8",
    "bnb_4bit_quant_type": "model.quantize",
    "bnb_4bit_use_double_quant": "model.double_quantization",
    "torch_dtype": "model.dtype",
    "adapter": "[lora]",
    "r": "lora.rank",
    "lora_r": "lora.rank",
    "lora_rank": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target": "lora.target_modules",
    "lora_target_modules": "lora.target_modules",
    "lora_layers": "lora.layers",
    "num_layers": "lora.layers",
    "layers_to_transform": "lora.layers",
    "peft_layers_to_transform": "lora.layers",
    "use_rslora": "lora.rslora",
    "peft_use_rslora": "lora.rslora",
    "use_dora": "lora.dora",
    "peft_use_dora": "lora.dora",
    "fine_tune_type": "lora.dora (true or false)",
    "resume_adapter_file": "lora.init_from (its folder)",
    "adapter_name_or_path": "lora.init_from",
    "lora_model_dir": "lora.init_from",
    "scale": "lora.alpha (scale is alpha / rank)",
    "type": "[[data]] format",
    "dataset": "[[data]] path",
    "datasets": "[[data]] path",
    "max_train_samples": "[[data]] max_samples",
    "rl": "objective",
    "rl_beta": "dpo.beta",
    "pref_beta": "dpo.beta",
    "dpo_beta": "dpo.beta",
    "pref_loss": "dpo.loss_type",
    "dpo_loss_type": "dpo.loss_type",
    "dpo_cpo_loss_type": "dpo.loss_type",
    "dpo_label_smoothing": "dpo.label_smoothing",
    "rpo_alpha": "dpo.sft_weight",
    "pref_ftx": "dpo.sft_weight",
    "per_device_train_batch_size": "train.batch_size",
    "micro_batch_size": "train.batch_size",
    "gradient_accumulation": "train.gradient_accumulation_steps",
    "grad_accumulation_steps": "train.gradient_accumulation_steps",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "iters": "train.max_steps",
    "lr": "train.learning_rate",
    "lr_scheduler_type": "train.lr_scheduler",
    "lr_schedule": "train.lr_scheduler",
    "min_lr_rate": "train.min_lr_ratio",
    "cosine_min_lr_ratio": "train.min_lr_ratio",
    "optim": "train.optimizer",
    "neftune_alpha": "train.neftune_noise_alpha",
    "gradient_clipping": "train.max_grad_norm",
    "sequence_len": "train.max_seq_length",
    "max_length": "train.max_seq_length",
    "cutoff_len": "train.max_seq_length",
    "sample_packing": "train.packing",
    "grad_checkpoint": "train.gradient_checkpointing",
    "use_gradient_checkpointing": "train.gradient_checkpointing",
    "eval_steps": "eval.steps",
    "early_stopping_patience": "eval.patience",
    "steps_per_eval": "eval.steps",
    "val_set_size": "eval.val_size",
    "save_steps": "checkpoint.steps",
    "save_every": "checkpoint.steps",
    "save_total_limit": "checkpoint.keep",
    "logging_steps": "log.steps",
    "steps_per_report": "log.steps",
    "output_dir": "name (runs go to runs/<name>)",
}

# What they call values of ours.
FOREIGN_VALUES = {
    "train.optimizer": {
        "adam": "adamw",
        "adamw_torch": "adamw",
        "adamw_torch_fused": "adamw",
        "adamw_hf": "adamw",
        "paged_adamw": "adamw",
        "paged_adamw_32bit": "adamw",
        "adamw8bit": "adamw_8bit",
        "adamw_bnb_8bit": "adamw_8bit",
        "adamw_torch_8bit": "adamw_8bit",
        "paged_adamw_8bit": "adamw_8bit",
        "lion_32bit": "lion",
        "paged_lion_32bit": "lion",
    },
    "train.lr_scheduler": {
        "constant_with_warmup": "constant, with warmup_ratio or warmup_steps",
        "cosine_decay": "cosine",
        "cosine_with_min_lr": "cosine, with min_lr_ratio",
        "wsd": "warmup_stable_decay",
    },
}

# Keys by which a file is recognised, as each program documents them; two have to be there.
_WHOSE = {
    "Axolotl": (
        "base_model",
        "datasets",
        "micro_batch_size",
        "sequence_len",
        "sample_packing",
        "val_set_size",
        "lora_target_linear",
        "adapter",
    ),
    "LLaMA-Factory": (
        "model_name_or_path",
        "stage",
        "finetuning_type",
        "template",
        "cutoff_len",
        "do_train",
        "lora_target",
    ),
    "TRL": (
        "model_name_or_path",
        "dataset_name",
        "use_peft",
        "lora_target_modules",
        "per_device_train_batch_size",
    ),
    "torchtune": ("_component_", "tokenizer", "checkpointer", "metric_logger"),
    "mlx-lm": (
        "model",
        "iters",
        "fine_tune_type",
        "lora_parameters",
        "num_layers",
        "steps_per_report",
        "steps_per_eval",
        "grad_checkpoint",
        "adapter_path",
    ),
    "PEFT, of an adapter": ("peft_type", "base_model_name_or_path", "lora_alpha", "r"),
    "transformers, of a model": ("architectures", "model_type", "hidden_size", "vocab_size"),
}
_LINE = re.compile(r"\s*(?:- )?\s*(?P<key>[A-Za-z_][\w.]*):(?:\s+(?P<value>\S.*?))?\s*")


def of_another_program(text: str | None, path: Path) -> RecipeError | None:
    """What to say of a file that is no TOML, if it can be told what it is.

    Args:
        text: of the file; None if it is no text.
        path: of the file.
    """
    if path.name.lower().endswith(_RECORDS):
        return _records(path)
    if text is None:
        return None
    values, form = _json(text), "JSON"
    if values is None:
        values, form = _yaml(text), "YAML"
    if not values:
        return None
    whose, is_recipe = _owner(values)
    problems: tuple[MlxtuneError, ...] = ()
    given = ""
    if is_recipe:
        problems = tuple(
            MlxtuneError(f"here it is called {ours}", where=key)
            for key in values
            if (ours := (FOREIGN_NAMES | _AT_THE_TOP).get(key)) is not None
        )
        model = next((value for key in _MODELS if (value := values.get(key))), None)
        given = f" --model {shlex.quote(model)}" if model else ""
    return RecipeError(
        f"this is {form}, and a recipe is TOML" + (f"; by its keys it is {whose}" if whose else ""),
        where=str(path),
        remedy=f"write a recipe and edit it: {program()} init recipe.toml{given}",
        problems=problems,
    )


_MODELS = ("base_model", "model_name_or_path", "model")
# Keys of others that are tables of ours.
_AT_THE_TOP = {"model": "model.path", "data": "[[data]] path"}
_RECORDS = (".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".jsonl.gz", ".jsonl.zst", ".csv.gz")


def _records(path: Path) -> RecipeError:
    data = shlex.quote(str(path))
    return RecipeError(
        "this is a file of records, not a recipe",
        where=str(path),
        remedy=f"write a recipe for them: {program()} init recipe.toml --data {data}",
    )


def _owner(values: dict[str, str]) -> tuple[str | None, bool]:
    """Whose file it is, in words, and whether that is a trainer's recipe."""
    found = {name: sum(key in values for key in keys) for name, keys in _WHOSE.items()}
    name = max(found, key=lambda name: found[name])
    if found[name] < 2:
        return None, True
    library, _, what = name.partition(", ")
    return (f"{library}'s config {what}", False) if what else (f"a recipe of {name}", True)


def _json(text: str) -> dict[str, str] | None:
    """The keys and scalar values of a JSON object; None for anything else."""
    try:
        read = json.loads(text)
    except ValueError:
        return None
    if not isinstance(read, dict):
        return None
    return {key: value if isinstance(value, str) else "" for key, value in read.items()}


def _yaml(text: str) -> dict[str, str]:
    """Keys at any depth and what is behind them, as far as lines tell; none if it is no YAML."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        line = line.partition(" #")[0].rstrip()
        if not line or line.lstrip().startswith(("#", "---")):
            continue
        if (said := _LINE.fullmatch(line)) is not None:
            value = (said["value"] or "").strip("'\"")
            found.setdefault(said["key"], value)
        elif not line.startswith((" ", "-")):
            return {}
    return found
