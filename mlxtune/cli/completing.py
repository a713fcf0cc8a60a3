"""What a shell completes after `--set`: the keys of a recipe, and the values there are."""

from __future__ import annotations

import click
from click.shell_completion import BashComplete, CompletionItem, add_completion_class


def complete_set(
    _context: click.Context, _parameter: click.Parameter, begun: str
) -> list[CompletionItem]:
    """Keys up to their `=`, then values."""
    from mlxtune.recipe.keys import keys

    return _completed(keys(), begun)


def complete_prep(
    _context: click.Context, _parameter: click.Parameter, begun: str
) -> list[CompletionItem]:
    """Those of `[prep]`, whose keys go by their last part."""
    from mlxtune.recipe.keys import keys

    table = "prep."
    of_prep = {k.removeprefix(table): v for k, v in keys().items() if k.startswith(table)}
    return _completed(of_prep, begun)


def _completed(keys: dict[str, tuple[str, ...]], begun: str) -> list[CompletionItem]:
    key, equals, value = begun.partition("=")
    if not equals:
        return [CompletionItem(f"{known}=") for known in keys if known.startswith(key)]
    return [CompletionItem(f"{key}={v}") for v in keys.get(key, ()) if v.startswith(value)]


class Bash(BashComplete):
    """Bash, which takes `=` for the end of a word, and puts a space behind what is complete."""

    source_template = BashComplete.source_template.replace(
        "    return 0\n",
        '    [[ "${COMPREPLY[0]}" == *= ]] && compopt -o nospace\n\n    return 0\n',
    )

    def get_completion_args(self) -> tuple[list[str], str]:
        """The words, with those that an `=` divides in one."""
        args, begun = super().get_completion_args()
        joined: list[str] = []
        for word in (*args, begun):
            if joined and (word == "=" or joined[-1].endswith("=")):
                joined[-1] += word
            else:
                joined.append(word)
        self._divided = joined[-1].rpartition("=")[0]
        return joined[:-1], joined[-1]

    def format_completion(self, item: CompletionItem) -> str:
        """Of a divided word bash replaces the last part alone."""
        if self._divided:
            item.value = item.value.removeprefix(f"{self._divided.removeprefix('--set=')}=")
        return super().format_completion(item)


add_completion_class(Bash)
