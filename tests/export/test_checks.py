"""What an export is checked with, and what it refuses before it writes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from contextlib import suppress
from dataclasses import replace

import gguf
import mlx.core as mx
import numpy as np
import psutil
import pytest
from gguf import GGUFReader
from mlx.utils import tree_map

from mlxtune.cli.convert import _bytes as split_bytes
from mlxtune.cli.convert import file_size, verified_lines
from mlxtune.errors import ExportError, OutputExists
from mlxtune.export.adapter import export_adapter
from mlxtune.export.bundle import export_run, exported_before
from mlxtune.export.convert import Verified, convert, convert_to_folder
from mlxtune.export.meant import unlike
from mlxtune.export.runtime import RuntimeCheck, check_in_llamacpp
from mlxtune.export.verify import USUAL_ERROR, Readback
from mlxtune.fuse import dense_config, fuse_run
from mlxtune.gguf import writer
from mlxtune.gguf.heads import Reordering
from mlxtune.gguf.imatrix import write_imatrix
from mlxtune.gguf.mixing import FILE_TYPES
from mlxtune.gguf.reader import GGUFFile
from mlxtune.gguf.rope import rope_metadata
from mlxtune.install import install_extra
from mlxtune.models.load import load_model, load_tokenizer
from mlxtune.models.resolve import ModelSource
from mlxtune.recipe.load import parse_recipe
from mlxtune.train.metrics import Silent
from mlxtune.train.session import fine_tune
from mlxtune.train.subject import find_subject
from support.files import SHELL_TRAIN, listing, write_jsonl
from support.models import save_real_vocabulary, tiny
from support.process import HANGS
from support.program import mlxtune, running, wait_until

ROWS = [[504, 2537, 841, 260, 284, 1017, 28, 260, 3122, 30]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "small"
    save_real_vocabulary(path)
    return path


@pytest.fixture
def model(folder):
    return load_model(ModelSource("small", folder)).model


@pytest.fixture(scope="module")
def written(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    return convert(str(folder), path, file_type="f32", verify=False).path


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A run of one step on a copy of the model."""
    place = tmp_path_factory.mktemp("home-of-somebody")
    shutil.copytree(folder, place / "base")
    rows = [json.loads(line) for line in SHELL_TRAIN.read_text().splitlines()[:8]]
    data = write_jsonl(place / "rows.jsonl", rows)
    recipe = {"name": "small", "model": {"path": str(place / "base")}}
    recipe |= {"data": [{"path": str(data)}], "train": {"max_steps": 1, "batch_size": 2}}
    return fine_tune(parse_recipe(recipe, where="test"), place / "run", Silent()).path


def test_llama_cpp_is_believed_when_it_disagrees(written, model):
    pytest.importorskip("xllamacpp")
    found = check_in_llamacpp(written, model, ROWS, "f32")
    assert found.places == 9 and found.mean_kl < 1e-4 and found.top1 == 1
    assert check_in_llamacpp(written, model, [[504]], "f32").mean_kl is None  # nothing precedes it
    model.update(tree_map(lambda a: a * 1.5, model.parameters()))
    with pytest.raises(ExportError, match="other tokens than MLX"):
        check_in_llamacpp(written, model, ROWS, "f32")
    model.update(tree_map(lambda a: a * mx.nan, model.parameters()))
    with pytest.raises(ExportError, match="the model itself gives no numbers"):
        check_in_llamacpp(written, model, ROWS, "q4_k_m")


def test_a_template_that_llama_cpp_renders_otherwise_is_told_of(written, folder, model):
    """It says that models may think, where the template can be told."""
    pytest.importorskip("xllamacpp")
    tokenizer = load_tokenizer(ModelSource("small", folder))
    own = check_in_llamacpp(written, model, ROWS[:1], "f32", tokenizer)
    assert own.same_prompt is True
    tokenizer.chat_template = str(tokenizer.chat_template).replace("assistant", "model")
    other = check_in_llamacpp(written, model, ROWS[:1], "f32", tokenizer)
    assert other.same_prompt is False
    readback = Readback(272, {"F32": 0.0}, "a", 0.0, 4, True)
    assert "ANOTHER PROMPT" in verified_lines(Verified(readback, other))[3]
    assert verified_lines(Verified(readback, own))[3].endswith("asks as the chat template does")


