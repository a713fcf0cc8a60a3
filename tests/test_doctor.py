"""`mlxtune doctor` on this machine as it is, and with parts of it missing; completion."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from cli_tools import mlxtune
from test_ollama import stand_in

from mlxtune import doctor
from mlxtune.doctor import examine


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


@pytest.mark.skipif(sys.platform != "linux", reason="macOS needs no other BLAS")
def test_a_slow_blas_is_bad_and_ends_with_1(tmp_path, monkeypatch):
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    done = mlxtune("doctor", "--json", cwd=tmp_path)  # whose BLAS is off
    found = {finding["topic"]: finding for finding in json.loads(done.stdout)}
    assert (done.returncode, found["BLAS"]["state"]) == (1, "bad")
    assert found["BLAS"]["remedy"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_script_that_names_the_program(tmp_path, shell):
    done = mlxtune("completion", shell, cwd=tmp_path)
    assert done.returncode == 0
    assert "_MLXTUNE_COMPLETE" in done.stdout


def test_bash_completes_a_verb(tmp_path):
    asked = {"_MLXTUNE_COMPLETE": "bash_complete", "COMP_WORDS": "mlxtune ex", "COMP_CWORD": "1"}
    program = "import sys; sys.argv[0] = 'mlxtune'; import mlxtune.__main__"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | asked,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert "export" in done.stdout
