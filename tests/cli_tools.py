"""The program as a process, and a model small enough to run it on in a second."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from functools import cache
from pathlib import Path

import mlx.core as mx
from conftest import SMOLLM2, tiny_llama
from forks import TIMEOUT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlxtune.arrays import flat

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def mlxtune(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the program: on Linux in a fork, which spares its imports."""
    if sys.platform != "linux" or environment() != _OF_FORKS:
        return mlxtune_afresh(*arguments, cwd=cwd)
    forks = _forks()
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder, "stdout"), Path(folder, "stderr")
        asked = {"arguments": arguments, "cwd": str(cwd)}
        asked |= {"stdout": str(stdout), "stderr": str(stderr)}
        forks.stdin.write(json.dumps(asked) + "\n")
        forks.stdin.flush()
        status = int(forks.stdout.readline())
        return subprocess.CompletedProcess(
            arguments, status, stdout.read_text("utf-8"), stderr.read_text("utf-8")
        )


def complaints(done: subprocess.CompletedProcess[str]) -> str:
    """What is on stderr, but that the machine is being measured, which a busy one is again."""
    lines = done.stderr.splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("measuring this machine"))


def mlxtune_afresh(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the program in a process of its own."""
    return subprocess.run(
        [*PROGRAM, *arguments],
        cwd=cwd,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


# In `environment`.
PROGRAM = (
    sys.executable,
    "-c",
    "import forks, sys; forks.without_torch(); sys.argv[0] = 'mlxtune'; import mlxtune.__main__",
)


# What pytest says of each test, and torch of itself once bitsandbytes is imported.
_NOT_THE_PROGRAMS = ("PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR")


def environment() -> dict[str, str]:
    """Of the program as a process: it finds what is beside the tests, and is not run again."""
    own = {"MLXTUNE_BLAS": "off", "HF_HUB_OFFLINE": "1"}
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    kept = {k: v for k, v in os.environ.items() if k not in _NOT_THE_PROGRAMS}
    return kept | own | {"PYTHONPATH": path}


# Before any test has changed it.
_OF_FORKS = environment()


@cache
def _forks() -> subprocess.Popen[str]:
    forks = subprocess.Popen(
        [sys.executable, "-c", "import forks; forks.serve()"],
        env=_OF_FORKS,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(forks.communicate)  # at the end of its stdin it ends
    return forks


def save_tiny_model(folder: Path, *, merged: bool = False) -> None:
    """A random model with a tokenizer of bytes, as a Hugging Face folder.

    Args:
        folder: is there.
        merged: with one merge, of two bytes that no text has: a GGUF must have some.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(alphabet[-2], alphabet[-1])] if merged else []
    pieces = [*alphabet, *map("".join, merges)]
    model = tiny_llama(vocabulary=len(pieces) + 2)
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(pieces)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    config = {k: v for k, v in asdict(model.args).items() if v is not None}
    config |= {"architectures": ["LlamaForCausalLM"], "eos_token_id": len(pieces) + 1}
    (folder / "config.json").write_text(json.dumps(config))
    weights = flat(model.parameters())
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})


REAL_TOKENS = 4096  # of the 49,152: reading and writing all of them takes seconds each time


@cache
def real_vocabulary() -> PreTrainedTokenizerFast:
    """SmolLM2's first tokens, with the merges that make them, its rule and its template.

    Do not change it.
    """
    from mlxtune.models.load import load_tokenizer
    from mlxtune.models.resolve import resolve_model

    whole = load_tokenizer(resolve_model(SMOLLM2))._tokenizer
    state = json.loads(whole.backend_tokenizer.to_str())
    bpe = state["model"]
    bpe["vocab"] = {token: n for token, n in bpe["vocab"].items() if n < REAL_TOKENS}
    bpe["merges"] = [pair for pair in bpe["merges"] if "".join(pair) in bpe["vocab"]]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        clean_up_tokenization_spaces=False,
        **whole.special_tokens_map,
    )
    tokenizer.chat_template = whole.chat_template
    return tokenizer


def save_real_vocabulary(folder: Path, *, dims: int = 64) -> None:
    """A random two-block llama of this width with `real_vocabulary`, as a folder."""
    folder.mkdir(parents=True)
    model = tiny_llama(vocabulary=REAL_TOKENS, dims=dims)
    real_vocabulary().save_pretrained(str(folder))
    config = {k: v for k, v in asdict(model.args).items() if v is not None}
    config |= {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 512}
    (folder / "config.json").write_text(json.dumps(config))
    weights = flat(model.parameters())
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every path, hidden ones too, with its size and time of change."""
    paths = ((path, path.lstat()) for path in folder.rglob("*"))
    return {str(p.relative_to(folder)): (stat.st_size, stat.st_mtime_ns) for p, stat in paths}
