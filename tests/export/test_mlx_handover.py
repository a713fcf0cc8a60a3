"""Handed to Ollama's MLX engine: by a stand-in for its program and its server.

The real ones were asked by hand, with published templates: what is said there of prompts comes
from them.
"""

from __future__ import annotations

import json
import os
import stat

import jinja2
import pytest
from click.testing import CliRunner

from mlxtune.cli.app import cli
from mlxtune.data.records import Conversation, Turn
from mlxtune.errors import ExportError, OutputExists
from mlxtune.export import mlx_engine
from mlxtune.export.gotemplate import CONVERSATIONS
from mlxtune.export.mlx_engine import NotForEngine, choose
from mlxtune.export.mlx_handover import hand_to_engine, require_program
from mlxtune.export.modelfile import modelfile
from mlxtune.models.load import load_model
from mlxtune.models.ollama_store import parse_name
from mlxtune.models.resolve import ModelSource
from mlxtune.train.metrics import Silent
from mlxtune.train.session import fine_tune
from support.models import TEMPLATE, save_tiny_model
from support.ollama import stand_in
from support.program import mlxtune

PROGRAM = """#!/bin/sh
if [ "$1" = --version ]; then echo "ollama version is $VERSION"; exit; fi
echo "$@" >> "$CALLS"
if [ -n "$FAILS" ]; then echo "Error: $FAILS" >&2; exit 1; fi
"""
RENDERED = "{{ 'Think. ' if think is none or think }}{% for m in messages %}[{{ m.content }}]"
RENDERED += "{% endfor %}"
ALL = "{% for m in messages %}[{{ m.content }}]{% endfor %}"


class World:
    """A program, a server, and what they were asked."""

    def __init__(self, known, calls):
        self.known, self._calls = known, calls

    @property
    def created(self):
        return self._calls.read_text().splitlines() if self._calls.exists() else []

    def writes(self, template):
        """What the server makes of messages."""
        made = jinja2.Environment().from_string(template)

        def prompt(body):
            return made.render(add_generation_prompt=True, **({"think": None} | body))

        self.known.prompt = prompt


@pytest.fixture
def world(tmp_path, monkeypatch):
    program = tmp_path / "bin/ollama"
    program.parent.mkdir()
    program.write_text(PROGRAM)
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    calls = tmp_path / "calls"
    environ = {"CALLS": str(calls), "VERSION": "0.33.0", "OLLAMA_MODELS": str(tmp_path / "store")}
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    with stand_in() as known:
        monkeypatch.setenv("OLLAMA_HOST", known.url)
        made = World(known, calls)
        made.writes(TEMPLATE)
        known.models["shell"] = {}
        yield made


@pytest.fixture
def opened(tiny_folder):
    return load_model(ModelSource("t", tiny_folder))


def handed(opened, folder, template=None, architecture="LlamaForCausalLM", **how):
    if template is not None:
        opened.tokenizer.chat_template = template
    made = modelfile(opened.renderer(), opened.tokenizer, gguf=".")
    files = ("tokenizer.json", "tokenizer_config.json", "config.json")
    for name in files:
        (folder / name).write_bytes((opened.source.path / name).read_bytes())
    config = {"architectures": [architecture]}
    return hand_to_engine(folder, "shell", made, config, opened.renderer(), **how)


def test_what_is_asked_as_it_was_trained_is_handed_over(world, opened, tmp_path):
    done = handed(opened, tmp_path)
    assert done.done and done.commands == ("ollama run shell",)
    assert "17 of 17 conversations are the trained ones" in done.note
    assert world.created == [f"create shell --experimental -f {tmp_path}/Modelfile"]
    assert "TEMPLATE" in (tmp_path / "Modelfile").read_text()


