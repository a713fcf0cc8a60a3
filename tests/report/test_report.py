"""The report of real runs, as a browser shows it and as files."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from mlxtune.bench.machine import mac
from mlxtune.bench.plan import Planner
from mlxtune.errors import OutputExists, RunError
from mlxtune.evaluate.compare import compare_run
from mlxtune.evaluate.results import write_results
from mlxtune.objectives import DPO
from mlxtune.recipe.load import parse_recipe
from mlxtune.recipe.objectives import MEANINGS
from mlxtune.report.charts import charts, smoothed
from mlxtune.report.collect import collect, read_run
from mlxtune.report.page import page
from mlxtune.report.results import results
from mlxtune.report.summary import clock, gigabytes, summarize
from mlxtune.report.svg import MOST_POINTS, draw
from mlxtune.report.write import write_report
from mlxtune.train.metrics import Silent
from mlxtune.train.run import Run
from mlxtune.train.session import fine_tune
from support.files import SHELL_HELDOUT, SHELL_TRAIN, listing, write_jsonl
from support.program import mlxtune

SUITE = "heldout-tokens-8"
FULL = {"mean": 0.999, "low": 0.888, "high": 1.0, "count": 3}
PLANNED = ("peak_memory_bytes", "seconds_per_step", "steps")  # as `mlxtune lora` keeps it
FIGURES = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_bytes")


@pytest.fixture(scope="module")
def runs(tiny_folder, tmp_path_factory) -> tuple[Path, Path]:
    """Two real runs of one name, unlike in rate and length, the first one evaluated."""
    folder = tmp_path_factory.mktemp("runs")
    lines = [json.loads(line) for line in SHELL_TRAIN.read_text().splitlines()[::21]]
    held_out = [json.loads(line) for line in SHELL_HELDOUT.read_text().splitlines()[::28]]
    # What a model is asked and answers may look like HTML.
    held_out[0]["prompt"] = "<script>alert(1)</script> & <b>bold</b>"
    few = write_jsonl(folder / "few.jsonl", lines)
    out = write_jsonl(folder / "out.jsonl", held_out)
    for name, rate, steps in (("a", 1e-2, 12), ("b", 1e-3, 8)):
        values = {
            "name": "tiny",
            "model": {"path": str(tiny_folder)},
            "lora": {"rank": 4},
            "data": [{"path": str(few)}],
            "eval": {"path": str(out), "steps": 4},
            "train": {"batch_size": 4, "max_steps": steps, "learning_rate": rate},
            "log": {"steps": 1},
        }
        recipe = parse_recipe(values, where="test")
        run = fine_tune(recipe, folder / name, Silent())
        # For a Mac: to measure the machine at hand takes seconds.
        plan = Planner(recipe, mac("M2 Pro", 16)).estimate(recipe).as_json()
        run.write_status(plan={key: plan[key] for key in PLANNED})
    write_results(compare_run(folder / "a", max_tokens=8), folder / "a/eval")
    return folder / "a", folder / "b"


def entries(run: Path, key: str) -> list[dict]:
    return [entry for entry in Run(run).metrics() if key in entry]


class Dom(HTMLParser):
    """Elements with their attributes, and the text of each."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def curves(self) -> dict[tuple[int, str], tuple[list[int], list[float]]]:
        return {
            (int(a["data-run"]), a["data-key"]): (
                [int(v) for v in a["data-steps"].split()],
                [float(v) for v in a["data-values"].split()],
            )
            for _, a in self.elements
            if "data-steps" in a
        }


def same_as_metrics(dom: Dom, paths: list[Path]) -> None:
    shown = dom.curves()
    for number, path in enumerate(paths):
        for key in FIGURES:
            reports = entries(path, "loss")
            want = [e["step"] for e in reports], [e[key] for e in reports]
            assert shown[number, key] == want
        held_out = entries(path, "held_out_loss")
        want = [e["step"] for e in held_out], [e["held_out_loss"] for e in held_out]
        assert shown[number, "held_out_loss"] == want
    assert len(shown) == len(paths) * (len(FIGURES) + 1)


