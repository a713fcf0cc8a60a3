"""What keeps the tests themselves in order: their budget, processes left behind, shared folders."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from support.once import Once
from support.program import environment


def run_tests(
    folder: Path, plugin: str, setting: str, test: str, tests: str = "fast"
) -> tuple[int, str]:
    """Exit status and output of pytest on one test, with one of our plugins.

    Args:
        folder: of the test.
        plugin: a module of `support`.
        setting: what is set in it.
        test: Python code.
        tests: which are run, as MLXTUNE_TESTS names them.
    """
    (folder / "conftest.py").write_text(
        f"import support.{plugin} as plugin\nplugin.{setting}\n"
        "def pytest_configure(config):\n    config.addinivalue_line('markers', 'slow')\n"
    )
    (folder / "test_it.py").write_text(test)
    command = [sys.executable, "-m", "pytest", "-q", "-p", f"support.{plugin}"]
    env = environment() | {"MLXTUNE_TESTS": tests}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout


BURNS = """
import time, pytest

def burn():
    end = time.process_time() + 0.5
    while time.process_time() < end:
        pass
"""
IN_TEST = "def test_it():\n    burn()\n"
IN_FIXTURE = (
    "@pytest.fixture(scope='module')\ndef costly():\n    burn()\n\ndef test_it(costly):\n    pass\n"
)


@pytest.mark.parametrize("test", [IN_TEST, IN_FIXTURE], ids=["test", "fixture"])
def test_more_processor_time_than_the_budget_fails_the_run_unless_marked_slow(tmp_path, test):
    status, said = run_tests(tmp_path, "budget", "LIMIT = 0.2", BURNS + test)
    assert status == pytest.ExitCode.TESTS_FAILED and "1 passed" in said
    assert "of processor time; a test that is not marked slow" in said
    slow = test.replace("def test_it", "@pytest.mark.slow\ndef test_it")
    status, said = run_tests(tmp_path, "budget", "LIMIT = 0.2", BURNS + slow)
    assert status == pytest.ExitCode.OK and "0.5 s  " in said


@pytest.mark.slow
def test_a_property_may_take_more_where_it_has_more_examples(tmp_path):
    test = """
from hypothesis import given, settings, strategies

@settings(max_examples=1, deadline=None)
@given(strategies.none())
def test_it(nothing):
    burn()
"""
    status, _ = run_tests(tmp_path, "budget", "LIMIT = 0.2", BURNS + test)
    assert status == pytest.ExitCode.TESTS_FAILED
    status, _ = run_tests(tmp_path, "budget", "LIMIT = 0.2", BURNS + test, tests="all")
    assert status == pytest.ExitCode.OK
    status, _ = run_tests(tmp_path, "budget", "LIMIT = 0.2", BURNS + IN_TEST, tests="all")
    assert status == pytest.ExitCode.TESTS_FAILED


def test_time_that_is_waited_is_not_counted(tmp_path):
    waits = "import time\n\ndef test_it():\n    time.sleep(0.5)\n"
    status, _ = run_tests(tmp_path, "budget", "LIMIT = 0.2", waits)
    assert status == pytest.ExitCode.OK


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked for in /proc")
def test_a_process_that_is_left_behind_is_an_error_and_ends(tmp_path):
    """Of a process that has ended itself, too."""
    command = f"sleep 987 & echo $! > {tmp_path / 'pid'}"
    leaves = f"import subprocess\n\ndef test_it():\n    subprocess.run({command!r}, shell=True)\n"
    status, said = run_tests(tmp_path, "leftovers", "_ENDING = 0.2", leaves)
    assert status == pytest.ExitCode.TESTS_FAILED
    assert "test_it.py leaves processes behind" in said and "sleep 987" in said
    pid = int((tmp_path / "pid").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_shared_folder_is_made_once_and_anew_after_a_failure(tmp_path):
    made = []

    def make(path: Path) -> None:
        made.append(list(path.iterdir()))
        (path / "file").write_text("x")
        if len(made) == 1:
            raise OSError("the disk is full")

    once = Once(tmp_path / "shared")
    with pytest.raises(OSError):
        once("name", make)
    for _ in range(2):
        assert (once("name", make) / "file").read_text() == "x"
    assert made == [[], []]