def test_other_prompts_are_refused_and_the_model_is_taken_away(world, opened, tmp_path):
    world.writes("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(NotForEngine, match="would not ask this model as it was trained") as raised:
        handed(opened, tmp_path)
    assert "it sends 'What is 2 < 3?', and trained was" in raised.value.what
    assert "--engine gguf" in raised.value.remedy and "shell" not in world.known.models


def test_clients_may_have_to_say_that_the_model_is_not_to_think(world, opened, tmp_path):
    """Ollama's own code for Qwen's prompts asks every model to think that can."""
    world.writes(RENDERED)
    plain = RENDERED.replace("{{ 'Think. ' if think is none or think }}", "")
    done = handed(opened, tmp_path, plain, "Qwen3ForCausalLM")
    assert done.commands == ("ollama run shell --think=false",) and '"think": false' in done.note
    said = (tmp_path / "Modelfile").read_text()
    assert "RENDERER" in said and "PARSER" in said and "TEMPLATE" not in said
    # Of those that write the same the first is Ollama's own choice; it was made anew at the end.
    assert 'RENDERER "qwen3-vl-instruct"' in said and len(world.created) > 2
    with pytest.raises(NotForEngine):
        handed(opened, tmp_path, plain, "Qwen3ForCausalLM", by_default=True)


def test_what_hardly_anybody_sends_may_be_written_otherwise_and_is_counted(world, opened, tmp_path):
    stripped = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}"
    world.writes(stripped)
    done = handed(opened, tmp_path, stripped.replace(" | trim", ""), "Qwen3ForCausalLM")
    assert "13 of 17 conversations" in done.note


def test_a_switch_of_thinking_is_thrown_by_the_client(world, opened, tmp_path):
    """Trained was the template's own default, which is not to think."""
    switch = "{% if enable_thinking %}Think. {% endif %}"
    switch += "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    world.writes(RENDERED)
    done = handed(opened, tmp_path, switch, "Qwen3ForCausalLM")
    assert done.commands == ("ollama run shell --think=false",) and '"think": false' in done.note


def test_late_system_messages_may_be_left_out_and_are_counted(world, opened, tmp_path):
    late = "{% for m in messages %}{% if loop.first or m.role != 'system' %}[{{ m.content }}]"
    late += "{% endif %}{% endfor %}"
    world.writes(late)
    done = handed(opened, tmp_path, ALL, "Qwen3ForCausalLM")
    told = [turns for turns in CONVERSATIONS if any(t.role == "system" for t in turns[1:])]
    some, every = len(CONVERSATIONS) - len(told), len(CONVERSATIONS)
    assert 0 < some < every and f"{some} of {every} conversations" in done.note


def test_how_answers_begin_is_compared(world, opened, tmp_path):
    turns = (Turn("user", "list files"), Turn("assistant", "ls -a"))
    records = [Conversation(turns)] * 3
    done = handed(opened, tmp_path, records=records, answers=["ls", " ls\n", "ls -a"])
    assert "2 of 3 answers begin as MLX's own" in done.note  # the server says: ls


@pytest.mark.slow
def test_a_server_without_tools_is_quoted(world, opened, tmp_path):
    world.known.tools = False
    tool = {"type": "function", "function": {"name": "list_files", "parameters": {}}}
    turns = (Turn("user", "list files"), Turn("assistant", "ls"))
    listed = ALL + "{% for t in tools or () %}{{ t.function.name }}{% endfor %}"
    world.writes(listed)
    with_tools = [Conversation(turns, tools=(tool,))]
    with pytest.raises(NotForEngine, match="does not support tools"):
        handed(opened, tmp_path, listed, "Qwen3ForCausalLM", records=with_tools)
    assert "shell" not in world.known.models
    world.known.models["shell"], world.known.tools = {}, True
    done = handed(opened, tmp_path, listed, "Qwen3ForCausalLM", records=with_tools)
    assert f"of {len(CONVERSATIONS) + 1} conversations are the trained ones" in done.note


def test_what_the_server_refuses_is_passed_on(world, opened, tmp_path):
    world.known.refuses = ("/api/chat", 400, '{"error": "shell does not support tools"}')
    with pytest.raises(NotForEngine, match="does not support tools"):
        handed(opened, tmp_path)


