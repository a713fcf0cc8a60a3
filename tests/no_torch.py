"""Imported before transformers, which then does without torch, as where a user runs the program."""

import forks

forks.without_torch()
