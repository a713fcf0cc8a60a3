"""What tests look at in a run, and how they interrupt one."""

from __future__ import annotations

import os
import signal

import mlx.core as mx

from mlxtune.adapters.saved import load_arrays
from mlxtune.train.metrics import Silent


def losses(run):
    return [entry["loss"] for entry in run.metrics() if "loss" in entry]


def adapter(run):
    return load_arrays(run.adapter / "adapters.safetensors")


def same_arrays(a, b):
    return a.keys() == b.keys() and all(mx.array_equal(a[k], b[k]).item() for k in a)


class StopAt(Silent):
    """Presses Ctrl-C when a step is done."""

    def __init__(self, step):
        self.step = step

    def stepped(self, step):
        if step == self.step:
            os.kill(os.getpid(), signal.SIGINT)
