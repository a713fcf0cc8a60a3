"""Importance from texts: against a forward pass in NumPy, and by what it is for."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from mlx import nn
from mlx.utils import tree_flatten

from mlxtune.arrays import flat
from mlxtune.data.render import Renderer
from mlxtune.data.sources import Source
from mlxtune.errors import DataError, ExportError, OutputExists
from mlxtune.export.calibrate import CHUNK, Calibration, calibrate, importance_of
from mlxtune.export.convert import convert
from mlxtune.gguf.imatrix import read_imatrix
from mlxtune.gguf.reader import GGUFFile
from mlxtune.gguf.tensors import SourceTensor
from mlxtune.gguf.writer import encode, write_gguf
from mlxtune.layers.inject import dequantize_layers, own_quantized_layers
from mlxtune.models.load import LoadedModel, load_model, load_tokenizer
from mlxtune.models.resolve import ModelSource, resolve_model
from support.files import SHELL_HELDOUT, SHELL_TRAIN, write_jsonl
from support.models import QWEN3_5, SMOLLM2, save_real_vocabulary, tiny, tiny_llama, with_adapters
from support.program import mlxtune

PROJECTIONS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(resolve_model(SMOLLM2))


def loaded(model, tokenizer, **config: object) -> LoadedModel:
    source = ModelSource("x", Path("x"))
    return LoadedModel(source, model, tokenizer, config, "float32", "float32")


class Bytes:
    """Each byte a token."""

    bos_token_id = eos_token_id = None
    all_special_ids = ()
    chat_template = None
    truncation = padding = None

    def __init__(self) -> None:
        self.backend_tokenizer = self

    def encode(self, text: str, **_: object):
        ids = [ord(c) % 128 for c in text]
        return SimpleNamespace(ids=ids) if text else ids

    def get_added_tokens_decoder(self) -> dict[int, object]:
        return {}


# ------------------------------------------------------------------------ what is summed


def numpy_llama(weights: dict[str, np.ndarray], ids: np.ndarray) -> dict[str, np.ndarray]:
    """What the matrices of `tiny_llama` are given, (tokens, in) by GGUF name."""
    heads, kv_heads, dim = 4, 2, 16
    given = {}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weights[name]

    def rotated(x: np.ndarray) -> np.ndarray:
        angles = np.arange(len(ids))[:, None] / 10000 ** (np.arange(0, dim, 2) / dim)
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        a, b = x[..., : dim // 2], x[..., dim // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(2):

        def project(x: np.ndarray, name: str, gguf: str, layer: int = layer) -> np.ndarray:
            given[f"blk.{layer}.{gguf}.weight"] = x
            return x @ weights[f"model.layers.{layer}.{name}.weight"].T

        h = norm(x, f"model.layers.{layer}.input_layernorm.weight")
        q = rotated(project(h, "self_attn.q_proj", "attn_q").reshape(-1, heads, dim))
        k = rotated(project(h, "self_attn.k_proj", "attn_k").reshape(-1, kv_heads, dim))
        v = project(h, "self_attn.v_proj", "attn_v").reshape(-1, kv_heads, dim)
        k, v = (np.repeat(each, heads // kv_heads, axis=1) for each in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(dim)
        scores[:, np.triu(np.ones((len(ids), len(ids)), bool), 1)] = -np.inf
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        mixed = np.einsum("hqk,khd->qhd", shares, v).reshape(len(ids), -1)
        x = x + project(mixed, "self_attn.o_proj", "attn_output")
        h = norm(x, f"model.layers.{layer}.post_attention_layernorm.weight")
        gate = project(h, "mlp.gate_proj", "ffn_gate")
        hidden = gate / (1 + np.exp(-gate)) * project(h, "mlp.up_proj", "ffn_up")
        x = x + project(hidden, "mlp.down_proj", "ffn_down")
    return given


def test_sums_are_those_of_a_forward_pass_in_numpy(tmp_path):
    text = "find . -name '*.py' | xargs grep -n TODO; " * 20
    (tmp_path / "text.txt").write_text(text)
    model = tiny_llama(tied=False)
    found = calibrate(loaded(model, Bytes(), model_type="llama"), tmp_path / "text.txt")
    ids = np.array([ord(c) for c in text])
    weights = {k: np.array(v, np.float64) for k, v in flat(model.parameters()).items()}
    want: dict[str, np.ndarray] = {}
    for chunk in (ids[:CHUNK], ids[CHUNK:]):
        for name, rows in numpy_llama(weights, chunk).items():
            want[name] = want.get(name, 0) + (rows**2).sum(0)
    assert found.tokens == len(ids) > CHUNK
    assert found.sums.keys() == want.keys()
    assert {name.split(".")[2] for name in want} == set(PROJECTIONS)
    for name, sums in want.items():
        assert np.allclose(found.sums[name], sums, rtol=2e-4), name
        assert found.counts[name].tolist() == [len(ids)]
        assert np.allclose(found.importance()[name], sums / len(ids), rtol=2e-4)


def test_columns_that_the_file_has_in_another_order_are_weighed_in_that_order(tmp_path):
    model = tiny("qwen3_5", **QWEN3_5)
    layer = model.layers[0].linear_attn.out_proj
    layer.weight = mx.broadcast_to(mx.arange(64.0), (64, 64))
    config = model.args.text_config
    (tmp_path / "text.txt").write_text("find . -name '*.py' | xargs grep -n TODO; ")
    found = calibrate(loaded(model, Bytes(), **config), tmp_path / "text.txt")
    weights = flat(model.parameters())
    given = []
    model.layers[0].linear_attn.out_proj = lambda x: given.append(x) or layer(x)
    model(mx.array([[ord(c) for c in (tmp_path / "text.txt").read_text()]]))
    sums = np.array((given[0] ** 2).sum(axis=(0, 1)))
    tensors = [SourceTensor(k, v.shape, lambda v=v: np.array(v)) for k, v in weights.items()]
    names = {"tokenizer.ggml.tokens": [str(i) for i in range(128)]}
    write_gguf(
        tmp_path / "m.gguf",
        config=config,
        tensors=tensors,
        tokenizer=names,
        file_type="f32",
        name="tiny",
    )
    columns = GGUFFile(tmp_path / "m.gguf").data("blk.0.ssm_out.weight")[0].astype(int)
    assert sorted(columns) == list(range(64))
    assert columns.tolist() != list(range(64))
    assert np.allclose(found.sums["blk.0.ssm_out.weight"], sums[columns], rtol=2e-4)


@pytest.mark.parametrize("length", [5, 300])
def test_experts_are_given_the_tokens_that_are_sent_to_them(tmp_path, length):
    model = tiny(
        "qwen3_moe",
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        norm_topk_prob=True,
        tie_word_embeddings=True,
    )
    (tmp_path / "text.txt").write_text("".join(chr(32 + n * n % 90) for n in range(length)))
    block = model.model.layers[1].mlp
    given = []
    original = type(block)
    block.__class__ = type(
        "Seen",
        (original,),
        {"__call__": lambda self, x: (given.append(x), original.__call__(self, x))[1]},
    )
    found = calibrate(loaded(model, Bytes(), model_type="qwen3_moe"), tmp_path / "text.txt")
    assert len(given) == 1
    x = np.array(given[0], np.float64)[0]
    weights = {k: np.array(v, np.float64) for k, v in flat(block.parameters()).items()}
    chosen = np.argsort(-(x @ weights["gate.weight"].T), axis=1)[:, :2]
    for expert in range(6):
        rows = x[(chosen == expert).any(1)]
        gate = rows @ weights["switch_mlp.gate_proj.weight"][expert].T
        up = rows @ weights["switch_mlp.up_proj.weight"][expert].T
        hidden = gate / (1 + np.exp(-gate)) * up
        for name, want in (("gate", rows), ("up", rows), ("down", hidden)):
            name = f"blk.1.ffn_{name}_exps.weight"
            assert found.counts[name][expert] == len(rows)
            assert np.allclose(found.sums[name][expert], (want**2).sum(0), rtol=1e-3, atol=1e-9)
    assert not any("inp" in name for name in found.sums)
    unmet = found.counts["blk.1.ffn_up_exps.weight"] == 0
    assert (found.importance()["blk.1.ffn_up_exps.weight"][unmet] == 1).all()


def test_adapters_and_packed_layers_are_given_what_their_base_is(tmp_path):
    (tmp_path / "text.txt").write_text("sort -n | tail -n 10 " * 9)
    data = tmp_path / "text.txt"
    plain = calibrate(loaded(tiny_llama(), Bytes(), model_type="llama"), data)
    adapted = with_adapters(tiny_llama())
    for _, layer in adapted.named_modules():
        if "lora_b" in layer:
            layer.lora_b = mx.zeros_like(layer.lora_b)
    classes = [type(layer) for layer in adapted.modules()]
    found = calibrate(loaded(adapted, Bytes(), model_type="llama"), data)
    assert [type(layer) for layer in adapted.modules()] == classes
    assert found.sums.keys() == plain.sums.keys()
    for name, sums in plain.sums.items():
        assert np.allclose(found.sums[name], sums, rtol=1e-4)
    packed = tiny_llama()
    mx.eval(packed.parameters())
    nn.quantize(packed, group_size=32, bits=8)
    found = calibrate(loaded(packed, Bytes(), model_type="llama"), data)
    assert found.sums.keys() == plain.sums.keys()
    for name, sums in plain.sums.items():
        assert np.allclose(found.sums[name], sums, rtol=0.2, atol=1e-2 * sums.max()), name


# ------------------------------------------------------------------------ which texts


def test_records_are_run_as_they_are_trained_on_each_alone(tmp_path, tokenizer):
    model = loaded(tiny_llama(vocabulary=49152), tokenizer, model_type="llama")
    pairs = [json.loads(line) for line in SHELL_TRAIN.read_text().splitlines()[:4]]
    one = tmp_path / "one.jsonl"
    found = [calibrate(model, write_jsonl(one, [pair])) for pair in pairs]
    together = calibrate(model, write_jsonl(tmp_path / "all.jsonl", pairs))
    samples = [
        sample
        for conversation in Source(str(tmp_path / "all.jsonl"))
        for sample in Renderer(tokenizer).samples(conversation)
    ]
    assert together.tokens == sum(len(sample.tokens) for sample in samples)
    for name, sums in together.sums.items():
        assert np.allclose(sums, sum(each.sums[name] for each in found), rtol=1e-4)
    few = calibrate(model, tmp_path / "all.jsonl", max_tokens=7)
    assert few.tokens == 7 and set(few.counts["blk.0.attn_q.weight"]) == {7.0}


def test_what_cannot_be_calibrated_on_is_refused(tmp_path, tokenizer):
    model = loaded(tiny_llama(vocabulary=49152), tokenizer, model_type="llama")
    with pytest.raises(DataError, match="cannot be read"):
        calibrate(model, tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="no text"):
        calibrate(model, tmp_path / "empty.txt")
    (tmp_path / "kept.gguf").write_text("mine")
    (tmp_path / "a.txt").write_text("ls")
    given = {"calibration": tmp_path / "a.txt"}
    with pytest.raises(ExportError, match="q8_0 weighs no errors"):
        importance_of(lambda: model, "q8_0", **given)
    with pytest.raises(OutputExists):
        importance_of(lambda: model, "q4_0", save=tmp_path / "kept.gguf", **given)
    assert (tmp_path / "kept.gguf").read_text() == "mine"


def test_the_importance_of_another_model_is_refused():
    values = np.ones((3, 2, 32), np.float32)
    for size in (31, 64, 97):
        with pytest.raises(ExportError, match="columns"):
            encode(values, Type.Q4_0, np.ones(size, np.float32))
    for ones in (np.ones(96, np.float32), np.ones((3, 32), np.float32), np.ones(32, np.float32)):
        assert encode(values, Type.Q4_0, ones).shape == (3, 2, 18)


# ------------------------------------------------------------------------ what it is for


@pytest.fixture(scope="module")
def first_blocks(tmp_path_factory, tokenizer) -> Path:
    """The real model's first three blocks, with its head, as a folder."""
    folder = tmp_path_factory.mktemp("models") / "three"
    folder.mkdir()
    tokenizer.save_pretrained(str(folder))
    model = load_model(resolve_model(SMOLLM2), dtype="float32")
    own_quantized_layers(model.model, mx.float32)
    model.model.model.layers = model.model.model.layers[:3]
    dequantize_layers(model.model, mx.float32)
    weights = dict(tree_flatten(model.model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(model.config | {"num_hidden_layers": 3}))
    return folder


def divergence(path: Path, folder: Path, tokenizer) -> float:
    """Mean KL divergence of a GGUF's next tokens from the folder's, on held-out records."""
    want, got = (
        load_model(source).model for source in (ModelSource("x", folder), resolve_model(str(path)))
    )
    own_quantized_layers(got, mx.float32)
    dequantize_layers(got, mx.float32)
    total = count = 0.0
    for conversation in list(Source(str(SHELL_HELDOUT)))[:80:20]:
        (sample,) = Renderer(tokenizer).samples(conversation)
        p, q = (
            (y := model(mx.array(sample.tokens[None]))[0].astype(mx.float32))
            - mx.logsumexp(y, axis=-1, keepdims=True)
            for model in (want, got)
        )
        total += (mx.exp(p) * (p - q)).sum().item()
        count += len(sample.tokens)
    return total / count


@pytest.mark.slow
def test_a_calibrated_file_says_more_nearly_the_same(first_blocks, tokenizer, tmp_path):
    rows = SHELL_TRAIN.read_text().splitlines()[::70]
    texts = write_jsonl(tmp_path / "texts.jsonl", [json.loads(row) for row in rows])
    made = [
        convert(
            str(first_blocks),
            tmp_path / f"{number}.gguf",
            file_type="q4_0",
            calibration=data,
            verify=False,
        ).path
        for number, data in enumerate((None, texts))
    ]
    without, calibrated = (divergence(path, first_blocks, tokenizer) for path in made)
    print(f"KL {without:.5f} without, {calibrated:.5f} calibrated")
    assert calibrated < 0.9 * without


def test_the_command_calibrates_keeps_and_takes_importance_in_both_forms(tmp_path):
    save_real_vocabulary(tmp_path / "model")
    (tmp_path / "text.txt").write_text("du -a . | sort -n | tail -n 10\n" * 40)

    def made(name: str, *options: str) -> bytes:
        options = ("--quantize=q4_0", "--no-verify", *options)
        done = mlxtune("convert", "model", f"{name}.gguf", *options, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return (tmp_path / f"{name}.gguf").read_bytes()

    calibrated = made("a", "--calibrate=text.txt", "--save-imatrix=new.gguf")
    kept = GGUFFile(tmp_path / "new.gguf")
    assert kept.metadata["imatrix.datasets"] == ["text.txt"]
    means = read_imatrix(tmp_path / "new.gguf")
    assert len(means) == 14
    old = struct.pack("<i", len(means))
    for name, values in means.items():
        old += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 1, len(values))
        old += values.astype("<f4").tobytes()
    (tmp_path / "old.dat").write_bytes(old)
    assert made("b", "--imatrix=old.dat") == calibrated
    how = {"file_type": "q4_0", "verify": False}
    for name, imatrix in (("c", tmp_path / "new.gguf"), ("d", None)):
        path = convert(
            str(tmp_path / "model"), tmp_path / f"{name}.gguf", imatrix=imatrix, **how
        ).path
        assert (path.read_bytes() == calibrated) == bool(imatrix)


def test_means_are_of_counts_and_ones_where_nothing_was_met():
    found = Calibration(
        {"a": np.array([4.0, 8.0], np.float32), "b": np.array([[2.0], [0.0]], np.float32)},
        {"a": np.array([4.0], np.float32), "b": np.array([2.0, 0.0], np.float32)},
        4,
    )
    means = found.importance()
    assert means["a"].tolist() == [1, 2] and means["b"].tolist() == [[1], [1]]
