"""`mlxtune doctor` and `mlxtune completion`: the machine, and the shell."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from mlxtune.cli.check import FILE, check_machine
from mlxtune.cli.shared import PATH, prepare
from mlxtune.cli.suggest import NearChoice

# Where each shell reads what it does at its start.
_STARTS = {"bash": "~/.bashrc", "zsh": "~/.zshrc", "fish": "~/.config/fish/config.fish"}
_SIGNS = {"good": ("ok", "green"), "missing": ("--", "yellow"), "bad": ("!!", "red")}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@click.option("--check", is_flag=True, help="Train small random models in every way, and compare.")
@click.option("-o", "--output", type=PATH, help=f"With --check: the file.  [default: {FILE}]")
@click.option("--overwrite", is_flag=True, help="With --check: replace a file that is there.")
def doctor(as_json: bool, check: bool, output: Path | None, overwrite: bool) -> None:
    """Look at this machine: device, memory, BLAS, disk, hub, Ollama, llama.cpp, mistral.rs.

    Ends with 1 if something is there that training suffers from. With --check it also computes:
    attention, losses, quantized weights and small random models, each against a plain formula on
    the CPU, and measures speed. That takes up to ten minutes and downloads nothing; one file
    holds all that came out, to be sent where something is wrong.
    """
    if check:
        prepare(long=True)
        if not check_machine(output or FILE, overwrite=overwrite, as_json=as_json):
            raise SystemExit(1)
        return
    if output is not None or overwrite:
        raise click.UsageError("--output and --overwrite go with --check")
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
