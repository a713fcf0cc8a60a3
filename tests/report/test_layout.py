"""The report as it is seen: widths in a browser, what stands first, and what is named."""

from __future__ import annotations

import html
import json
import re
import shutil
from pathlib import Path

import pytest

from mlxtune.evaluate.compare import compare_run
from mlxtune.evaluate.results import share, write_results
from mlxtune.recipe.load import load_recipe
from mlxtune.report.collect import collect, read_run
from mlxtune.report.page import page
from mlxtune.report.summary import time_text
from mlxtune.train.run import Run
from support.files import ROOT

FULL = {"mean": 0.999, "low": 0.888, "high": 1.0, "count": 8}
SUITE = "heldout-tokens-4"


@pytest.fixture(scope="module")
def evaluated(tiny_run, worse_run, tmp_path_factory) -> tuple[Path, Path]:
    """A run that got better and one that got worse, both evaluated."""
    folder = tmp_path_factory.mktemp("runs")
    copies = []
    for name, run in (("better", tiny_run), ("worse", worse_run)):
        copy = shutil.copytree(run, folder / name)
        write_results(compare_run(copy, max_tokens=4), copy / "eval")
        copies.append(copy)
    return copies[0], copies[1]


def changed(run: Path, to: Path, change) -> Path:
    """A copy of a run, with the figures of its evaluation changed."""
    copy = shutil.copytree(run, to)
    path = copy / f"eval/{SUITE}.json"
    stored = json.loads(path.read_text())
    change(stored)
    path.write_text(json.dumps(stored))
    return copy


def as_wide_as_they_get(stored) -> None:
    names = ["exact", "normalised", "f1", "edit", "bash", "dash", "programs", "flags", "shell"]
    for number, target in enumerate(stored["targets"].values()):
        target["metrics"] = dict.fromkeys(names, FULL)
        target["gains"] = dict.fromkeys(names, FULL) if number else {}
    means = dict.fromkeys(stored["targets"], 1.0)
    stored["categories"]["exact"] = {key: {"records": 84, **means} for key in ("archives", "text")}


PROBE = """
<iframe width="WIDTH" height="900" srcdoc="PAGE"></iframe><script>
onload = () => {
  const inside = document.querySelector("iframe").contentDocument, root = inside.documentElement;
  const lines = (cell) => {
    const range = inside.createRange();
    range.selectNodeContents(cell);
    return new Set([...range.getClientRects()].map((edge) => Math.round(edge.top))).size;
  };
  document.body.dataset.said = JSON.stringify({
    page: root.scrollWidth - root.clientWidth,
    tables: [...inside.querySelectorAll(".table")].map((card) => {
      const edge = card.getBoundingClientRect();
      const cells = [...card.querySelectorAll("th, td, .note")];
      const ends = cells.map((cell) => cell.getBoundingClientRect().right);
      return Math.round(Math.max(...ends) - edge.right);
    }),
    facts: [...inside.querySelectorAll("#environment th[scope=row]")].map((cell) => [
      cell.textContent, lines(cell), Math.round(cell.getBoundingClientRect().width)]),
    cards: [...inside.querySelectorAll("main .card")].map((card) =>
      Math.round(card.getBoundingClientRect().width)),
  });
}</script>"""


def seen(browser, text: str, width: int, folder: Path) -> dict:
    """What a browser measures on a page of that width: a frame may be narrower than a window."""
    probe = PROBE.replace("WIDTH", str(width)).replace("PAGE", html.escape(text))
    (folder / "probe.html").write_text(probe)
    dom = browser("--dump-dom", "--window-size=1400,1000", (folder / "probe.html").as_uri()).stdout
    return json.loads(html.unescape(re.search(r'data-said="([^"]*)"', dom).group(1)))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("width", [1280, 800, 400])
def test_tables_stay_in_their_cards_and_words_stay_whole(
    evaluated,
    browser,
    tmp_path,
    width,
    count,
):
    runs = [changed(run, tmp_path / run.name, as_wide_as_they_get) for run in evaluated]
    found = seen(browser, page(collect(runs[:count])), width, tmp_path)
    assert found["page"] == 0
    assert max(found["tables"]) <= 0, found["tables"]
    facts = {name: (lines, wide) for name, lines, wide in found["facts"]}
    for name in ("status", "device", "started", "seed of all that is random", "version of mlx"):
        lines, wide = facts[name]
        assert lines <= 1 + len(name) // 12 and wide >= 90, (name, lines, wide)
    assert min(found["cards"]) > 120


def test_a_run_that_got_worse_is_called_that_before_all_else(evaluated):
    record = read_run(evaluated[1])
    first, *_, last = (entry["held_out_loss"] for entry in record.held_out)
    assert last > first + 0.5
    text = page([record])
    warning = f"held-out loss is worse than before training: {first:.4f} before, {last:.4f} after"
    main = text.split("<main>")[1]
    assert main.lstrip().startswith('<p class="banner bad"><strong>The ' + warning)
    tile = re.search(r'<div class="card tile bad">.*?</div>', text)[0]
    assert f"held-out loss after step 6</span><strong>{last:.4f}</strong>" in tile
    assert f"{first:.4f} before training" in tile
    # Nor does a table of several runs show the best value as if it were that of the adapter.
    table = page(collect(evaluated)).split('id="runs"')[1].split("</table>")[0]
    assert f'<td data-label="held-out loss after" class="num bad">{last:.4f}</td>' in table
    evaluation = text.split('<section id="evaluation-')[1]
    told = re.search(r'<p class="words bad">(.*?)</p>', evaluation)[1]
    assert "held-out loss is worse than before training" in told
    assert f"{evaluated[1].name}/adapter (after step 6)." in html.unescape(evaluation)