def test_the_browser_holds_the_values_of_metrics_jsonl(runs, browser, tmp_path):
    for paths in ([runs[0]], list(runs)):
        [written] = write_report(collect(paths), tmp_path / f"{len(paths)}.html")
        dom = Dom(browser("--dump-dom", written.as_uri()).stdout)
        same_as_metrics(dom, paths)


def pixels(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return imread(path)[..., :3]


@pytest.mark.slow
def test_the_page_is_light_or_dark_as_the_reader_has_it(runs, browser, tmp_path):
    [written] = write_report(collect(runs), tmp_path / "page.html")
    shots = {}
    for mode in ("light", "dark"):
        path = tmp_path / f"{mode}.png"
        dark = ["--force-dark-mode"] if mode == "dark" else []
        browser(f"--screenshot={path}", "--window-size=1280,1400", *dark, written.as_uri())
        shots[mode] = pixels(path)
    light, dark = shots["light"], shots["dark"]
    assert light[-1, 0].min() > 0.9 and dark[-1, 0].max() < 0.1
    for shot in (light, dark):
        # Not blank: text, cards and both runs' colours are there.
        assert shot.reshape(-1, 3).std() > 0.02
        levels = (shot * 255).astype(np.uint32)
        assert len(np.unique(levels @ np.array([1 << 16, 1 << 8, 1], np.uint32))) > 200
    blue, orange = np.array([0x25, 0x63, 0xEB]) / 255, np.array([0xD9, 0x73, 0x0D]) / 255
    for colour in (blue, orange):
        assert (np.abs(light - colour).max(axis=-1) < 0.02).sum() > 100


def test_the_page_fits_a_phone_and_tells_what_is_under_the_finger(runs, browser, tmp_path):
    # Chromium makes no window as narrow as a phone; a frame is.
    probe = """
    <iframe width="390" height="800" srcdoc="PAGE"></iframe><script>
    onload = () => {
      const inside = document.querySelector("iframe").contentDocument;
      const root = inside.documentElement, plot = inside.querySelector("#loss .plot");
      const said = [root.clientWidth, root.scrollWidth];
      plot.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
      document.body.dataset.said = said.join(" ");
      document.body.dataset.tip = plot.querySelector(".tip").textContent;
      document.body.dataset.crosses = inside.querySelectorAll(".cross").length;
    }</script>"""
    text = page(collect(runs))
    (tmp_path / "probe.html").write_text(probe.replace("PAGE", html.escape(text)))
    dom = browser("--dump-dom", (tmp_path / "probe.html").as_uri()).stdout
    width, scrolled = map(int, re.search(r'data-said="(\d+) (\d+)"', dom).groups())
    assert width <= 390 and scrolled == width
    [tip] = re.findall(r'data-tip="([^"]*)"', dom)
    last = entries(runs[0], "loss")[-1]
    assert f"step {last['step']}" in tip
    assert f"{last['loss']:.4f}".rstrip("0")[:5] in tip
    assert re.search(r'data-crosses="(\d+)"', dom).group(1) == "5"


def test_figures_of_an_evaluation_are_read_on_a_phone_without_scrolling(runs, browser, tmp_path):
    probe = """
    <iframe width="390" height="800" srcdoc="PAGE"></iframe><script>
    onload = () => {
      const inside = document.querySelector("iframe").contentDocument;
      document.body.dataset.wide = [...inside.querySelectorAll(".table:not(:has(code))")].map(
        (table) => table.scrollWidth - table.clientWidth);
    }</script>"""
    figures = runs[0] / f"eval/{SUITE}.json"
    before = figures.read_text()
    stored = json.loads(before)
    for number, target in enumerate(stored["targets"].values()):
        # As wide as they get.
        target["metrics"] = dict.fromkeys(target["metrics"], FULL)
        target["gains"] = dict.fromkeys(target["metrics"], FULL) if number else {}
    figures.write_text(json.dumps(stored))
    text = page(collect(runs[:1]))
    figures.write_text(before)
    (tmp_path / "probe.html").write_text(probe.replace("PAGE", html.escape(text)))
    dom = browser("--dump-dom", (tmp_path / "probe.html").as_uri()).stdout
    wide = re.search(r'data-wide="([^"]*)"', dom).group(1).split(",")
    assert len(wide) == 2 and all(table == "0" for table in wide), wide


@pytest.mark.slow
def test_figures_of_several_runs_are_read_on_a_desktop_without_scrolling(runs, browser, tmp_path):
    paths = [copied(runs[0], tmp_path / name) for name in ("one", "another")]
    for path in paths:
        figures = path / f"eval/{SUITE}.json"
        stored = json.loads(figures.read_text())
        tuned = stored["targets"]["tuned"]
        tuned["metrics"] = dict.fromkeys([*tuned["metrics"], "bash", "programs"], FULL)
        tuned["gains"] = dict.fromkeys(tuned["metrics"], FULL)
        means = dict.fromkeys(stored["targets"], 0.5)
        # Which stand beside the figures.
        stored["categories"]["exact"] = {key: {"records": 3, **means} for key in "ab"}
        figures.write_text(json.dumps(stored))
    probe = """<script>onload = () => { document.body.dataset.wide =
      [...document.querySelectorAll(".table:not(:has(code))")].map(
        (table) => table.scrollWidth - table.clientWidth)}</script>"""
    text = re.sub(r"<meta http-equiv[^>]*>", "", page(collect(paths)))
    (tmp_path / "probe.html").write_text(text + probe)
    window = "--window-size=1280,900"
    dom = browser("--dump-dom", window, (tmp_path / "probe.html").as_uri()).stdout
    wide = re.search(r'data-wide="([^"]*)"', dom).group(1).split(",")
    assert len(wide) == 4 and all(table == "0" for table in wide), wide


def test_an_answer_of_nothing_is_said_to_be_one(runs, tmp_path):
    run = copied(runs[0], tmp_path / "run")
    path = run / f"eval/{SUITE}.jsonl"
    answers = [json.loads(line) for line in path.open()]
    for answer in answers:
        answer["said"]["tuned"] = ""
    write_jsonl(path, answers)
    assert page([read_run(run)]).count('<i class="empty">nothing</i>') >= len(answers)


def test_sizes_are_read_without_counting_zeros():
    sizes = (None, 4_420_000, 63_290_000, 999_400_000, 1_000_000_000, 24_600_000_000)
    told = ["–", "4.4 MB", "63 MB", "999 MB", "1.00 GB", "24.60 GB"]
    assert [gigabytes(size) for size in sizes] == told


def test_a_page_refers_to_nothing_outside_and_runs_no_script_but_its_own(runs):
    text = page(collect(runs))
    assert text == page(collect(runs))
    dom = Dom(text)
    ids = {attributes.get("id") for _, attributes in dom.elements}
    for tag, attributes in dom.elements:
        assert tag not in ("iframe", "object", "embed", "img", "base", "form")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "srcset", "action", "data"):
                # Its own sections are all that it leads to.
                assert value == "data:," or (tag == "a" and value.removeprefix("#") in ids)
    assert "http" not in re.sub(r"http-equiv", "", re.search(r"<style>.*</style>", text, re.S)[0])
    assert len(re.findall(r"<script", text)) == 1
    script = re.search(r"<script>(.*?)</script>", text, re.S)[1]
    hashed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{hashed}'" in text
    # The record that looks like HTML is shown as it is.
    assert "<script>alert(1)</script> & <b>bold</b>" in dom.text


