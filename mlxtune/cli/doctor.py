"""`mlxtune doctor` and `mlxtune completion`: the machine, and the shell."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from mlxtune.cli.shared import prepare
from mlxtune.cli.suggest import NearChoice

# Where each shell reads what it does at its start.
_STARTS = {"bash": "~/.bashrc", "zsh": "~/.zshrc", "fish": "~/.config/fish/config.fish"}
_SIGNS = {"good": ("ok", "green"), "missing": ("--", "yellow"), "bad": ("!!", "red")}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(as_json: bool) -> None:
    """Look at this machine: device, memory, BLAS, disk, hub, Ollama, llama.cpp, mistral.rs.

    Ends with 1 if something is there that training suffers from.
    """
    with suppress(ImportError):  # MLX, which is then the first finding
        prepare()
    from mlxtune.doctor import examine

    findings = []
    for finding in examine(Path("runs")):
        findings.append(finding)
        if as_json:
            continue
        sign, colour = _SIGNS[finding.state]
        click.echo(f"{click.style(sign, fg=colour)} {finding.topic:<12} {finding.said}")
        if finding.remedy:
            click.echo(f"{'':<15} {finding.remedy}")
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    if any(finding.state == "bad" for finding in findings):
        raise SystemExit(1)


@click.command()
@click.argument("shell", type=NearChoice(list(_STARTS)))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print what makes SHELL complete the verbs and options of mlxtune.

    \b
    mlxtune completion zsh > ~/.mlxtune-completion
    echo 'source ~/.mlxtune-completion' >> ~/.zshrc
    """
    made = get_completion_class(shell)
    assert made is not None
    root = context.find_root().command
    click.echo(made(root, {}, "mlxtune", "_MLXTUNE_COMPLETE").source())
    click.echo(f"kept in a file, it is read by {_STARTS[shell]}: source FILE", err=True)