def test_a_server_that_fails_says_nothing_of_prompts(world, opened, tmp_path):
    world.known.refuses = ("/api/chat", 500, '{"error": "out of memory"}')
    with pytest.raises(ExportError, match="out of memory") as raised:
        handed(opened, tmp_path)
    assert not isinstance(raised.value, NotForEngine) and "shell" in world.known.models


def test_a_program_that_fails_says_why(world, opened, tmp_path, monkeypatch):
    monkeypatch.setenv("FAILS", "write blob: no space left on device")
    with pytest.raises(ExportError, match="no space left on device") as raised:
        handed(opened, tmp_path)
    assert "the folder is ready" in raised.value.remedy


def test_a_dry_run_asks_nobody(world, opened, tmp_path):
    done = handed(opened, tmp_path, dry_run=True)
    assert not done.done and len(done.commands) == 2
    assert world.created == [] and world.known.asked == []


# Before any work.


def test_there_is_no_program(world, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ExportError, match="not on the PATH"):
        require_program("shell", overwrite=False)


def test_the_program_is_too_old(world, monkeypatch):
    monkeypatch.setenv("VERSION", "0.18.1")
    with pytest.raises(ExportError, match=r"Ollama 0\.18\.1 has no MLX engine"):
        require_program("shell", overwrite=False)


def test_the_server_is_another_machines(world, monkeypatch):
    monkeypatch.setenv("OLLAMA_HOST", "http://10.0.0.7:11434")
    with pytest.raises(ExportError, match="on another machine"):
        require_program("shell", overwrite=False)


def test_the_server_does_not_answer(world, monkeypatch):
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    with pytest.raises(ExportError, match="does not answer"):
        require_program("shell", overwrite=False)


def test_a_name_that_is_taken_is_replaced_only_when_asked(world, tmp_path):
    taken = (tmp_path / "store/manifests").joinpath(*parse_name("shell").parts)
    taken.parent.mkdir(parents=True)
    taken.write_text("{}")
    with pytest.raises(ExportError, match="called shell already"):
        require_program("shell", overwrite=False)
    require_program("shell", overwrite=True)
    require_program("shell2", overwrite=False)


# Which engine.


@pytest.fixture
def mac(monkeypatch):
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    monkeypatch.setattr(mlx_engine, "installed_version", lambda: (0, 33, 0))


LLAMA = {"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("said", "version"),
    [
        ("0.33.0", (0, 33, 0)),
        ("0.19.0-rc1", (0, 19, 0)),
        ("0.33.0\nWarning: client version is 0.20.1", (0, 20, 1)),
        ("unknown", (0,)),
    ],
)
def test_the_programs_own_version_is_what_counts(world, monkeypatch, said, version):
    monkeypatch.setenv("VERSION", said)
    assert mlx_engine.installed_version() == version


def chosen(type_="auto", config=LLAMA, to="ollama", asked="auto", option=None):
    found = choose(asked, type_, lambda: config, to=to, option=option)
    return found.engine, found.why


def test_on_a_mac_the_mlx_engine_is_taken_where_it_can_be(mac, monkeypatch):
    assert chosen() == ("mlx", "Ollama 0.33.0 runs it in MLX")
    assert chosen("q4_k_m") == ("gguf", "q4_k_m is a type of GGUF")
    assert chosen(option="--imatrix") == ("gguf", "--imatrix is of GGUFs")
    assert chosen(to=None)[0] == chosen(to="llamacpp")[0] == "gguf"
    stretched = LLAMA | {"rope_scaling": {"rope_type": "llama3"}}
    assert chosen(config=stretched)[0] == "gguf" and "llama3" in chosen(config=stretched)[1]
    monkeypatch.setattr(mlx_engine, "installed_version", lambda: (0, 18, 3))
    assert chosen() == ("gguf", "Ollama 0.18.3 has no MLX engine")
    monkeypatch.setattr(mlx_engine, "installed_version", lambda: (0,))
    assert chosen() == ("gguf", "the program ollama does not say its version")
    monkeypatch.setattr(mlx_engine, "installed_version", lambda: None)
    assert chosen()[0] == "gguf" and "not on the PATH" in chosen()[1]