def test_a_page_tells_plan_lengths_evaluation_recipe_and_environment(runs):
    run = read_run(runs[0])
    text = page([run])
    dom = Dom(text)
    figures = json.loads((runs[0] / f"eval/{SUITE}.json").read_text())
    for target in ("base", "tuned"):
        assert f"{figures['targets'][target]['held_out_loss']:.4f}" in dom.text
    edit = figures["targets"]["tuned"]["metrics"]["edit"]
    assert f"{edit['mean']:.1%}" in dom.text
    answers = [json.loads(line) for line in (runs[0] / f"eval/{SUITE}.jsonl").open()]
    for answer in answers[:: max(1, len(answers) // 8)][:8]:
        assert answer["prompt"] in dom.text and answer["expected"] in dom.text
        assert answer["said"]["tuned"] in dom.text and answer["said"]["base"] in dom.text
    assert (runs[0] / "recipe.toml").read_text() in dom.text
    status = Run(runs[0]).status()
    for value in (status["device"], status["versions"]["mlx"], *status["hashes"].values()):
        assert value in dom.text
    plan = status["plan"]
    assert plan["peak_memory_bytes"] > 1e6 and plan["seconds_per_step"] > 0
    assert f"planned {gigabytes(plan['peak_memory_bytes'])}" in dom.text
    rows = dom.text.split("Planned and measured")[1].split("Evaluation")[0]
    last = entries(runs[0], "loss")[-1]
    for seconds in (plan["seconds_per_step"], last["seconds"] / last["step"]):
        assert clock(seconds) in rows
    for memory in (plan["peak_memory_bytes"], last["peak_memory_bytes"]):
        assert gigabytes(memory) in rows
    counts = next(a["data-counts"] for _, a in dom.elements if "data-counts" in a)
    assert [int(n) for n in counts.split()] == status["lengths"]["counts"]
    assert not run.gaps and 'id="gaps"' not in text


def test_samples_are_matched_by_all_that_was_asked(runs, tmp_path):
    """Two records alike in question and answer, unlike in system prompt, over two runs."""

    def answer(record: int, system: str, said: str) -> dict[str, object]:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": "q"}]
        kept = {"record": record, "prompt": "q", "messages": messages, "tools": [], "expected": "e"}
        return kept | {"category": "", "said": {"base": "-", "tuned": said}, "scores": {}}

    paths = [copied(runs[0], tmp_path / name) for name in "ab"]
    answers = [answer(1, "one", "first"), answer(2, "two", "second")]
    write_jsonl(paths[0] / f"eval/{SUITE}.jsonl", answers)
    # The other was asked the second, and another first one.
    others = [answer(1, "other", "third"), answer(2, "two", "fourth")]
    write_jsonl(paths[1] / f"eval/{SUITE}.jsonl", others)
    [result] = results(collect(paths))
    assert [column.target for column in result.columns] == ["base", "tuned", "tuned"]
    said = [[answer and answer.text for answer in sample.answers] for sample in result.samples]
    assert said == [["-", "first", None], ["-", "second", "fourth"]]
    assert [sample.conversation[0] for sample in result.samples] == [
        ("system", "one"), ("system", "two"),
    ]  # fmt: skip
    assert "conversation of 2 turns" in Dom(page(collect(paths))).text


def test_a_run_keeps_how_long_its_samples_are(runs, tiny_folder):
    from mlxtune.data.render import Renderer
    from mlxtune.train.corpus import read_corpus
    from mlxtune.train.model import tokenizer_of

    recipe = Run(runs[0]).recipe()
    [part] = read_corpus(recipe, Renderer(tokenizer_of(recipe.model))).parts
    lengths = read_run(runs[0]).lengths
    counts, _ = np.histogram([len(s.tokens) for s in part.samples], lengths.edges)
    assert lengths.counts == tuple(counts)
    assert sum(lengths.counts) == len(part.samples)


def test_several_runs_are_told_apart_and_compared(runs):
    records = collect([*runs, runs[0]])
    assert [record.name for record in records] == ["tiny (a)", "tiny (b)"]
    dom = Dom(page(records))
    assert "What differs" in dom.text
    differing = dom.text.split("What differs")[2].split("Training")[0]  # first in the contents
    assert "train.learning_rate" in differing and "train.max_steps" in differing
    assert "lora.rank" not in differing


def test_the_summary_is_that_of_the_metrics(runs):
    for path in runs:
        short, last = summarize(read_run(path)), entries(path, "loss")[-1]
        held_out = [e["held_out_loss"] for e in entries(path, "held_out_loss")]
        assert (short.steps, short.loss) == (last["step"], last["loss"])
        assert (short.held_out_loss, short.best_held_out_loss) == (held_out[-1], min(held_out))
        assert short.first_held_out_loss == held_out[0]
        assert short.tokens_per_second == pytest.approx(last["tokens"] / last["seconds"])


def copied(run: Path, to: Path) -> Path:
    shutil.copytree(run, to, ignore=shutil.ignore_patterns("checkpoints", "adapter*"))
    return to


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda r: (r / "metrics.jsonl").unlink(), "metrics.jsonl is missing: there are no curves"),
        (lambda r: (r / "metrics.jsonl").write_text(""), "metrics.jsonl reports nothing yet"),
        (lambda r: (r / "metrics.jsonl").open("a").write('{"step": 13, "lo'), "line 17 cannot be"),
        (lambda r: (r / "metrics.jsonl").open("ab").write(b'\xff\xfe\n[1]\n{"step": "x"}\n'),
         "lines 17, 18, 19 cannot be read and are left out"),
        (lambda r: shutil.rmtree(r / "eval"), "no evaluation: mlxtune eval"),
        (lambda r: (r / f"eval/{SUITE}.json").write_text("{"), "the evaluation cannot be read"),
        (lambda r: (r / f"eval/{SUITE}.json").write_text('{"targets": {"base": {}}}'),
         "this is no evaluation"),
        (lambda r: (r / f"eval/{SUITE}.json").write_text(
            '{"targets": {"base": {"held_out_loss": "x", "metrics": {}}}}'),
         "this is no evaluation"),
        (lambda r: (r / f"eval/{SUITE}.jsonl").unlink(), f"{SUITE}.jsonl is missing"),
        (lambda r: (r / f"eval/{SUITE}.jsonl").write_text('{"prompt": "x"'), "line 1 of heldout"),
        (lambda r: (r / "recipe.toml").unlink(), "recipe.toml is missing"),
        (lambda r: (r / "recipe.toml").write_text("name = "), "recipe.toml cannot be read"),
    ],
    ids=["no metrics", "empty metrics", "cut off", "garbage", "no evaluation", "cut figures",
         "other figures", "text for a figure", "no answers", "cut answers", "no recipe",
         "cut recipe"],
)  # fmt: skip
def test_what_is_missing_is_said_and_the_rest_is_shown(runs, tmp_path, spoil, said):
    run = copied(runs[0], tmp_path / "run")
    spoil(run)
    record = read_run(run)
    assert any(said in gap for gap in record.gaps), record.gaps
    for records in ([record], [record, read_run(runs[1])]):
        dom = Dom(page(records))
        assert html.unescape(said) in dom.text
        assert Run(run).status()["device"] in dom.text
    if "cut off" in said or "garbage" in said:
        same_as_metrics(Dom(page([record])), [runs[0]])


