"""`export --adapter-only`: a run's adapter in other libraries, and between them."""

from __future__ import annotations

import json
import shutil

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
import torch
import transformers

from mlxtune.adapters.store import save_adapter
from mlxtune.data.render import Renderer
from mlxtune.errors import ExportError, OutputExists, RunError
from mlxtune.evaluate.compare import compare_run
from mlxtune.export.adapter import export_adapter
from mlxtune.fuse import fuse_run
from mlxtune.recipe.load import parse_recipe
from mlxtune.train.corpus import read_corpus
from mlxtune.train.metrics import Silent
from mlxtune.train.run import Run
from mlxtune.train.session import fine_tune, open_run
from support.compare import distance
from support.files import write_jsonl
from support.models import tiny, with_adapters
from support.program import mlxtune

IDS = [[5, 17, 99, 3, 42, 64, 7, 1]]


@pytest.fixture(scope="module")
def run(tiny_folder, tmp_path_factory):
    """A short DoRA run with rslora on some of the layers."""
    folder = tmp_path_factory.mktemp("run")
    data = write_jsonl(folder / "data.jsonl", [{"prompt": "list", "completion": "ls"}] * 4)
    values = {
        "name": "t",
        "model": {"path": str(tiny_folder)},
        "lora": {"rank": 4, "rslora": True, "dora": True, "exclude_modules": ["o_proj"]},
        "data": [{"path": str(data)}],
        "eval": {"path": str(data), "max_overlap": 1.0},
        "train": {"max_steps": 3, "learning_rate": 1e-2, "lr_scheduler": "constant"},
    }
    fine_tune(parse_recipe(values, where="test"), folder / "run", Silent())
    return folder / "run"


@pytest.fixture(scope="module")
def logits(run):
    """Of the run, from which the base's differ."""
    _, loaded = open_run(run)
    base, _ = mlx_lm.utils.load_model(loaded.source.path)
    got = loaded.model(mx.array(IDS))
    assert distance(got, base(mx.array(IDS))) > 1e-2
    return got


def in_mlx_lm(tiny_folder, adapter) -> mx.array:
    model, _ = mlx_lm.utils.load_model(tiny_folder)
    model = mlx_lm.utils.load_adapters(model, str(adapter))
    model.eval()
    return model(mx.array(IDS))


def in_peft(tiny_folder, adapter) -> mx.array:
    from peft import PeftModel

    base = transformers.LlamaForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter).eval()
    with torch.no_grad():
        return mx.array(model(torch.tensor(IDS)).logits.numpy())


def test_a_run_goes_to_both_and_from_one_to_the_other(run, logits, tiny_folder, tmp_path):
    to_peft = export_adapter(run, "peft")
    to_mlx_lm = export_adapter(run, "mlx-lm")
    assert (to_peft.folder, to_mlx_lm.folder) == (run / "export/peft", run / "export/mlx-lm")
    assert (to_peft.kind, to_peft.layers) == ("dora", 12)
    assert str(tiny_folder) in to_mlx_lm.load and str(to_peft.folder) in to_peft.load
    assert distance(in_peft(tiny_folder, to_peft.folder), logits) < 1e-4
    assert distance(in_mlx_lm(tiny_folder, to_mlx_lm.folder), logits) < 1e-4
    config = json.loads((to_peft.folder / "adapter_config.json").read_text())
    assert config["use_rslora"] and config["lora_alpha"] == 16
    # A folder alone, with nothing but what PEFT knows.
    there = export_adapter(to_peft.folder, "mlx-lm", output=tmp_path / "there")
    back = export_adapter(there.folder, "peft", output=tmp_path / "back")
    assert distance(in_mlx_lm(tiny_folder, there.folder), logits) < 1e-4
    want = mx.load(str(to_peft.folder / "adapter_model.safetensors"))
    got = mx.load(str(back.folder / "adapter_model.safetensors"))
    assert got.keys() == want.keys()
    assert all(np.array_equal(np.array(got[n]), np.array(want[n])) for n in want)


