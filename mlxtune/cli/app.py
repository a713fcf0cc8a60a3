"""The `mlxtune` program: its verbs, and how errors look.

Verbs import what they need when they run, so `--help` answers at once.
"""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import click

import mlxtune
from mlxtune.cli.bench import bench
from mlxtune.cli.convert import convert
from mlxtune.cli.data import data
from mlxtune.cli.doctor import completion, doctor
from mlxtune.cli.evaluate import evaluate
from mlxtune.cli.export import export
from mlxtune.cli.output import make_printable, of_locale
from mlxtune.cli.plan import plan
from mlxtune.cli.report import report
from mlxtune.cli.shared import (
    ADAPTER,
    BASE,
    DTYPE,
    KEEP_TEMPLATE,
    PATH,
    SET,
    Words,
    complete_paths,
    complete_presets,
    prepare,
    steps,
)
from mlxtune.cli.stops import Stopped, stop_on_signals
from mlxtune.cli.suggest import Verbs, unknown_option
from mlxtune.device import worker_rank
from mlxtune.errors import MlxtuneError, RecipeError, WorkerFailed
from mlxtune.gpu_errors import as_user_error
from mlxtune.install import explained, program

if TYPE_CHECKING:
    from mlxtune.train.distributed import Workers

USER_ERROR, INTERRUPTED = 1, 130
_BEFORE_TRAINING = {
    "validate": "are the recipe and its data in order?",
    "plan": "does it fit, how long does it take?",
    "lora": "train it",
}
_AFTER_TRAINING = {
    "eval": "did it learn?",
    "chat": "talk to it",
    "report": "curves, evaluation and samples as a page",
    "export": "a GGUF for Ollama, llama.cpp and mistral.rs",
}