@pytest.mark.slow
def test_a_picture_never_takes_the_place_of_its_page(runs, tmp_path):
    run = copied(runs[0], tmp_path / "run")
    for arguments in (["-o", "x", "--png", "./x"], ["--png", "run/report.html"]):
        done = mlxtune("report", "run", *arguments, "--overwrite", cwd=tmp_path)
        assert done.returncode == 2 and "is the page's own file" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert not (run / "report.html").exists()


def test_a_damaged_run_among_several_costs_only_itself(runs, tmp_path):
    copied(runs[0], tmp_path / "good")
    for name, text in (("cut", '{"status": "fin'), ("other", "[]")):
        (copied(runs[1], tmp_path / name) / "run.json").write_text(text)
    done = mlxtune("report", "cut", "good", "other", "nope", "--json", cwd=tmp_path)
    assert done.returncode == 0
    printed = json.loads(done.stdout)
    assert [run["path"] for run in printed["runs"]] == ["good"]
    assert list(printed["missing"]) == ["cut", "other", "nope"]
    assert "note: other is left out: the run's status is damaged" in done.stderr
    # Several were asked for: the page is not that of the one which is left.
    assert printed["files"] == ["report.html"] and not (tmp_path / "good/report.html").exists()
    text = Dom((tmp_path / "report.html").read_text()).text
    assert "cut: left out: the run's status cannot be read" in text
    assert "nope: left out: there is no such run" in text
    same_as_metrics(Dom((tmp_path / "report.html").read_text()), [runs[0]])
    done = mlxtune("report", "cut", "other", cwd=tmp_path)
    assert done.returncode == 1 and "the run's status cannot be read" in done.stderr