@pytest.mark.parametrize("file_type", ["q6_k", "q4_0", "q2_k", "q5_k_m"])
def test_columns_that_no_input_reaches_may_err(tmp_path, monkeypatch, file_type):
    """With so much of the importance zero, ggml itself leaves such weights far off."""
    save_real_vocabulary(tmp_path / "wide", dims=256)
    monkeypatch.setattr("mlxtune.export.convert.installed", lambda: False)
    names = [f"blk.{n}.{kind}.weight" for n in (0, 1) for kind in ("ffn_up", "ffn_gate", "attn_q")]
    rng = np.random.default_rng(0)
    sparse = [np.where(rng.random(256) < 0.9, 0, 100).astype(np.float32) for _ in names]
    sparse[2][:] = 0
    sums, counts = dict(zip(names, sparse, strict=True)), dict.fromkeys(names, np.float32([10]))
    write_imatrix(tmp_path / "i.gguf", sums, counts, ["text"])
    how = {"file_type": file_type, "imatrix": tmp_path / "i.gguf"}
    made = convert(str(tmp_path / "wide"), tmp_path / "m.gguf", **how)
    assert made.verified.readback.worst_error > USUAL_ERROR[FILE_TYPES[file_type].type]
    encode = writer.encode
    monkeypatch.setattr(writer, "encode", lambda values, *more: encode(values * 1.7, *more))
    with pytest.raises(ExportError, match="differs from its source by"):
        convert(str(tmp_path / "wide"), tmp_path / "n.gguf", **how)


@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_every_type_has_a_bound(written, model, monkeypatch, file_type):
    pytest.importorskip("xllamacpp")
    monkeypatch.setattr("mlxtune.export.runtime._divergence", lambda *_: 3.5)
    with pytest.raises(ExportError, match=r"other tokens than MLX: mean KL divergence 3\.5,"):
        check_in_llamacpp(written, model, ROWS, file_type)


def divided(entry, config):
    key = f"{entry.name}.rope.freq_base"
    meant = rope_metadata(entry, config)
    return meant | {key: meant[key] / 1000}


@pytest.mark.parametrize("file_type", ["f32", "q4_0"])
def test_a_wrong_rotation_is_seen_without_running_it(folder, tmp_path, monkeypatch, file_type):
    monkeypatch.setattr("mlxtune.gguf.writer.rope_metadata", divided)
    monkeypatch.setattr("mlxtune.export.convert.installed", lambda: False)
    with pytest.raises(ExportError, match=r"rope\.base is 10\.0 there, and 10000 in its"):
        convert(str(folder), tmp_path / "m.gguf", file_type=file_type)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("llama.attention.layer_norm_rms_epsilon", 1e-3, r"eps is 0\.001 there"),
        ("llama.context_length", 4096, "config.max_position_embeddings is 4096 there"),
        ("llama.rope.scaling.type", "linear", r"rope\.scale is 0\.25 there"),
        ("tokenizer.ggml.eos_token_id", 5, "its eos token is number 5"),
        ("tokenizer.ggml.add_bos_token", True, "only the file puts a mark before a text"),
    ],
)
def test_wrong_metadata_is_an_error(folder, tmp_path, monkeypatch, key, value, said):
    monkeypatch.setattr("mlxtune.export.convert.installed", lambda: False)
    shutil.copytree(folder, tmp_path / "m")
    for file in (tmp_path / "m").glob("*.jinja"):
        file.unlink()  # templates write marks too, and are looked at before
    more = {"llama.rope.scaling.factor": 4.0} if "scaling" in key else {}

    class Otherwise(GGUFFile):
        def __init__(self, path):
            super().__init__(path)
            self.metadata |= {key: value} | more

    monkeypatch.setattr("mlxtune.export.verify.GGUFFile", Otherwise)
    with pytest.raises(ExportError, match=said):
        convert(str(tmp_path / "m"), tmp_path / "m.gguf", file_type="q2_k")