@click.group(
    cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(mlxtune.__version__, prog_name="mlxtune")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Fine-tune language models on Apple silicon and ship them as GGUF.

    \b
    mlxtune init                     write a recipe
    mlxtune plan recipe.toml         does it fit, how long does it take?
    mlxtune lora recipe.toml         train it
    mlxtune eval runs/NAME           did it learn?
    mlxtune chat runs/NAME           talk to it
    mlxtune export runs/NAME         a GGUF for Ollama, llama.cpp and mistral.rs
    """


@cli.command()
@click.argument("output", type=PATH, default="recipe.toml")
@click.option(
    "--preset",
    default="default",
    help="Which recipe; --list shows them.",
    shell_complete=complete_presets,
)
@click.option(
    "--model",
    help="What to train: a hub id, a folder, a .gguf file.",
    shell_complete=complete_paths,
)
@click.option(
    "--data",
    help="Records to train on: a file, a folder, hub:OWNER/NAME.",
    shell_complete=complete_paths,
)
@click.option("--list", "list_presets", is_flag=True, help="List the presets.")
@click.option("--overwrite", is_flag=True, help="Replace a file that is there.")
def init(
    output: Path,
    preset: str,
    model: str | None,
    data: str | None,
    list_presets: bool,
    overwrite: bool,
) -> None:
    """Write an annotated recipe."""
    from mlxtune.recipe.presets import presets, write_preset

    if list_presets:
        for name, summary in presets().items():
            click.echo(f"{name:<14}{summary}")
        return
    write_preset(output, preset, model=model, data=data, overwrite=overwrite)
    click.echo(f"{output}: written; edit it, then")
    click.echo(steps(_BEFORE_TRAINING, output))


@cli.command()
@click.argument("recipe", type=PATH)
@SET
def validate(recipe: Path, overrides: tuple[str, ...]) -> None:
    """Check a recipe, its data files and that its model is there."""
    from mlxtune.cli.validation import validated

    for line in validated(recipe, overrides):
        click.echo(line)


@cli.command()
@click.argument("recipe", type=PATH)
@SET
@click.option("-o", "--output", type=PATH, help="Folder of the run.  [default: runs/<name>]")
@click.option("--resume", is_flag=True, help="Go on from the run's latest checkpoint.")
@click.option("--model", "base", metavar="MODEL", help="The base model, instead of the recipe's.")
@click.option("--overwrite", is_flag=True, help="Replace a run that is there.")
@click.option("--force", is_flag=True, help="Train even if the plan says that it does not fit.")
def lora(
    recipe: Path,
    overrides: tuple[str, ...],
    output: Path | None,
    resume: bool,
    base: str | None,
    overwrite: bool,
    force: bool,
) -> None:
    """Train an adapter as a recipe says: LoRA or DoRA, on a quantized model too (QLoRA).

    With --resume RECIPE may be the run's folder, which holds its own.
    """
    from mlxtune.evaluate.suite import suite_of
    from mlxtune.recipe.load import load_recipe

    if resume and overwrite:
        raise click.UsageError("--resume and --overwrite exclude each other")
    if base is not None:
        overrides = (*overrides, f"model.path={json.dumps(base)}")
    with _joined() as workers:
        if recipe.is_dir() or (resume and not recipe.exists() and recipe.suffix != ".toml"):
            from mlxtune.train.resume import recipe_of_run

            if output is not None:
                raise click.UsageError("--output goes with a recipe, not with a run's folder")
            checked, output = recipe_of_run(recipe, overrides, resume=resume), recipe
        else:
            checked = load_recipe(recipe, overrides)
        suite_of(checked)  # not first looked for when the training is done
        prepare(long=True)
        from mlxtune.cli.display import training_display
        from mlxtune.cli.plan import forecast
        from mlxtune.train.metrics import Silent
        from mlxtune.train.session import fine_tune

        folder = output or Path("runs") / checked.name
        silent = workers is not None and not workers.first
        with nullcontext(Silent()) if silent else training_display() as display:
            run = fine_tune(
                checked,
                folder,
                display,
                resume=resume,
                overwrite=overwrite,
                workers=workers,
                forecast=forecast(force=force),
                command=" ".join(["mlxtune", *map(quote, sys.argv[1:])]),
            )
    if silent:
        return
    from mlxtune.train.outcome import adapter_name, outcome_lines

    said = outcome_lines(run)
    for line in said:
        click.echo(line)
    click.echo(f"adapter: {adapter_name(run.adapter)}")
    # A model that got worse is to be looked at, not shipped.
    worse = any(line.startswith("warning") for line in said)
    click.echo("next:")
    following = {v: why for v, why in _AFTER_TRAINING.items() if not (worse and v == "export")}
    click.echo(steps(following, folder))


@cli.command()
@click.argument("model", metavar="RUN|MODEL", shell_complete=complete_paths)
@click.option("-o", "--output", type=PATH, required=True, help="Folder to write.")
@ADAPTER
@BASE
@click.option(
    "--dtype",
    type=DTYPE,
    help="Type of the weights.  [default: as the base stores its own]",
)
@KEEP_TEMPLATE
@click.option("--overwrite", is_flag=True, help="Replace a folder that is there.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def fuse(
    model: str,
    output: Path,
    adapter: Path | None,
    base: str | None,
    dtype: str | None,
    keep_template: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write a Hugging Face folder, adapter fused in, and measure what it cost.

    RUN is a run, RUN@step-N, an adapter's folder, or with --adapter any model.
    """
    prepare()
    from dataclasses import asdict

    from mlxtune.fuse import fuse_run
    from mlxtune.train.outcome import adapter_lines
    from mlxtune.train.subject import find_subject

    subject = find_subject(model, adapter=adapter, base=base)
    if subject.adapter is not None:
        for line in adapter_lines(subject.adapter):
            click.echo(line, err=True)
    report = fuse_run(
        model,
        output,
        adapter=adapter,
        base=base,
        dtype=dtype,
        keep_template=keep_template,
        overwrite=overwrite,
    )
    if as_json:
        click.echo(json.dumps(asdict(report), indent=2))
        return
    click.echo(f"{output}: {report.dtype} safetensors, tokenizer and config")
    click.echo(
        f"compared with the adapter unfused: at {report.top1_agreement:.1%} of "
        f"{report.tokens_compared} tokens (of {report.tried_on}) the most likely next token is the "
        f"same; logits differ by at most {report.max_logit_difference:.2g}, where the largest is "
        f"{report.max_logit:.3g}"
    )


@cli.command()
@click.argument("model", metavar="RUN|MODEL", shell_complete=complete_paths)
@ADAPTER
@BASE
@click.option("-p", "--prompt", type=Words(), help="Answer this and stop.")
@click.option("--system", type=Words(), help="A system prompt.")
@click.option("--max-tokens", type=click.IntRange(1), default=256, show_default=True)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="0: always the most likely token.",
)
@click.option("--seed", type=click.IntRange(0), help="Draw the same tokens each time.")
def chat(
    model: str,
    adapter: Path | None,
    base: str | None,
    prompt: str | None,
    system: str | None,
    max_tokens: int,
    temperature: float,
    seed: int | None,
) -> None:
    """Talk to a run, or to any model: a folder, a .gguf file, a hub id.

    RUN@step-N is a checkpoint of a run; an adapter's folder is put on the model that it names.
    """
    if seed is not None and not temperature:
        raise click.UsageError("--seed goes with --temperature above 0")
    prepare(long=True)
    from mlxtune.cli.talk import talk

    talk(
        model,
        adapter=adapter,
        base=base,
        prompt=prompt,
        system=system,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
    )


cli.add_command(data)
cli.add_command(doctor)
cli.add_command(completion)
cli.add_command(evaluate)
cli.add_command(convert)
cli.add_command(export)
cli.add_command(plan)
cli.add_command(bench)
cli.add_command(report)
# Each fits a line of `--help` in a terminal of 80 columns.
_IN_SHORT = {
    "bench": "Measure how fast this machine trains.",
    "chat": "Talk to a run or to any model.",
    "completion": "Print what lets a shell complete mlxtune's commands.",
    "convert": "Write a model as GGUF, or as a folder.",
    "data": "Look at records, change their shape, prepare them.",
    "doctor": "Look at this machine, and say what it lacks.",
    "eval": "Measure whether a run has learned.",
    "export": "Write a run as GGUF for Ollama, llama.cpp, mistral.rs.",
    "fuse": "Write a run as a Hugging Face folder.",
    "init": "Write an annotated recipe.",
    "lora": "Train an adapter: LoRA, DoRA or QLoRA.",
    "plan": "Say whether a recipe fits and how long it takes.",
    "report": "Write an HTML page of one run, or of several.",
    "validate": "Check a recipe and its data.",
}
for _verb, _said in _IN_SHORT.items():
    cli.commands[_verb].short_help = _said


