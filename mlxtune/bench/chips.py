"""The chips of Apple silicon Macs: memory, bandwidth and arithmetic, each figure with its source.

Nothing here is measured by this project. Specifications are what a document states, or what
follows from a clock that one states; what none states is None. What others measured stands
apart, in `Chip.measured_prefill` and `MEASURED`, and is for estimates only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from mlxtune.errors import ChipError

GB = 10**9
# "16 GB" of memory are 16 GiB.
_GIB = 2**30
# A GPU core has 128 ALUs, each a fused multiply-add a clock: `_CLOCKS` below.
_FLOP_PER_CLOCK = 256
# Llama 2 7B, as llama-bench counts it: https://gist.github.com/andrewginns/cf95867c2d79458bd894c07b9e7d5cbd
PREFILL_PARAMETERS = 6.74e9


@dataclass(frozen=True)
class Source:
    """Where a figure is from.

    Attributes:
        url: of the document.
        retrieved: the document itself, or a copy of it, was read; otherwise its figure was
            read where another document quotes it.
        note: what to know about it.
    """

    url: str
    retrieved: bool = True
    note: str = ""


@dataclass(frozen=True)
class Chip:
    """One variant of a chip: its name and how many cores its GPU has.

    Attributes:
        name: as Apple writes it, such as `M2 Pro`.
        gpu_cores: of this variant.
        memory_gb: sizes sold, in GB.
        bandwidth: of the memory, bytes/s, as Apple rounds it.
        float32_rate: FLOP/s of the GPU's ALUs at its highest clock; None where no document
            states that clock, or two contradict each other.
        float16_rate: the same for float16, where a source states it. From the M5 on, matrices
            are multiplied by accelerators of their own, whose rate Apple does not state: None.
        bfloat16_rate: the same for bfloat16. No document states it of any chip, so it is None of
            all: plans take what is known of float16, and say so (`BFLOAT16`).
        measured_prefill: tokens/s at which llama.cpp reads a prompt of 512 tokens with Llama 2
            7B in float16. Not a specification.
        sources: (attribute, where it is from) of every attribute that is not None.
    """

    name: str
    gpu_cores: int
    memory_gb: tuple[int, ...]
    bandwidth: float
    float32_rate: float | None
    float16_rate: float | None
    bfloat16_rate: float | None
    measured_prefill: float | None
    sources: tuple[tuple[str, Source], ...]

    def __str__(self) -> str:
        return f"{self.name} ({self.gpu_cores}-core GPU)"

    @property
    def matrix_units(self) -> bool:
        """Whether matrices are multiplied by accelerators, not by the GPU's ALUs."""
        return int(self.name.split()[0].removeprefix("M")) >= 5

    def source(self, attribute: str) -> Source | None:
        """Where an attribute is from; None where the attribute is None."""
        return dict(self.sources).get(attribute)

    @property
    def prefill_rate(self) -> float | None:
        """FLOP/s that `measured_prefill` amounts to, 2 for a parameter and a token.

        An estimate of what large float16 products reach: attention and everything else that
        a prompt takes are in the time, and not in the count.
        """
        if self.measured_prefill is None:
            return None
        return 2 * PREFILL_PARAMETERS * self.measured_prefill


@dataclass(frozen=True)
class Measurement:
    """What somebody measured on a chip. For estimates; conditions differ between entries.

    Attributes:
        chip: name.
        gpu_cores: None where the source does not say.
        quantity: `lora` or `prefill`, tokens/s, or `matmul`, FLOP/s.
        value: in the unit of `quantity`.
        conditions: program, model and sizes.
        source: where it is published.
    """

    chip: str
    gpu_cores: int | None
    quantity: str
    value: float
    conditions: str
    source: Source


def _quoted(url: str, by: str) -> Source:
    return Source(url, retrieved=False, note=f"as quoted by {by}")


_SUNKCOST = "https://github.com/rlindsey2/sunkcost (data/hardware.json)"
_PAPALINI = "E. Papalini, Bigger Models, Smaller Macs (28 September 2026)"
_ADVISOR = "https://github.com/Himalpok1/local-ai-advisor (research/findings.md)"
_HUGGING_FACE = "https://github.com/huggingface/huggingface.js (packages/tasks/src/hardware.ts)"