def test_what_is_there_is_kept_unless_it_is_an_adapter_and_told(run, tmp_path):
    first = export_adapter(run, "peft", output=tmp_path / "out")
    with pytest.raises(OutputExists, match="exists already"):
        export_adapter(run, "mlx-lm", output=first.folder)
    export_adapter(run, "mlx-lm", output=first.folder, overwrite=True)
    assert (first.folder / "adapters.safetensors").is_file()
    (tmp_path / "home").mkdir()
    (tmp_path / "home/letter.txt").write_text("dear")
    with pytest.raises(OutputExists, match="nothing that this command wrote"):
        export_adapter(run, "peft", output=tmp_path / "home", overwrite=True)
    with pytest.raises(OutputExists):
        export_adapter(run, "peft", output=run, overwrite=True)


def test_a_folder_without_a_place_to_go_or_without_an_adapter_is_told(run, tiny_folder, tmp_path):
    shutil.copytree(run / "adapter", tmp_path / "alone")
    with pytest.raises(ExportError) as caught:
        export_adapter(tmp_path / "alone", "peft")
    assert "--output" in (caught.value.remedy or "")
    with pytest.raises(RunError, match="there is no adapter here"):
        export_adapter(tiny_folder, "peft", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_line_says_what_it_wrote_and_how_to_load_it(run, tmp_path):
    done = mlxtune("export", str(run), "--adapter-only", "--to=peft", "--output=out", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "out: dora on 12 layers, for peft",
        '  PeftModel.from_pretrained(model, "out")',
    ]
    done = mlxtune(
        *("export", str(run), "--adapter-only", "--to=mlx-lm", "--output=two", "--json"),
        cwd=tmp_path,
    )
    told = json.loads(done.stdout)
    assert (told["folder"], told["layout"], told["kind"]) == ("two", "mlx-lm", "dora")
    assert (tmp_path / "two/adapters.safetensors").is_file()


# ------------------------------------------------------------ another adapter with a run


@pytest.fixture(scope="module")
def foreign(tiny_folder, tmp_path_factory):
    """A folder that PEFT wrote, and its model."""
    import peft

    base = transformers.LlamaForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    config = peft.LoraConfig(r=6, use_dora=True, target_modules=["q_proj", "up_proj"])
    model = peft.get_peft_model(base, config).eval()
    generator = torch.Generator().manual_seed(2)
    for name, array in model.named_parameters():
        if "lora_B" in name:
            array.data = torch.randn(array.shape, generator=generator) * 0.1
    folder = tmp_path_factory.mktemp("foreign") / "peft"
    model.save_pretrained(folder)
    return folder, model


def test_an_adapter_of_peft_is_fused_into_a_model_of_transformers(run, foreign, tmp_path):
    folder, theirs = foreign
    report = fuse_run(run, tmp_path / "fused", adapter=folder, dtype="float32")
    assert report.max_logit_difference < 1e-3
    fused = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "fused", dtype=torch.float32)
    with torch.no_grad():
        got, want = (mx.array(m(torch.tensor(IDS)).logits.numpy()) for m in (fused, theirs))
    assert distance(got, want) < 1e-4


def test_another_adapter_is_evaluated_with_the_data_of_a_run(run, foreign):
    folder, theirs = foreign
    other, own = (compare_run(run, adapter=a, max_tokens=2) for a in (folder, None))
    assert other.base == own.base
    assert other.tuned.held_out_loss != own.tuned.held_out_loss
    recipe = Run.open(run).recipe()
    _, loaded = open_run(run)
    samples = read_corpus(recipe, Renderer(loaded.tokenizer)).held_out
    total = weight = 0.0
    for sample in samples:
        with torch.no_grad():
            logits = theirs(torch.tensor(sample.tokens[None].astype("int64"))).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(
            logits, torch.tensor(sample.tokens[1:].astype("int64")), reduction="none"
        )
        total += float((losses.numpy() * sample.weights[1:]).sum())
        weight += float(sample.weights[1:].sum())
    assert other.tuned.held_out_loss == pytest.approx(total / weight, rel=1e-4)


def test_an_adapter_of_another_model_is_refused_before_anything_is_computed(run, tmp_path):
    save_adapter(tmp_path, with_adapters(tiny("llama", num_hidden_layers=3)), base="some/other")
    said = []
    with pytest.raises(RunError, match=r"layers\.2\.") as caught:
        compare_run(run, adapter=tmp_path, progress=said.append)
    assert "some/other" in caught.value.remedy
    assert not said
    with pytest.raises(RunError):
        fuse_run(run, tmp_path / "fused", adapter=tmp_path)
    assert not (tmp_path / "fused").exists()
