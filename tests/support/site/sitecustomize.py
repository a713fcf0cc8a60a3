"""Python imports this at its start where PYTHONPATH has its folder.

Without torch, which transformers imports for seconds if it can: as where a user runs the program.
"""

import sys

sys.modules["torch"] = None  # type: ignore[assignment]
