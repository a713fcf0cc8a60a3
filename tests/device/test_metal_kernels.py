"""What recipes offer, against the kernels in MLX's wheel for macOS.

The wheel's Metal library names every kernel with its types and sizes. MLX looks a kernel up by
such a name when it is first needed, so one that is missing fails in the middle of a run.
"""

from __future__ import annotations

import pytest

from mlxtune.layers.quantized import packing_named
from mlxtune.models.known import known_config
from mlxtune.recipe.schema import ModelSection
from support import downloads
from support.metal import (
    ANY,
    BINARY_ANY,
    BINARY_FLOATS,
    BITWISE,
    BOOL,
    FLOATS,
    INTEGERS,
    UNARY_ANY,
    UNARY_FLOATS,
)
from support.skips import lacking

# As types are called in the names of most kernels, and of those with packed weights.
TYPES = {"float16": "float16_t", "bfloat16": "bfloat16_t", "float32": "float"}
# Of models that are packed already; recipes have their own.
GROUP_SIZES = (32, 64, 128)
# What is done with a packed weight: many rows, few, one; its transpose; experts; packing it.
PACKED_KERNELS = (
    *("quantize", "dequantize"),
    *("qmm_t", "qmm_t_splitk", "qmm_n", "qmv", "qmv_fast", "qvm", "qvm_split_k"),
    *("gather_qmm_t", "gather_qmm_n", "gather_qmv", "gather_qmv_fast", "gather_qvm"),
    *("gather_qmm_rhs_nt", "gather_qmm_rhs_nn"),
)


@pytest.fixture(scope="module")
def functions() -> frozenset[str]:
    try:
        return downloads.metal_functions()
    except FileNotFoundError:
        lacking(f"MLX's wheel for macOS was not fetched: {downloads.FETCH}")


@pytest.fixture(scope="module")
def texts() -> bytes:
    try:
        return downloads.metal_texts()
    except FileNotFoundError:
        lacking(f"MLX's wheel for macOS was not fetched: {downloads.FETCH}")


def packings() -> dict[str, tuple[str, int, int]]:
    """Mode, bits and group size of all that recipes pack in, and that is packed already."""
    annotation = ModelSection.model_fields["quantize"].annotation
    offered = [value for part in annotation.__args__ for value in getattr(part, "__args__", ())]
    assert {4, "mxfp4", "nf4"} <= set(offered)
    found = {}
    for value in offered:
        for size in GROUP_SIZES if isinstance(value, int) else (64,):
            packing = packing_named(value, group_size=size)
            if packing.has_product:  # NF4 has none in MLX
                found[str(packing)] = (packing.mode, packing.bits, packing.group_size)
    return found


def without_kernel(functions, mode: str, bits: int, group_size: int) -> list[str]:
    """Kernels that such a packing needs and that are not there."""
    wanted = [
        f"{mode}_{kernel}_{type_}_gs_{group_size}_b_{bits}"
        for kernel in PACKED_KERNELS
        for type_ in TYPES.values()
    ]
    return [
        name for name in wanted if not any(f == name or f.startswith(f"{name}_") for f in functions)
    ]


@pytest.mark.parametrize("name", packings())
def test_every_packing_has_its_kernels(functions, name):
    mode, bits, group_size = packings()[name]
    of_mode = {f for f in functions if f.startswith(f"{mode}_")}
    assert without_kernel(of_mode, mode, bits, group_size) == []


@pytest.mark.parametrize("other", [("affine", 7, 64), ("affine", 4, 16), ("mxfp4", 4, 64)])
def test_a_packing_that_mlx_does_not_have_is_found_out(functions, other):
    assert len(without_kernel(functions, *other)) == len(PACKED_KERNELS) * len(TYPES)


def without_functions(functions, kernels: dict[str, frozenset[str]], form: str) -> set[str]:
    kinds = {"bool": "bool_"}
    wanted = {
        form.format(name, kinds.get(dtype, dtype))
        for name, dtypes in kernels.items()
        for dtype in dtypes
    }
    return wanted - functions


def test_the_table_of_operations_is_what_metal_implements(functions):
    unary = dict.fromkeys(UNARY_FLOATS, FLOATS) | dict.fromkeys(UNARY_ANY, ANY)
    assert without_functions(functions, unary | {"LogicalNot": BOOL}, "v_{0}{1}{1}") == set()
    binary = dict.fromkeys(BINARY_FLOATS, FLOATS) | dict.fromkeys(BINARY_ANY, ANY)
    binary |= dict.fromkeys(BITWISE, BOOL | INTEGERS)
    binary |= dict.fromkeys(("LogicalAnd", "LogicalOr"), BOOL)
    assert without_functions(functions, binary, "vv_{0}{1}") == set()
    assert without_functions(functions, {"Select": ANY}, "v_{0}{1}") == set()
    rows = dict.fromkeys(("softmax", "logsumexp"), FLOATS)
    assert without_functions(functions, rows, "looped_{0}_{1}") == set()
    norms = dict.fromkeys(("rms", "vjp_rms", "layer_norm", "vjp_layer_norm"), FLOATS)
    assert without_functions(functions, norms, "{0}{1}") == set()
    assert "v_Expfloat64float64" in without_functions(
        functions, {"Exp": frozenset({"float64"})}, "v_{0}{1}{1}"
    )


KNOWN = ("HuggingFaceTB/SmolLM2-135M-Instruct", "Qwen/Qwen3-8B", "google/gemma-3-1b-it")


@pytest.mark.parametrize("dtype", TYPES)
def test_attention_and_loss_have_their_kernels_forwards_and_back(functions, dtype):
    dims = {_head_dim(known_config(name)) for name in KNOWN}
    assert dims == {64, 128, 256}
    masks = {"bool_", dtype}
    for dim in dims:
        attention = [f for f in functions if f.startswith(f"steel_attention_{dtype}_")]
        assert {f.rpartition("_mask")[2] for f in attention if f"_bd{dim}_" in f} >= masks
        assert f"sdpa_vjp_odo_{TYPES[dtype]}_{dim}" in functions
        assert f"sdpa_vector_{TYPES[dtype]}_{dim}_{dim}" in functions
    assert f"sdpa_vjp_ds_{TYPES[dtype]}" in functions
    assert {f"cross_entropy_{dtype}", f"cross_entropy_vjp_{dtype}"} <= functions


def _head_dim(config: dict) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


# What is relied upon in MLX's library for macOS: how its errors begin, and that attention's
# backward pass keeps no scores unless there is an array mask.
TEXTS = (
    b"[METAL] Command buffer execution failed: ",
    b"[metal::malloc] Attempting to allocate ",
    b"[metal::malloc] Resource limit (",
    b"[malloc] Unable to allocate ",
    b"the backward pass does not support an array mask; only causal masking is implemented.",
    b"MLX_SDPA_VJP_FALLBACK",
    b"MLX_MAX_OPS_PER_BUFFER",
    b"MLX_MAX_MB_PER_BUFFER",
)


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_relied_upon_stands_in_mlx_s_library(texts, text):
    assert text in texts
