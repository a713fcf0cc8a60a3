"""What a name means: the same model whichever way it is named."""

from __future__ import annotations

import shutil

import mlx.core as mx
import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from mlxtune.adapters.peft import write_peft
from mlxtune.adapters.store import write_mlx_lm
from mlxtune.errors import ModelError, RunError
from mlxtune.train.loop import Interrupted
from mlxtune.train.metrics import Silent
from mlxtune.train.run import Run
from mlxtune.train.session import fine_tune
from mlxtune.train.subject import find_subject, saved_adapter
from support.files import listing
from support.program import mlxtune
from support.runs import StopAt, same_arrays

TOKENS = [[3, 1, 4, 1, 5, 9, 2, 6]]


def logits(subject):
    return subject.load().model(mx.array(TOKENS))


def alike(one, other, *, atol=0.0):
    return mx.allclose(logits(one), logits(other), rtol=0, atol=atol).item()


@pytest.fixture(scope="module")
def stopped(once, recipe, few):
    """A run that was stopped after its fourth step."""

    def make(path):
        settings = recipe(few, checkpoint={"steps": 2, "keep": 9})
        with pytest.raises(Interrupted):
            fine_tune(settings, path / "runs/x", StopAt(4))

    return once("stopped", make) / "runs/x"


def test_a_checkpoint_of_a_stopped_run_is_the_model_of_that_step(stopped, recipe, few, tmp_path):
    with pytest.raises(RunError, match="no adapter yet") as error:
        find_subject(str(stopped))
    assert f"{stopped}@step-4" in error.value.remedy
    subject = find_subject(f"{stopped}@step-2")
    # A run of the same schedule that is stopped there.
    with pytest.raises(Interrupted):
        fine_tune(recipe(few, checkpoint={"steps": 9}), tmp_path / "y", StopAt(2))
    other = find_subject(f"{tmp_path / 'y'}@step-2")
    assert same_arrays(subject.saved().arrays, other.saved().arrays)
    assert alike(subject, other)
    by_folder = find_subject(str(stopped / "checkpoints/step-2"))
    assert by_folder.run == subject.run and by_folder.checkpoint == "step-2"
    assert not alike(subject, find_subject(f"{stopped}@step-4"))
    with pytest.raises(RunError, match="no checkpoint step-3") as error:
        find_subject(f"{stopped}@step-3")
    assert error.value.remedy == "it has: step-2, step-4"


def test_training_begins_with_a_checkpoint(stopped, recipe, few, tmp_path):
    name = f"{stopped}@step-2"
    begin = recipe(few, lora={"init_from": name}, train={"max_steps": 1, "learning_rate": 1e-30})
    run = fine_tune(begin, tmp_path / "run", Silent())
    assert same_arrays(saved_adapter(run.path).arrays, find_subject(name).saved().arrays)


def test_the_adapter_of_a_run_is_the_run(tiny_run):
    for name in (tiny_run / "adapter", tiny_run / "checkpoints/step-6"):
        subject = find_subject(str(name))
        assert subject.run.recipe() == Run(tiny_run).recipe()
        assert alike(subject, find_subject(str(tiny_run)))


@pytest.mark.parametrize("write", [write_peft, write_mlx_lm])
def test_an_adapter_alone_is_put_on_the_model_that_it_names(tiny_run, tmp_path, write):
    (tmp_path / "alone").mkdir()
    write(tmp_path / "alone", saved_adapter(tiny_run))
    assert alike(find_subject(str(tmp_path / "alone")), find_subject(str(tiny_run)))


def test_an_adapter_of_peft_computes_here_what_it_does_there(tiny_folder, tmp_path):
    import torch

    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    torch.manual_seed(0)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj", "up_proj"]))
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    wrapped.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        want = wrapped(torch.tensor(TOKENS)).logits.numpy()
    for subject in (
        find_subject(str(tmp_path / "theirs")),
        find_subject(str(tiny_folder), adapter=tmp_path / "theirs"),
    ):
        assert mx.allclose(logits(subject), mx.array(want), atol=1e-4)


def test_a_model_with_an_adapter_of_a_run_or_a_checkpoint(tiny_run, tiny_folder, stopped):
    named = find_subject(str(tiny_folder), adapter=tiny_run)
    assert alike(named, find_subject(str(tiny_run)))
    named = find_subject(str(tiny_run), adapter=stopped.with_name("x@step-2"))
    assert not named.own and alike(named, find_subject(f"{stopped}@step-2"))


def test_another_base_is_named(tiny_run, tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "copy")
    (tmp_path / "alone").mkdir()
    write_peft(tmp_path / "alone", saved_adapter(tiny_run))
    for name in (tiny_run, tmp_path / "alone"):
        subject = find_subject(str(name), base=str(tmp_path / "copy"))
        assert subject.model.path == str(tmp_path / "copy")
        assert alike(subject, find_subject(str(tiny_run)))
    with pytest.raises(ModelError, match="--model names the base"):
        find_subject(str(tiny_folder), base=str(tmp_path / "copy"))


