"""The judge against a stand-in for an endpoint, which misbehaves on demand, and a real one."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mlxtune.data.records import Turn
from mlxtune.data.render import Renderer
from mlxtune.evaluate.compare import compare_run
from mlxtune.evaluate.judge import Judge
from mlxtune.evaluate.suite import Suite
from mlxtune.models.resolve import resolve_model
from mlxtune.recipe.judge import JudgeSection
from mlxtune.recipe.load import parse_recipe
from mlxtune.recipe.schema import ModelSection
from mlxtune.train.metrics import Silent
from mlxtune.train.model import tokenizer_of
from mlxtune.train.session import fine_tune
from support import llamacpp
from support.files import write_jsonl
from support.models import SMOLLM2, save_tiny_model
from support.program import mlxtune

ASKED = [{"role": "user", "content": "q"}]


class Endpoint(ThreadingHTTPServer):
    """Answers each request with the next of `script`, the last one again and again."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = [good(5)]
        self.seen = []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, self.headers.get("Authorization"), body))
        script = self.server.script
        status, headers, reply = script.pop(0) if len(script) > 1 else script[0]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(reply if isinstance(reply, bytes) else json.dumps(reply).encode())

    def log_message(self, *_arguments):
        pass


def good(grade, text='{{"reason": "so", "grade": {}}}'):
    message = {"role": "assistant", "content": text.format(grade)}
    usage = {"prompt_tokens": 100, "completion_tokens": 10}
    return 200, {}, {"choices": [{"message": message}], "usage": usage}


@pytest.fixture
def endpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("MLXTUNE_CACHE", str(tmp_path))
    server = Endpoint()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def naps():
    return []


@pytest.fixture
def judge(endpoint, naps):
    def make(**changes):
        values = {
            "endpoint": endpoint.url,
            "model": "grader",
            "rubric": "Is the command right?",
            "price_input": 2.0,
            "price_output": 10.0,
        }
        return Judge(JudgeSection(**values | changes), sleep=naps.append)

    return make


def test_a_grade_is_scaled_and_its_cost_counted(endpoint, judge):
    endpoint.script = [good(5), good(1), good(2)]
    asked = judge()
    assert [asked.grade(ASKED, "ls", a) for a in ("ls", "rm", "ls -l")] == [1.0, 0.0, 0.25]
    report = asked.report()
    assert report["cost"] == pytest.approx((300 * 2 + 30 * 10) / 1e6)
    assert (report["graded"], report["requests"], asked.notes()) == (3, 3, [])
    path, key, body = endpoint.seen[0]
    assert path == "/v1/chat/completions" and key is None and body["temperature"] == 0
    system, user = body["messages"]
    assert (
        "Is the command right?" in system["content"] and "from 1 (worst) to 5" in system["content"]
    )
    assert json.loads(user["content"]) == {
        "conversation": ASKED, "reference": "ls", "answer": "ls",
    }  # fmt: skip


def test_what_was_asked_once_is_not_asked_again(endpoint, judge):
    assert judge().grade(ASKED, "ls", "ls") == 1
    again = judge()
    assert again.grade(ASKED, "ls", "ls") == 1
    assert len(endpoint.seen) == 1
    assert (again.report()["from_cache"], again.report()["cost"]) == (1, 0)
    judge(rubric="Another").grade(ASKED, "ls", "ls")
    assert len(endpoint.seen) == 2


def test_the_judge_sees_the_conversation_and_the_tools(endpoint, judge):
    tool = {"type": "function", "function": {"name": "run"}}
    system = {"role": "system", "content": "Answer in French."}
    assert judge().grade([system, *ASKED], "oui", "oui", tools=[tool]) == 1
    judge().grade([system | {"content": "Answer in Latin."}, *ASKED], "oui", "oui", tools=[tool])
    asked = [json.loads(body["messages"][1]["content"]) for _, _, body in endpoint.seen]
    assert asked[0]["conversation"] == [system, *ASKED] and asked[0]["tools"] == [tool]
    assert asked[1]["conversation"][0]["content"] == "Answer in Latin."