def test_a_run_whose_process_died_is_shown_as_interrupted(runs, tmp_path):
    run = copied(runs[0], tmp_path / "run")
    Run(run).write_status(status="running")
    with Run(run).held():
        assert read_run(run).status == "running" and not read_run(run).gaps
    record = read_run(run)
    assert record.status == summarize(record).status == "interrupted"
    assert '<span class="badge interrupted">interrupted</span>' in page([record])
    # A report changes no run.
    assert json.loads((run / "run.json").read_text())["status"] == "running"


def test_the_first_figure_is_of_a_whole_evaluation(runs, tmp_path):
    run = copied(runs[0], tmp_path / "run")
    stored = json.loads((run / f"eval/{SUITE}.json").read_text())
    kinds = {
        "a-first-3": ({"limit": 3, "max_tokens": None}, 0.111),
        "b-of-other-data": ({"own": False, "max_tokens": None, "data": ["x/b.jsonl"]}, 0.222),
        "c": ({"max_tokens": None}, 0.333),
    }
    for name, (changes, mean) in kinds.items():
        stored["targets"]["tuned"]["metrics"]["exact"] = FULL | {"mean": mean}
        (run / f"eval/{name}.json").write_text(json.dumps(stored | changes))
        shutil.copy(run / f"eval/{SUITE}.jsonl", run / f"eval/{name}.jsonl")

    def tile():
        text = re.sub(r"<[^>]+>", " ", page([read_run(run)]).split('class="tiles"')[1])
        return " ".join(text.split("exact match")[1].split()[:12])

    assert [result.suite for result in results([read_run(run)])] == [*list(kinds)[::-1][:2],
        "a-first-3", SUITE]  # fmt: skip
    # Samples of all but the first are folded up.
    assert page([read_run(run)]).count("<details><summary>Sample answers</summary>") == len(kinds)
    for name in ("c", "b-of-other-data"):
        assert (
            tile().startswith(f"{kinds[name][1]:.1%} 0.0% before training; 3 records")
            and "first" not in tile()
        )
        (run / f"eval/{name}.json").unlink()
    assert tile().startswith("11.1% 0.0% before training") and "3 held-out records" in tile()


