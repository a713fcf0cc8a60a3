"""The process that computes: it is given the names of checks and gives back what came of them.

    python -m mlxtune.selfcheck.worker FD

Names come on stdin, one a line, and outcomes go to the file descriptor FD, each as a line of
JSON: what libraries print is not in their way. It ends with its stdin.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence

from mlxtune.selfcheck.check import Check, run_check
from mlxtune.selfcheck.registry import CHECKS


def serve(names: Iterable[str], descriptor: int, checks: Sequence[Check] = CHECKS) -> None:
    """Run the checks that are named.

    Args:
        names: one a line.
        descriptor: of what outcomes are written to.
        checks: all there are.
    """
    known = {check.name: check for check in checks}
    for line in names:
        outcome = run_check(known[line.strip()])
        os.write(descriptor, json.dumps(outcome.as_json()).encode() + b"\n")


if __name__ == "__main__":
    serve(sys.stdin, int(sys.argv[1]))
