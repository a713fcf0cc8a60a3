"""`mlxtune convert` as people use it: every way in and out, and what can go wrong."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
import sentencepiece
from transformers import AutoTokenizer

from mlxtune.arrays import flat
from mlxtune.errors import ExportError, ModelError, OutputExists
from mlxtune.export.convert import convert, convert_to_folder
from mlxtune.export.verify import SAMPLE
from mlxtune.gguf.metadata import end_tokens
from mlxtune.gguf.mixing import FILE_TYPES
from mlxtune.gguf.reader import GGUFFile
from mlxtune.gguf.sentencepiece import sentencepiece_metadata
from mlxtune.gguf.tokenizer import read_tokenizer
from mlxtune.models.folder import folder_tensors
from mlxtune.models.load import load_model, load_tokenizer, model_config
from mlxtune.models.resolve import ModelSource, resolve_model
from mlxtune.models.safetensors import from_bfloat16, read_safetensors, to_bfloat16
from support import llamacpp
from support.compare import distance
from support.files import ROOT, listing
from support.models import SMOLLM2, save_real_vocabulary, tiny, tiny_llama
from support.program import mlxtune

IDS = mx.array([[5, 17, 99, 3, 42, 64, 7, 1]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random two-block llama with a real tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    save_real_vocabulary(folder)
    return folder


def loaded(path):
    return load_model(resolve_model(str(path))).model(IDS)


def test_from_a_folder_to_gguf_to_a_folder_and_packed(folder, tmp_path):
    want = loaded(folder)
    done = mlxtune("convert", str(folder), "m.gguf", "--quantize=f32", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "read back" in done.stdout and "tensors equal the model's" in done.stdout
    assert distance(loaded(tmp_path / "m.gguf"), want) < 1e-5
    done = mlxtune("convert", "m.gguf", "folder", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["files"] == ["model.safetensors"]
    model, _ = mlx_lm.utils.load_model(tmp_path / "folder")
    assert distance(model(IDS), want) < 1e-5
    done = mlxtune(
        *("convert", "folder", "packed", "--mlx-bits=8", "--group-size=32", "--dtype=float32"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    model, config = mlx_lm.utils.load_model(tmp_path / "packed")
    assert config["quantization"] == {"group_size": 32, "bits": 8, "mode": "affine"}
    assert 0 < distance(model(IDS), want) < 0.05
    # And packed ones are a source again.
    done = mlxtune("convert", "packed", "again.gguf", "--quantize=f32", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert distance(loaded(tmp_path / "again.gguf"), model(IDS)) < 1e-4


@pytest.mark.parametrize(
    ("mode", "bits", "group_size"),
    [("affine", 4, 64), ("affine", 3, 32), ("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)],
)
def test_what_mlx_lm_packed_is_expanded_as_mlx_expands_it(tmp_path, mode, bits, group_size):
    model = tiny("llama")
    packing = {"group_size": group_size, "bits": bits, "mode": mode}
    mlx_lm.utils.quantize_model(model, {}, **packing)
    weights = dict(mlx_lm.utils.tree_flatten(model.parameters()))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights)
    config = {"model_type": "llama", "tie_word_embeddings": True, "quantization": packing}
    got = {t.name: t for t in folder_tensors(tmp_path, config)}
    path = "model.layers.0.mlp.up_proj"
    layer = model.layers[0].mlp.up_proj
    arrays = [weights.get(f"{path}.{name}") for name in ("weight", "scales", "biases")]
    want = mx.dequantize(*arrays, **packing)
    assert got[f"{path}.weight"].shape == want.shape
    assert np.abs(got[f"{path}.weight"].load() - np.array(want.astype(mx.float32))).max() < 1e-6
    assert not any(name.endswith(("scales", "biases")) for name in got)
    assert layer is not None


def test_experts_go_apart_and_together(tmp_path):
    model = tiny(
        "qwen3_moe",
        num_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        norm_topk_prob=True,
        tie_word_embeddings=True,
    )
    from mlxtune.gguf.tensors import SourceTensor
    from mlxtune.models.folder import dense_pieces
    from mlxtune.models.safetensors import write_safetensors

    weights = dict(mlx_lm.utils.tree_flatten(model.parameters()))
    tensors = [
        SourceTensor(name, tuple(value.shape), lambda value=value: np.array(value))
        for name, value in weights.items()
    ]
    config = {"model_type": "qwen3_moe", "tie_word_embeddings": True}
    write_safetensors(tmp_path, dense_pieces(tensors, "float32", config))
    stored = read_safetensors(tmp_path / "model.safetensors")
    assert "model.layers.1.mlp.experts.2.down_proj.weight" in stored
    again = {t.name: t for t in folder_tensors(tmp_path, config)}
    assert again.keys() == weights.keys()
    for name, tensor in again.items():
        assert np.array_equal(tensor.load(), np.array(weights[name])), name


def test_bfloat16_rounds_as_mlx_rounds():
    values = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    values = np.concatenate([values * 1e30, values * 1e-38, [np.inf, -np.inf, 0.0, -0.0, 1e39]])
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    want = np.array(mx.array(values).astype(mx.bfloat16).view(mx.uint16))
    assert np.array_equal(to_bfloat16(values), want)
    assert np.isnan(from_bfloat16(to_bfloat16(np.array([np.nan], np.float32)))).all()


@pytest.mark.slow
def test_a_real_model_through_types_that_mlx_holds_and_those_it_does_not(tmp_path):
    text = "The largest planet of the solar system is Jupiter, and the smallest is Mercury."
    source = load_model(resolve_model(SMOLLM2))
    ids = mx.array([source.tokenizer.encode(text)])
    want = source.model(ids)
    for file_type in ("q8_0", "q5_k_m", "q3_k_m"):
        path = tmp_path / f"{file_type}.gguf"
        convert(SMOLLM2, path, file_type=file_type, verify=False)
        got = load_model(resolve_model(str(path))).model(ids)
        off = (mx.linalg.norm(got - want) / mx.linalg.norm(want)).item()
        assert off < {"q8_0": 0.05, "q5_k_m": 0.2, "q3_k_m": 0.3}[file_type], file_type


@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_every_type_is_written_and_found_right_when_read_back(folder, tmp_path, file_type):
    made = convert(str(folder), tmp_path / "m.gguf", file_type=file_type)
    assert made.verified.readback.tensors == 20
    assert made.verified.llamacpp.places > 20
    whole = file_type in ("f32", "f16", "bf16")
    assert (made.verified.readback.worst_error < 0.004) == whole


def test_what_is_there_is_not_replaced_unasked_and_nothing_half_written_stays(
    folder, tmp_path, monkeypatch
):
    convert(str(folder), tmp_path / "m.gguf", verify=False)
    before = (tmp_path / "m.gguf").read_bytes()
    with pytest.raises(OutputExists):
        convert(str(folder), tmp_path / "m.gguf", file_type="f32")
    with pytest.raises(OutputExists):
        convert_to_folder(str(folder), folder)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("mlxtune.export.convert.read_back", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(str(folder), tmp_path / "m.gguf", file_type="f32", overwrite=True)
    assert (tmp_path / "m.gguf").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["model", "model", "--mlx-bits=2"],
        ["model", "link", "--mlx-bits=2"],
        ["link", "model"],
        ["model", ".", "--mlx-bits=2"],
        ["model", "model/packed", "--mlx-bits=2"],
        ["links", "model"],
        ["holder/source.gguf", "holder"],
        ["holder/source.gguf", "holder/source.gguf", "--quantize=q2_k"],
        ["holder/source.gguf", "linked.gguf", "--quantize=q2_k"],
        ["linked.gguf", "holder/source.gguf", "--quantize=q2_k"],
        ["parts/m-00001-of-00002.gguf", "parts/m-00002-of-00002.gguf"],
        ["parts/m-00001-of-00002.gguf", "parts/m.gguf", "--split-max-size=300K"],
        ["model", "use.dat.gguf", "--imatrix=use.dat.gguf", "--quantize=q2_k"],
        ["model", "n.gguf", "--calibrate=t.txt", "--save-imatrix=t.txt", "--quantize=q2_k"],
    ],
    ids=" ".join,
)
def test_no_source_is_replaced_by_what_is_made_of_it(folder, tmp_path, arguments):
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "link").symlink_to("model")
    (tmp_path / "links").mkdir()
    for file in folder.iterdir():
        (tmp_path / "links" / file.name).symlink_to(tmp_path / "model" / file.name)
    convert(str(folder), tmp_path / "holder/source.gguf", verify=False)
    (tmp_path / "linked.gguf").symlink_to("holder/source.gguf")
    parts = convert(str(folder), tmp_path / "parts/m.gguf", split_max_bytes=200_000, verify=False)
    for place in (tmp_path, tmp_path / "holder"):
        shutil.copy(folder / "config.json", place)  # a folder that may be replaced
    (tmp_path / "t.txt").write_text("text")
    (tmp_path / "use.dat.gguf").write_bytes(b"GGUF")
    before = listing(tmp_path)
    assert len(parts.files) == 2
    done = mlxtune("convert", *arguments, "--overwrite", cwd=tmp_path)
    assert done.returncode == 1 and "is used for it" in done.stderr, done.stderr
    assert listing(tmp_path) == before


def test_a_file_may_join_the_folder_that_it_is_made_of(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    made = convert(str(tmp_path / "model"), tmp_path / "model/m.gguf")
    again = convert(str(tmp_path / "model"), made.path, file_type="q8_0", overwrite=True)
    assert again.types.keys() == {"F32", "Q8_0"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nope", "out.gguf"], "no such run and no such model"),
        (["model/config.json", "out.gguf"], "a model is a folder"),
        (["mamba", "out.gguf"], "'mamba' cannot be written as GGUF yet"),
        (["short", "out.gguf"], "truncated"),
        (["holes", "out.gguf"], "not a finite number"),
        (["lacking", "out.gguf"], "tensors are missing, such as model.layers.1.mlp.up_proj.weight"),
        (["lacking", "out"], "tensors are missing, such as model.layers.1.mlp.up_proj.weight"),
        (["wide", "out.gguf"], "config asks for (2000000000, "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_converted_is_told_in_a_block(folder, tmp_path, arguments, said):
    for name in ("model", "mamba", "short", "holes", "lacking", "wide"):
        shutil.copytree(folder, tmp_path / name)
    config = json.loads((tmp_path / "mamba/config.json").read_text())
    (tmp_path / "mamba/config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    weights = tmp_path / "short/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    holes = mx.load(str(tmp_path / "holes/model.safetensors"))
    holes["model.layers.0.mlp.up_proj.weight"][0, 0] = mx.nan
    mx.save_safetensors(str(tmp_path / "holes/model.safetensors"), holes)
    lacking = mx.load(str(tmp_path / "lacking/model.safetensors"))
    del lacking["model.layers.1.mlp.up_proj.weight"]
    mx.save_safetensors(str(tmp_path / "lacking/model.safetensors"), lacking)
    (tmp_path / "wide/config.json").write_text(json.dumps(config | {"vocab_size": 2_000_000_000}))
    options = ["--quantize=q8_0"] if arguments[1].endswith(".gguf") else []
    done = mlxtune("convert", *arguments, *options, cwd=tmp_path)
    assert done.returncode == 1
    assert said in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out*"))


def test_a_model_that_lacks_a_shard_is_not_converted(folder, tmp_path):
    """As a download that was cut off leaves it, index and all."""
    shutil.copytree(folder, tmp_path / "m")
    arrays = mx.load(str(tmp_path / "m/model.safetensors"))
    names = sorted(arrays)
    half = {name: arrays[name] for name in names[: len(names) // 2]}
    (tmp_path / "m/model.safetensors").unlink()
    mx.save_safetensors(str(tmp_path / "m/model-00001-of-00002.safetensors"), half)
    for output, write in (("g.gguf", convert), ("f", convert_to_folder)):
        with pytest.raises(ModelError, match="tensors are missing"):
            write(str(tmp_path / "m"), tmp_path / output, verify=False)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("dtype", ["f16", "float16"])
def test_what_float16_cannot_hold_is_not_written(folder, tmp_path, dtype):
    shutil.copytree(folder, tmp_path / "m")
    arrays = mx.load(str(tmp_path / "m/model.safetensors"))
    arrays["model.layers.0.mlp.up_proj.weight"] = arrays[
        "model.layers.0.mlp.up_proj.weight"
    ].astype(mx.float32)
    arrays["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    mx.save_safetensors(str(tmp_path / "m/model.safetensors"), arrays)
    with pytest.raises(ExportError, match=r"1e\+06 is more than float16 holds"):
        if dtype == "f16":
            convert(str(tmp_path / "m"), tmp_path / "g.gguf", file_type="f16", verify=False)
        else:
            convert_to_folder(str(tmp_path / "m"), tmp_path / "f", dtype=dtype, verify=False)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_suffix_is_read_in_any_case_and_not_guessed_at(folder, tmp_path):
    assert mlxtune("convert", str(folder), "m.GGUF", "--no-verify", cwd=tmp_path).returncode == 0
    assert (tmp_path / "m.GGUF").read_bytes()[:4] == b"GGUF"
    again = mlxtune("convert", "m.GGUF", "back", "--no-verify", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    wrong = mlxtune("convert", str(folder), "m.ggfu", cwd=tmp_path)
    assert wrong.returncode == 2 and "did you mean .gguf?" in wrong.stderr
    assert not (tmp_path / "m.ggfu").exists()


def test_a_file_that_differs_from_its_source_is_an_error(folder, tmp_path, monkeypatch):
    from mlxtune.gguf import writer

    def off(values, *arguments):
        return writer_encode(values * 1.1, *arguments)

    writer_encode = writer.encode
    monkeypatch.setattr(writer, "encode", off)
    with pytest.raises(ExportError, match="differs from its source by"):
        convert(str(folder), tmp_path / "m.gguf", file_type="q8_0")
    assert not (tmp_path / "m.gguf").exists()


def test_what_ends_a_turn_is_not_lost(folder, tmp_path):
    """Beside what ends a text, as Gemma has both."""
    source = tmp_path / "two"
    shutil.copytree(folder, source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(source)
    text, turn = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    said = {"eos_token_id": [text, turn]}
    (source / "generation_config.json").write_text(json.dumps(said))
    made = convert(str(source), tmp_path / "m.gguf", verify=False)
    meta = GGUFFile(made.path).metadata
    silent = {k: v for k, v in meta.items() if k != "tokenizer.ggml.eot_token_id"}
    assert len(silent) < len(meta) and end_tokens(silent) == end_tokens(meta) == [text, turn]
    for number, told in enumerate((source, made.path)):
        assert load_tokenizer(resolve_model(str(told))).eos_token_ids == {text, turn}
        assert load_model(resolve_model(str(told))).tokenizer.eos_token_ids == {text, turn}
        convert_to_folder(str(told), tmp_path / str(number))
        _, again = mlx_lm.utils.load(str(tmp_path / str(number)))
        assert again.eos_token_ids == {text, turn}
    # What llama.cpp ends at in the same file, whatever it is made to say.
    server = llamacpp.serve(made.path, context=64)
    begin = tokenizer.convert_tokens_to_ids("<|im_start|>")
    with llamacpp.client(server) as client:
        for token in (text, begin, turn):
            body = {"prompt": "a", "n_predict": 2, "logit_bias": [[token, 1000]]}
            answer = client.post("/completion", json=body).json()
            assert (answer["stop_type"] == "eos") == (token != begin), token


TOOLS = "{% for m in messages %}{{ eos_token }}{{ m.content }}{% endfor %}{{ tools }}"


@pytest.mark.parametrize("form", ["files", "list"])
def test_every_template_of_a_model_goes_along(folder, tmp_path, monkeypatch, form):
    source = tmp_path / "several"
    shutil.copytree(folder, source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": TOOLS}
    tokenizer.save_pretrained(source, save_jinja_files=form == "files")
    if form == "list":
        for file in source.rglob("*.jinja"):
            file.unlink()
    made = convert(str(source), tmp_path / "m.gguf")
    assert made.verified.readback.template_kept
    # On from there: the file is a source of another, and of a folder.
    assert convert(str(made.path), tmp_path / "n.gguf").verified.readback.template_kept
    convert_to_folder(str(made.path), tmp_path / "folder")
    again = AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert again.chat_template == tokenizer.chat_template
    turns = [{"role": "user", "content": "hello"}]
    for name in ("default", "tool_use"):
        want = tokenizer.apply_chat_template(turns, chat_template=name, tokenize=False)
        assert again.apply_chat_template(turns, chat_template=name, tokenize=False) == want

    for change, said in (
        ({"tokenizer.chat_template.tool_use": "{{ tools }}"}, "'tool_use' is not the source's"),
        ({"tokenizer.chat_templates": []}, "named ['default'],"),
        ({"tokenizer.ggml.eos_token_id": 0}, "'tool_use' writes a conversation unlike"),
    ):

        def otherwise(metadata, change=change, **_):
            return read_tokenizer(metadata | change, where="x")

        monkeypatch.setattr("mlxtune.export.verify.read_tokenizer", otherwise)
        with pytest.raises(ExportError, match=re.escape(said)):
            convert(str(source), tmp_path / "wrong.gguf")
    assert not (tmp_path / "wrong.gguf").exists()


def test_a_folder_with_no_tokenizer_but_sentencepiece_s(tmp_path):
    source = tmp_path / "pieces"
    source.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((ROOT / "README.md").read_text(encoding="utf-8").splitlines()),
        model_prefix=str(source / "tokenizer"),
        model_type="bpe",
        vocab_size=500,
        minloglevel=2,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    model = tiny_llama(vocabulary=504)
    mx.save_safetensors(str(source / "model.safetensors"), flat(model.parameters()))
    config = {k: v for k, v in asdict(model.args).items() if v is not None}
    (source / "config.json").write_text(json.dumps(config))
    turns = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
    named = {"default": turns, "tool_use": TOOLS}
    added = {"<|end|>": 500, "<|stop|>": 501, "<pad>": 502}
    (source / "added_tokens.json").write_text(json.dumps(added))
    special = {"pad_token": {"content": "<pad>"}, "additional_special_tokens": ["<|end|>"]}
    (source / "special_tokens_map.json").write_text(json.dumps(special))
    said = {
        "tokenizer_class": "LlamaTokenizer",
        "eos_token": "<|stop|>",
        "chat_template": [{"name": n, "template": t} for n, t in named.items()],
    }
    (source / "tokenizer_config.json").write_text(json.dumps(said))
    made = convert(str(source), tmp_path / "m.gguf")
    assert made.verified.readback.texts == len(SAMPLE)
    metadata = GGUFFile(made.path).metadata
    again = read_tokenizer(metadata, where="x")
    assert again.chat_template == named
    ids = {key: metadata[f"tokenizer.ggml.{key}_token_id"] for key in ("eos", "eot", "padding")}
    assert ids == {"eos": 501, "eot": 500, "padding": 502}
    assert metadata["tokenizer.ggml.token_type"][500:] == [3, 3, 3, 5]
    theirs = load_tokenizer(resolve_model(str(source)))
    assert (theirs.eos_token_id, theirs.pad_token_id) == (501, 502)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    for text in SAMPLE:
        assert again(text, add_special_tokens=False).input_ids == pieces.encode(text)
    with pytest.raises(ExportError, match="no pre-tokenizer to name"):
        convert(str(source), tmp_path / "pre.gguf", pre="smollm")
    (source / "added_tokens.json").unlink()
    with pytest.raises(ExportError, match=r"eos_token is '<\|stop\|>', which is no token"):
        sentencepiece_metadata(source / "tokenizer.model", 504)


@pytest.mark.parametrize("bits", [None, 2, 3, 4, 5, 6, 8])
def test_a_folder_is_read_back(folder, tmp_path, bits):
    made = convert_to_folder(str(folder), tmp_path / "out", mlx_bits=bits, group_size=32)
    found = made.verified.readback
    assert (found.tensors, found.texts, found.template_kept) == (20, 4, True)
    assert sum(made.types.values()) == 20
    assert found.error.keys() == made.types.keys()
    if bits is None:
        assert found.worst_error == 0
        return
    mlx = mx.load(str(tmp_path / "out/model.safetensors"))
    path = found.worst.removesuffix(".weight")
    read = mx.dequantize(
        *(mlx[f"{path}.{name}"] for name in ("weight", "scales", "biases")),
        group_size=32,
        bits=bits,
    )
    want = mx.load(str(folder / "model.safetensors"))[found.worst]
    off = (mx.linalg.norm(read - want) / mx.linalg.norm(want)).item()
    assert found.worst_error == pytest.approx(off, rel=1e-4)


def test_a_folder_that_differs_from_its_source_is_an_error(folder, tmp_path, monkeypatch):
    from mlxtune.errors import ExportError
    from mlxtune.models import folder as writing

    def off(values, dtype):
        return in_dtype(values * 1.01, dtype)

    in_dtype = writing.to_dtype
    monkeypatch.setattr(writing, "to_dtype", off)
    with pytest.raises(ExportError, match=r"as float32 differs from its source by 0\.01"):
        convert_to_folder(str(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    convert_to_folder(str(folder), tmp_path / "out", verify=False)
    quantize = mx.quantize
    monkeypatch.setattr(mx, "quantize", lambda values, **how: quantize(values * 1.5, **how))
    with pytest.raises(ExportError, match="as 4 bits differs"):
        convert_to_folder(str(folder), tmp_path / "packed", mlx_bits=4)


def test_parts_are_written_beyond_a_size(folder, tmp_path):
    made = convert(str(folder), tmp_path / "m.gguf", split_max_bytes=200_000, verify=False)
    assert len(made.files) > 1 and made.path.name.endswith(f"-00001-of-{len(made.files):05d}.gguf")
    names = [n for file in made.files for n in GGUFFile(tmp_path / file).tensors]
    whole = convert(str(folder), tmp_path / "w.gguf", verify=False)
    assert set(names) == set(GGUFFile(whole.path).tensors)
    # Once more over it: of two models of one name only the new one is left.
    convert(str(folder), whole.path, split_max_bytes=200_000, overwrite=True, verify=False)
    assert not whole.path.exists() and len(list(tmp_path.glob("w-*.gguf"))) == len(made.files)


def test_a_config_that_is_none_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="this is no config: it has no keys"):
        model_config(ModelSource("x", tmp_path))