def test_what_the_judge_did_and_cost_is_on_the_page(runs, tmp_path):
    run = copied(runs[0], tmp_path / "run")
    path = run / f"eval/{SUITE}.json"
    judge = {"model": "qwen3:8b", "answers": 6, "graded": 5, "from_cache": 1, "requests": 5,
             "prompt_tokens": 700, "completion_tokens": 70, "cost": 0.0123}  # fmt: skip
    said = "judge qwen3:8b: 5 of 6 answers graded, 1 from the cache, 700 + 70 tokens, cost 0.0123"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"judge": judge}))
    assert said in Dom(page([read_run(run)])).text
    assert f"tiny (run): {said}" in Dom(page(collect([run, runs[1]]))).text
    path.write_text(json.dumps(json.loads(path.read_text()) | {"judge": {"cost": "x"}}))
    assert "judge ?: ? of ? answers graded" in Dom(page([read_run(run)])).text


def test_figures_of_other_types_are_left_out(runs, tmp_path):
    run = copied(runs[0], tmp_path / "run")
    lines = ['{"step": 20, "loss": NaN}', '{"step": 21, "loss": "x", "grad_norm": 1}',
             '{"step": 22, "loss": 1.5, "grad_norm": Infinity, "learning_rate": null}']  # fmt: skip
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write("\n".join(lines) + "\n")
    (run / "run.json").write_text(json.dumps({"status": "finished", "plan": 3, "lengths": [1]}))
    shown = Dom(page([read_run(run)])).curves()
    assert (shown[0, "loss"][0][-1], shown[0, "loss"][1][-1]) == (22, 1.5)
    assert shown[0, "grad_norm"][0][-1] == 12


