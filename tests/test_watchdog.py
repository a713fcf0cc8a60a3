"""The GPU watchdog's variable: set on a Mac before MLX is there, and nowhere else."""

from __future__ import annotations

import subprocess
import sys

import pytest

from support.program import environment

VARIABLE = "AGX_RELAX_CDM_CTXSTORE_TIMEOUT"
IMPORTED = f"""
import os, sys
sys.platform = {{platform!r}}
import mlxtune
assert not any(name.partition(".")[0] == "mlx" for name in sys.modules)
print(os.environ.get({VARIABLE!r}))
"""
# Only the import is made to believe it: the standard library would look for macOS's own modules.
AS_ON_A_MAC = """
import runpy, sys
platform, sys.platform = sys.platform, "darwin"
import mlxtune
sys.platform = platform
runpy.run_module("mlxtune.device", run_name="__main__", alter_sys=True)
"""


def found(platform: str, before: str | None) -> str:
    """The variable's value after `import mlxtune`, in a new process on this platform."""
    env = {k: v for k, v in environment().items() if k != VARIABLE}
    if before is not None:
        env[VARIABLE] = before
    code = IMPORTED.format(platform=platform)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("platform", "before", "after"),
    [
        ("darwin", None, "1"),
        ("darwin", "0", "0"),  # whoever sets it decides
        ("linux", None, "None"),
    ],
)
def test_importing_mlxtune_relaxes_the_watchdog_of_a_mac(platform, before, after):
    assert found(platform, before) == after


def test_what_python_m_mlxtune_device_starts_has_it_too():
    """Of any program, which may import MLX alone."""
    env = {k: v for k, v in environment().items() if k != VARIABLE}
    asked = f"import os; print(os.environ.get({VARIABLE!r}))"
    command = [sys.executable, "-c", AS_ON_A_MAC, sys.executable, "-c", asked]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("1\n", "")