def test_a_folder_with_another_config_is_an_error(folder, tmp_path, monkeypatch):
    def otherwise(config, dtype):
        return dense_config(config, dtype) | {"rope_theta": 77.0}

    monkeypatch.setattr("mlxtune.export.convert.dense_config", otherwise)
    with pytest.raises(ExportError, match=r"rope\.base is 77\.0 there"):
        convert_to_folder(str(folder), tmp_path / "m")


def test_what_computes_the_same_may_be_written_otherwise():
    sizes = {k: v for k, v in vars(tiny("llama").args).items() if v is not None}
    assert unlike(sizes, sizes | {"sliding_window": 512, "model_type": "mistral"}) is None
    assert unlike(sizes, sizes | {"rope_theta": 10_000}) is None
    scaling = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
    scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    stretched = sizes | {"rope_scaling": scaling}
    assert unlike(stretched, stretched) is None
    said = unlike(stretched, stretched | {"rope_scaling": scaling | {"factor": 32.0}})
    assert said == "model.layers.1.self_attn.rope._freqs has other values than in its source"
    assert "rope is 'RoPE' there" in unlike(stretched, sizes)
    assert unlike({"model_type": "none"}, sizes) is None  # mlx-lm knows no such


def test_what_does_not_fit_beside_its_source_is_not_run(folder, tmp_path, monkeypatch):
    pytest.importorskip("xllamacpp")
    monkeypatch.setattr("mlxtune.export.convert.memory_budget", lambda _: 2_500_000)
    small = convert(str(folder), tmp_path / "small.gguf", file_type="q8_0").verified
    large = convert(str(folder), tmp_path / "large.gguf", file_type="f32").verified
    assert (small.llamacpp is None, small.not_run) == (False, None)
    assert large.llamacpp is None and "0.0 are there" in large.not_run
    assert "not tried in llama.cpp: " in "".join(verified_lines(large))


def test_what_was_found_is_said_in_common_words_and_what_is_optional_with_what_to_type():
    readback = Readback(272, {"Q8_0": 0.0052, "F32": 0.0}, "a", 0.0052, 4, True)
    lines = verified_lines(Verified(readback, None))
    assert lines[0] == "  read back: 272 tensors differ from the model's by 0.52% (Q8_0)"
    assert lines[1].endswith("4 test texts become the same tokens, test chats the same prompts")
    assert lines[2].endswith(f"which is optional: {install_extra('llamacpp')}")
    ran = verified_lines(Verified(readback, RuntimeCheck(50, 0.0056, 0.98), "records"))[2]
    assert "at 98% of 50 places the most likely next token is that of MLX" in ran
    equal = verified_lines(Verified(replace(readback, error={"F32": 0.0}), None), runs=False)
    assert equal[0].endswith("272 tensors equal the model's") and len(equal) == 2


def test_a_run_outlives_its_data(folder, tmp_path):
    pytest.importorskip("xllamacpp")
    data = tmp_path / "rows.jsonl"
    write_jsonl(data, [json.loads(line) for line in SHELL_TRAIN.read_text().splitlines()[:8]])
    source = {"path": str(data), "system": "Be brief."}
    recipe = {"name": "r", "model": {"path": str(folder)}, "data": [source]}
    recipe |= {"train": {"max_steps": 1, "batch_size": 2}}
    run = fine_tune(parse_recipe(recipe, where="test"), tmp_path / "run", Silent()).path
    with_data = export_run(run, output=tmp_path / "with", file_type="f32").verified
    # Asked in use as it was trained.
    assert "SYSTEM Be brief.\n" in (tmp_path / "with/Modelfile").read_text().replace('"', "")
    adapter = export_adapter(run, "gguf").folder / "adapter.gguf"
    assert GGUFReader(adapter).fields["general.base_model.0.name"].contents() == folder.name
    assert str(folder.parent).encode() not in adapter.read_bytes()
    data.unlink()
    without = export_run(run, output=tmp_path / "without", file_type="f32").verified
    assert (with_data.tried_on, without.tried_on) == ("records", "texts")
    assert min(with_data.llamacpp.places, without.llamacpp.places) > 10