def test_a_long_run_is_thinned_but_keeps_its_extremes(runs, tmp_path):
    run = copied(runs[0], tmp_path / "run")
    values = np.random.default_rng(0).normal(3, 0.3, 20_000)
    values[7_777], values[12_345] = 9.0, 0.5
    lines = (json.dumps({"step": i + 1, "loss": v}) for i, v in enumerate(values.tolist()))
    (run / "metrics.jsonl").write_text("\n".join(lines))
    text = page([read_run(run)])
    steps, shown = Dom(text).curves()[0, "loss"]
    assert len(steps) <= MOST_POINTS and (steps[0], steps[-1]) == (1, 20_000)
    assert all(values[step - 1] == value for step, value in zip(steps, shown, strict=True))
    assert {9.0, 0.5} <= set(shown)
    assert "of 20,000 reports" in text and len(text) < 300_000


def test_smoothing_has_no_bias_to_the_first_value():
    assert smoothed([2.0] * 100) == pytest.approx([2.0] * 100)
    values = np.random.default_rng(0).normal(3, 1, 5_000).tolist()
    assert np.std(smoothed(values)) < 0.1
    assert smoothed(values)[-1] == pytest.approx(3, abs=0.2)


def test_smoothing_stays_with_values_that_fall():
    values = [3 / (1 + step / 50) for step in range(20_000)]
    assert np.abs(np.array(smoothed(values)) - values).max() < 0.1


@pytest.mark.slow
def test_runs_of_unlike_lengths_are_laid_over_each_other_by_ratios_of_steps(
    runs, browser, tmp_path
):
    long = copied(runs[0], tmp_path / "long")
    lines = (json.dumps({"step": s, "loss": 3 / s}) for s in range(20_000, 0, -1))
    (long / "metrics.jsonl").write_text("\n".join(lines))
    several = collect([runs[0], long])
    [loss, *_] = [draw(chart) for chart in charts(several)]
    assert loss.logarithmic_steps and [tick.label for tick in loss.x_ticks][-1] == "10,000"
    ends = [float(re.findall(r"[ML]([\d.]+)", trace.line)[-1]) for trace in loss.traces]
    # A linear axis would leave twelve steps of 20,000 less than one part in a thousand.
    assert ends[0] > 200 and ends[1] == 1000
    assert len(loss.traces[1].curve.steps) <= MOST_POINTS
    [written] = write_report(several, tmp_path / "page.html", png=tmp_path / "x.png")[:1]
    at_the_middle = """<script>onload = () => {
      const plot = document.querySelector("#loss .plot"), edges = plot.getBoundingClientRect();
      const clientX = edges.left + edges.width / 2;
      plot.dispatchEvent(new PointerEvent("pointermove", { clientX }));
      document.body.dataset.tip = plot.querySelector(".tip b").textContent;
      document.body.dataset.cross = plot.querySelector(".cross").style.left;
    }</script>"""
    text = re.sub(r"<meta http-equiv[^>]*>", "", written.read_text()) + at_the_middle
    (tmp_path / "probe.html").write_text(text)
    dom = browser("--dump-dom", (tmp_path / "probe.html").as_uri()).stdout
    step = int(re.search(r'data-tip="step (\d+)"', dom).group(1))
    assert step == pytest.approx(np.expm1(np.log1p(20_000) / 2), rel=0.05)
    assert float(re.search(r'data-cross="([\d.]+)%', dom).group(1)) == pytest.approx(50, abs=0.5)


