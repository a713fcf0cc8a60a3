"""Verbs beside training whose GPU fails: one block, and nothing half-written."""

from __future__ import annotations

import pytest

from support import faults
from support.faults import Failing
from support.files import listing
from support.program import mlxtune, mlxtune_afresh

VERBS = {
    "eval": (["eval", "{run}", "-o", "out"], "mlx.core:async_eval", "--limit"),
    "chat": (["chat", "{run}", "-p", "Say it."], "mlx.core:async_eval", "--max-tokens"),
    "fuse": (["fuse", "{run}", "-o", "out"], "mlxtune.fuse:save_model", ""),
    "export": (["export", "{run}", "-o", "out"], "mlxtune.export.bundle:write_model", ""),
}
# Where a verb has none of its own.
REMEDIES = {
    faults.MEMORY: "close other programs",
    faults.BUFFER: "compute less at once",
    faults.WATCHDOG: "let the display sleep",
}


@pytest.mark.parametrize("text", REMEDIES, ids=["memory", "buffer", "watchdog"])
@pytest.mark.parametrize("verb", VERBS)
def test_a_failure_of_the_gpu_is_no_bug_of_the_program(tiny_run, tmp_path, verb, text):
    arguments, place, less = VERBS[verb]
    before = listing(tiny_run)
    arguments = [argument.format(run=tiny_run) for argument in arguments]
    done = mlxtune(*arguments, cwd=tmp_path, fault=Failing(place, 1, text))
    assert done.returncode == 1
    said = done.stderr
    assert said.count("error: ") == 1 and "bug in mlxtune" not in said, said
    assert "Traceback" not in said and text in said
    own = less if text != faults.WATCHDOG else ""
    assert (own or REMEDIES[text]) in said
    assert listing(tiny_run) == before
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_where_it_happened(tiny_run, tmp_path):
    fault = Failing("mlx.core:async_eval", 1, faults.MEMORY)
    done = mlxtune("chat", str(tiny_run), "-p", "x", "--debug", cwd=tmp_path, fault=fault)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "stream_generate" in done.stderr


def test_a_chat_through_a_pipe_ends_likewise(tiny_run, tmp_path):
    fault = Failing("mlx.core:async_eval", 1, faults.MALLOC)
    done = mlxtune_afresh("chat", str(tiny_run), cwd=tmp_path, stdin="one\ntwo\n", fault=fault)
    assert done.returncode == 1
    assert "the GPU ran out of memory" in done.stderr and "2.15 GB" in done.stderr


def test_what_is_not_of_the_gpu_is_still_a_bug(tiny_run, tmp_path):
    fault = Failing("mlx.core:async_eval", 1, "[matmul] Last dimension of first input")
    done = mlxtune("chat", str(tiny_run), "-p", "x", cwd=tmp_path, fault=fault)
    assert done.returncode == 1 and "this is a bug in mlxtune" in done.stderr