def test_the_base_of_a_run_is_not_replaced_by_what_is_made_of_it(run, tmp_path):
    base, place = run.parent / "base", run.parent
    for marker in ("model.gguf", "fuse.json"):  # as if an export, or a fused run, were the base
        (base / marker).touch()
    convert(str(run), tmp_path / "m.gguf", verify=False)
    before = listing(place)
    for write in (export_run, fuse_run):
        with pytest.raises(OutputExists, match="is used for it"):
            write(run, output=base, overwrite=True)
    for output in (base, run, run / "adapter", place):
        with pytest.raises(OutputExists, match="is used for it"):
            convert_to_folder(str(run), output, overwrite=True)
    inside = tmp_path / "out/importance.gguf"
    how = {"calibration": place / "rows.jsonl", "save_imatrix": inside, "file_type": "q4_k_m"}
    with pytest.raises(OutputExists, match="is used for it"):
        export_run(run, output=tmp_path / "out", **how)
    assert listing(place) == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("tensor", "holds other numbers"),
        ("rows", "blk.0.attn_k.weight.lora_b holds other numbers"),
        ("alpha", "adapter.lora.alpha is"),
        ("architecture", "general.architecture is 'qwen2' there, not 'llama'"),
        ("missing", "lora_a is not there"),
    ],
)
def test_an_adapter_is_read_back(run, tmp_path, monkeypatch, change, said):
    class Writer(gguf.GGUFWriter):
        def __init__(self, path, name):
            super().__init__(path, "qwen2" if change == "architecture" else name)

        def add_tensor(self, name, values):
            if change != "missing" or "ffn_up.weight.lora_a" not in name:
                super().add_tensor(name, values * 2 if change == "tensor" else values)

        def add_float32(self, name, value):
            super().add_float32(name, value + (change == "alpha"))

    weights = run / "adapter/adapters.safetensors"
    kept, arrays = weights.read_bytes(), dict(mx.load(str(weights)))
    mx.save_safetensors(str(weights), {k: mx.random.normal(v.shape) for k, v in arrays.items()})
    try:
        assert export_adapter(run, "gguf", output=tmp_path / "right").kind == "lora"
        if change == "rows":
            monkeypatch.setattr(Reordering, "to_gguf", lambda self, values: values)
        monkeypatch.setattr("mlxtune.adapters.gguf.gguf.GGUFWriter", Writer)
        with pytest.raises(ExportError, match=said):
            export_adapter(run, "gguf", output=tmp_path / "wrong")
    finally:
        weights.write_bytes(kept)
    assert not (tmp_path / "wrong").exists()


