"""`mlxtune doctor` on this machine as it is, and with parts of it missing; completion."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlxtune import doctor
from mlxtune.bench.chips import working_set_bytes
from mlxtune.doctor import examine
from mlxtune.recipe.presets import write_preset
from mlxtune.watchdog import VARIABLE
from support.ollama import stand_in
from support.program import mlxtune


def states(path):
    return {finding.topic: finding for finding in examine(path)}


def test_everything_is_looked_at_and_what_is_missing_has_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:1")
    monkeypatch.setenv("PATH", str(tmp_path))
    found = states(tmp_path / "not/there/yet")
    assert {"system", "device", "memory", "packages", "disk", "hub", "Ollama"} < set(found)
    assert {"llama.cpp", "mistral.rs"} < set(found)
    assert found["Ollama"].state == "missing"
    for finding in found.values():
        assert finding.said
        assert (finding.state == "good") == (finding.remedy is None), finding


def test_an_ollama_that_answers_is_told_with_its_version(tmp_path, monkeypatch):
    with stand_in() as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        assert states(tmp_path)["Ollama"].state == "good"


def test_a_full_disk_and_programs_on_the_path_are_seen(tmp_path, monkeypatch):
    program = tmp_path / "llama-server"
    program.write_text("")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor, "_ROOM", 10**18)
    found = states(tmp_path)
    assert found["disk"].state == "missing"
    assert str(program) in found["llama.cpp"].said


def test_a_package_under_another_name_and_a_folder_that_is_none(tmp_path, monkeypatch):
    """mistralrs-metal brings the module mistralrs; so does, nearly, any folder of that name."""
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "mistralrs").mkdir()
    others = [p for p in sys.path if not Path(p or ".", "mistralrs").exists()]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *others])
    monkeypatch.delitem(sys.modules, "mistralrs", raising=False)

    def said():
        return doctor._program("mistral.rs", "mistralrs", "a remedy", "mistralrs").said

    assert said() == "not found"
    (tmp_path / "mistralrs/__init__.py").write_text("")
    importlib.invalidate_caches()
    assert said() == "Python package mistralrs"
    metadata = tmp_path / "mistralrs_metal-0.9.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Name: mistralrs-metal\nVersion: 0.9.1\n")
    (metadata / "top_level.txt").write_text("mistralrs\n")
    importlib.invalidate_caches()
    assert said() == "Python package mistralrs-metal 0.9.1"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="macOS needs no other BLAS")
def test_a_slow_blas_is_bad_and_ends_with_1(tmp_path, monkeypatch):
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    done = mlxtune("doctor", "--json", cwd=tmp_path)  # whose BLAS is off
    found = {finding["topic"]: finding for finding in json.loads(done.stdout)}
    assert (done.returncode, found["BLAS"]["state"]) == (1, "bad")
    assert found["BLAS"]["remedy"]


@pytest.mark.parametrize(
    ("allowed", "state", "remedy"),
    [(10, "missing", "sudo sysctl iogpu.wired_limit_mb="), (12, "good", None)],
)
def test_what_the_gpu_of_a_mac_may_hold(tmp_path, monkeypatch, allowed, state, remedy):
    info = {
        "device_name": "Apple M2",
        "memory_size": 16 * 2**30,
        "max_recommended_working_set_size": allowed * 2**30,
    }
    monkeypatch.setattr("mlx.core.metal.is_available", lambda: True)
    monkeypatch.setattr("mlx.core.device_info", lambda *_: info)
    found = states(tmp_path)["wired memory"]
    assert found.state == state and f"{allowed * 2**30 / 1e9:.1f} GB" in found.said
    assert found.remedy is None if remedy is None else remedy in found.remedy


@pytest.mark.parametrize("memory", [16, 18, 24, 36, 64, 128])
def test_what_the_gpu_is_given_leaves_macos_enough(memory):
    """5 GB at least, and a fifth of a large memory; and it is more than the GPU has by default."""
    total = memory * 2**30
    advised = doctor.wired_limit_mb(total) * 2**20
    left = total - advised
    assert left >= 5e9 and left >= 0.2 * total
    assert advised > working_set_bytes(memory)
    # And not less than that asks for.
    assert left <= max(5e9, 0.2 * total) + 2**20


def test_a_small_mac_is_left_as_it_is(tmp_path, monkeypatch):
    assert doctor.wired_limit_mb(8 * 2**30) is None
    info = {
        "device_name": "Apple M1",
        "memory_size": 8 * 2**30,
        "max_recommended_working_set_size": 8 * 2**30 * 2 // 3,
    }
    monkeypatch.setattr("mlx.core.metal.is_available", lambda: True)
    monkeypatch.setattr("mlx.core.device_info", lambda *_: info)
    found = states(tmp_path)["wired memory"]
    assert (found.state, found.remedy) == ("good", None)


@pytest.mark.parametrize(("value", "state"), [("1", "good"), ("0", "missing"), (None, "missing")])
def test_a_mac_is_told_whether_its_watchdog_is_relaxed(monkeypatch, value, state):
    monkeypatch.delenv(VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(VARIABLE, value)
    found = doctor.watchdog()
    assert found.state == state and VARIABLE in found.said
    # And this is told on a Mac only.
    monkeypatch.setattr(doctor, "watchdog", lambda: found)
    for platform, told in (("linux", False), ("darwin", True)):
        monkeypatch.setattr(doctor.sys, "platform", platform)
        assert (found in list(doctor._mlx())) == told


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_script_that_names_the_program(tmp_path, shell):
    done = mlxtune("completion", shell, cwd=tmp_path)
    assert done.returncode == 0
    assert "_MLXTUNE_COMPLETE" in done.stdout
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    script = tmp_path / "script"
    script.write_text(done.stdout)
    read = subprocess.run([shell, "-n", script], capture_output=True, text=True)
    assert (read.returncode, read.stderr) == (0, "")


@pytest.mark.parametrize(
    "verb",
    ["eval", "chat", "convert", "data convert", "data prep", "report", "export", "lora", "plan"],
)
def test_what_may_be_a_path_is_completed_as_one(verb):
    words = verb.split()
    asked = {
        "_MLXTUNE_COMPLETE": "bash_complete",
        "COMP_WORDS": f"mlxtune {verb} runs/q",
        "COMP_CWORD": str(len(words) + 1),
    }
    code = "import sys; sys.argv[0] = 'mlxtune'; import mlxtune.__main__"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True
    )
    assert done.stdout.split() == ["file,runs/q"], done.stderr


def completed(*words: str, shell: str = "fish") -> list[str]:
    """What the last of the words is completed by."""
    asked = {"_MLXTUNE_COMPLETE": f"{shell}_complete", "COMP_WORDS": " ".join(words[:-1])}
    asked["COMP_CWORD"] = words[-1]  # fish gives the word that is begun, bash its number
    code = "import sys; sys.argv[0] = 'mlxtune'; import mlxtune.__main__"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = filter(None, done.stdout.splitlines())
    return [line.partition(",")[2].partition("\t")[0] for line in lines]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("lora", "r.toml", "--set", "train.opt"), ["train.optimizer="]),
        (("plan", "r.toml", "--set", "train.optimizer=ad"), ["adamw", "adamw_8bit", "adafactor"]),
        (("data", "inspect", "r.toml", "--set", "data.trunc"), ["data.truncate="]),
        (("validate", "r.toml", "--set", "train.packing="), ["true", "false"]),
        (("data", "prep", "a", "b", "--set", "dedup="), ["off", "exact", "near"]),
        (("lora", "r.toml", "--set", "train.epochs="), []),
        (("init", "--preset", "ql"), ["qlora"]),
        (("export", "run", "--to", "oll"), ["ollama"]),
    ],
)
def test_keys_and_values_are_completed(words, expected):
    begun = words[-1].partition("=")[0] + "=" if "=" in words[-1] else ""
    assert completed("mlxtune", *words) == [begun + value for value in expected]


def test_every_key_of_a_recipe_is_completed(tmp_path):
    """Of the annotated recipe, which shows them all."""
    write_preset(tmp_path / "recipe.toml", "default")
    text = (tmp_path / "recipe.toml").read_text()
    tables = re.split(r"^(?:# )?\[{1,2}(\w+)\]{1,2}", text, flags=re.MULTILINE)[1:]
    shown = {
        f"{table}.{key}="
        for table, body in zip(tables[::2], tables[1::2], strict=True)
        for key in re.findall(r"^(?:# )?(\w+) = ", body, re.MULTILINE)
    }
    shown |= {"name=", "seed=", "objective="}
    assert set(completed("mlxtune", "lora", "r.toml", "--set", "")) == shown


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("mlxtune ex", ["export"]),
        ("mlxtune lora r.toml --set train.opt", ["train.optimizer="]),
        # Bash divides words at an equals sign.
        ("mlxtune lora r.toml --set train.optimizer = ada", ["adamw", "adamw_8bit", "adafactor"]),
        ("mlxtune lora r.toml --set train.packing =", ["true", "false"]),
        ("mlxtune lora r.toml --set = train.packing = t", ["true"]),
    ],
)
def test_bash_completes_with_the_script(tmp_path, words, expected):
    """Sourced, as ~/.bashrc does it: what it registers asks the program and fills COMPREPLY."""
    (tmp_path / "script").write_text(mlxtune("completion", "bash", cwd=tmp_path).stdout)
    program = tmp_path / "mlxtune"
    code = "import sys; sys.argv[0] = 'mlxtune'; import mlxtune.__main__"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{code}"\n')
    program.chmod(0o755)
    asked = f"""source ./script
    compopt() {{ echo "$@"; }}
    COMP_WORDS=({words}); COMP_CWORD={len(words.split()) - 1}
    set -- $(complete -p mlxtune)
    while [ "$1" != -F ]; do shift; done
    "$2" mlxtune; echo "${{COMPREPLY[@]}}"
    """
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "--norc", "-c", asked], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    *options, words = done.stdout.splitlines()
    assert words.split() == expected, done.stderr
    assert options == ["-o nospace"] * expected[0].endswith("=")  # a value comes behind it