_M1_NEWS = Source(
    "https://www.apple.com/gw/newsroom/2021/10/introducing-m1-pro-and-m1-max-the-most-powerful-chips-apple-has-ever-built"
)
_TOMS_M1 = Source("https://www.tomshardware.com/news/apple-m1-pro-max-everything-we-know")
_MLJOURNEY = Source("https://mljourney.com/?p=4513")
_STUDIO_2022 = Source(
    "http://tekspecz.com/new-blog-2/2022/3/13/hardware-breakdown-presents-the-mac-studio"
)
_WIKI_M2 = Source("https://en.wikipedia.org/wiki/Apple_M2", note="read in copies")
_WIKI_M3 = Source(
    "https://en.wikipedia.org/wiki/Apple_M3",
    note=f"the cores, read in copies; the sizes are in {_HUGGING_FACE}",
)
_MBP_2023 = Source(
    "https://thelowryusq.com/article/macbook-pro-14-inch-2023-technical-specifications",
    note="copy of Apple's technical specifications",
)
_STUDIO_2023 = Source("https://theapplewiki.com/wiki/Mac_Studio_(2023)")
_MBP_M3 = Source("https://support.apple.com/en-au/117737")
_MBP_M3_MAX = _quoted("https://support.apple.com/en-au/117737", _HUGGING_FACE)
_MACWORLD_2025 = Source("https://english.worldmagazine.it/431260", note="copy of Macworld")
_ARS_2025 = Source(
    "https://inforeader.com/i/?search=%23Mac%2BStudio", note="copy of a table of Ars Technica"
)
_ARS_M4 = Source(
    "https://goodnewsapodcast.com/apples-m4-m4-pro-and-m4-max-compared-to-past-generations-and-to-each-other",
    note="copy of tables of Ars Technica",
)
_STUDIO_2025 = _quoted("https://support.apple.com/en-us/122211", _SUNKCOST)
_MBP_M5 = _quoted("https://support.apple.com/en-us/125405", _ADVISOR)
_CHIPS_GIST = Source(
    "https://gist.github.com/kellyshephard", note="chips_table.md; the smallest size alone"
)
_M5_PRO_NEWS = Source(
    "https://www.macrumors.com/2026/03/03/apple-unveils-macbook-pro-with-m5-pro-and-m5-max-chips-with-neural-accelerators/"
)
_MBP_M5_MAX = _quoted("https://support.apple.com/en-us/126318", _ADVISOR)
_STUDIO_2026 = _quoted("https://www.apple.com/mac-studio/specs/", f"{_SUNKCOST} and {_PAPALINI}")
_MINI_2026 = _quoted("https://www.apple.com/mac-mini/specs/", f"{_SUNKCOST} and {_PAPALINI}")

# https://github.com/ggml-org/llama.cpp/discussions/4167: `llama-bench -p 512`, build 8e672ef or,
# for newer chips, a later one. The table was read in one copy; where others quote it they agree:
# https://gist.github.com/andrewginns/cf95867c2d79458bd894c07b9e7d5cbd (M1 Pro, M3 Pro).
PREFILL_SOURCE = _quoted("https://github.com/ggml-org/llama.cpp/discussions/4167", _ADVISOR)