@pytest.fixture
def pipe(tmp_path):
    """A named pipe that is read for ever, and a function that says whether somebody reads it."""
    path, ends = tmp_path / "waits.txt", []
    os.mkfifo(path)

    def is_read() -> bool:
        if not ends:
            with suppress(OSError):  # nobody does
                ends.append(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
        return bool(ends)

    yield path, is_read
    for end in ends:
        os.close(end)


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_a_conversion_that_is_told_to_stop_leaves_nothing(folder, tmp_path, number, pipe):
    path, is_read = pipe
    place = tmp_path / "out"
    arguments = ("convert", str(folder), "out/m.gguf", "--quantize=q4_k_m")
    with running(*arguments, f"--calibrate={path}", cwd=tmp_path) as program:
        wait_until(is_read, program)
        # A signal between the opening and the reading would be seen only when something is read.
        wait_until(lambda: psutil.Process(program.pid).status() == psutil.STATUS_SLEEPING, program)
        assert [path.suffix for path in place.iterdir()] == [".partial"]
        program.send_signal(number)
        _, said = program.communicate(timeout=HANGS)
    assert program.returncode == 128 + number and "interrupted" in said
    assert not place.exists()


def test_what_is_shipped_says_nothing_of_this_machine(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = export_run(run, file_type="q8_0", verify=False)
    assert str(run) in made.commands["llama.cpp"]
    card = (made.folder / "README.md").read_text()
    assert "`ollama create small -f Modelfile && ollama run small`" in card
    assert "`llama-cli -m model.gguf -cnv`" in card and "`mistralrs run -f model.gguf`" in card
    for file in made.folder.iterdir():
        for part in (str(run), str(run.parent), run.parent.name):
            assert part.encode() not in file.read_bytes(), file.name


def test_an_importance_that_can_have_no_effect_is_refused(folder, tmp_path):
    of_another = tmp_path / "other.gguf"
    sums, counts = ({"blk.0.attn_z.weight": np.ones(n, np.float32)} for n in (64, 1))
    write_imatrix(of_another, sums, counts, ["text"], chunk_size=8)
    how = {"imatrix": of_another, "verify": False}
    with pytest.raises(ExportError, match="no effect") as caught:
        convert(str(folder), tmp_path / "m.gguf", file_type="q8_0", **how)
    assert caught.value.where == "--imatrix"
    with pytest.raises(ExportError, match="of another model"):
        convert(str(folder), tmp_path / "m.gguf", file_type="q4_k_m", **how)
    assert [path.name for path in tmp_path.iterdir()] == ["other.gguf"]


def test_parts_of_an_earlier_conversion_are_refused_or_all_replaced(folder, tmp_path):
    path, how = tmp_path / "m.gguf", {"file_type": "q8_0", "verify": False}
    first = convert(str(folder), path, split_max_bytes=40_000, **how)
    (tmp_path / "m-00001-of-00002.txt").write_text("not a part")
    before = sorted(tmp_path.iterdir())
    said = []
    with pytest.raises(OutputExists):
        convert(str(folder), path, split_max_bytes=300_000, progress=said.append, **how)
    assert sorted(tmp_path.iterdir()) == before and said == ["opening"]
    again = convert(str(folder), path, split_max_bytes=300_000, overwrite=True, **how)
    assert 1 < len(again.files) < len(first.files)
    names = {entry.name for entry in tmp_path.iterdir()}
    assert names == {*again.files, "m-00001-of-00002.txt"}
    assert len(GGUFFile(tmp_path / again.files[0]).tensors) == 20


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("export", "run", "--adapter-only", "--pre", "gpt-2"), "--pre is of fused models"),
        (("export", "run", "--adapter-only", "--no-verify"), "--no-verify is of fused"),
        (("convert", "a", "b.gguf", "--split-max-size", "0G"), "no file is that small"),
        (("convert", "a", "b.gguf", "--split-max-size", "0.0K"), "no file is that small"),
        (("convert", "a", "b.gguf", "--quantize", "q4km"), "Did you mean q4_k_m?"),
        (("export", "run", "--to", "olama"), "Did you mean ollama?"),
        (("export", "run", "--adapter-only", "--adapter", "x"), "--adapter is of fused models"),
    ],
)
def test_options_without_effect_are_refused(tmp_path, arguments, words):
    done = mlxtune(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and words in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("convert", "smal", "m.gguf"), "did you mean small?"),
        (
            ("convert", "s.gguf", "m.gguf"),
            "of which the first stands for all: s-00001-of-00002.gguf",
        ),
        (("convert", "two", "m.gguf"), "did you mean two/a.gguf?"),
        (("convert", "small", "m.gguf", "--pre", "smolm"), "did you mean smollm? one of: "),
        (("export", "small"), "mlxtune convert small model.gguf"),
    ],
)
def test_what_may_be_meant_is_told(folder, tmp_path, arguments, words):
    shutil.copytree(folder, tmp_path / "small")
    (tmp_path / "two").mkdir()
    for file in ("two/a.gguf", "two/b.gguf", "s-00001-of-00002.gguf", "s-00002-of-00002.gguf"):
        (tmp_path / file).touch()
    done = mlxtune(*arguments, cwd=tmp_path)
    assert done.returncode == 1 and words in done.stderr, done.stderr


