"""Speed of the quantizers against ggml's own, in millions of weights a second.

    python -m mlxtune.device python benchmarks/quantize.py [Q4_K …] [--rounds 7] [--threads 2]

ggml is the one inside `xllamacpp`, compiled C called through ctypes, which lets go of the
interpreter lock: several threads take parts of the rows, as ours do. The four ways take
turns in every round; medians over the rounds, and of the rounds' own ratios. Before that
the bytes of both are compared. Keeps all figures in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from mlxtune.device import device_name
from mlxtune.gguf.quantize import quantize
from mlxtune.processes import started

HERE = Path(__file__).parent
TYPES = ["Q8_0", "Q4_0", "Q5_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
TARGET = {"Q4_K": 0.8}
ROWS, WIDTH = 4096, 2048


def load_ggml() -> Callable[..., int]:
    found = importlib.util.find_spec("xllamacpp")
    if found is None or not found.submodule_search_locations:
        sys.exit("pip install xllamacpp")
    folder = Path(found.submodule_search_locations[0])
    function = ctypes.CDLL(str(next(folder.glob("xllamacpp*.so")))).ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [ctypes.c_int, pointer, pointer, *[number] * 3, pointer]
    return function


def ggml_quantize(
    function: Callable[..., int],
    values: np.ndarray,
    type_: Type,
    importance: np.ndarray | None,
    pool: ThreadPoolExecutor | None,
) -> np.ndarray:
    """All rows; with a pool in parts of 32 rows."""
    block, size = gguf.GGML_QUANT_SIZES[type_]
    result = np.empty((len(values), values.shape[1] // block * size), np.uint8)
    weights = None if importance is None else importance.ctypes.data

    def work(start: int, stop: int) -> None:
        part, into = values[start:stop], result[start:stop]
        where = part.ctypes.data, into.ctypes.data
        function(type_, *where, 0, len(part), values.shape[1], weights)

    if pool is None:
        work(0, len(values))
    else:
        list(pool.map(lambda start: work(start, start + 32), range(0, len(values), 32)))
    return result


def measure(type_: Type, rounds: int, threads: int, *, weighed: bool) -> dict[str, Any]:
    """Speeds of ggml and of ours, with one thread and with several; ours has processes in
    their place where scales are searched for, as `mlxtune convert` has."""
    rng = np.random.default_rng(0)
    values = (0.02 * rng.standard_normal((ROWS, WIDTH))).astype(np.float32)
    importance = rng.random(WIDTH).astype(np.float32) if weighed else None
    function = load_ggml()
    with ThreadPoolExecutor(threads) as pool, started(threads) as others:
        ways: dict[str, Callable[[], np.ndarray]] = {
            "ggml 1": lambda: ggml_quantize(function, values, type_, importance, None),
            "mlxtune 1": lambda: quantize(values, type_, importance, threads=1),
            "ggml n": lambda: ggml_quantize(function, values, type_, importance, pool),
            "mlxtune n": lambda: quantize(
                values, type_, importance, threads=threads, others=others
            ),
        }
        list(others.map(time.sleep, [(0.5,)] * threads))  # they have all started
        packed = [way() for way in ways.values()]  # warms up, too
        assert all(np.array_equal(packed[0], other) for other in packed[1:]), "other bytes"
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(rounds):
            for name in ways if number % 2 else reversed(ways):
                start = time.perf_counter()
                ways[name]()
                speeds[name].append(values.size / (time.perf_counter() - start) / 1e6)
    figures: dict[str, Any] = {name: statistics.median(found) for name, found in speeds.items()}
    for count in "1n":
        pairs = zip(speeds[f"mlxtune {count}"], speeds[f"ggml {count}"], strict=True)
        figures[f"ratio {count}"] = statistics.median(ours / theirs for ours, theirs in pairs)
    return figures | {"rounds": speeds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", default=TYPES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    given = parser.parse_args()
    device = device_name()
    name = "".join(c if c.isalnum() else "-" for c in device.lower()).strip("-")
    path = HERE / "results" / f"quantize-{name}.json"
    results: dict[str, Any] = {
        "benchmark": "quantize",
        "device": device,
        "machine": platform.platform(),
        "versions": {p: version(p) for p in ("mlxtune", "mlx", "numpy", "xllamacpp")},
        "unit": "million weights a second",
        "weights": ROWS * WIDTH,
        "threads": given.threads,
        "target": TARGET,
        "types": {},
    }
    n = given.threads
    print(f"| type | ggml, 1 thread | mlxtune | | ggml, {n} threads | mlxtune, {n} cores | |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for type_name in given.types:
        for weighed in (False, True) if type_name != "Q8_0" else (False,):
            label = type_name + (" with importance" if weighed else "")
            figures = measure(Type[type_name], given.rounds, n, weighed=weighed)
            results["types"][label] = figures
            print(row(label, figures), flush=True)
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def row(label: str, figures: dict[str, Any]) -> str:
    """A line of the table."""
    cells = [label]
    for count in "1n":
        cells += [f"{figures[f'{who} {count}']:.1f}" for who in ("ggml", "mlxtune")]
        cells += [f"**{figures[f'ratio {count}']:.2f} ×**"]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