def test_a_base_that_is_gone_or_not_named_is_asked_for(tiny_run, tmp_path):
    saved = saved_adapter(tiny_run)
    (tmp_path / "alone").mkdir()
    write_peft(tmp_path / "alone", saved)
    config = tmp_path / "alone/adapter_config.json"
    text = config.read_text()
    for base, what in (('"/nowhere/model"', "is not at /nowhere/model"), ("null", "not say which")):
        config.write_text(text.replace(f'"{saved.base}"', base))
        with pytest.raises(ModelError, match=what) as error:
            find_subject(str(tmp_path / "alone")).load()
        assert "--model" in error.value.remedy


def test_what_an_export_wrote_is_its_gguf(tmp_path):
    (tmp_path / "q8_0").mkdir()
    for name in ("model.gguf", "Modelfile"):
        (tmp_path / "q8_0" / name).touch()
    subject = find_subject(str(tmp_path / "q8_0"))
    assert subject.model.path == str(tmp_path / "q8_0/model.gguf")
    assert subject.adapter is None


@pytest.fixture
def world(tiny_run, tmp_path):
    (tmp_path / "runs").mkdir()
    for name in ("shell", "story"):
        (tmp_path / "runs" / name).symlink_to(tiny_run)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["chat", "runs/shel", "-p", "x"], "did you mean runs/shell?"),
        (["eval", "runs/shel"], "did you mean runs/shell?"),
        (["fuse", "runs/shel", "-o", "out"], "did you mean runs/shell?"),
        (["export", "runs/shel"], "did you mean runs/shell?"),
        (["convert", "runs/shel", "m.gguf"], "did you mean runs/shell?"),
        (["chat", "shel", "-p", "x"], "did you mean runs/shell?"),
        (["chat", "runs/shel@step-6", "-p", "x"], "did you mean runs/shell?"),
        (["chat", "runs/nothing-like", "-p", "x"], "runs there are: runs/shell, runs/story"),
        (["chat", "runs/shell@step-7", "-p", "x"], "it has: step-6"),
        (["lora", "runs/shel", "--resume"], "did you mean runs/shell?"),
        (["lora", "runs/shell"], "mlxtune lora runs/shell --resume"),
    ],
)
def test_a_slip_in_a_runs_name_is_no_model_of_the_hub(world, arguments, told):
    before = listing(world)
    done = mlxtune(*arguments, cwd=world)
    assert done.returncode == 1 and told in done.stderr, done.stderr
    assert "hub" not in done.stderr.splitlines()[0]
    assert listing(world) == before


def test_verbs_take_a_checkpoint(stopped, few, tmp_path):
    name = f"{stopped}@step-4"
    done = mlxtune("chat", name, "-p", "list files", "--max-tokens=3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    asked = ("--data", str(few), "--limit=2", "--max-tokens=2")
    done = mlxtune("eval", name, *asked, "--json", cwd=tmp_path)
    assert done.returncode == 0 and '"tuned"' in done.stdout, done.stderr
    done = mlxtune("fuse", name, "-o", "fused", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "(of records)" in done.stdout
    assert alike(find_subject(name), find_subject(str(tmp_path / "fused")), atol=1e-4)
    done = mlxtune("export", name, "--adapter-only", "--to=peft", "-o", "theirs", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert alike(find_subject(str(tmp_path / "theirs")), find_subject(name))


def test_verbs_take_an_adapter_alone(tiny_run, few, tmp_path):
    (tmp_path / "alone").mkdir()
    write_peft(tmp_path / "alone", saved_adapter(tiny_run))
    done = mlxtune("eval", "alone", cwd=tmp_path)
    assert done.returncode == 1 and "name a file of records with --data" in done.stderr
    done = mlxtune("eval", "alone", f"--data={few}", "--limit=2", "--max-tokens=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = mlxtune("fuse", "alone", "-o", "fused", cwd=tmp_path)
    assert done.returncode == 0 and "(of texts)" in done.stdout, done.stderr
    fused = find_subject(str(tmp_path / "fused"))
    assert alike(fused, find_subject(str(tiny_run)), atol=1e-4)


def test_an_adapter_that_is_not_the_runs_own_has_the_name_it_was_given(tiny_run, stopped):
    assert find_subject(str(tiny_run)).adapter_name is None
    other = find_subject(str(tiny_run), adapter=stopped.with_name("x@step-2"))
    assert other.adapter_name == f"{stopped}@step-2"
    assert find_subject(f"{stopped}@step-2").adapter_name == str(stopped / "checkpoints/step-2")
