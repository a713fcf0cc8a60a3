"""`mlxtune convert`, and the options that `mlxtune export` shares with it."""

from __future__ import annotations

import re
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from mlxtune.cli.shared import DTYPE, PATH, complete_paths, prepare, steps
from mlxtune.cli.suggest import NearChoice
from mlxtune.install import install_extra

if TYPE_CHECKING:
    from mlxtune.export.convert import Conversion, Verified
    from mlxtune.export.verify import Readback

# Of `gguf.mixing`, whose import takes longer than `--help` may.
FILE_TYPES = [
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


FILE_TYPE = NearChoice(FILE_TYPES, case_sensitive=False)
IMATRIX = click.option(
    "--imatrix", type=PATH, help="llama.cpp's importance matrix, for the types below 8 bits."
)
PRE = click.option(
    "--pre", help="llama.cpp's name of the pre-tokenizer, where it is not recognised."
)
CALIBRATE = click.option(
    "--calibrate",
    "calibration",
    type=PATH,
    help="Find the importance by running these records, or a .txt, through the model.",
)
SAVE_IMATRIX = click.option(
    "--save-imatrix", type=PATH, help="Keep what --calibrate found, as llama.cpp keeps it."
)
VERIFY = click.option(
    "--verify/--no-verify", default=True, help="Read it back and compare it.  [default: on]"
)
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")


@click.command()
@click.argument("source", shell_complete=complete_paths)
@click.argument("output", type=PATH)
@click.option(
    "--quantize",
    type=FILE_TYPE,
    metavar="TYPE",
    help=f"Type of a GGUF's weights: {', '.join(FILE_TYPES)}.  [default: f16]",
)
@click.option(
    "--mlx-bits",
    type=click.Choice(["2", "3", "4", "5", "6", "8"]),
    help="Quantize a folder's matrices with MLX, for mlx-lm and for QLoRA.",
)
@click.option(
    "--group-size",
    type=click.Choice(["32", "64", "128"]),
    help="Weights that share a scale, with --mlx-bits.  [default: 64]",
)
@click.option("--dtype", type=DTYPE, help="Type of a folder's weights.  [default: the source's]")
@IMATRIX
@PRE
@CALIBRATE
@SAVE_IMATRIX
@click.option("--split-max-size", help="Begin a new GGUF beyond this size, such as 4G or 500M.")
@VERIFY
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
@AS_JSON
def convert(
    source: str,
    output: Path,
    quantize: str | None,
    mlx_bits: str | None,
    group_size: str | None,
    dtype: str | None,
    imatrix: Path | None,
    calibration: Path | None,
    save_imatrix: Path | None,
    pre: str | None,
    split_max_size: str | None,
    verify: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write a model as GGUF (OUTPUT ends in .gguf), or as a folder.

    SOURCE is a run, a folder of Hugging Face's or MLX's layout, a .gguf file, a hub id,
    ollama:NAME of a model that Ollama has, or pkg:PACKAGE/FILE.
    """
    to_gguf = output.suffix.lower() == ".gguf"
    if not to_gguf and get_close_matches(output.suffix.lower(), [".gguf"], cutoff=0.75):
        raise click.UsageError(f"OUTPUT ends in {output.suffix}: did you mean .gguf?")
    of_folders = {"--mlx-bits": mlx_bits, "--group-size": group_size, "--dtype": dtype}
    of_ggufs = {
        "--quantize": quantize,
        "--imatrix": imatrix,
        "--calibrate": calibration,
        "--save-imatrix": save_imatrix,
        "--pre": pre,
        "--split-max-size": split_max_size,
    }
    for option, given in (of_folders if to_gguf else of_ggufs).items():
        if given is not None:
            kind = "folders" if to_gguf else "GGUF files, whose name ends in .gguf"
            raise click.UsageError(f"{option} is of {kind}")
    if group_size is not None and mlx_bits is None:
        raise click.UsageError("--group-size goes with --mlx-bits")
    require_one_importance(imatrix, calibration, save_imatrix)
    split = _bytes(split_max_size) if split_max_size else 0
    prepare()
    from mlxtune.cli.display import status_line
    from mlxtune.export.convert import convert as to_file
    from mlxtune.export.convert import convert_to_folder
    from mlxtune.train.outcome import outcome_lines
    from mlxtune.train.run import STATUS, Run

    run = Run(Path(source).expanduser())
    for line in outcome_lines(run) if (run.path / STATUS).is_file() else ():
        click.echo(line, err=True)
    with status_line("opening", every=0.2 if sys.stderr.isatty() else 10.0) as progress:
        if to_gguf:
            made = to_file(
                source,
                output,
                file_type=quantize or "f16",
                imatrix=imatrix,
                calibration=calibration,
                save_imatrix=save_imatrix,
                pre=pre,
                split_max_bytes=split,
                verify=verify,
                overwrite=overwrite,
                progress=progress,
            )
        else:
            made = convert_to_folder(
                source,
                output,
                dtype=dtype,
                mlx_bits=int(mlx_bits) if mlx_bits else None,
                group_size=int(group_size or 64),
                verify=verify,
                overwrite=overwrite,
                progress=progress,
            )
    click.echo(made.as_json() if as_json else _told(made))


def require_one_importance(
    imatrix: Path | None, calibration: Path | None, save_imatrix: Path | None
) -> None:
    """Refuse options of importance that do not go together."""
    if imatrix is not None and calibration is not None:
        raise click.UsageError("--imatrix and --calibrate exclude each other")
    if save_imatrix is not None and calibration is None:
        raise click.UsageError("--save-imatrix goes with --calibrate")


def on_command_line(option: str) -> bool | None:
    """True if a flag was on the command line, whichever way."""
    source = click.get_current_context().get_parameter_source(option)
    return True if source is ParameterSource.COMMANDLINE else None


def _bytes(size: str) -> int:
    """`4G` in bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG])B?", size.strip().upper())
    if found is None:
        raise click.UsageError("--split-max-size is a number with K, M or G, such as 4G")
    count = int(float(found[1]) * {"K": 10**3, "M": 10**6, "G": 10**9}[found[2]])
    if not count:
        raise click.UsageError("--split-max-size: no file is that small")
    return count