_METAL_BENCHMARKS = Source(
    "https://github.com/philipturner/metal-benchmarks",
    note="128 ALUs a core, float16 as fast as float32; Apple's own figures, where it gives"
    " any, are up to 2 percent lower",
)
_MAC_PRO = Source(
    "https://www.apple.com/mac-pro/",
    note="27.2 TFLOPS of 76 cores, that is 1398 MHz, and two M2 Max in one M2 Ultra; read in"
    " a copy of the Polish page",
)
_HMC = Source("https://hmc-tech.com/gpu/apple_10_core_m3", note="1398 MHz; float16 as float32")
_HMC_MAX = Source(
    "https://hmc-tech.com/gpu/apple-32-core-m4-max-vs-apple-40-core-m3-max",
    note="1398 MHz; float16 as float32",
)
_HMC_PRO = Source(
    "https://hmc-tech.com/gpu/apple-32-core-m4-max-vs-apple-18-core-m3-pro",
    note="1398 MHz; float16 as float32",
)
_M3_DIES = Source(
    "https://english.worldmagazine.it/431260",
    note="two M3 Max in one, taken at their clock; copy of Macworld",
)
_ECLECTIC = Source(
    "https://eclecticlight.co/2025/01/22/m4-pro-full-on-when-cpu-and-gpu-draw-over-50-w-and-how-low-power-mode-changes-that/",
    note="powermetrics on 20 cores: 1578 MHz; read in a copy",
)
_M5_ROOFLINE = Source(
    "https://michaelstinkerings.org/apple-m5-gpu-roofline-analysis",
    note="powermetrics: 1578 MHz; 3.76 TFLOPS measured on 10 cores of a MacBook Air",
)

# What there is about bfloat16: comparisons, not rates.
BFLOAT16 = (
    Source(
        "https://github.com/huggingface/transformers/pull/40458",
        note="the GPUs of M1 and M2 have none of their own; Metal computes in float32",
    ),
    Source(
        "https://github.com/ikawrakow/ik_llama.cpp/pull/56",
        note="prompts of an 8B model at 539 tokens/s in bfloat16, 587 in float16; chip not stated",
    ),
    Source(
        "https://github.com/ml-explore/mlx-examples/pull/186",
        note="M2 Ultra, MLX of January 2024: prompts at 12.1 tokens/s, 20.7 in float16",
    ),
)

# Name -> highest clock of the GPU in Hz, whether float16 is stated to run at the rate of
# float32, and the source. Missing: the M4, for which one site gives both 1470 and 1578 MHz; the
# M4 Max, for which it gives 1678 MHz and a published table 18.4 TFLOPS, that is 1797 MHz; the
# M5 Pro, Max and Ultra and the M6, for which there are estimates only.
_CLOCKS: dict[str, tuple[float, bool, Source]] = {
    "M1": (1.278e9, True, _METAL_BENCHMARKS),
    "M1 Pro": (1.296e9, True, _METAL_BENCHMARKS),
    "M1 Max": (1.296e9, True, _METAL_BENCHMARKS),
    "M1 Ultra": (1.296e9, True, _METAL_BENCHMARKS),
    "M2": (1.398e9, True, _METAL_BENCHMARKS),
    "M2 Pro": (1.398e9, True, _METAL_BENCHMARKS),
    "M2 Max": (1.398e9, True, _MAC_PRO),
    "M2 Ultra": (1.398e9, True, _MAC_PRO),
    "M3": (1.398e9, True, _HMC),
    "M3 Pro": (1.398e9, True, _HMC_PRO),
    "M3 Max": (1.398e9, True, _HMC_MAX),
    "M3 Ultra": (1.398e9, True, _M3_DIES),
    "M4 Pro": (1.578e9, False, _ECLECTIC),
    "M5": (1.578e9, False, _M5_ROOFLINE),
}


def _variant(
    name: str,
    cores: int,
    memory: tuple[int, ...],
    bandwidth: float,
    prefill: float | None,
    sold: Source,
    speed: Source,
) -> Chip:
    """A chip from its row.

    Args:
        bandwidth: GB/s.
        sold: source of the cores and of the memory.
        speed: of the bandwidth.
    """
    sources = [("gpu_cores", sold), ("memory_gb", sold), ("bandwidth", speed)]
    float32 = float16 = None
    if name in _CLOCKS:
        clock, same, source = _CLOCKS[name]
        float32 = cores * _FLOP_PER_CLOCK * clock
        sources.append(("float32_rate", source))
        if same:
            float16 = float32
            half = _METAL_BENCHMARKS if source in (_MAC_PRO, _M3_DIES) else source
            sources.append(("float16_rate", half))
    if prefill is not None:
        sources.append(("measured_prefill", PREFILL_SOURCE))
    return Chip(
        name, cores, memory, bandwidth * GB, float32, float16, None, prefill, tuple(sources)
    )