def test_a_bad_address_of_ollama_is_told_before_the_work(run, tmp_path, monkeypatch):
    monkeypatch.setenv("OLLAMA_HOST", "ftp://somewhere")
    for more in ((), ("--adapter-only", "--base", "smollm2:135m")):
        done = mlxtune("export", str(run), "--to=ollama", "-o", "out", *more, cwd=tmp_path)
        assert done.returncode == 1 and "this is no address of a server" in done.stderr
        assert not (tmp_path / "out").exists()


def test_another_adapter_of_a_run_is_exported_and_handed_over(run, tmp_path, monkeypatch):
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    best = tmp_path / "adapter-best"
    shutil.copytree(run / "adapter", best)
    arrays = dict(mx.load(str(best / "adapters.safetensors")))
    arrays = {name: mx.ones(array.shape) for name, array in arrays.items()}
    mx.save_safetensors(str(best / "adapters.safetensors"), arrays)
    how = {"file_type": "f16", "verify": False}
    own = export_run(run, output=tmp_path / "own", **how)
    other = export_run(run, output=tmp_path / "other", adapter=best, **how)
    files = [GGUFFile(made.folder / "model.gguf") for made in (own, other)]
    assert not np.array_equal(*(file.data("blk.0.attn_q.weight") for file in files))
    assert "| adapter | `adapter-best` |" in (other.folder / "README.md").read_text()
    assert "| learning rate |" in (own.folder / "README.md").read_text()
    assert exported_before(run, output=other.folder, adapter=best, **how).written_before
    with pytest.raises(OutputExists, match="made of another adapter"):
        exported_before(run, output=other.folder, **how)
    arguments = ("--to=ollama", "--quantize=f16", "--no-verify", "-o", "other")
    done = mlxtune("export", str(run), f"--adapter={best}", *arguments, cwd=tmp_path)
    assert "written before" in done.stdout and "Ollama does not answer" in done.stderr


def test_a_checkpoint_and_a_model_with_an_adapter_are_exported(run, tmp_path):
    how = {"file_type": "f16", "verify": False}
    shutil.copytree(run, tmp_path / "run")
    step = export_run(f"{tmp_path / 'run'}@step-1", **how)
    assert step.folder == tmp_path / "run/export/f16-step-1"
    with pytest.raises(ExportError, match="no place to be written to"):
        export_run(str(run.parent / "base"), adapter=run, **how)
    other = export_run(str(run.parent / "base"), adapter=run, output=tmp_path / "out", **how)
    files = [GGUFFile(made.folder / "model.gguf") for made in (step, other)]
    for name in files[0].tensors:
        assert np.array_equal(*(file.data(name) for file in files))
    # What was written is a model by its folder's name.
    again, live = find_subject(str(other.folder)).load(), find_subject(str(run)).load()
    wanted = live.model(mx.array(ROWS))
    assert mx.allclose(again.model(mx.array(ROWS)), wanted, atol=2e-2)


def test_an_importance_of_some_matrices_is_told(folder, run, tmp_path):
    sums, counts = ({"blk.0.attn_q.weight": np.ones(n, np.float32)} for n in (64, 1))
    write_imatrix(tmp_path / "i.gguf", sums, counts, ["text"])
    given = ("--quantize=q4_0", "--imatrix=i.gguf", "--no-verify")
    done = mlxtune("convert", str(folder), "m.gguf", *given, cwd=tmp_path)
    assert "13 matrices have no importance there and are rounded as without" in done.stdout
    assert re.search(r"m\.gguf: \d+ kB, tensors", done.stdout)
    done = mlxtune("export", str(run), "-o", "out", *given, cwd=tmp_path)
    assert "13 matrices have no importance there" in done.stdout
    assert not convert(str(folder), tmp_path / "n.gguf", file_type="q4_0", verify=False).unweighed


def test_sizes_are_told_as_people_say_them():
    told = {3: "3 bytes", 42_000: "42 kB", 1_250_000: "1.2 MB", 145e6: "145 MB", 4.1e9: "4.1 GB"}
    assert {size: file_size(size) for size in told} == told
    assert split_bytes("4.5G") == 4_500_000_000 and split_bytes("500mb") == 500_000_000
