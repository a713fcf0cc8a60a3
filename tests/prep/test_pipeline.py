"""Preparation from file to folder, on real rows and on one row of each kind."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import pytest

from mlxtune.data.sources import Source, read_conversations
from mlxtune.errors import DataError, OutputExists
from mlxtune.prep.dedup import jaccard, shingles
from mlxtune.prep.pipeline import prepare
from mlxtune.prep.texts import compared
from mlxtune.recipe.schema import PrepSection
from support.files import beside

OFF = {
    "drop_unreadable": False,
    "fix_encoding": False,
    "drop_refusals": False,
    "drop_empty": False,
    "drop_echo": False,
    "dedup": "off",
}


def write(path: Path, rows: list) -> Source:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return Source(str(path))


def read(path: Path) -> list:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def ask(prompt: str, completion: str, **tags) -> dict:
    return {"prompt": prompt, "completion": completion, **tags}


ROWS = [
    ask("Zeige die Größe", "du -sh", category="de"),
    ask("Show how large the cafÃ© folder is", "du -sh café", category="en"),
    ask("Help me", "I'm sorry, but I can't assist with that.", category="en"),
    ask("Say nothing", " ", category="en"),
    ask("Repeat this text", "repeat this text.", category="en"),
    ask("Mail jane@corp.example from 10.1.2.3", "mail jane@corp.example", category="en"),
    ask("Delete all empty folders below the current one", "find . -type d -empty -delete"),
    ask("Delete all empty folders below the current one!", "find . -type d -empty -delete"),
    ask("Delete all empty folders below the current one", "find . -type d -empty -delete"),
]


def test_every_step_reports_what_it_did(tmp_path):
    source = write(tmp_path / "in.jsonl", ROWS)
    before = (tmp_path / "in.jsonl").read_bytes()
    settings = PrepSection(scrub=("email", "ip"), languages=("en",))
    report = prepare(source, tmp_path / "out", settings)

    assert (tmp_path / "in.jsonl").read_bytes() == before
    assert read(tmp_path / "out/train.jsonl") == [
        ask("Show how large the café folder is", "du -sh café", category="en"),
        ask("Mail <EMAIL_1> from <IP_1>", "mail <EMAIL_1>", category="en"),
        ROWS[6],
    ]
    assert "café" in (tmp_path / "out/train.jsonl").read_text(encoding="utf-8")
    assert not (tmp_path / "out/heldout.jsonl").exists()

    told = json.loads((tmp_path / "out/report.json").read_text())
    assert told == report.as_dict()
    steps = {step["step"]: step for step in told["steps"]}
    assert steps["encoding"]["changed"] == {"wrong encoding undone": 1}
    assert steps["scrub"]["changed"] == {"EMAIL": 2, "IP": 1}
    assert steps["filter"]["removed"] == {
        "language de": 1,
        "refusal": 1,
        "empty answer": 1,
        "the answer repeats the request": 1,
    }
    assert steps["dedup"]["removed"] == {"the same text": 1, "nearly the same text": 1}
    assert (told["read"], told["train"], told["heldout"]) == (9, 3, 0)
    assert told["balance"]["train"]["en"] == {"rows": 2, "share": 0.666667}
    example = next(e for e in steps["filter"]["examples"] if e["reason"] == "refusal")
    assert example["where"].endswith("in.jsonl:3")
    assert example["text"].startswith("Help me → I'm sorry")

    text = (tmp_path / "out/report.txt").read_text()
    assert text == report.as_text()
    assert "9 rows read, 3 to train on, 0 held out" in text
    assert "removed 1: refusal" in text and "in.jsonl:3" in text
    assert "jane@" not in text + json.dumps(told)


def test_with_everything_off_rows_pass_as_they_are(tmp_path):
    rows = [row for row in ROWS if row["completion"].strip()]
    report = prepare(write(tmp_path / "in.jsonl", rows), tmp_path / "out", PrepSection(**OFF))
    assert read(tmp_path / "out/train.jsonl") == rows
    assert report.steps == ()


def test_empty_answers_are_an_error_unless_they_are_filtered(tmp_path):
    source = write(tmp_path / "in.jsonl", ROWS)
    with pytest.raises(DataError) as error:
        prepare(source, tmp_path / "out", PrepSection(**OFF))
    assert error.value.where.endswith("in.jsonl:4")
    assert not (tmp_path / "out").exists()
    settings = OFF | {"drop_empty": True}
    prepare(source, tmp_path / "out", PrepSection(**settings))
    assert len(read(tmp_path / "out/train.jsonl")) == len(ROWS) - 1


def test_rows_that_cannot_be_read_are_dropped_and_told(tmp_path):
    good = '{"prompt": "list files", "completion": "ls"}'
    lines = [good, "{not json", '{"prompt": 3, "completion": "x"}', '{"other": 1}', good]
    text = "\n".join(lines).encode() + b'\n{"prompt": "caf\xe9", "completion": "x"}\n'
    (tmp_path / "in.jsonl").write_bytes(text)
    source = Source(str(tmp_path / "in.jsonl"))
    settings = OFF | {"drop_unreadable": True}
    report = prepare(source, tmp_path / "out", PrepSection(**settings))
    [step] = report.steps
    assert (report.read, report.train) == (6, 2)
    assert step.name == "read" and step.removed == {"unreadable": 4}
    places = [example.where.rpartition(":")[2] for example in step.examples]
    assert places == ["2", "3", "4"]  # three of each reason are kept
    assert "not JSON" in step.examples[0].text
    (tmp_path / "in.csv").write_text("prompt,completion\na,b\nc,d,e\nf,g\n")
    report = prepare(Source(str(tmp_path / "in.csv")), tmp_path / "csv", PrepSection(**settings))
    assert (report.read, report.train) == (3, 2)


SHAPES = [
    {"text": "A whole document, from a@x.org."},
    {"segments": [{"label": False, "text": "Q: "}, {"label": True, "text": "A: ask a@x.org"}]},
    {"prompt": "Say hello to a@x.org", "chosen": "Hello!", "rejected": "No."},
    {"instruction": "Greet", "output": "Good day to you, a@x.org", "id": 4},
    {"conversations": [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "Two."}]},
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What is the weather for a@x.org?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "f", "arguments": {"who": "a@x.org"}}}],
            },
        ]
    },
    {"prompt": "Show hidden files", "expected_command": "ls -a", "category": "files"},
]


def test_rows_of_every_shape_keep_it(tmp_path):
    source = write(tmp_path / "in.jsonl", SHAPES)
    prepare(source, tmp_path / "out", PrepSection(scrub=("email",)))
    rows = read(tmp_path / "out/train.jsonl")
    for row, before in zip(rows, SHAPES, strict=True):
        assert row.keys() == before.keys()
    assert "a@x.org" not in (tmp_path / "out/train.jsonl").read_text()
    call = rows[5]["messages"][2]["tool_calls"][0]["function"]
    assert call["arguments"] == {"who": "<EMAIL_1>"}
    again = read_conversations(tmp_path / "out/train.jsonl")
    expected = read_conversations(
        write(
            tmp_path / "expected.jsonl",
            json.loads(json.dumps(SHAPES).replace("a@x.org", "<EMAIL_1>")),
        ).path
    )
    assert [(c.turns, c.segments, c.rejected) for c in again] == [
        (c.turns, c.segments, c.rejected) for c in expected
    ]


def test_renamed_columns_are_written_by_their_own_names(tmp_path):
    source = write(tmp_path / "in.jsonl", [{"q": "Hi there", "a": "Hello"}])
    source = Source(source.path, columns={"prompt": "q", "completion": "a"})
    prepare(source, tmp_path / "out", PrepSection())
    assert read(tmp_path / "out/train.jsonl") == [{"prompt": "Hi there", "completion": "Hello"}]


def test_no_near_duplicate_of_the_held_out_file_remains(tmp_path, nl2bash):
    rows = read(nl2bash)[:1500]
    heldout = [dict(row) for row in rows[:100]]
    for row in heldout:
        row["prompt"] = row["prompt"] + "!"
    source, against = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", heldout)
    settings = PrepSection(**OFF | {"dedup": "near"})
    report = prepare(source, tmp_path / "out", settings, against=against)
    sets = [
        [shingles(compared(c), 5) for c in read_conversations(path)]
        for path in (tmp_path / "out/train.jsonl", tmp_path / "b.jsonl")
    ]
    near = sum(jaccard(a, b) >= settings.dedup_threshold for a in sets[0] for b in sets[1])
    assert near == 0
    leaks = next(step for step in report.steps if step.name == "against")
    assert sum(leaks.removed.values()) >= 90
    assert any("b.jsonl:" in example.text for example in leaks.examples)
    # Also when the rows aren't compared with each other.
    alone = prepare(source, tmp_path / "off", PrepSection(**OFF), against=against)
    assert [step.name for step in alone.steps] == ["against"]
    assert alone.train < len(rows) - 90
    exact = PrepSection(**OFF | {"dedup": "exact"})
    assert prepare(source, tmp_path / "exact", exact, against=against).train > alone.train


@pytest.mark.parametrize("dedup", ["off", "exact", "near"])
def test_near_duplicates_never_stand_on_both_sides(tmp_path, nl2bash, dedup):
    rows = sorted(read(nl2bash), key=lambda row: row["prompt"])[4000:4600]
    settings = PrepSection(**OFF | {"dedup": dedup}, val_size=0.2)
    report = prepare(write(tmp_path / "in.jsonl", rows), tmp_path / "out", settings, seed=3)
    train, heldout = (
        [shingles(compared(c), 5) for c in read_conversations(tmp_path / f"out/{name}.jsonl")]
        for name in ("train", "heldout")
    )
    assert not any(jaccard(a, b) >= settings.dedup_threshold for a in train for b in heldout)
    assert (len(train), len(heldout)) == (report.train, report.heldout)
    assert 0 < report.heldout <= round(0.2 * (report.train + report.heldout))
    near = sum(jaccard(a, b) >= 0.85 for a, b in combinations(train, 2))
    assert (near > 0) == (dedup != "near")


def test_groups_stay_together_and_categories_are_counted(tmp_path):
    rows = read(beside("tldr.jsonl"))[:2000]
    for row in rows:
        row["category"] = row["prompt"].split()[0]
    source = write(tmp_path / "in.jsonl", rows)
    settings = PrepSection(val_size=150, group_by="page")
    report = prepare(source, tmp_path / "out", settings, seed=1)
    train, heldout = read(tmp_path / "out/train.jsonl"), read(tmp_path / "out/heldout.jsonl")
    assert not {row["page"] for row in train} & {row["page"] for row in heldout}
    assert 100 < len(heldout) <= 150
    for name, side in (("train", train), ("heldout", heldout)):
        shown = sum(row["category"] == "Show" for row in side)
        assert report.as_dict()["balance"][name]["Show"]["rows"] == shown
    assert "Show" in report.as_text()
    by_page = prepare(source, tmp_path / "page", PrepSection(balance_by="page"))
    assert by_page.balance["train"].keys() <= {row["page"] for row in rows}

    other = prepare(source, tmp_path / "other", settings, seed=2)
    same = prepare(source, tmp_path / "same", settings, seed=1)
    assert read(tmp_path / "other/heldout.jsonl") != heldout and other.train
    assert read(tmp_path / "same/heldout.jsonl") == heldout and same == report


def test_a_second_time_changes_nothing(tmp_path, nl2bash):
    settings = PrepSection(scrub=("email", "ip", "phone", "card", "secret"))
    source = Source(str(nl2bash), max_samples=2500)
    first = prepare(source, tmp_path / "one", settings)
    assert first.train < first.read == 2500
    again = prepare(Source(str(tmp_path / "one/train.jsonl")), tmp_path / "two", settings)
    assert not any(step.removed or step.changed for step in again.steps)
    assert read(tmp_path / "two/train.jsonl") == read(tmp_path / "one/train.jsonl")


def test_the_duplicate_with_the_longest_answer_is_kept(tmp_path):
    prompt = "Delete all of the empty folders that are below the current folder"
    answers = ["find . -type d -empty", "find . -type d -empty -delete", "find . -type d -empty"]
    source = write(tmp_path / "in.jsonl", [ask(prompt, answer) for answer in answers])
    kept = {dedup: len(prepare_rows(source, tmp_path / dedup, dedup)) for dedup in ("off", "exact")}
    assert kept == {"off": 3, "exact": 2}
    assert prepare_rows(source, tmp_path / "near", "near") == [ask(prompt, answers[1])]


def prepare_rows(source: Source, output: Path, dedup: str) -> list:
    prepare(source, output, PrepSection(dedup=dedup))
    return read(output / "train.jsonl")


def test_threshold_permutations_and_shingle_reach_the_search(tmp_path):
    rows = [ask("find files older than ten days", "x"), ask("find files older than six days", "x")]
    source = write(tmp_path / "in.jsonl", rows)
    left = [
        prepare(source, tmp_path / "out", PrepSection(**more), overwrite=True)
        for more in (
            {},
            {"dedup_threshold": 0.5},
            {"dedup_threshold": 0.5, "dedup_shingle": 12},
            {"dedup_permutations": 64},
        )
    ]
    assert [report.train for report in left] == [2, 1, 2, 2]
    assert left[3].steps[-1].settings["permutations"] == 64


def test_the_region_of_phone_numbers(tmp_path):
    source = write(tmp_path / "in.jsonl", [ask("Ring 020 8765 4321 for me", "done")])
    for region, text in (("GB", "Ring <PHONE_1> for me"), ("US", "Ring 020 8765 4321 for me")):
        settings = PrepSection(scrub=("phone",), phone_region=region)
        prepare(source, tmp_path / region, settings)
        assert read(tmp_path / region / "train.jsonl")[0]["prompt"] == text


def test_length_bounds(tmp_path):
    source = write(tmp_path / "in.jsonl", [ask("a", "x"), ask("b" * 50, "x"), ask("c" * 500, "x")])
    prepare(source, tmp_path / "out", PrepSection(min_chars=10, max_chars=100))
    assert [row["prompt"][0] for row in read(tmp_path / "out/train.jsonl")] == ["b"]


def test_output_is_replaced_only_where_it_is_ours(tmp_path):
    source = write(tmp_path / "in.jsonl", [ask("a", "x")])
    prepare(source, tmp_path / "out", PrepSection())
    with pytest.raises(OutputExists):
        prepare(source, tmp_path / "out", PrepSection())
    prepare(source, tmp_path / "out", PrepSection(), overwrite=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home/letter.txt").write_text("dear")
    with pytest.raises(OutputExists):
        prepare(source, tmp_path / "home", PrepSection(), overwrite=True)
    assert (tmp_path / "home/letter.txt").read_text() == "dear"


def test_where_nothing_is_left_the_reasons_are_given_with_counts(tmp_path):
    rows = [{"frage": f"{n}", "antwort": "x"} for n in range(7)]
    rows += [ask(f"{n}", " ") for n in range(3)] + [{"prompt": 3, "completion": "x"}]
    source = write(tmp_path / "in.jsonl", rows)
    with pytest.raises(DataError) as raised:
        prepare(source, tmp_path / "out", PrepSection())
    first, *reasons = raised.value.what.splitlines()
    assert first == "no rows are left of 11"
    assert [line.split()[0] for line in reasons] == ["7", "3", "1"]
    assert "the keys frage, antwort has no known shape" in reasons[0]
    assert reasons[0].endswith("in.jsonl:1") and reasons[1].endswith("in.jsonl:8")
    assert "answer" in reasons[1] and "'prompt'" in reasons[2]
    assert "columns = {" in raised.value.remedy
    assert not (tmp_path / "out").exists()


def test_reasons_that_differ_from_row_to_row_are_not_all_kept(tmp_path):
    rows = [{f"key {n}": "x"} for n in range(200)]
    with pytest.raises(DataError, match="no rows are left of 200") as raised:
        prepare(write(tmp_path / "in.jsonl", rows), tmp_path / "out", PrepSection())
    assert len(raised.value.what.splitlines()) == 4


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([], {}, "no records"),
        ([ask("hi", " ")], {}, "no rows are left of 1"),
        ([ask("hi", "x"), ask("ho", "y")], {"val_size": 0.1, "group_by": "pgae"}, "'pgae'"),
        ([ask("hi", "x"), ask("ho", "y")], {"val_size": 2}, "cannot be held out"),
        (
            [ask("hi", "x"), {"prompt": 3, "completion": "x"}],
            {"drop_unreadable": False},
            "must be a string",
        ),
    ],
)
def test_errors_leave_nothing(tmp_path, rows, settings, message):
    source = write(tmp_path / "in.jsonl", rows)
    with pytest.raises(DataError, match=message):
        prepare(source, tmp_path / "out", PrepSection(**settings))
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_half_a_character_in_a_tag(tmp_path):
    line = '{"prompt": "hi", "completion": "hö", "note": "\\ud83c"}\n'
    (tmp_path / "in.jsonl").write_text(line + line.replace("\\ud83c", "ok"), encoding="utf-8")
    source = Source(str(tmp_path / "in.jsonl"))
    prepare(source, tmp_path / "off", PrepSection(**OFF))
    assert read(tmp_path / "off/train.jsonl") == read(tmp_path / "in.jsonl")
    prepare(source, tmp_path / "on", PrepSection(**OFF | {"fix_encoding": True}))
    assert [row["note"] for row in read(tmp_path / "on/train.jsonl")] == ["ok"]
