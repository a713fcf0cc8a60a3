"""Suites, and models side by side."""

from __future__ import annotations

import json
import math
import re
import shutil
import socket
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest

from mlxtune.data.render import Renderer
from mlxtune.data.sources import read_conversations
from mlxtune.errors import DataError, RecipeError
from mlxtune.evaluate.compare import compare_models, compare_run
from mlxtune.evaluate.measure import plain_samples
from mlxtune.evaluate.results import (
    described,
    figures_json,
    read_results,
    write_results,
)
from mlxtune.evaluate.suite import Suite, load_suite
from mlxtune.export.convert import convert
from mlxtune.fuse import fuse_run
from mlxtune.recipe.load import parse_recipe
from mlxtune.recipe.schema import ModelSection
from mlxtune.report.collect import read_run
from mlxtune.report.results import results
from mlxtune.train.metrics import Silent
from mlxtune.train.model import tokenizer_of
from mlxtune.train.run import Run
from mlxtune.train.session import fine_tune
from support.files import ROOT, SHELL_HELDOUT, write_jsonl
from support.models import TEMPLATE, save_tiny_model
from support.program import mlxtune

RECORDS = [
    {"prompt": "list", "expected_command": "ls", "category": "files"},
    {"prompt": "all", "expected_command": "ls -la", "category": "files"},
    {"prompt": "where", "expected_command": "pwd | cat", "category": "paths"},
]


@pytest.fixture
def records(tmp_path):
    return write_jsonl(tmp_path / "records.jsonl", RECORDS)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "model").mkdir()
    save_tiny_model(folder / "model", merged=True)
    data = write_jsonl(folder / "data.jsonl", RECORDS * 2)
    recipe = {
        "name": "tiny",
        "model": {"path": str(folder / "model")},
        "data": [{"path": str(data)}],
        "train": {"max_steps": 2, "batch_size": 2},
        "eval": {"path": str(data), "max_samples": 3, "max_overlap": 1.0},
    }
    fine_tune(parse_recipe(recipe, where="-"), folder / "runs/tiny", Silent())
    return folder / "runs/tiny"


def test_the_suite_of_the_shell_data_is_complete():
    suite = load_suite(ROOT / "data/shell/suite.toml")
    assert suite.name == "shell" and "shell" in suite.metrics
    assert suite.data[0].path == str(SHELL_HELDOUT)
    text = Path(suite.general_text).read_text(encoding="utf-8")
    assert 2500 < len(text) < 4000 and text.isascii()


def test_all_that_is_wrong_in_a_suite_is_told_at_once(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'metric = ["exact"]\nmax_tokens = 0\nnormalise = "text"\n[judge]\nendpoint = "x"\n'
        'model = "m"\nrubrik = "r"\nrubric = "r"\nlowest = 5\n[[data]]\npath = "a"\nsplits = "b"\n'
    )
    with pytest.raises(RecipeError, match="things are wrong in this suite") as error:
        load_suite(path)
    told = {str(problem.where): problem for problem in error.value.problems}
    assert told["metric"].remedy == "did you mean metrics?"
    assert told["judge.rubrik"].remedy == "did you mean rubric?"
    assert told["data[0].splits"].remedy == "did you mean split?"
    assert {"max_tokens", "normalise", "judge.endpoint"} <= told.keys()
    for endpoint in ("http://localhost:port/v1", "http:///v1"):
        path.write_text(f'[judge]\nendpoint = "{endpoint}"\nmodel = "m"\nrubric = "r"\n')
        with pytest.raises(RecipeError) as error:
            load_suite(path)
        assert "URL" in str(error.value.problems[0])
    with pytest.raises(RecipeError, match="there is no such suite"):
        load_suite(tmp_path / "nope.toml")


def test_a_suite_takes_its_name_from_its_file_and_paths_from_beside_it(tmp_path):
    (tmp_path / "mine.toml").write_text('general_text = "t.txt"\n[[data]]\npath = "hub:a/b"\n')
    suite = load_suite(tmp_path / "mine.toml")
    assert (suite.name, suite.general_text) == ("mine", str(tmp_path / "t.txt"))
    assert suite.data[0].path == "hub:a/b"