def test_progress_is_no_line_for_each_answer(endpoint, judge, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("mlxtune.evaluate.judge.time.monotonic", lambda: now[0])
    told = []
    asked = Judge(judge()._section, progress=told.append)
    for number in range(20):
        asked.grade(ASKED, "ls", f"answer {number}")
        now[0] += 1
    assert told == [f"judge: grader, answer {number}" for number in (1, 6, 11, 16)]


def test_the_key_comes_from_the_environment(endpoint, judge, monkeypatch):
    monkeypatch.setenv("GRADER_KEY", "abc")
    judge(api_key_env="GRADER_KEY").grade(ASKED, "ls", "ls")
    assert endpoint.seen[0][1] == "Bearer abc"
    monkeypatch.delenv("GRADER_KEY")
    without = judge(api_key_env="GRADER_KEY")
    assert without.grade(ASKED, "x", "y") is None and len(endpoint.seen) == 1
    assert "GRADER_KEY" in without.notes()[0] and "1 of 1" in without.notes()[0]


def test_overload_is_waited_for(endpoint, judge, naps):
    endpoint.script = [(429, {"Retry-After": "7"}, {}), (503, {}, b"busy"), (500, {}, b""), good(5)]
    assert judge().grade(ASKED, "ls", "ls") == 1
    assert naps == [7.0, 2.0, 4.0]


def test_silence_is_waited_for(endpoint, judge, naps):
    # A port that nobody listens on, and one that listens and says nothing.
    import socket

    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        url = f"http://127.0.0.1:{mute.getsockname()[1]}"
        slow = judge(endpoint=url, timeout=0.05, retries=1)
        assert slow.grade(ASKED, "ls", "ls") is None
    assert naps == [1.0] and "ReadTimeout" in slow.notes()[0]


def test_an_endpoint_that_is_down_is_given_up_with_what_there_is(endpoint, judge, naps):
    endpoint.script = [good(4), (500, {}, b"")]
    asked = judge(retries=2)
    grades = [asked.grade(ASKED, "ls", a) for a in ("one", "two", "three", "four")]
    assert grades == [0.75, None, None, None]
    assert len(endpoint.seen) == 1 + 3  # the third is not even asked for
    assert asked.notes() == [f"judge: 3 of 4 answers not graded: {endpoint.url} says 500"]
    endpoint.server_close()
    gone = judge(retries=0)
    assert gone.grade(ASKED, "other", "x") is None and "does not answer" in gone.notes()[0]


def test_what_cannot_even_be_sent_costs_no_more_than_the_grades(endpoint, judge, naps, monkeypatch):
    monkeypatch.setenv("GRADER_KEY", "schlüssel")  # a header is ASCII
    asked = judge(api_key_env="GRADER_KEY")
    assert asked.grade(ASKED, "ls", "a") is None and not endpoint.seen and not naps
    assert "1 of 1 answers not graded" in asked.notes()[0]
    endpoint.script = [(200, {"Content-Encoding": "gzip"}, b"none")]
    assert (garbled := judge()).grade(ASKED, "ls", "a") is None
    assert "cannot be asked" in garbled.notes()[0]


def test_a_refusal_is_not_repeated(endpoint, judge, naps):
    endpoint.script = [(401, {}, b'{"error": "bad key"}')]
    asked = judge()
    assert asked.grade(ASKED, "ls", "a") is None and len(endpoint.seen) == 1 and not naps
    assert "says 401" in asked.notes()[0] and "bad key" in asked.notes()[0]


@pytest.mark.parametrize("text", ["no idea", '{{"grade": 9}}', '{{"grade": null}}', ""])
def test_a_reply_without_a_grade_is_told(endpoint, judge, text):
    endpoint.script = [good(0, text)]
    asked = judge()
    assert asked.grade(ASKED, "ls", "a") is None
    assert "1 of 1 replies hold no grade from 1 to 5" in asked.notes()[0]


@pytest.mark.parametrize("reply", [b"<html>", [], {"choices": []}, {"choices": [{"message": 1}]}])
def test_a_reply_of_another_kind_is_told(endpoint, judge, reply):
    endpoint.script = [(200, {}, reply)]
    asked = judge()
    assert asked.grade(ASKED, "ls", "a") is None
    assert "does not reply as OpenAI's API does" in asked.notes()[0]


def test_a_grade_after_thoughts_is_found(endpoint, judge):
    endpoint.script = [good(3, 'I would say {{"grade": 1}} but: ```{{"grade": "{}"}}```')]
    assert judge().grade(ASKED, "ls", "a") == 0.5


def test_a_recipe_names_its_suite_and_its_judge(endpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    save_tiny_model(tmp_path / "model")
    data = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "list", "expected_command": "ls"}] * 4)
    (tmp_path / "mine.toml").write_text('metrics = ["edit"]\n')
    judge = {"endpoint": endpoint.url, "model": "grader", "rubric": "Is it short?"}
    recipe = {
        "name": "judged",
        "model": {"path": "model"},
        "data": [{"path": str(data)}],
        "train": {"max_steps": 1, "batch_size": 2},
        "eval": {"val_size": 1, "max_overlap": 1.0, "suite": "mine.toml"},
        "judge": judge,
    }
    fine_tune(parse_recipe(recipe, where="-"), tmp_path / "runs/judged", Silent())
    monkeypatch.chdir(tmp_path / "runs")  # the run's recipe has whole paths

    result = compare_run(tmp_path / "runs/judged", max_tokens=2)
    assert result.suite == "mine" and list(result.tuned.metrics) == ["edit", "judge"]
    assert result.judge["model"] == "grader"
    assert "Is it short?" in endpoint.seen[0][2]["messages"][0]["content"]

    other = Suite(name="other", metrics=("exact",))
    result = compare_run(tmp_path / "runs/judged", suite=other, max_tokens=2)
    assert result.suite == "other" and result.judge["model"] == "grader"
    own = other.model_copy(update={"judge": JudgeSection(**judge | {"model": "another"})})
    result = compare_run(tmp_path / "runs/judged", suite=own, max_tokens=2)
    assert result.judge["model"] == "another"


