"""Whether training helped is said first, plainly, and of which adapter."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from mlxtune.adapters.store import read_adapter
from mlxtune.errors import RunError
from mlxtune.recipe.load import dump_recipe
from mlxtune.train.metrics import Silent
from mlxtune.train.outcome import adapter_lines, adapter_name, judge, outcome, outcome_lines
from mlxtune.train.run import Run
from mlxtune.train.session import fine_tune
from support.files import SHELL_HELDOUT
from support.program import mlxtune


def loss_by_mlx_lm(model: Path, adapter: Path | None) -> float:
    """Mean loss of the answers of the first eight held-out records, end of turn counted."""
    loaded, tokenizer = mlx_lm.load(str(model), adapter_path=str(adapter) if adapter else None)
    total = count = 0.0
    for line in SHELL_HELDOUT.read_text().splitlines()[:8]:
        record = json.loads(line)
        asked = [{"role": "user", "content": record["prompt"]}]
        whole = [*asked, {"role": "assistant", "content": record["expected_command"]}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True)
        ids = tokenizer.apply_chat_template(whole)
        # What follows the end of a turn is the template's, and not trained.
        ids = ids[: len(ids) - ids[::-1].index(tokenizer.convert_tokens_to_ids("<|im_end|>"))]
        logits = np.array(loaded(mx.array([ids]))[0].astype(mx.float32), np.float64)
        top = logits.max(-1, keepdims=True)
        normal = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
        total -= sum(normal[at - 1, ids[at]] for at in range(len(prompt), len(ids)))
        count += len(ids) - len(prompt)
    return total / count


def test_a_run_that_got_worse_is_called_that_with_what_mlx_lm_measures(worse_run, trained_folder):
    run = Run(worse_run)
    before, after = (loss_by_mlx_lm(trained_folder, a) for a in (None, run.adapter))
    assert after > before + 0.5
    found = outcome(run.metrics())
    assert found.before == pytest.approx(before, rel=1e-3)
    assert found.after == pytest.approx(after, rel=1e-2)
    assert found.warning == (
        f"the held-out loss is worse than before training: {found.before:.4f} before, "
        f"{found.after:.4f} after step 6"
    )
    assert found.best_step == 0 and found.better_before is None
    warning, advice = outcome_lines(run)
    assert warning == f"warning: {found.warning}" and "lower train.learning_rate" in advice


def test_lora_says_first_that_it_got_worse(recipe, few, trained_folder, tmp_path):
    settings = recipe(
        few,
        model={"path": str(trained_folder)},
        eval={"path": str(SHELL_HELDOUT), "max_samples": 4},
        train={"learning_rate": 1.0, "max_steps": 3},
    )
    (tmp_path / "r.toml").write_text(dump_recipe(settings))
    done = mlxtune("lora", "r.toml", "-o", "out", "--force", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    warning, advice, adapter, then, *verbs = done.stdout.splitlines()[-7:]
    assert warning.startswith("warning: the held-out loss is worse than before training: ")
    assert "train again with a lower train.learning_rate" in advice
    assert adapter == "adapter: out/adapter (after step 3)"
    assert then == "next:"
    assert [line.split(" out ")[0].split()[-1] for line in verbs] == ["eval", "chat", "report"]
    status = Run(tmp_path / "out").status()
    assert status["command"] == "mlxtune lora r.toml -o out --force"
    assert status["started"] <= status["ended"]


@pytest.fixture(scope="module")
def turned(recipe, few, trained_folder, tmp_path_factory) -> Run:
    """A run that got better while its rate was low, and then worse than it had begun."""
    settings = recipe(
        few,
        model={"path": str(trained_folder)},
        eval={"path": str(SHELL_HELDOUT), "max_samples": 8, "steps": 2},
        train={"learning_rate": 1.0, "max_steps": 12, "warmup_steps": 100},
    )
    return fine_tune(settings, tmp_path_factory.mktemp("runs") / "turned", Silent())


def test_an_adapter_that_was_better_before_is_named_with_its_step(turned):
    found = outcome(turned.metrics())
    best = found.better_before
    assert best and found.losses[best] < found.before < found.after
    warning, advice = outcome_lines(turned)
    assert warning.startswith("warning: the held-out loss is worse than before training")
    assert f"lowest after step {best} ({found.losses[best]:.4f}): that adapter is in " in advice
    assert str(turned.best_adapter) in advice
    assert adapter_name(turned.best_adapter) == f"{turned.best_adapter} (after step {best})"
    assert adapter_name(turned.adapter) == f"{turned.adapter} (after step 12)"
    # Nothing is to be said against the one that is better.
    assert adapter_lines(turned.adapter) and not adapter_lines(turned.best_adapter)


def test_a_run_that_got_better_is_not_spoken_of(tiny_run):
    assert outcome(Run(tiny_run).metrics()).warning is None
    assert outcome_lines(Run(tiny_run)) == []


def test_training_that_changed_nothing_is_said_to(recipe, few, tmp_path):
    eval_ = {"path": str(SHELL_HELDOUT), "max_samples": 2}
    settings = recipe(few, eval=eval_, train={"learning_rate": 1e-12, "max_steps": 2})
    run = fine_tune(settings, tmp_path / "run", Silent())
    assert "the held-out loss has not changed: " in outcome_lines(run)[0]


def test_without_held_out_records_the_training_loss_is_looked_at(
    recipe, few, trained_folder, tmp_path
):
    settings = recipe(few, model={"path": str(trained_folder)}, train={"learning_rate": 1.0})
    run = fine_tune(settings, tmp_path / "run", Silent())
    losses = [entry["loss"] for entry in run.metrics()]
    assert outcome_lines(run)[0] == (
        f"warning: the training loss did not fall: {losses[0]:.4f} in the first quarter of the "
        f"run, {losses[-1]:.4f} in the last"
    )


def test_losses_that_are_printed_alike_are_the_same():
    assert [judge(2.00004, after) for after in (2.00001, 1.9, 2.1, math.nan, None)] == [
        "same", "better", "worse", "worse", "worse",
    ]  # fmt: skip


def test_what_is_no_figure_in_the_metrics_is_passed_over(worse_run, tmp_path):
    run = Run(shutil.copytree(worse_run, tmp_path / "run"))
    want = outcome(run.metrics())
    with (run.path / "metrics.jsonl").open("ab") as metrics:
        metrics.write(b'\xff\xfe\n[1]\n{"step": "x"}\n{"step": 9, "held_out_loss": NaN}\n{"st')
    found = outcome(run.metrics())
    assert (found.losses, found.training) == (want.losses, want.training)
    (run.path / "metrics.jsonl").unlink()
    assert outcome_lines(run) == [] and adapter_name(run.adapter) == str(run.adapter)


def test_an_adapter_of_no_numbers_is_refused_by_every_verb(tiny_run, tmp_path):
    run = Run(shutil.copytree(tiny_run, tmp_path / "run"))
    path = run.adapter / "adapters.safetensors"
    arrays = mx.load(str(path))
    name = sorted(arrays)[1]
    arrays[name][0, :2] = mx.array([math.nan, math.inf])
    mx.save_safetensors(str(path), arrays)
    size = sum(array.size for array in arrays.values())
    said = f"the adapter is damaged: 2 of its {size:,} weights are no numbers"
    with pytest.raises(RunError, match="no numbers") as error:
        read_adapter(run.adapter)
    assert said in error.value.what and error.value.what.endswith(name)
    verbs = (["eval", "run"], ["export", "run"], ["fuse", "run", "-o", "x"],
             ["export", "run", "--adapter-only"], ["chat", "run", "-p", "x"])  # fmt: skip
    for arguments in verbs:
        done = mlxtune(*arguments, cwd=tmp_path)
        assert done.returncode == 1 and said in done.stderr, (arguments, done.stderr)
    assert [p.name for p in tmp_path.iterdir()] == ["run"] and not (run.path / "export").exists()