def test_a_model_alone_is_measured(tiny_folder, records):
    result = compare_models(str(tiny_folder), data=records, max_tokens=4)
    figures = result.figures["model"]
    assert list(result.figures) == ["model"] and figures.gains == {}
    assert list(figures.metrics) == ["exact", "normalised", "f1", "edit"]
    # Tokens are bytes here, and each answer has one more for its end.
    size = sum(len(r["expected_command"]) for r in RECORDS)
    assert figures.tokens == size + len(RECORDS)
    assert figures.bits_per_byte == pytest.approx(
        figures.held_out_loss * figures.tokens / size / math.log(2)
    )
    assert figures.perplexity == pytest.approx(math.exp(figures.held_out_loss))


def test_a_copy_of_a_model_has_its_figures(tiny_folder, records):
    suite = Suite(name="s", metrics=("exact", "edit", "shell"))
    result = compare_models(
        str(tiny_folder), data=records, suite=suite, others={"copy": str(tiny_folder)}, max_tokens=4
    )
    one, other = result.figures.values()
    assert one.held_out_loss == other.held_out_loss and one.metrics == other.metrics
    assert all(g is None or (g.mean, g.low, g.high) == (0, 0, 0) for g in other.gains.values())
    assert list(one.metrics) == [
        "exact", "edit", "bash", "dash", "programs", "flags", "shell",
    ]  # fmt: skip
    assert {c: n for c, (n, *_) in result.by_category().items()} == {"files": 2, "paths": 1}


def test_forgetting_shows_in_the_loss_on_plain_text(tiny_run, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Nothing about shells. " * 80)
    result = compare_run(tiny_run, suite=Suite(name="s", general_text=str(text)), max_tokens=2)
    plain, tokenizer = mlx_lm.load(Run(tiny_run).recipe().model.path)
    tokens = mx.array([*tokenizer.encode(text.read_text().strip()), tokenizer.eos_token_id])
    windows = [tokens[at : at + 1024] for at in range(0, len(tokens), 1024)]
    losses = [
        nn.losses.cross_entropy(plain(w[None, :-1])[0], w[1:], reduction="sum") for w in windows
    ]
    expected = sum(loss.item() for loss in losses) / (len(tokens) - len(windows))
    assert result.base.general_loss == pytest.approx(expected, rel=1e-5)
    assert result.tuned.general_loss != result.base.general_loss
    assert set(result.tuned.gains) == set(result.tuned.metrics)


def test_a_long_text_is_cut_into_windows(smollm2):
    renderer = Renderer(smollm2.tokenizer)
    samples = plain_samples(ROOT / "README.md", renderer)
    assert len(samples) > 1 and all(2 <= len(s.tokens) <= 1024 for s in samples)
    joined = renderer.decode([t for s in samples for t in s.tokens], special=False)
    assert joined == (ROOT / "README.md").read_text(encoding="utf-8").strip()


def test_results_are_written_together(tiny_run, tmp_path):
    result = compare_run(tiny_run, max_tokens=2)
    figures, answers = write_results(result, tmp_path / "out")
    assert json.loads(figures.read_text()) == json.loads(json.dumps(figures_json(result)))
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["list", "all", "where"]
    assert set(lines[0]["said"]) == set(lines[0]["scores"]) == {"base", "tuned"}
    write_results(result, tmp_path / "out")  # again
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "heldout-tokens-2.json", "heldout-tokens-2.jsonl",
    ]  # fmt: skip