def file_size(count: int) -> str:
    """Bytes as people say them."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            number = count / size
            return f"{number:.1f} {unit}" if number < 10 else f"{number:.0f} {unit}"
    return f"{count} bytes"


def _told(made: Conversion) -> str:
    types = ", ".join(f"{count} {name}" for name, count in made.types.items())
    lines = [f"{made.path}: {file_size(made.nbytes)}, tensors: {types}"]
    if len(made.files) > 1:
        lines.append(f"  in {len(made.files)} files; runtimes are given the first")
    lines += unweighed_lines(made.unweighed)
    if made.verified is not None:
        folder = made.path.suffix.lower() != ".gguf"
        lines += verified_lines(made.verified, runs=not folder)
    first = made.path if made.path.is_dir() else made.path.with_name(made.files[0])
    return "\n".join([*lines, "next:", steps({"chat": "talk to it"}, first)])


def unweighed_lines(count: int) -> list[str]:
    """What an importance, that was given, says nothing of."""
    if not count:
        return []
    what = "1 matrix has" if count == 1 else f"{count} matrices have"
    return [f"  {what} no importance there and {'is' if count == 1 else 'are'} rounded as without"]


def verified_lines(verified: Verified, *, runs: bool = True) -> list[str]:
    """How a file, which may be one that llama.cpp runs, differs from its source."""
    lines = _readback_lines(verified.readback)
    if not runs:
        pass
    elif (run := verified.llamacpp) is not None:
        compared = (
            "it loads; there was nothing to compare"
            if run.mean_kl is None or run.top1 is None
            else f"at {run.top1:.0%} of {run.places} places the most likely next token is that of "
            f"MLX (mean KL divergence {run.mean_kl:.2g})"
        )
        tried = "held-out records" if verified.tried_on == "records" else "test texts"
        lines.append(f"in llama.cpp: {compared}; tried on {tried}")
        if run.same_prompt is not None:
            asks = (
                "as the chat template does"
                if run.same_prompt
                else ("WITH ANOTHER PROMPT than the chat template's: answers may be worse there")
            )
            lines.append(f"llama.cpp's server asks {asks}")
    elif verified.not_run is not None:
        lines.append(f"not tried in llama.cpp: {verified.not_run}")
    else:
        add = install_extra("llamacpp")
        lines.append(f"not tried in llama.cpp, which is optional: {add}")
    return [f"  {line}" for line in lines]


def _readback_lines(readback: Readback) -> list[str]:
    """What was read back, and whether it says the same as the source."""
    errors = [f"{100 * error:.2g}% ({name})" for name, error in readback.error.items() if error]
    differ = f"differ from the model's by {', '.join(errors)}" if errors else "equal the model's"
    same = f"{readback.texts} test texts become the same tokens"
    if readback.template_kept:
        same += ", test chats the same prompts"
    return [f"read back: {readback.tensors} tensors {differ}", f"tokenizer: {same}"]
