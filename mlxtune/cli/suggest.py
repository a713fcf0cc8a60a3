"""What was meant by a verb, an option or a value that there is not."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click

# What other programs call our verbs, and what people try.
_VERBS = {
    "benchmark": "bench",
    "check": "validate",
    "create": "init",
    "dora": "lora",
    "estimate": "plan",
    "evaluate": "eval",
    "finetune": "lora",
    "fit": "lora",
    "generate": "chat",
    "gguf": "export",
    "inspect": "data inspect",
    "lint": "validate",
    "memory": "plan",
    "merge": "fuse",
    "new": "init",
    "prep": "data prep",
    "prepare": "data prep",
    "qlora": "lora",
    "quantize": "convert",
    "run": "chat",
    "sft": "lora",
    "template": "init",
    "test": "eval",
    "train": "lora",
    "tune": "lora",
}


class Verbs(click.Group):
    """A group that names the verb that was meant."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError:
            name = args[0]
            if (meant := self._meant(name, ctx)) is None:
                raise
            root = ctx.find_root().command_path
            raise click.UsageError(
                f"No such command {name!r}. Did you mean {root} {meant}?", ctx
            ) from None

    def _meant(self, name: str, ctx: click.Context) -> str | None:
        """The verb, with the group that it is in."""
        if name.endswith(".toml") and "lora" in self.commands:
            return f"lora {name}"
        if (Path(name) / "run.json").is_file() and "eval" in self.commands:
            return f"eval {name}"
        inside = " ".join(ctx.command_path.split()[1:])
        own = {verb: f"{inside} {verb}".strip() for verb in self.list_commands(ctx)}
        known = own if inside else _VERBS | own
        given = name.lower().replace("-", "").replace("_", "")
        near = get_close_matches(given, known, n=1, cutoff=0.7)
        return known[near[0]] if near else None


class NearChoice(click.Choice[str]):
    """A choice that names the nearest to what is none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """As click's."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            near = get_close_matches(str(value).lower(), self.choices, n=1)
            if not near:
                raise
            raise click.BadParameter(
                f"{error.message} Did you mean {near[0]}?", ctx, param
            ) from None


def unknown_option(error: click.NoSuchOption) -> click.UsageError:
    """An option that there is not, with the key of a recipe that it is, if it is one.

    Of options that are nearly right click itself names the nearest.
    """
    meant = _key_of(error)
    if meant is None:
        return error
    return click.UsageError(
        f"No such option '{error.option_name}'. Did you mean {meant}?", error.ctx
    )


def _key_of(error: click.NoSuchOption) -> str | None:
    """Where the verb takes `--set`."""
    takes = [] if error.ctx is None else [o for p in error.ctx.command.params for o in p.opts]
    if "--set" not in takes:
        return None
    from mlxtune.recipe.foreign import FOREIGN_NAMES
    from mlxtune.recipe.keys import keys

    name = error.option_name.lstrip("-").replace("-", "_")
    dotted = list(keys())
    if "." in name:
        near = get_close_matches(name, dotted, n=1)
        return _as_set(near[0]) if near else None
    if name in FOREIGN_NAMES and name != "output_dir":  # which is --output
        return _as_set(FOREIGN_NAMES[name])
    last = {key.rpartition(".")[2]: key for key in reversed(dotted)}
    near = get_close_matches(name, last, n=1, cutoff=0.8)
    return _as_set(last[near[0]]) if near else None


def _as_set(key: str) -> str:
    """A key, or what the key of another trainer is here, as it is given."""
    name, _, value = key.partition(" = ")
    dotted = " " not in name and not name.startswith("[")
    return f"--set {name}={value or '…'}" if dotted else f"{key} in the recipe"
