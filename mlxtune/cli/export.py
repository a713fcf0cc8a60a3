"""`mlxtune export`."""

from __future__ import annotations

import sys
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import click

from mlxtune.cli.convert import (
    AS_JSON,
    CALIBRATE,
    FILE_TYPES,
    IMATRIX,
    PRE,
    SAVE_IMATRIX,
    VERIFY,
    file_size,
    on_command_line,
    require_one_importance,
    unweighed_lines,
    verified_lines,
)
from mlxtune.cli.shared import ADAPTER, BASE, KEEP_TEMPLATE, PATH, complete_paths, prepare
from mlxtune.cli.suggest import NearChoice
from mlxtune.errors import RunError

if TYPE_CHECKING:
    from mlxtune.export.bundle import Bundle
    from mlxtune.export.handover import HandOver
    from mlxtune.export.mlx_bundle import MlxBundle

# Of `export.handover` and `export.adapter`, whose import takes longer than `--help` may.
RUNTIMES = ("ollama", "llamacpp", "mistralrs")
LAYOUTS = ("peft", "mlx-lm", "gguf")
# Of `export.mlx_engine`.
ENGINES = ("auto", "gguf", "mlx")
MLX_TYPES = ("keep", "int4", "int8", "nvfp4", "mxfp4", "mxfp8")