def test_elsewhere_it_is_taken_only_when_asked_for(monkeypatch):
    monkeypatch.setattr("platform.system", lambda: "Linux")
    assert chosen() == ("gguf", "Ollama's MLX engine is for Apple silicon")
    assert chosen("int4")[0] == chosen(asked="mlx")[0] == "mlx"


# The command.


def handing_over(run, folder, *more):
    """By the program, as a process."""
    given = ("--engine", "mlx", "--to", "ollama", "--name", "shell", "-o", str(folder / "out"))
    return mlxtune("export", str(run), *given, *more, cwd=folder)


def export(run, *arguments):
    return CliRunner().invoke(cli, ["export", str(run), *map(str, arguments)])


def test_the_command_writes_the_folder_and_hands_it_over(world, tiny_run, tmp_path):
    done = export(tiny_run, "--engine", "mlx", "--to", "ollama", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "matrices: in floats" in done.output and "loss on" in done.output
    assert "are the trained ones" in done.output and world.created
    done = export(tiny_run, "--engine", "mlx", "--json", "-o", tmp_path / "out")
    said = json.loads(done.stdout)
    assert said["kind"] == "keep" and said["written_before"] is True


def test_what_goes_with_ggufs_does_not_go_with_it(tiny_run, tmp_path):
    for given in (["--to", "llamacpp"], ["--imatrix", tmp_path], ["--pre", "x"], ["--no-verify"]):
        assert export(tiny_run, "--engine", "mlx", *given).exit_code == 2
    done = export(tiny_run, "--engine", "mlx", "--quantize", "q4_k_m")
    assert isinstance(done.exception, ExportError) and "type of GGUF" in done.exception.what
    done = export(tiny_run, "--engine", "gguf", "--quantize", "int4")
    assert isinstance(done.exception, ExportError) and "--engine mlx" in done.exception.remedy


def test_what_the_engine_cannot_take_goes_as_gguf_where_nobody_asked(
    mac, world, recipe, few, tmp_path, monkeypatch
):
    (tmp_path / "model").mkdir()
    save_tiny_model(tmp_path / "model", merged=True)
    settings = recipe(few, model={"path": str(tmp_path / "model")}, train={"max_steps": 1})
    run = fine_tune(settings, tmp_path / "run", Silent()).path

    def refuse(*_given, **_how):
        raise NotForEngine("it cannot", where="x")

    monkeypatch.setattr("mlxtune.export.mlx_bundle.write_mlx_folder", refuse)
    done = export(run, "--to", "ollama", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "for Ollama's GGUF engine: it cannot" in done.output
    assert (tmp_path / "out/model.gguf").is_file()
    done = export(run, "--to", "ollama", "--engine", "mlx", "-o", tmp_path / "other")
    assert isinstance(done.exception, NotForEngine) and not (tmp_path / "other").exists()


def test_where_prompts_differ_it_goes_as_gguf_though_a_folder_was_written(
    mac, world, recipe, few, tmp_path
):
    """The folder was written to the place that the GGUF was asked for in."""
    (tmp_path / "model").mkdir()
    save_tiny_model(tmp_path / "model", merged=True)
    settings = recipe(few, model={"path": str(tmp_path / "model")}, train={"max_steps": 1})
    run = fine_tune(settings, tmp_path / "run", Silent()).path
    world.writes("{{ messages[0].content }}")
    world.known.models["t"] = {}
    done = export(run, "--to", "ollama", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "for Ollama's GGUF engine: Ollama's MLX engine would not ask" in done.output
    assert (tmp_path / "out/model.gguf").is_file() and "t:latest" in world.known.models
    assert not (tmp_path / "out/model.safetensors").exists()
    # Either takes the other's place where that is asked for, and nothing else's.
    for engine, file in (("mlx", "model.safetensors"), ("gguf", "model.gguf")):
        done = export(run, "--engine", engine, "-o", tmp_path / "out")
        assert isinstance(done.exception, OutputExists)
        done = export(run, "--engine", engine, "-o", tmp_path / "out", "--overwrite")
        assert done.exit_code == 0 and (tmp_path / "out" / file).is_file()
    done = export(run, "--engine", "gguf", "-o", tmp_path / "model", "--overwrite")
    assert isinstance(done.exception, OutputExists) and (tmp_path / "model/config.json").is_file()


def test_the_recipe_says_which_engine_and_which_type(recipe, few, tmp_path):
    settings = recipe(few, export={"engine": "mlx", "quantize": "int8"}, train={"max_steps": 1})
    run = fine_tune(settings, tmp_path / "run", Silent()).path
    done = export(run, "--json")
    assert done.exit_code == 0, done.output
    said = json.loads((run / "export/mlx-int8/config.json").read_text())["quantization"]
    assert (said["bits"], said["mode"]) == (8, "affine")
    assert json.loads(done.stdout)["kind"] == "int8"
    # The command line goes before it.
    assert export(run, "--quantize", "f16").exit_code == 0
    assert (run / "export/mlx-f16/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"PATH": "/nowhere"}, "not on the PATH"),
        ({"VERSION": "0.18.1"}, "Ollama 0.18.1 has no MLX engine"),
        ({"OLLAMA_HOST": "10.0.0.7:11434"}, "on another machine"),
    ],
)
def test_what_is_missing_is_told_before_any_work(
    world, tiny_run, tmp_path, monkeypatch, environ, said
):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    done = handing_over(tiny_run, tmp_path)
    assert done.returncode == 1 and said in done.stderr
    assert not (tmp_path / "out").exists() and not world.created


def test_the_command_takes_a_name_that_is_taken_only_to_overwrite_it(world, tiny_run, tmp_path):
    taken = (tmp_path / "store/manifests").joinpath(*parse_name("shell").parts)
    taken.parent.mkdir(parents=True)
    taken.write_text("{}")
    done = handing_over(tiny_run, tmp_path)
    assert done.returncode == 1 and "called shell already" in done.stderr
    assert "--overwrite" in done.stderr and not (tmp_path / "out").exists()
    done = handing_over(tiny_run, tmp_path, "--overwrite")
    assert done.returncode == 0, done.stderr
    assert [line.split()[:2] for line in world.created] == [["create", "shell"]]


def test_the_command_says_that_prompts_differ_and_what_to_do(world, tiny_run, tmp_path):
    world.writes("{{ messages[0].content }}")
    done = handing_over(tiny_run, tmp_path)
    assert done.returncode == 1 and "it sends" in done.stderr
    assert "--engine gguf" in done.stderr and "shell" not in world.known.models


def test_the_command_passes_on_what_the_program_says(world, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setenv("FAILS", "write blob: no space left on device")
    done = handing_over(tiny_run, tmp_path)
    assert done.returncode == 1 and "no space left on device" in done.stderr
    assert (tmp_path / "out/Modelfile").is_file()  # as its remedy says


def test_the_command_in_a_dry_run_needs_no_program(world, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    done = handing_over(tiny_run, tmp_path, "--dry-run")
    assert done.returncode == 0, done.stderr
    create = f"ollama create shell --experimental -f {tmp_path}/out/Modelfile"
    assert [line.strip() for line in done.stdout.splitlines()[-2:]] == [create, "ollama run shell"]
    assert world.known.asked == []


def test_usage_is_told_from_what_cannot_be_done(tiny_run, tmp_path):
    done = mlxtune("export", str(tiny_run), "--engine", "mlx", "--to", "llamacpp", cwd=tmp_path)
    assert done.returncode == 2 and "goes with --to ollama" in done.stderr
    done = mlxtune("export", str(tiny_run), "--engine", "mlx", "--quantize", "q4_k_m", cwd=tmp_path)
    assert done.returncode == 1 and "or --engine gguf" in done.stderr