@pytest.mark.slow
def test_a_real_model_judges_over_http(tmp_path, monkeypatch):
    """SmolLM2 in llama.cpp's server. It is too small to judge: what it says is counted."""
    monkeypatch.setenv("MLXTUNE_CACHE", str(tmp_path))
    server = llamacpp.serve(resolve_model(SMOLLM2).path, context=1024)
    section = JudgeSection(
        endpoint=f"{server.listening_address}/v1",
        model="smollm2",
        rubric="Is the command right?",
        max_tokens=24,
        price_output=1e6,
    )
    asked = [{"role": "system", "content": "Answer with a command."}, *ASKED]
    first = Judge(section)
    grades = [first.grade(asked, "ls", answer) for answer in ("ls", "I like cheese")]
    report = first.report()
    assert (report["answers"], report["requests"], report["from_cache"]) == (2, 2, 0)
    read = [grade for grade in grades if grade is not None]
    assert report["graded"] == len(read) and all(0 <= grade <= 1 for grade in read)
    unread = [f"judge: {2 - len(read)} of 2 replies hold no grade from 1 to 5"]
    assert first.notes() == (unread if len(read) < 2 else [])
    # The server counts what it reads and writes: all that we sent, in the model's template.
    renderer = Renderer(tokenizer_of(ModelSection(path=SMOLLM2)))
    sent = [first._body(asked, "ls", a, ())["messages"] for a in ("ls", "I like cheese")]
    turns = [[Turn(m["role"], m["content"]) for m in messages] for messages in sent]
    expected = sum(len(renderer.encode(renderer.text(t, ask=True))) for t in turns)
    assert report["prompt_tokens"] == expected
    assert 0 < report["completion_tokens"] <= 2 * 24
    assert report["cost"] == report["completion_tokens"]
    again = Judge(section)
    assert [again.grade(asked, "ls", a) for a in ("ls", "I like cheese")] == grades
    assert (again.report()["requests"], again.report()["from_cache"]) == (0, 2)


def test_a_suite_that_is_not_there_is_told_before_training(tmp_path):
    (tmp_path / "model").mkdir()
    save_tiny_model(tmp_path / "model")
    data = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "list", "expected_command": "ls"}])
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        f'[model]\npath = "{tmp_path}/model"\n[[data]]\npath = "{data}"\n'
        f'[eval]\nval_size = 1\nsuite = "{tmp_path}/nope.toml"\n'
    )
    for verb in (("validate",), ("lora", "-o", str(tmp_path / "run"))):
        result = mlxtune(*verb, str(recipe), cwd=tmp_path)
        assert result.returncode == 1 and "there is no such suite" in result.stderr
    assert not (tmp_path / "run").exists()