# name, GPU cores, memory GB, bandwidth GB/s, prefill tokens/s, source of cores and memory, of
# the bandwidth. Smaller variants come first.
CHIPS: tuple[Chip, ...] = tuple(
    _variant(*row)
    for row in (
        ("M1", 7, (8, 16), 68.25, None, _MLJOURNEY, _TOMS_M1),
        ("M1", 8, (8, 16), 68.25, None, _MLJOURNEY, _TOMS_M1),
        ("M1 Pro", 14, (16, 32), 200, 262.65, _MLJOURNEY, _M1_NEWS),
        ("M1 Pro", 16, (16, 32), 200, 302.14, _MLJOURNEY, _M1_NEWS),
        ("M1 Max", 24, (32, 64), 400, 453.03, _MLJOURNEY, _M1_NEWS),
        ("M1 Max", 32, (32, 64), 400, 599.53, _MLJOURNEY, _M1_NEWS),
        ("M1 Ultra", 48, (64, 128), 800, 875.81, _STUDIO_2022, _STUDIO_2022),
        ("M1 Ultra", 64, (64, 128), 800, 1168.89, _STUDIO_2022, _STUDIO_2022),
        ("M2", 8, (8, 16, 24), 100, None, _WIKI_M2, _WIKI_M2),
        ("M2", 10, (8, 16, 24), 100, 201.34, _WIKI_M2, _WIKI_M2),
        ("M2 Pro", 16, (16, 32), 200, 312.65, _MBP_2023, _MBP_2023),
        ("M2 Pro", 19, (16, 32), 200, 384.38, _MBP_2023, _MBP_2023),
        ("M2 Max", 30, (32, 64), 400, 600.46, _MBP_2023, _MBP_2023),
        ("M2 Max", 38, (32, 64, 96), 400, 755.67, _MBP_2023, _MBP_2023),
        ("M2 Ultra", 60, (64, 128, 192), 800, 1128.59, _STUDIO_2023, _WIKI_M2),
        ("M2 Ultra", 76, (64, 128, 192), 800, 1401.85, _STUDIO_2023, _WIKI_M2),
        ("M3", 8, (8, 16, 24), 100, None, _WIKI_M3, PREFILL_SOURCE),
        ("M3", 10, (8, 16, 24), 100, None, _ARS_M4, PREFILL_SOURCE),
        ("M3 Pro", 14, (18, 36), 150, None, _ARS_M4, _MBP_M3),
        ("M3 Pro", 18, (18, 36), 150, 357.45, _MBP_M3, _MBP_M3),
        ("M3 Max", 30, (36, 96), 300, 589.41, _MBP_M3, _MBP_M3),
        ("M3 Max", 40, (48, 64, 128), 400, 779.17, _MBP_M3_MAX, _MBP_M3),
        ("M3 Ultra", 60, (96, 256), 819, 1121.80, _ARS_2025, _MACWORLD_2025),
        ("M3 Ultra", 80, (96, 256, 512), 819, 1538.34, _STUDIO_2025, _MACWORLD_2025),
        ("M4", 8, (16, 24), 120, None, _ARS_M4, _ARS_M4),
        ("M4", 10, (16, 24, 32), 120, 230.18, _ARS_M4, _ARS_M4),
        ("M4 Pro", 16, (24, 48, 64), 273, 381.14, _ARS_M4, _ARS_M4),
        ("M4 Pro", 20, (24, 48, 64), 273, 464.48, _ARS_M4, _ARS_M4),
        ("M4 Max", 32, (36,), 410, 736.25, _STUDIO_2025, _ARS_M4),
        ("M4 Max", 40, (48, 64, 128), 546, 922.83, _STUDIO_2025, _ARS_M4),
        ("M5", 8, (16,), 153, None, _CHIPS_GIST, _CHIPS_GIST),
        ("M5", 10, (16, 24, 32), 153, None, _MBP_M5, _CHIPS_GIST),
        ("M5 Pro", 16, (24, 48, 64), 307, None, _MINI_2026, _M5_PRO_NEWS),
        ("M5 Pro", 20, (24, 48, 64), 307, None, _MBP_M5_MAX, _M5_PRO_NEWS),
        ("M5 Max", 32, (36,), 460, None, _STUDIO_2026, _STUDIO_2026),
        ("M5 Max", 40, (48, 64, 128), 614, None, _STUDIO_2026, _M5_PRO_NEWS),
        ("M5 Ultra", 64, (96, 256), 1200, None, _STUDIO_2026, _STUDIO_2026),
        ("M5 Ultra", 80, (96, 256, 512), 1200, None, _STUDIO_2026, _STUDIO_2026),
        # 170 GB/s with 24 or 32 GB.
        ("M6", 12, (16, 24, 32), 153, None, _MINI_2026, _MINI_2026),
    )
)

