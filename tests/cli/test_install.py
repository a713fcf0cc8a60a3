"""A copy of mlxtune that lacks something: what is said, and that what it says to type works."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlxtune import install
from mlxtune.cli.shared import _say_blas
from mlxtune.device import blas_remedy, find_blas
from support.files import ROOT, listing
from support.process import HANGS
from support.program import mlxtune, running

VERBS = [
    "chat model",
    "lora recipe.toml",
    "eval run",
    "export run",
    "fuse run -o out",
    "convert model model.gguf",
    "plan recipe.toml",
    "data inspect recipe.toml",
]
RECIPE = 'name = "x"\n[model]\npath = "model"\n[[data]]\npath = "data.jsonl"\n'


@pytest.fixture
def without_library(tmp_path, monkeypatch):
    """MLX as `pip install mlx` leaves it on Linux: compiled modules, and not the library."""
    core = Path(importlib.util.find_spec("mlx.core").origin)
    broken = tmp_path / "site/mlx"
    broken.mkdir(parents=True)
    shutil.copy(core, broken)
    paths = [str(broken.parent), os.environ.get("PYTHONPATH")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))


@pytest.mark.parametrize("verb", VERBS)
def test_without_mlx_each_verb_says_so_in_one_error_with_what_to_type(
    tmp_path, without_library, verb
):
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    before = listing(tmp_path)
    done = mlxtune(*verb.split(), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    first, remedy = done.stderr.splitlines()
    assert first.startswith("error: MLX cannot be loaded: ") and "libmlx" in first
    if sys.platform == "linux":
        assert "[cpu]'" in remedy and "cuda" in remedy
    assert listing(tmp_path) == before


def test_without_mlx_the_doctor_names_it_and_looks_at_the_rest(tmp_path, without_library):
    done = mlxtune("doctor", "--json", cwd=tmp_path)
    found = {finding["topic"]: finding for finding in json.loads(done.stdout)}
    assert (done.returncode, done.stderr) == (1, "")
    assert found["MLX"]["state"] == "bad" and "libmlx" in found["MLX"]["said"]
    assert {"system", "packages", "disk", "hub", "Ollama", "llama.cpp"} < set(found)
    assert not {"device", "memory", "BLAS"} & set(found)


def test_another_package_that_is_missing_is_no_bug_of_ours_either(tmp_path, monkeypatch):
    (tmp_path / "httpx.py").write_text("import one_that_is_nowhere\n")
    paths = [str(tmp_path), os.environ.get("PYTHONPATH")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    done = mlxtune("doctor", cwd=tmp_path)
    assert done.returncode == 1 and "bug" not in done.stderr
    assert "the package one_that_is_nowhere cannot be loaded" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere MLX needs no other BLAS")
@pytest.mark.skipif(find_blas() is None, reason="there is no other BLAS")
@pytest.mark.slow
def test_the_blas_is_spoken_of_once_and_only_where_it_matters(tmp_path):
    given = {"MLXTUNE_BLAS": "", "LD_PRELOAD": "", "MLXTUNE_CACHE": str(tmp_path / "cache")}

    def said(*verb: str) -> int:
        with running(*verb, cwd=tmp_path, **given) as started:
            return started.communicate(timeout=HANGS)[1].count(f"with {find_blas().name}")

    assert said("fuse", "nope", "--output=out") == 0
    assert said("chat", "nope.gguf") == 1
    assert said("chat", "nope.gguf") == 0


def test_a_slow_blas_is_spoken_of_each_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLXTUNE_CACHE", str(tmp_path))
    for _ in range(2):
        _say_blas(None)
        assert f"slower than this machine can\n  {blas_remedy()}" in capsys.readouterr().err
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("MLXTUNE_CACHE", str(tmp_path / "a file"))  # nothing can be noted there
    for _ in range(2):
        _say_blas(Path("libopenblas.so.0"))
        assert "with libopenblas.so.0" in capsys.readouterr().err


# ------------------------------------------------------------------------- what to type


PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
LOCAL = ["--no-build-isolation", "--no-index", "--quiet"]
PROJECT = """[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "{name}"
version = "0.1"
[tool.setuptools]
packages = ["{name}"]
"""


def package(folder: Path, name: str, more: str = "") -> Path:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text("")
    (folder / "pyproject.toml").write_text(PROJECT.format(name=name) + more)
    return folder


@pytest.fixture
def project(tmp_path) -> Path:
    """A small package of our name, whose extra is another small package."""
    brought = package(tmp_path / "brought", "brought")
    extra = f'[project.optional-dependencies]\nprep = ["brought @ {brought.as_uri()}"]\n'
    folder = package(tmp_path / "a checkout", "mlxtune", extra)
    for name in ("install", "errors"):
        shutil.copy(ROOT / f"mlxtune/{name}.py", folder / "mlxtune")
    return folder


def said(site: Path, cwd: Path) -> list[str]:
    """What the copy of mlxtune in a folder of packages says to type, as words."""
    code = "from mlxtune.install import install_extra; print(install_extra('prep'))"
    command = [sys.executable, "-c", code]
    env = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


def would_install(command: list[str], cwd: Path, site: Path) -> str:
    """What pip would install if that were typed."""
    dry = [*command, "--dry-run", "--no-build-isolation", "--no-index"]
    env = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(dry, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(line for line in done.stdout.splitlines() if line.startswith("Would install"))


def test_what_is_said_in_a_checkout_works(project):
    command = said(project, project)
    assert command[-2:] == ["-e", ".[prep]"]
    assert re.search(r"brought-0\.1", would_install(command, project, project))


@pytest.mark.slow
@pytest.mark.parametrize("gone", [False, True], ids=["its folder is there", "it is gone"])
def test_what_is_said_by_a_copy_that_was_installed_works(project, tmp_path, gone):
    site = tmp_path / "site"
    subprocess.run([*PIP, "install", *LOCAL, "--target", site, project], check=True)
    if gone:
        project.rename(tmp_path / "elsewhere")
    command = said(site, tmp_path)
    assert command[-1].startswith("brought @ " if gone else "./a checkout[prep]")
    assert "brought-0.1" in would_install(command, tmp_path, site)


def test_without_pip_it_is_uv_that_is_named(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "pip" else real(n))
    words = shlex.split(install.pip_install("mkl"))
    assert words[:4] == ["uv", "pip", "install", "--python"] and words[-1] == "mkl"


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        (None, "mlxtune[prep]"),
        (
            {"url": "https://github.com/a/b", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
            "mlxtune[prep] @ git+https://github.com/a/b@abc",
        ),
        (
            {"url": "https://a.b/mlxtune-0.1.whl", "archive_info": {}},
            "mlxtune[prep] @ https://a.b/mlxtune-0.1.whl",
        ),
    ],
    ids=["an index", "a repository", "a wheel of a server"],
)
def test_what_to_type_is_by_where_this_copy_came_from(tmp_path, monkeypatch, origin, expected):
    monkeypatch.setattr(install, "_ROOT", tmp_path)
    monkeypatch.setattr(install, "_origin", lambda _: origin)
    assert shlex.split(install.install_extra("prep"))[-1] == expected


def test_the_program_is_called_by_its_name_only_where_the_shell_finds_this_copy(
    tmp_path, monkeypatch
):
    bin = tmp_path / "env/bin"
    bin.mkdir(parents=True)
    monkeypatch.setattr(sys, "executable", str(bin / "python"))
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.chdir(tmp_path)
    assert install.program() == "env/bin/python -m mlxtune"
    script = bin / "mlxtune"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    assert install.program() == "env/bin/mlxtune"
    monkeypatch.chdir(bin)
    assert install.program() == "./mlxtune"
    monkeypatch.setenv("PATH", str(bin))
    assert install.program() == "mlxtune"


def test_what_an_error_says_to_type_can_be_typed(tmp_path):
    done = mlxtune("validate", "nope.toml", cwd=tmp_path)
    (command,) = re.findall(r"`(.*) init` writes one", done.stderr)
    assert shutil.which(shlex.split(command)[0], path=f"{os.environ['PATH']}:{tmp_path}")