def test_no_short_or_other_check_takes_the_place_of_the_whole(tiny_run, tiny_folder, tmp_path):
    def stem(**how) -> str:
        figures, answers = write_results(compare_run(tiny_run, **how), tmp_path / "out")
        assert answers == figures.with_suffix(".jsonl")
        return figures.stem

    suite = Suite(name="s", metrics=("exact",), max_tokens=2)  # the suite's own cut is no other
    assert stem(suite=suite) == "s"
    assert stem(suite=suite, max_tokens=3) == "s-tokens-3"
    assert stem(suite=suite, limit=3) == stem(suite=suite, limit=99) == "s"  # there are three
    assert stem(suite=suite, limit=2, max_tokens=1) == "s-first-2-tokens-1"
    others = {"q 8": str(tiny_folder), "a": str(tiny_folder)}
    assert stem(suite=suite, others=others) == "s-with-a-q_8"
    value = json.loads((tmp_path / "out/s-with-a-q_8.json").read_text())
    assert list(value["targets"]) == ["base", "tuned", *others]


def test_records_that_differ_in_what_comes_before_the_question_are_told_apart(
    tiny_folder, tmp_path
):
    def record(system: str, answer: str) -> dict[str, object]:
        turns = [("system", system), ("user", "a"), ("assistant", "b"), ("user", "go on")]
        turns.append(("assistant", answer))
        return {"messages": [{"role": role, "content": text} for role, text in turns]}

    records = [record("Be brief.", "ls"), record("Be polite.", "ls"), record("Be brief.", "ls")]
    data = write_jsonl(tmp_path / "chats.jsonl", records)
    result = compare_models(str(tiny_folder), data=data, max_tokens=2)
    _, answers = write_results(result, tmp_path / "out")
    kept = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [answer["record"] for answer in kept] == [1, 2, 3]
    assert [answer["messages"] for answer in kept] == [r["messages"][:-1] for r in records]
    assert {answer["prompt"] for answer in kept} == {"go on"}


def test_what_was_called_and_could_be_called_is_kept(tiny_folder, tmp_path):
    call = {"id": "c1", "type": "function", "function": {"name": "run", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "user", "content": "run it"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "done", "tool_call_id": "c1", "name": "run"},
        {"role": "assistant", "content": "It ran."},
    ]
    tool = {"type": "function", "function": {"name": "run", "parameters": {"type": "object"}}}
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    template = model / "chat_template.jinja"
    written = "{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}"
    template.write_text("{{ tools | tojson }}" + TEMPLATE.replace("{{ m.content }}", written))
    data = write_jsonl(tmp_path / "chats.jsonl", [{"messages": messages, "tools": [tool]}])
    [answer] = compare_models(str(model), data=data, max_tokens=2).answers
    assert answer.tools == (tool,)
    assert answer.messages[1:] == (
        {"role": "assistant", "content": "",
         "tool_calls": [{"name": "run", "arguments": {"x": 1}}]},
        {"role": "tool", "content": "done", "name": "run"},
    )  # fmt: skip


def test_a_judge_who_is_not_there_costs_nothing_else(tiny_run):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    judge = {"endpoint": f"http://127.0.0.1:{port}", "model": "m", "rubric": "r", "retries": 0}
    result = compare_run(tiny_run, suite=Suite(name="s", judge=judge), max_tokens=2)
    assert result.tuned.metrics["judge"] is None and result.tuned.metrics["edit"] is not None
    assert any("6 of 6 answers not graded" in note for note in result.notes)
    assert result.judge["graded"] == 0


def test_a_model_alone_needs_records(tiny_folder):
    with pytest.raises(DataError, match="no held-out records"):
        compare_models(str(tiny_folder))


