"""Hand an exported model to the program that is to run it."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from mlxtune.errors import ExportError
from mlxtune.export.modelfile import Modelfile
from mlxtune.export.ollama import Progress, create, require_name

GGUF, MODELFILE = "model.gguf", "Modelfile"
LABELS = {"ollama": "Ollama", "llamacpp": "llama.cpp", "mistralrs": "mistral.rs"}
RUNTIMES = tuple(LABELS)
_HOW_TO_INSTALL = {
    "llamacpp": "https://github.com/ggml-org/llama.cpp/blob/master/docs/install.md",
    "mistralrs": "https://github.com/EricLBuehler/mistral.rs#installation",
}

# What a program is asked to see that it runs the file, and how many seconds it is given:
# reading tens of gigabytes from a disk takes minutes.
PROMPT = "Hello"
_PATIENCE = 600


@dataclass(frozen=True)
class HandOver:
    """What became of a model.

    Attributes:
        to: of `RUNTIMES`.
        name: of the model, where the program knows it by one.
        done: whether the program has it, or has run it; False in a dry run.
        note: what happened, in a sentence.
        commands: what runs it from here on.
    """

    to: str
    name: str
    done: bool
    note: str
    commands: tuple[str, ...]


def run_commands(to: str, folder: Path, name: str) -> tuple[str, ...]:
    """The commands that run the model in `folder`, from files alone.

    Args:
        to: of `RUNTIMES`.
        folder: holds the Modelfile and, for all but Ollama, model.gguf.
        name: what Ollama calls it.
    """
    gguf, modelfile = (shlex.quote(str(folder / file)) for file in (GGUF, MODELFILE))
    name = shlex.quote(name)
    return {
        "ollama": (f"ollama create {name} -f {modelfile}", f"ollama run {name}"),
        "llamacpp": (f"llama-server -m {gguf}", f"llama-cli -m {gguf} -cnv"),
        "mistralrs": (f"mistralrs run -f {gguf}",),
    }[to]


def hand_over(
    folder: Path,
    to: str,
    *,
    name: str,
    modelfile: Modelfile,
    dry_run: bool = False,
    host: str | None = None,
    progress: Progress = lambda _what, _done, _total: None,
) -> HandOver:
    """Hand over the model in a folder: send it to Ollama, or have a program answer with it.

    Args:
        folder: of an export; it stays as it is, whatever happens.
        to: of `RUNTIMES`.
        name: what Ollama is to call it.
        modelfile: the one in the folder.
        dry_run: only say what to do.
        host: of Ollama, as `ollama.base_url` takes it.
        progress: is told what is being done, and how many bytes of it.

    Raises:
        ExportError: Ollama does not answer or refuses, or a program is not there or cannot
            run the file; the files stay, and the error names the commands for later.
    """
    if to == "ollama":
        require_name(name)
    commands = run_commands(to, folder, name)
    if dry_run:
        return HandOver(to, name, False, "a dry run: nobody was asked", commands)
    try:
        if to == "ollama":
            version = create(
                name,
                modelfile,
                _file(folder, modelfile.from_ if modelfile.from_.endswith(".gguf") else None),
                adapter=_file(folder, modelfile.adapter),
                host=host,
                progress=progress,
            )
            return HandOver(to, name, True, f"Ollama {version} has {name}", commands[1:])
        return _tried(to, folder / GGUF, name, commands, progress)
    except ExportError as error:
        later = "\n  ".join(
            [f"the files are ready in {folder}; to go on with them later:"]
            + [f"  {command}" for command in commands]
        )
        remedy = f"{error.remedy}\n  {later}" if error.remedy else later
        raise ExportError(error.what, where=error.where, remedy=remedy) from error


def _file(folder: Path, named: str | None) -> Path | None:
    """A file that the folder's Modelfile names; a model that Ollama has is none."""
    return None if named is None else folder / named


def _tried(
    to: str, gguf: Path, name: str, commands: tuple[str, ...], progress: Progress
) -> HandOver:
    """Have a program answer one prompt."""
    program, *arguments = _smoke_test(to, gguf)
    if shutil.which(program) is None:
        raise ExportError(
            f"{LABELS[to]} was not found: {program} is not on the PATH",
            remedy=f"install it: {_HOW_TO_INSTALL[to]}",
        )
    progress(f"asking {program}", 0, 0)
    try:
        ran = subprocess.run(
            [program, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PATIENCE,
        )
    except subprocess.TimeoutExpired:
        raise ExportError(f"{program} gave no answer in {_PATIENCE} s", where=str(gguf)) from None
    except OSError as error:
        raise ExportError(
            f"{program} cannot be started: {error.strerror or error}", where=str(gguf)
        ) from None
    if ran.returncode != 0 or not ran.stdout.strip():
        said = ran.stderr.strip() or ran.stdout.strip() or "nothing"
        raise ExportError(
            f"{program} does not run the model (exit code {ran.returncode}); it says last:\n  "
            + "\n  ".join(said.splitlines()[-5:]),
            where=str(gguf),
        )
    return HandOver(to, name, True, f"{program} has loaded it and answered", commands)


def _smoke_test(to: str, gguf: Path) -> tuple[str, ...]:
    if to == "llamacpp":
        return ("llama-cli", "-m", str(gguf), "-cnv", "-st", "-p", PROMPT, "-n", "16")
    return ("mistralrs", "run", "-f", str(gguf), "-i", PROMPT)