def test_a_better_run_has_no_warning(evaluated):
    text = page([read_run(evaluated[0])])
    assert "banner" not in text.split("<main>")[1] and 'class="words bad"' not in text


def test_where_no_answer_is_exact_the_loss_comes_first(evaluated):
    record = read_run(evaluated[0])
    targets = record.evaluations[SUITE].figures["targets"]
    assert targets["tuned"]["metrics"]["exact"]["mean"] == 0
    before, after = (targets[name]["held_out_loss"] for name in ("base", "tuned"))
    assert after < before
    words = re.findall(r'<p class="words">(.*?)</p>', page([record]))
    assert words == [
        f"base → tuned: held-out loss {before:.4f} → {after:.4f}; exact match 0.0% with both"
    ]


def test_no_share_is_minus_zero(evaluated, tmp_path):
    assert [share(v, signed=True) for v in (-4e-4, 4e-4, -6e-4)] == ["0.0%", "0.0%", "-0.1%"]
    assert share(-0.004, digits=0, signed=True) == "0%" and share(0.125, signed=True) == "+12.5%"

    def nearly_none(stored) -> None:
        for target in stored["targets"].values():
            target["gains"] = {"exact": {"mean": -1e-4, "low": -2e-4, "high": 1e-4, "count": 8}}

    run = changed(evaluated[0], tmp_path / "run", nearly_none)
    last = read_run(run).last
    assert last is not None
    plan = {"peak_memory_bytes": last["peak_memory_bytes"] * 1.001, "seconds_per_step": 1.0}
    Run(run).write_status(plan=plan)
    for records in (collect([run]), collect([run, evaluated[1]])):
        text = page(records)
        words = re.sub(r"<[^>]+>", " ", body(text))
        # A word before it makes it part of a name, such as that of a folder.
        assert not re.search(r"(?<!\w)[-−+]0(\.0+)?(%| |\b(?!\.))(?!\d)", words)
        assert '<td class="num">0%</td>' in text


def body(text: str) -> str:
    """What is read of a page, but for the recipe and the paths of the curves."""
    return re.sub(
        r"<pre.*?</pre>|<svg.*?</svg>|<code>.*?</code>", "", text.split("<main>")[1], flags=re.S
    )


def test_a_page_says_when_and_by_which_command_and_what_is_on_it(evaluated, tmp_path):
    run = Run(shutil.copytree(evaluated[0], tmp_path / "run"))
    begun = "2026-11-30T23:58:10+01:00"
    run.write_status(
        command="mlxtune lora r.toml --set 'a=<b>'",
        started=begun,
        ended="2026-12-01T00:04:00+01:00",
    )
    text = page([read_run(run.path)])
    head = html.unescape(text.split("<header>")[1].split("</header>")[0])
    assert "2026-11-30, 23:58 to 2026-12-01, 00:04" in head
    assert "<code>mlxtune lora r.toml --set 'a=<b>'</code>" in head
    assert time_text(begun, "2026-11-30T23:59:59+01:00") == "2026-11-30, 23:58 to 23:59"
    assert [time_text(begun, None), time_text(None, None), time_text("x", begun)] == [
        "2026-11-30, 23:58", "", "",
    ]  # fmt: skip
    for records in (collect([run.path]), collect(evaluated)):
        text = page(records)
        links = re.findall(r'<a href="#([^"]*)">([^<]*)</a>', text)
        assert {"Training", "Recipe and environment"} < {name for _, name in links}
        sections = re.findall(r'<section id="([^"]*)">\s*<h2>([^<]*?) *<', text)
        assert dict(links) == dict(sections)


def test_a_run_of_an_earlier_version_has_a_page_too(evaluated, tmp_path):
    run = Run(shutil.copytree(evaluated[0], tmp_path / "run"))
    kept = run.status()
    for key in ("command", "started", "ended"):
        del kept[key]
    (run.path / "run.json").write_text(json.dumps(kept))
    path = run.path / f"eval/{SUITE}.json"
    stored = json.loads(path.read_text())
    del stored["tuned_adapter"]
    path.write_text(json.dumps(stored))
    text = page([read_run(run.path)])
    assert "tuned: the same with the run&#39;s adapter" in text and "None" not in body(text)


def test_every_figure_is_explained(evaluated, tmp_path):
    text = page(collect([changed(evaluated[0], tmp_path / "run", as_wide_as_they_get)]))
    evaluation = text.split('<section id="evaluation-')[1].split("</table>")[0]
    rows = re.findall(r'<th scope="row">([^<]*)(<small>[^<]+</small>)?</th>', evaluation)
    assert len(rows) >= 12 and all(meaning for _, meaning in rows), rows
    figures = re.findall(r"<figure.*?</figure>", text, re.S)
    assert len(figures) == 6 and all('<p class="meaning">' in figure for figure in figures)
    assert "nats a token" not in text


def test_the_quickstart_measures_often_enough_for_a_curve():
    recipe = load_recipe(ROOT / "recipes/quickstart.toml")
    [data] = recipe.data
    steps = data.max_samples * recipe.train.epochs // recipe.train.batch_size
    assert 6 <= steps // recipe.eval.steps <= 12