def test_the_curves_as_a_picture(runs, tmp_path):
    picture = tmp_path / "curves.png"
    written = write_report(collect(runs), tmp_path / "page.html", png=picture)
    assert written == [tmp_path / "page.html", picture]
    assert pixels(picture).shape[1] == 1800
    assert pixels(picture).std() > 0.05


def test_a_folder_whose_name_looks_like_a_formula_has_a_picture(runs, tmp_path):
    formula = copied(runs[0], tmp_path / r"$\foo$/run")
    write_report(collect([runs[0], formula]), tmp_path / "p.html", png=tmp_path / "p.png")


def test_a_picture_without_matplotlib_or_without_figures(runs, tmp_path, monkeypatch):
    (copied(runs[0], tmp_path / "run") / "metrics.jsonl").unlink()
    with pytest.raises(RunError, match="no figures to draw"):
        write_report(collect([tmp_path / "run"]), png=tmp_path / "x.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(Exception, match=r"pip install .*\[report\]"):
        write_report(collect([runs[0]]), png=tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists() and not (tmp_path / "run/report.html").exists()


def test_a_report_replaces_only_its_own_page(runs, tmp_path):
    run = copied(runs[0], tmp_path / "run")
    records = collect([run])
    assert write_report(records) == write_report(records) == [run / "report.html"]
    mine = tmp_path / "mine.html"
    mine.write_text("mine")
    for arguments in ({"output": mine}, {"png": mine}, {"output": tmp_path}):
        with pytest.raises(OutputExists):
            write_report(records, **arguments)
    assert mine.read_text() == "mine"
    write_report(records, mine, overwrite=True)
    assert mine.read_text() == (run / "report.html").read_text()


def test_the_verb_writes_prints_and_needs_no_mlx(runs, tmp_path):
    run = copied(runs[0], tmp_path / "run")
    done = mlxtune("report", "run", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "run/report.html\n", "")
    done = mlxtune("report", "run", str(runs[1]), "--json", cwd=tmp_path)
    printed = json.loads(done.stdout)
    assert printed["files"] == ["report.html"] and (tmp_path / "report.html").is_file()
    assert [r["steps"] for r in printed["runs"]] == [12, 8]
    assert printed["runs"][0]["held_out_loss"] == summarize(read_run(run)).held_out_loss
    code = "import sys, mlxtune.report.write, mlxtune.report.png; print('mlx' in sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert loaded.stdout == "False\n", loaded.stderr


def test_a_folder_that_is_no_run(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/run.json").write_text('{"status": "fin')
    before = listing(tmp_path)
    for name, said in (
        ("empty", "there is no run in this folder"),
        ("nope", "there is no such run"),
        ("damaged", "the run's status cannot be read"),
    ):
        done = mlxtune("report", name, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"error: {name}") and said in done.stderr
    assert listing(tmp_path) == before


def test_figures_of_an_objective_have_charts_that_say_what_they_are(recipe, pairs, tmp_path):
    settings = recipe(
        pairs, objective="dpo", train={"max_steps": 2}, eval={"val_size": 4, "steps": 1}
    )
    run = fine_tune(settings, tmp_path / "run", Silent())
    found = {chart.key: chart for chart in charts([read_run(run.path)])}
    entries = list(run.metrics())
    for key in ("rewards/chosen", "rewards/margins", "rewards/accuracies", "logps/rejected"):
        training, held_out = found[key].curves
        assert list(training.values) == [e[key] for e in entries if key in e]
        own = f"held_out_{key}"
        assert list(held_out.values) == [e[own] for e in entries if own in e] and held_out.measured
    assert found["rewards/margins"].title == "Rewards: margins"
    assert "It is common that this falls" in found["rewards/chosen"].meaning
    assert "mean over pairs" in found["loss"].meaning and "per token" not in found["loss"].unit
    assert {key for key in found if "/" in key} == set(DPO.figures)
    assert MEANINGS["dpo"].keys() == {"loss", *DPO.figures}
