"""What MLX computes on Metal: operations, and the types that each takes.

Read off MLX's Metal backend (mlx/backend/metal: primitives.cpp, and what each kernel is
instantiated for), not off what is used here. Of what is not in the table MLX's `eval_gpu` throws
("NYI", "has no GPU implementation"), or nobody has looked. Of these MLX has no kernel for any
operation: float64, which Metal does not know; and complex64 is not looked for.
"""

from __future__ import annotations

from mlxtune.bench.graph import Graph

BOOL = frozenset({"bool"})
INTEGERS = frozenset(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
FLOATS = frozenset({"float16", "bfloat16", "float32"})
ANY = BOOL | INTEGERS | FLOATS
# Kernels add to memory with atomics, which have four bytes (`Scatter::eval_gpu` throws).
SCATTERED = ANY - {"int64", "uint64"}
PACKED = FLOATS | {"uint32", "uint8"}
INDICES = frozenset({"uint32", "int32"})

# Kernels of unary.metal and binary.metal, whose names are these with the types.
# fmt: off
UNARY_FLOATS = frozenset({
    "ArcCos", "ArcCosh", "ArcSin", "ArcSinh", "ArcTan", "ArcTanh", "Cos", "Cosh", "Erf", "ErfInv",
    "Exp", "Expm1", "Log", "Log1p", "Round", "Sigmoid", "Sin", "Sinh", "Sqrt", "Tan", "Tanh",
})
UNARY_ANY = frozenset({"Abs", "Ceil", "Floor", "Negative", "Sign", "Square"})
BINARY_FLOATS = frozenset({"ArcTan2", "LogAddExp"})
BINARY_ANY = frozenset({
    "Add", "Divide", "Equal", "FloorDivide", "Greater", "GreaterEqual", "Less", "LessEqual",
    "Maximum", "Minimum", "Multiply", "NotEqual", "Power", "Remainder", "Subtract",
})
BITWISE = frozenset({"BitwiseAnd", "BitwiseOr", "BitwiseXor"})

# Views and copies, of any type.
_MOVES = (
    "AsStrided", "AsType", "Broadcast", "Concatenate", "Contiguous", "Copy", "CustomTransforms",
    "Depends", "DynamicSlice", "DynamicSliceUpdate", "ExpandDims", "Flatten", "Full", "Gather",
    "GatherAxis", "Pad", "Reshape", "Select", "Slice", "SliceUpdate", "Split", "Squeeze",
    "StopGradient", "Transpose", "Unflatten", "View",
)
# fmt: on

# Operation to the types of all that goes in and comes out.
TABLE: dict[str, frozenset[str]] = {
    **dict.fromkeys(_MOVES, ANY),
    **dict.fromkeys(UNARY_FLOATS | BINARY_FLOATS, FLOATS),
    **dict.fromkeys(UNARY_ANY | BINARY_ANY, ANY),
    **dict.fromkeys(("LogicalAnd", "LogicalNot", "LogicalOr"), BOOL),
    **dict.fromkeys(("BitwiseBinary", "BitwiseInvert"), BOOL | INTEGERS),
    **dict.fromkeys(("Matmul", "AddMM", "LogSumExp", "Softmax", "Hadamard"), FLOATS),
    **dict.fromkeys(("GatherMM", "BlockMaskedMM"), FLOATS | INDICES),
    **dict.fromkeys(("QuantizedMatmul", "Quantize", "ConvertFP8"), PACKED),
    "GatherQMM": PACKED | INDICES,
    **dict.fromkeys(("Arange", "ArgPartition", "ArgReduce", "ArgSort"), ANY),
    **dict.fromkeys(("NumberOfElements", "Partition", "Reduce", "Scan", "Sort"), ANY),
    **dict.fromkeys(("Scatter", "ScatterAxis"), SCATTERED),
    "RandomBits": frozenset({"uint8", "uint16", "uint32"}),
    "Convolution": FLOATS,
}


def not_on_metal(graph: Graph) -> set[str]:
    """Operations that MLX does not compute on a Mac's GPU, with the type that is too much."""
    found = set()
    for operation in graph.order:
        known = TABLE.get(operation.name)
        if known is None:
            found.add(f"{operation.name}: no such kernel is known")
            continue
        for name in (*operation.inputs, *operation.outputs):
            dtype = str(graph.shapes[name].dtype).rpartition(".")[2]
            dtype = {"bool_": "bool"}.get(dtype, dtype)
            if dtype not in known:
                found.add(f"{operation.name}: {dtype}")
    return found