def test_the_command_shows_a_table_that_fits_and_keeps_the_answers(tiny_run):
    runs = tiny_run.parent.parent
    fused, gguf = runs / "fused", runs / "model.gguf"
    fuse_run(tiny_run, fused, dtype="float32")
    convert(str(fused), gguf, file_type="f32", pre="default", verify=False)
    done = mlxtune(
        "eval", "runs/tiny", "--with=fused=fused", "--with=gguf=model.gguf", "--samples=1",
        "--suite", str(ROOT / "data/shell/suite.toml"), "--data", "data.jsonl", "--max-tokens=4",
        cwd=runs,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "missing" not in done.stdout, done.stdout
    for row in ("held-out loss", "bits per byte", "general text loss", "exact match", "same flags"):
        assert re.search(rf"│ {row} +│ +\S+( ±\d+)? │ +\S+( ±\d+)? │", done.stdout), done.stdout
    # Other data than the suite's: its name is in the files' and in the title.
    assert {p.name for p in (tiny_run / "eval").iterdir()} == {
        "shell-data-tokens-4-with-fused-gguf.json", "shell-data-tokens-4-with-fused-gguf.jsonl",
    }  # fmt: skip
    assert "6 records of data.jsonl" in done.stdout
    value = json.loads((tiny_run / "eval/shell-data-tokens-4-with-fused-gguf.json").read_text())
    assert value["data"] == ["data.jsonl"] and value["models"]["gguf"] == "model.gguf"
    base, tuned, *others = value["targets"].values()
    assert list(value["targets"]) == ["base", "tuned", "fused", "gguf"]
    assert abs(tuned["held_out_loss"] - base["held_out_loss"]) > 1e-4
    for other in others:  # the adapter is in these files, and nothing else has changed
        assert other["held_out_loss"] == pytest.approx(tuned["held_out_loss"], rel=1e-5)
        assert other["metrics"] == tuned["metrics"]


def test_another_adapter_and_a_limit_do_not_pass_for_the_runs_own(tiny_run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(Run(tiny_run).finished_adapter(), other)
    result = compare_run(tiny_run, adapter=other, limit=2, max_tokens=2)
    figures, answers = write_results(result, tmp_path / "out")
    stem = "heldout-other-first-2-tokens-2"
    assert (figures.name, answers.name) == (f"{stem}.json", f"{stem}.jsonl")
    value = read_results(figures).figures
    assert (value["adapter"], value["limit"], value["data"]) == (str(other), 2, [])
    cut = ", answers cut off at 2 tokens"
    assert described(value) == f"the first 2 held-out records{cut}, adapter {other}"
    own = figures_json(compare_run(tiny_run, max_tokens=2))
    assert described(own) == f"3 held-out records{cut}" and own["adapter"] is None


def test_a_model_that_cannot_be_loaded_costs_no_other(tiny_run, tiny_folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_folder, broken)
    (broken / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    result = compare_run(tiny_run, others={"bad": str(broken), "copy": str(tiny_folder)}, limit=1)
    assert list(result.figures) == ["base", "tuned", "copy"]
    [note] = (n for n in result.notes if "also trained on" not in n)
    assert note.startswith(f"bad is missing: {broken} cannot be measured: ")


def test_a_loss_that_is_no_number_is_said_and_is_null_in_json(tiny_folder, records, tmp_path):
    broken = shutil.copytree(tiny_folder, tmp_path / "broken")
    weights = mx.load(str(broken / "model.safetensors"))
    name = next(name for name in weights if "up_proj" in name)
    weights[name] = mx.full(weights[name].shape, math.nan)
    mx.save_safetensors(str(broken / "model.safetensors"), weights)
    result = compare_models(
        str(tiny_folder), data=records, max_tokens=2, others={"broken": str(broken)}
    )
    assert any("the loss of broken is no number" in note for note in result.notes)
    figures, _ = write_results(result, tmp_path)

    def refused(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    targets = json.loads(figures.read_text(), parse_constant=refused)["targets"]
    assert targets["broken"]["held_out_loss"] is None and targets["model"]["held_out_loss"] > 0
    assert read_results(figures).figures["targets"] == targets


def test_models_are_compared_on_the_records_that_all_have(tmp_path, tiny_folder):
    """A template that takes more room leaves the longest record out, the first of three."""
    wide = tmp_path / "wide"
    shutil.copytree(tiny_folder, wide)
    template = wide / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>", "<|im_start|>" + 9 * " "))
    data = write_jsonl(tmp_path / "data.jsonl", [RECORDS[1] | {"prompt": "all " * 9}, *RECORDS])
    sizes = [
        sum(len(s.tokens) for s in Renderer(tokenizer_of(ModelSection(path=str(f)))).samples(c))
        for f in (tiny_folder, wide)
        for c in read_conversations(data)
    ]
    assert max(sizes[4:]) > max(sizes) - 1 >= sizes[0] > max(sizes[5:])
    recipe = {
        "name": "short",
        "model": {"path": str(tiny_folder)},
        "data": [{"path": str(data), "truncate": "drop"}],
        "train": {"max_steps": 1, "batch_size": 1, "max_seq_length": sizes[0]},
        "eval": {"path": str(data), "max_overlap": 1.0},
    }
    fine_tune(parse_recipe(recipe, where="-"), tmp_path / "run", Silent())
    others = {"wide": str(wide)}
    result = compare_run(tmp_path / "run", others=others, max_tokens=2)
    assert result.records == 3 and [a.prompt for a in result.answers] == ["list", "all", "where"]
    assert any("1 of 4 records are left out: in the tokens of wide" in n for n in result.notes)
    # As if the record had not been there.
    rest = write_jsonl(tmp_path / "rest.jsonl", RECORDS)
    alone = compare_run(tmp_path / "run", data=rest, others=others, max_tokens=2)
    for name, figures in alone.figures.items():
        assert result.figures[name].held_out_loss == pytest.approx(figures.held_out_loss, rel=1e-5)
        assert result.figures[name].metrics == figures.metrics
    assert [a.said for a in result.answers] == [a.said for a in alone.answers]
    # A short check stays one, though it has fewer records than were asked for.
    short = compare_run(tmp_path / "run", others=others, limit=3, max_tokens=2)
    figures, _ = write_results(short, tmp_path / "out")
    assert short.records == 2 and "-first-3-" in figures.name
    assert described(figures_json(short)).startswith("2 of the first 3 held-out records")


def test_the_bash_that_was_asked_is_named_in_the_file_the_table_and_the_report(
    tiny_run, tmp_path, monkeypatch, capsys
):
    from mlxtune.cli.tables import show_comparison

    monkeypatch.setattr("mlxtune.evaluate.scores.shell_versions", lambda: {"bash": "3.2.57"})
    # Other tests evaluate the run that all share.
    shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("eval"))
    suite = Suite(name="s", metrics=("shell",))
    result = compare_run(tmp_path / "run", suite=suite, limit=1, max_tokens=2)
    assert figures_json(result)["shells"] == {"bash": "3.2.57"}
    show_comparison(result, samples=0)
    assert "bash 3.2.57" in capsys.readouterr().out
    write_results(result, tmp_path / "run/eval")
    [page] = results([read_run(tmp_path / "run")])
    assert any("bash 3.2.57" in note for note in page.notes)
    without = compare_run(tmp_path / "run", suite=Suite(name="t"), limit=1, max_tokens=2)
    assert figures_json(without)["shells"] == {}


def test_the_table_fits_60_columns(tiny_run, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    from mlxtune.cli.tables import show_comparison

    suite = Suite(name="s", metrics=("exact", "normalised", "f1", "edit", "shell"))
    show_comparison(compare_run(tiny_run, suite=suite, max_tokens=4), samples=2)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 60 and "…" not in printed.split("samples")[0]


@pytest.mark.parametrize(
    ("metrics", "shown"), [(("edit", "exact"), "exact match"), (("f1", "edit"), "token F1")]
)
def test_categories_show_exact_match_or_the_suites_first_metric(
    tiny_run, capsys, monkeypatch, metrics, shown
):
    from mlxtune.cli.tables import show_comparison

    def commands(_model, _tokenizer, prompts, **_):
        return ["ls", "ls -l x", "pwd | cat"][: len(prompts)]

    monkeypatch.setattr("mlxtune.evaluate.measure.answers", commands)
    show_comparison(compare_run(tiny_run, suite=Suite(name="s", metrics=metrics)), samples=0)
    table = capsys.readouterr().out.split(f"{shown} by category")[1]
    files, paths = re.findall(r"│ (?:files|paths) +│ +(\d) │ +(\d+)% │ +(\d+)% │", table)
    half = "70" if shown == "token F1" else "50"  # 1, and 2 shared of 2 + 3 words
    assert files == ("2", half, half) and paths == ("1", "100", "100")


def test_words_and_figures_of_four_models_stay_whole_in_60_columns(
    tiny_run, tiny_folder, monkeypatch, capsys
):
    monkeypatch.setenv("COLUMNS", "60")
    from mlxtune.cli.tables import show_comparison

    suite = Suite(name="s", metrics=("exact", "normalised", "f1", "edit", "shell"))
    others = dict.fromkeys(("fused", "gguf"), str(tiny_folder))
    result = compare_run(tiny_run, suite=suite, others=others, max_tokens=4)
    show_comparison(result, samples=1)
    figures, samples = capsys.readouterr().out.split("samples")
    assert max(map(len, f"{figures}{samples}".splitlines())) <= 60
    for label in ("edit similarity", "held-out loss", "normalised"):
        assert f"│ {label} " in figures
    assert len(re.findall(r" \d+\.\d{4} ", figures.split("┏")[1])) == 3 * 4
    # A line for each text, with what it is before it.
    told = dict(re.findall(r"│ (\S+) +│ (.*?) +│", samples))
    assert list(told) == ["prompt", "expected", "base", "tuned", "fused", "gguf"]
    assert (told["prompt"], told["expected"]) == ("list", "ls")


def test_names_that_look_like_markup_are_shown_and_nothing_is_lost(tiny_folder, tmp_path):
    record = {"prompt": "[/p]", "expected_command": "ls [/a]*", "category": "[/b]"}
    write_jsonl(tmp_path / "d.jsonl", [record, record | {"category": "[red]c"}])
    done = mlxtune(
        "eval", str(tiny_folder), "--data=d.jsonl", f"--with=[/q]={tiny_folder}",
        "--max-tokens=2", "-o", "kept", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {"[/p]", "[/b]", "[red]c", "[/q]", "[/a]*"} <= set(done.stdout.split()), done.stdout
    assert len((tmp_path / "kept/heldout-d-tokens-2-with-_q_.jsonl").read_text().splitlines()) == 2


def test_figures_are_shown_even_if_they_cannot_be_kept(tiny_folder, tmp_path):
    write_jsonl(tmp_path / "d.jsonl", RECORDS[:2])
    (tmp_path / "file").write_text("")
    options = ["--data=d.jsonl", "--max-tokens=2", "-o", "file/kept"]
    done = mlxtune("eval", str(tiny_folder), *options, cwd=tmp_path)
    assert done.returncode == 1 and "could not write" in done.stderr
    assert "held-out loss" in done.stdout


def test_figures_are_kept_even_if_nobody_reads_what_is_printed(tiny_folder, tmp_path, monkeypatch):
    from mlxtune.cli import tables
    from mlxtune.cli.evaluate import evaluate

    def gone(*_: object, **__: object) -> None:
        raise BrokenPipeError

    data = write_jsonl(tmp_path / "d.jsonl", RECORDS[:2])
    monkeypatch.setattr(tables, "show_comparison", gone)
    monkeypatch.setattr("mlxtune.cli.evaluate.prepare", lambda **_: None)
    options = ["--data", str(data), "--max-tokens", "2", "-o", str(tmp_path / "kept")]
    with pytest.raises(BrokenPipeError):
        evaluate.main([str(tiny_folder), *options], standalone_mode=False)
    assert (tmp_path / "kept/heldout-d-tokens-2.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--with=x"], "write NAME=MODEL"),
        (["--with=tuned=x"], "there is a tuned already"),
        (["--with=a=x", "--with=a=y"], "there is a a already"),
        (["--tasks=a", "--execute"], "--tasks goes with"),
        (["--tasks= ,"], "--tasks names none"),
        (["--task-path=a"], "--task-path goes with --tasks"),
    ],
)
def test_options_that_exclude_each_other(tmp_path, arguments, told):
    done = mlxtune("eval", "runs/x", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and told in done.stderr
