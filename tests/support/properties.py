"""How many examples a property is tested with.

`make test` takes few, the same every time; `make test-all` sets MLXTUNE_TESTS=all and takes
more, others every time.
"""

from __future__ import annotations

import os

from hypothesis import settings

ALL = os.environ.get("MLXTUNE_TESTS") == "all"


def examples(number: int, few: int = 20) -> settings:
    """Hypothesis' settings for a property.

    Args:
        number: of examples in `make test-all`.
        few: at most so many in `make test`.
    """
    if ALL:
        return settings(max_examples=number, deadline=None)
    return settings(max_examples=min(number, few), deadline=None, derandomize=True)
