"""`mlxtune eval`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from mlxtune.cli.shared import ADAPTER, BASE, PATH, complete_paths, prepare
from mlxtune.errors import StorageError


@click.command(name="eval")
@click.argument("model", metavar="RUN|MODEL", shell_complete=complete_paths)
@ADAPTER
@BASE
@click.option(
    "--suite",
    type=PATH,
    help="A file that says what is measured, and on what.  [default: the recipe's eval.suite]",
)
@click.option("--data", type=PATH, help="Records to use instead of the held-out ones.")
@click.option(
    "--with",
    "others",
    multiple=True,
    metavar="NAME=MODEL",
    help="Evaluate this too: a fused folder, a .gguf file, another run.",
)
@click.option("--limit", type=click.IntRange(1), help="Use the first N records.")
@click.option(
    "--max-tokens",
    type=click.IntRange(1),
    help="Cut answers off there.  [default: beyond the longest expected one]",
)
@click.option(
    "--execute",
    is_flag=True,
    help="Run commands that only read, in a sandbox (bubblewrap), and compare what they print.",
)
@click.option("--tasks", help="Tasks of lm-eval instead, such as arc_easy,hellaswag.")
@click.option("--task-path", type=PATH, help="A folder of task files of your own, for --tasks.")
@click.option(
    "--samples",
    type=click.IntRange(0),
    default=8,
    show_default=True,
    help="How many answers to show.",
)
@click.option(
    "-o", "--output", type=PATH, help="Folder of figures and answers.  [default: RUN/eval]"
)
@click.option("--json", "as_json", is_flag=True, help="Print figures and answers as JSON.")
def evaluate(
    model: str,
    adapter: Path | None,
    base: str | None,
    suite: Path | None,
    data: Path | None,
    others: tuple[str, ...],
    limit: int | None,
    max_tokens: int | None,
    execute: bool,
    tasks: str | None,
    task_path: Path | None,
    samples: int,
    output: Path | None,
    as_json: bool,
) -> None:
    """Measure a run, base against tuned, or a model alone.

    RUN@step-N is a checkpoint of a run; an adapter's folder is put on the model that it names.
    """
    named = _named(others)
    if tasks is not None:
        if suite or data or others or max_tokens or execute:
            raise click.UsageError(
                "--tasks goes with --adapter, --model, --task-path, --limit and --output"
            )
        chosen = [name for task in tasks.split(",") if (name := task.strip())]
        if not chosen:
            raise click.UsageError("--tasks names none")
        prepare(long=True)
        _tasks(model, adapter, base, chosen, task_path, limit, output, as_json)
        return
    if task_path is not None:
        raise click.UsageError("--task-path goes with --tasks")
    prepare(long=True)
    from mlxtune.cli.display import status_line
    from mlxtune.evaluate.compare import Options, compare_subject
    from mlxtune.evaluate.suite import load_suite
    from mlxtune.train.subject import find_subject

    every = 0.2 if sys.stderr.isatty() else 10.0
    with status_line("loading", every=every, rare=lambda said: " of " in said) as progress:
        options = Options(
            suite=load_suite(suite) if suite is not None else None,
            data=data,
            limit=limit,
            max_tokens=max_tokens,
            others=named,
            execute=execute,
            progress=progress,
        )
        subject = find_subject(model, adapter=adapter, base=base)
        result = compare_subject(subject, options=options)
    from mlxtune.evaluate.results import as_json as json_of
    from mlxtune.evaluate.results import write_results

    # Kept before it is shown: the reader of our output may have gone, as in `| head`. And
    # shown even if it cannot be kept.
    folder = output or (Path(model) / "eval" if _is_run(model) else None)
    files, refused = None, None
    if folder is not None:
        try:
            files = write_results(result, folder)
        except StorageError as error:
            refused = error
    if as_json:
        click.echo(json.dumps(json_of(result), indent=2))
    else:
        from mlxtune.cli.tables import show_comparison

        show_comparison(result, samples=samples)
    if refused is not None:
        raise refused
    if files is not None:
        click.echo(f"{files[0]}, {files[1].name}", err=as_json)


def _named(others: tuple[str, ...]) -> dict[str, str]:
    named: dict[str, str] = {}
    for other in others:
        name, _, path = other.partition("=")
        if not name or not path:
            raise click.UsageError(f"--with {other}: write NAME=MODEL, such as gguf=model.gguf")
        if name in (*named, "base", "tuned", "model"):
            raise click.UsageError(f"--with {other}: there is a {name} already")
        named[name] = path
    return named


def _is_run(model: str) -> bool:
    return (Path(model).expanduser() / "run.json").is_file()


def _tasks(
    model: str,
    adapter: Path | None,
    base: str | None,
    tasks: list[str],
    task_path: Path | None,
    limit: int | None,
    output: Path | None,
    as_json: bool,
) -> None:
    from mlxtune.cli.display import status_line
    from mlxtune.evaluate.harness import run_tasks

    with status_line("loading") as progress:
        result: dict[str, Any] = run_tasks(
            model,
            tasks,
            adapter=adapter,
            base=base,
            task_path=task_path,
            limit=limit,
            progress=progress,
        )
    from mlxtune.evaluate.results import write_tasks

    folder = output or (Path(model) / "eval" if _is_run(model) else None)
    written = write_tasks(result, folder, limit=limit, adapter=adapter) if folder else None
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        from mlxtune.cli.tables import show_tasks

        show_tasks(result)
    if written is not None:
        click.echo(written, err=as_json)