_LORA_EXAMPLE = Source("https://github.com/ml-explore/mlx-examples/blob/main/lora/README.md")
_MLX_M5 = Source("https://github.com/ml-explore/mlx/pull/3211")
_Q8 = "llama.cpp, Llama 2 7B in Q8_0, prompt of 512 tokens"

MEASURED: tuple[Measurement, ...] = (
    Measurement(
        "M2 Ultra", None, "lora", 475, "mlx-examples, Llama 7B, WikiSQL; sizes not stated",
        _LORA_EXAMPLE,
    ),
    Measurement(
        "M1 Max", None, "lora", 250, "mlx-examples, Mistral 7B, WikiSQL, batch of 1, 4 layers",
        _LORA_EXAMPLE,
    ),
    Measurement("M5 Max", None, "matmul", 58.4e12, "MLX, float16, 4096³, transposed", _MLX_M5),
    Measurement(
        "M5 Max", None, "matmul", 52.7e12, "MLX, float16, 4096×4096×14336, transposed", _MLX_M5
    ),
    Measurement(
        "M5", None, "matmul", 6.5e12, "MLX 0.31, bfloat16, 1280³ in 0.646 ms: small products",
        Source("https://github.com/ml-explore/mlx/issues/3196"),
    ),
    Measurement(
        "M4 Max", 40, "matmul", 13.45e12, "PyTorch 2.8 on MPS, float16, 4096³",
        Source("https://github.com/zzc0721/torch-performance-test-data/issues/65"),
    ),
    # Where float16 was not measured, mostly because it does not fit.
    Measurement("M1", 7, "prefill", 108.21, _Q8, PREFILL_SOURCE),
    Measurement("M1", 8, "prefill", 117.25, _Q8, PREFILL_SOURCE),
    Measurement("M2", 8, "prefill", 147.27, _Q8, PREFILL_SOURCE),
    Measurement("M3", 10, "prefill", 187.52, _Q8, PREFILL_SOURCE),
    Measurement("M3 Pro", 14, "prefill", 272.11, _Q8, PREFILL_SOURCE),
    Measurement(
        "M5 Max", 40, "prefill", 3347,
        "llama.cpp of June 2026, Llama 2 7B in Q4_0, prompt of 512 tokens",
        _quoted(PREFILL_SOURCE.url, "Local LLM Inference Engines: Embeddable Cores (July 2026)"),
    ),
)  # fmt: skip

_NAME = re.compile(
    r"(?:apple\s*)?(m\d+)(?:\s*(pro|max|ultra))?"
    r"(?:[\s,]*\(?\s*(\d+)(?:[\s-]*cores?)?(?:\s*gpu)?\s*\)?)?"
)


