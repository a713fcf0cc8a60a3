"""The program in forks of one process that has imported it, which takes a second or two.

Asked by a line of JSON each: arguments, folder and the files that stdout and stderr go to;
answered with the exit status and the processor seconds that it took.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys

from support import faults
from support.process import HANGS

IMPORTED = (
    "mlxtune.evaluate.compare",
    "mlxtune.export.bundle",
    "mlxtune.export.convert",
    "mlxtune.train.session",
)


def serve() -> None:
    """Fork for each line of stdin; the fork runs the program and ends as it does."""
    import transformers

    from mlxtune.cli import main

    for name in IMPORTED:
        importlib.import_module(name)
    assert transformers.AutoTokenizer and transformers.PreTrainedTokenizerFast  # lazy ones
    gc.freeze()
    for line in sys.stdin:
        asked = json.loads(line)
        if not (child := os.fork()):
            become(asked)
            if "fault" in asked:
                faults.install(asked["fault"])
            main()
            return
        _, status, used = os.wait4(child, 0)
        answer = [os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime]
        os.write(1, f"{json.dumps(answer)}\n".encode())


def become(asked: dict[str, object]) -> None:
    os.setsid()
    os.chdir(str(asked["cwd"]))
    os.environ.clear()
    os.environ.update(asked["environment"])  # type: ignore[call-overload]
    sys.argv = ["mlxtune", *asked["arguments"]]  # type: ignore[misc]
    for target, path in enumerate((os.devnull, asked["stdout"], asked["stderr"])):
        flags = os.O_WRONLY | os.O_CREAT if target else os.O_RDONLY
        opened = os.open(str(path), flags, 0o600)
        os.dup2(opened, target)
        os.close(opened)
    signal.alarm(HANGS)
