"""A trainer in a process of its own, and what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

# In the order of columns.
TRAINERS = ("mlx-lm", "mlxtune")


class Worker:
    """A trainer in its own process, warmed up.

    Args:
        trainer, job: what `module` takes.
        module: that is run.
        python: that runs it.
    """

    def __init__(
        self,
        trainer: str,
        job: Path,
        module: str = "training.worker",
        python: str = sys.executable,
    ) -> None:
        self._process = subprocess.Popen(
            [python, "-m", module, trainer, str(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
            env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
        )
        self.warm_up = self._answer()

    def turn(self) -> dict[str, Any]:
        """Train the job's steps."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit("a trainer stopped; see above")
        answer: dict[str, Any] = json.loads(line)
        return answer