def main() -> None:
    """Entry point: run a verb; errors become one block on stderr."""
    make_printable()
    debug = "--debug" in sys.argv[1:]
    # `mlxtune lora … --debug` is as good as `mlxtune --debug lora …`.
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    if worker_rank() is None:  # workers end together, by ways of their own
        stop_on_signals()
    try:
        result = cli.main(args=arguments, prog_name="mlxtune", standalone_mode=False)
    except WorkerFailed:
        sys.exit(USER_ERROR)  # it says itself what went wrong
    except MlxtuneError as error:
        if debug:
            traceback.print_exc()
        print(_block(error), file=sys.stderr)
        sys.exit(USER_ERROR)
    except click.ClickException as error:
        if isinstance(error, click.NoSuchOption):
            error = unknown_option(error)
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort) as error:
        if not worker_rank():
            with suppress(OSError):  # the terminal may be what is gone
                print("interrupted", file=sys.stderr)
        by = error.__cause__ if isinstance(error, click.Abort) else error
        sys.exit(128 + by.number if isinstance(by, Stopped) else INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output has gone, as in `mlxtune … | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(USER_ERROR)
    except Exception as error:
        if (number := _say_interrupted(error)) is not None:
            sys.exit(128 + number)
        if debug:
            raise
        said = _missing(error) or of_locale(error) or _of_gpu(error, arguments)
        if said is not None:
            print(_block(said), file=sys.stderr)
            sys.exit(USER_ERROR)
        print(
            f"error: {type(error).__name__}: {error}{_notes(error)}\n"
            "  this is a bug in mlxtune; --debug shows where it happened",
            file=sys.stderr,
        )
        sys.exit(USER_ERROR)
    sys.exit(result if isinstance(result, int) else 0)


def _missing(error: BaseException | None) -> MlxtuneError | None:
    """The package whose import failed, if that is what an error comes from."""
    while error is not None:
        if isinstance(error, ImportError) and (found := explained(error)) is not None:
            return found
        error = error.__cause__ or error.__context__
    return None


# How to do with less memory what a verb does; others take as much as the model has.
_LESS_MEMORY = {
    "lora": "close other programs; `mlxtune plan` says what each change of the recipe would save",
    "eval": "measure fewer and shorter answers: --limit 32 --max-tokens 64, or less",
    "chat": "ask for less, in a new conversation or with a smaller --max-tokens",
}


def _of_gpu(error: BaseException, arguments: list[str]) -> MlxtuneError | None:
    """A failure of the GPU, or memory that ran out, if that is what an error comes from."""
    verb = next((name for name in arguments if name in cli.commands), "")
    return as_user_error(error, less=_LESS_MEMORY.get(verb))


def _block(error: MlxtuneError) -> str:
    """An error as people read it: what, where, how to mend it."""
    lines = [f"error: {error}{_notes(error)}"]
    if isinstance(error, RecipeError):
        for problem in error.problems:
            remedy = f" ({problem.remedy})" if problem.remedy else ""
            where = f"{problem.where}: " if problem.where else ""
            lines.append(f"  {where}{problem.what}{remedy}")
    # What is to be typed has to work where the shell does not find the program by its name.
    named = rf"(?<![\w/.-])mlxtune(?= (?:{'|'.join(cli.commands)})\b)"
    return re.sub(named, lambda _: program(), "\n".join(lines))


def _notes(error: Exception) -> str:
    """What was added to an error on its way: on which of several workers it occurred."""
    return "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))


def _say_interrupted(error: Exception) -> int | None:
    """If this is a stop asked for by a signal, tell how to go on; the signal's number."""
    loop: Any = sys.modules.get("mlxtune.train.loop")
    if loop is None or not isinstance(error, loop.Interrupted):
        return None
    number = int(error.signal)
    if worker_rank():
        return number  # the first worker tells the rest
    checkpoint = error.checkpoint
    run = checkpoint.parent.parent
    print(
        f"interrupted; saved in {checkpoint}\n"
        f"  go on: {program()} lora {quote(str(run))} --resume\n"
        f"  try it: {program()} chat {quote(f'{run}@{checkpoint.name}')}",
        file=sys.stderr,
    )
    return number


def _joined() -> AbstractContextManager[Workers | None]:
    """The workers that a launcher started with this process, who end together; or nobody."""
    if worker_rank() is None:
        return nullcontext()
    prepare(long=True)
    from mlxtune.train.distributed import join

    return join()