@click.command()
@click.argument("run", metavar="RUN", shell_complete=complete_paths)
@ADAPTER
@BASE
@click.option("-o", "--output", type=PATH, help="Folder.  [default: RUN/export/<type>]")
@click.option(
    "--quantize",
    type=NearChoice([*FILE_TYPES, *MLX_TYPES], case_sensitive=False),
    metavar="TYPE",
    help=f"Type of the weights: {', '.join(FILE_TYPES)}; for Ollama's MLX engine bf16, f16, "
    f"{', '.join(MLX_TYPES)}.  [default: as the recipe says]",
)
@IMATRIX
@PRE
@CALIBRATE
@SAVE_IMATRIX
@VERIFY
@click.option(
    "--to",
    type=NearChoice([*RUNTIMES, *LAYOUTS]),
    help="Program to hand the model to, or with --adapter-only the library that the adapter "
    "is for; RUN may then be any adapter's folder.",
)
@click.option(
    "--engine",
    type=NearChoice(ENGINES),
    help="Which of Ollama's engines it is for: gguf, which other programs run too, or mlx, on "
    "Apple silicon.  [default: as the recipe says, else auto]",
)
@click.option("--name", help="What Ollama is to call the model.  [default: as the recipe says]")
@click.option(
    "--base",
    "ollama_base",
    help="With --adapter-only --to ollama: what the adapter goes on, a model that Ollama has or "
    "a .gguf.  [default: the model that was trained, if it is Ollama's]",
)
@click.option("--dry-run", is_flag=True, help="Write the files and print what --to would do.")
@click.option(
    "--adapter-only",
    is_flag=True,
    help="Write the adapter alone, unfused: as GGUF for llama.cpp and Ollama, or see --to.",
)
@KEEP_TEMPLATE
@click.option("--overwrite", is_flag=True, help="Replace a folder that is there.")
@AS_JSON
def export(
    run: str,
    adapter: Path | None,
    base: str | None,
    output: Path | None,
    quantize: str | None,
    imatrix: Path | None,
    pre: str | None,
    calibration: Path | None,
    save_imatrix: Path | None,
    verify: bool,
    to: str | None,
    engine: str | None,
    name: str | None,
    ollama_base: str | None,
    dry_run: bool,
    adapter_only: bool,
    keep_template: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write a run as GGUF with a Modelfile, for Ollama, llama.cpp and mistral.rs.

    RUN may be RUN@step-N for a checkpoint, an adapter's folder, or with --adapter any model.
    With --to the model is handed over: Ollama gets it, llama.cpp and mistral.rs answer a
    prompt with it if they are installed. With --engine mlx it is a folder of safetensors, for
    Ollama's MLX engine on Apple silicon and for mlx-lm.
    """
    if adapter_only:
        if to is not None and to not in (*LAYOUTS, "ollama"):
            raise click.UsageError(f"with --adapter-only --to is {', '.join(LAYOUTS)} or ollama")
        of_models = {
            "--adapter": adapter,
            "--quantize": quantize,
            "--imatrix": imatrix,
            "--calibrate": calibration,
            "--save-imatrix": save_imatrix,
            "--pre": pre,
            "--engine": engine,
            "--keep-template": keep_template or None,
            "--verify/--no-verify": on_command_line("verify"),
        }
        for option, given in of_models.items():
            if given is not None:
                raise click.UsageError(f"{option} is of fused models, not of adapters")
        of_ollama = {"--base": ollama_base, "--name": name, "--dry-run": dry_run or None}
        for option, given in of_ollama.items():
            if given is not None and to != "ollama":
                raise click.UsageError(f"with --adapter-only {option} goes with --to ollama")
        prepare()
        _export_adapter(
            run, to or "gguf", output, base, ollama_base, name, dry_run, overwrite, as_json
        )
        return
    if ollama_base is not None:
        raise click.UsageError("--base goes with --adapter-only --to ollama")
    require_one_importance(imatrix, calibration, save_imatrix)
    if to in LAYOUTS:
        raise click.UsageError(f"--to {to} goes with --adapter-only")
    prepare()
    from mlxtune.cli.display import status_line, transfer_bar
    from mlxtune.export.bundle import export_run, exported_before
    from mlxtune.export.handover import hand_over
    from mlxtune.export.mlx_engine import Choice, NotForEngine, choose
    from mlxtune.export.mlx_handover import require_program
    from mlxtune.export.ollama import base_url, require_name
    from mlxtune.models.load import model_config
    from mlxtune.models.resolve import resolve_model
    from mlxtune.train.outcome import adapter_lines
    from mlxtune.train.subject import find_subject

    subject = find_subject(run, adapter=adapter, base=base)
    if subject.adapter is None:
        raise RunError(
            "there is no adapter here",
            where=run,
            remedy=f"this is a model: mlxtune convert {quote(run)} model.gguf",
        )
    recipe = subject.recipe()
    to = to or recipe.export.to
    name = name or recipe.export.name or recipe.name
    if dry_run and to is None:
        raise click.UsageError("--dry-run goes with --to")
    of_ggufs = {
        "--imatrix": imatrix,
        "--calibrate": calibration,
        "--pre": pre,
        "--verify/--no-verify": on_command_line("verify"),
    }
    of_gguf = next((option for option, given in of_ggufs.items() if given is not None), None)
    kind = quantize or recipe.export.quantize
    choice = choose(
        engine or recipe.export.engine,
        kind,
        lambda: model_config(resolve_model(recipe.model.path, revision=recipe.model.revision)),
        to=to,
        option=of_gguf,
    )
    if choice.engine == "mlx":
        if to not in (None, "ollama"):
            raise click.UsageError(f"--engine mlx goes with --to ollama, not with --to {to}")
        if of_gguf is not None:
            raise click.UsageError(f"{of_gguf} goes with --engine gguf")
        if to == "ollama" and not dry_run:
            require_program(name, overwrite=overwrite)
        asked = {
            "kind": quantize,
            "adapter": adapter,
            "base": base,
            "output": output,
            "name": name,
            "keep_template": keep_template,
            "overwrite": overwrite,
            "why": choice.why,
        }
        # What nobody asked for may be done otherwise.
        other_way = choice.chosen and kind == "auto"
        free = output is not None and _is_free(output)
        try:
            _export_for_mlx(
                run, asked, name if to == "ollama" else None, dry_run, other_way, as_json
            )
            return
        except NotForEngine as error:
            if not other_way:
                raise
            choice = Choice("gguf", error.what)
            # The folder that has been written there just now gives way to the GGUF.
            overwrite = overwrite or free
    if to == "ollama":
        if choice.chosen:
            click.echo(f"for Ollama's GGUF engine: {choice.why}", err=True)
        require_name(name)
        if not dry_run:
            base_url()  # where it is no address, better said before the work
    wanted: dict[str, Any] = {
        "adapter": adapter,
        "base": base,
        "output": output,
        "file_type": quantize,
        "name": name,
        "imatrix": imatrix,
        "pre": pre,
        "calibration": calibration,
        "verify": verify,
        "keep_template": keep_template,
    }
    # First, not after minutes of work that may have been for nothing.
    for line in adapter_lines(subject.adapter):
        click.echo(line, err=True)
    bundle = None
    if to is not None and not overwrite:
        # Handed over once more, to a program that was not there the first time.
        bundle = exported_before(run, **wanted)
    with status_line("opening", every=0.2 if sys.stderr.isatty() else 10.0) as progress:
        bundle = bundle or export_run(
            run, **wanted, save_imatrix=save_imatrix, overwrite=overwrite, progress=progress
        )
    if not as_json:
        _tell_bundle(bundle, commands=to is None)
    if to is None:
        if as_json:
            click.echo(bundle.as_json())
        return
    with transfer_bar() as bar:
        handed = hand_over(
            bundle.folder, to, name=name, modelfile=bundle.modelfile, dry_run=dry_run, progress=bar
        )
    _tell_hand_over(handed, bundle.as_json(handed) if as_json else None)


def _is_free(place: Path) -> bool:
    return not place.exists() or (place.is_dir() and not any(place.iterdir()))


def _export_for_mlx(
    run: str,
    asked: dict[str, Any],
    name: str | None,
    dry_run: bool,
    by_default: bool,
    as_json: bool,
) -> None:
    """Write the folder for Ollama's MLX engine; with a name, hand it over."""
    from mlxtune.cli.display import status_line
    from mlxtune.export.mlx_bundle import export_for_mlx
    from mlxtune.train.outcome import adapter_lines
    from mlxtune.train.subject import find_subject

    subject = find_subject(run, adapter=asked["adapter"], base=asked["base"])
    assert subject.adapter is not None
    for line in adapter_lines(subject.adapter):
        click.echo(line, err=True)
    every = 0.2 if sys.stderr.isatty() else 10.0
    with status_line("opening", every=every) as progress:
        bundle = export_for_mlx(run, **asked, progress=progress)
    if not as_json:
        _tell_mlx_bundle(bundle)
    if name is None:
        if as_json:
            click.echo(bundle.as_json())
        return
    with status_line("handing over", every=every) as progress:
        handed = bundle.hand_over(name, dry_run=dry_run, by_default=by_default, progress=progress)
    _tell_hand_over(handed, bundle.as_json(handed) if as_json else None)


def _tell_mlx_bundle(bundle: MlxBundle) -> None:
    before = ", written before" * bundle.written_before
    size, found = file_size(bundle.size), bundle.quantized
    click.echo(f"{bundle.folder}: safetensors ({size}), tokenizer, Modelfile, README{before}")
    click.echo(f"  of {bundle.adapter}, for Ollama's MLX engine: {bundle.why}")
    if found.packing is None:
        click.echo("  matrices: in floats")
    else:
        click.echo(
            f"  matrices: {found.kept} quantized as in the base, to the bit; {found.rounded} "
            f"quantized now ({found.packing}); {found.floats} in floats"
        )
    if bundle.loss_before is not None and bundle.loss_after is not None:
        click.echo(
            f"  loss on {bundle.measured_on} records: {bundle.loss_before:.4f} with the adapter, "
            f"{bundle.loss_after:.4f} as written"
        )
    if found.misread is not None:
        click.echo(
            f"note: Ollama's MLX engine makes other tokens of a text such as {found.misread!r}; "
            "the run's records are none of these",
            err=True,
        )
    for note in bundle.notes:
        click.echo(f"note: {note}", err=True)


def _tell_hand_over(handed: HandOver, as_json: str | None) -> None:
    if as_json is not None:
        click.echo(as_json)
        return
    click.echo(handed.note)
    for command in handed.commands:
        click.echo(f"  {command}")


def _tell_bundle(bundle: Bundle, *, commands: bool) -> None:
    before = ", written before" * bundle.written_before
    size = file_size(bundle.gguf_bytes)
    click.echo(f"{bundle.folder}: model.gguf ({size}), Modelfile, README{before}")
    click.echo(f"  of {bundle.adapter}")
    for line in unweighed_lines(bundle.unweighed):
        click.echo(line)
    if bundle.verified is not None:
        click.echo("\n".join(verified_lines(bundle.verified)))
    for note in bundle.notes:
        click.echo(f"note: {note}", err=True)
    if commands:
        for runtime, command in bundle.commands.items():
            click.echo(f"  {runtime:<11}{command}")


def _export_adapter(
    run: str,
    layout: str,
    output: Path | None,
    model: str | None,
    base: str | None,
    name: str | None,
    dry_run: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    from mlxtune.cli.display import transfer_bar
    from mlxtune.export.adapter import export_adapter
    from mlxtune.export.handover import hand_over
    from mlxtune.export.ollama import base_url
    from mlxtune.train.outcome import adapter_lines
    from mlxtune.train.subject import find_subject

    if layout == "ollama" and not dry_run:
        base_url()
    subject = find_subject(run, base=model)
    if subject.adapter is not None:
        for line in adapter_lines(subject.adapter):
            click.echo(line, err=True)
    written = export_adapter(
        run, layout, output=output, model=model, base=base, name=name, overwrite=overwrite
    )
    if not as_json:
        before = ", written before" * written.written_before
        layers = f"{written.kind} on {written.layers} layers, for {layout}"
        click.echo(f"{written.folder}: {layers}{before}")
    if written.modelfile is None:
        click.echo(written.as_json() if as_json else f"  {written.load}")
        return
    with transfer_bar() as bar:
        handed = hand_over(
            written.folder,
            layout,
            name=written.name,
            modelfile=written.modelfile,
            dry_run=dry_run,
            progress=bar,
        )
    _tell_hand_over(handed, written.as_json(handed) if as_json else None)