def find_chip(text: str, memory_gb: float | None = None) -> Chip:
    """The chip that somebody means: `M2 Pro`, `Apple M2 Pro`, `m2 pro 19`, `M2 Pro (19-core)`.

    Without a number of cores it is the smallest variant: macOS names chips without it, and a
    plan that is too slow disappoints nobody.

    Args:
        text: a name, in any case, and the cores of the GPU.
        memory_gb: as sold: only variants that are sold with it.

    Raises:
        ChipError: there is no such chip, no such variant of it, or none with that memory.
    """
    match = _NAME.fullmatch(text.strip().lower())
    if match is None:
        raise _unknown(text)
    generation, tier, cores = match.groups()
    name = f"{generation.upper()} {tier.title()}" if tier else generation.upper()
    variants = [chip for chip in CHIPS if chip.name == name]
    if not variants:
        raise _unknown(text)
    meant = [chip for chip in variants if cores is None or chip.gpu_cores == int(cores)]
    if not meant:
        known = " or ".join(str(chip.gpu_cores) for chip in variants)
        raise ChipError(f"the GPU of the {name} has {known} cores, not {cores}", where=text)
    sold = [chip for chip in meant if memory_gb is None or memory_gb in chip.memory_gb]
    if not sold:
        called = name if cores is None else str(meant[0])
        sizes = sorted({size for chip in meant for size in chip.memory_gb})
        raise ChipError(
            f"the {called} is not sold with {memory_gb:g} GB",
            remedy=f"its sizes are {', '.join(map(str, sizes))} GB",
        )
    return min(sold, key=lambda chip: chip.gpu_cores)


def measured_products(chip: Chip) -> float | None:
    """FLOP/s of the fastest product that somebody measured on a chip; None where nobody did.

    Where the source does not say how many cores it was, it may have been the largest variant.
    """
    largest = max(other.gpu_cores for other in CHIPS if other.name == chip.name)
    rates = [
        entry.value
        for entry in MEASURED
        if (entry.chip, entry.quantity) == (chip.name, "matmul")
        and (entry.gpu_cores or largest) == chip.gpu_cores
    ]
    return max(rates, default=None)


def chip_names() -> Iterator[str]:
    """Every name once, oldest first."""
    yield from dict.fromkeys(chip.name for chip in CHIPS)


def _unknown(text: str) -> ChipError:
    from rapidfuzz import fuzz, process, utils

    names = list(chip_names())
    # Of another generation is further off than of another size.
    generation = text.upper().replace("APPLE", "").split()[:1]
    near = [name for name in names if name.split()[:1] == generation] or names
    close = process.extractOne(
        text, near, scorer=fuzz.ratio, processor=utils.default_process, score_cutoff=40
    )
    remedy = f"the chips are {', '.join(names)}"
    if close is not None:
        remedy = f"did you mean {close[0]}? {remedy[0].upper()}{remedy[1:]}"
    return ChipError(f"no Apple silicon chip is called {text!r}", remedy=remedy)


def working_set_bytes(memory_gb: float) -> int:
    """How much of a Mac's memory its GPU takes by default, as a cautious rule: two thirds of up
    to 36 GB, three quarters of more.

    It is Metal's `recommendedMaxWorkingSetSize`, for which Apple documents no rule
    (https://developer.apple.com/documentation/metal/mtldevice/recommendedmaxworkingsetsize).
    Two thirds were reported of 8 GB (https://github.com/WisdomShell/codeshell-vscode/issues/42),
    16 GB (https://github.com/abetlen/llama-cpp-python/issues/687) and 32 GB
    (https://github.com/ollama/ollama/issues/434), three quarters of 64, 96, 128 and 192 GB
    (https://github.com/raullenchai/Rapid-MLX/pull/183). 36 GB are placed in either class.
    Newer systems allow more: 11.84 of 16 GB (https://github.com/AlexsJones/llmfit/pull/754),
    17.76 of 24 GB (https://github.com/sgl-project/sglang/pull/29949), 107.5 of 128 GB on macOS
    26 (https://github.com/antirez/ds4/pull/893). `sudo sysctl iogpu.wired_limit_mb=...` raises
    it, and MLX wires memory from macOS 15 on
    (https://ml-explore.github.io/mlx/build/html/python/_autosummary/mlx.core.set_wired_limit.html).

    Args:
        memory_gb: as sold: 16 GB are 16 GiB.
    """
    total = int(memory_gb * _GIB)
    return total * 2 // 3 if memory_gb <= 36 else total * 3 // 4
