"""Several workers that train as one: data-parallel, on MLX's distributed engine.

Each worker holds the whole model and takes its share of every step's samples; gradients
are summed, so that all of them make the same update. What joins them is whatever
`mx.distributed.init` finds: ring, JACCL, MPI or NCCL.

Every message is preceded by a header, in which a worker says that it failed or that it
was asked to stop. So an error on one of them ends all, and nobody waits for ever.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from types import FrameType, TracebackType
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_unflatten

from mlxtune.arrays import flat, random_key, set_random_key
from mlxtune.device import worker_rank
from mlxtune.errors import RunError, WorkerFailed, WorkerLost
from mlxtune.gpu_errors import fault_of

# Bytes to a message: few large ones are fastest, and each is held in memory twice.
MESSAGE_BYTES = 64 << 20

# Seconds that a worker has to end by itself once the launcher has told it to.
GRACE = 10.0

# What comes before each message; as bytes, since a GPU has no float64.
_NUMBERS = 4
_HEADER = np.dtype(
    [("failed", "<i8"), ("asked", "<i8"), ("size", "<i8"), ("numbers", "<f8", _NUMBERS)]
)
_Headers = npt.NDArray[np.void]

_HALVES = (mx.float16, mx.bfloat16)


class Stopped(Exception):
    """All workers stop at the same point, and nothing is wrong."""


class Workers:
    """The workers of a run, as one of them sees them; alone, nothing is sent or waited for.

    As a context manager it ends together: a worker that leaves with an error tells the
    others, which then raise `WorkerFailed`; and none leaves before all do. Blocks nest;
    the outermost one counts.

    Args:
        group: MLX's; None for a worker that is alone.

    Attributes:
        rank: of this worker, from 0.
        size: how many there are.
    """

    def __init__(self, group: mx.distributed.Group | None = None) -> None:
        self._group = group
        self.rank = 0 if group is None else group.rank()
        self.size = 1 if group is None else group.size()
        self._depth = 0
        self._asked = False
        self._agreed = False

    @property
    def first(self) -> bool:
        """Whether this is the worker that writes and speaks."""
        return self.rank == 0

    # ------------------------------------------------------------------ what they exchange

    def barrier(self) -> None:
        """Wait for all.

        Raises:
            WorkerFailed: another worker has failed and said so.
            WorkerLost: another worker has ended without a word.
        """
        self._meet_alike(0)

    def totals(self, *values: float) -> list[float]:
        """The sum of each of a few numbers over all workers, the same bits on each."""
        found: list[float] = []
        for start in range(0, len(values), _NUMBERS):
            some = values[start : start + _NUMBERS]
            gathered = self._meet(numbers=some)["numbers"][:, : len(some)]
            found += [float(total) for total in gathered.sum(axis=0)]
        return found

    def largest(self, value: float) -> float:
        """The largest of the workers' numbers."""
        return float(self._meet(numbers=[value])["numbers"][:, 0].max())

    def texts(self, text: str) -> list[str]:
        """Each worker's text, by rank."""
        if self.size == 1:
            return [text]
        sizes = self._meet(len(text.encode()))["size"]
        return self._texts(text.encode(), sizes)

    def sum(self, tree: Any) -> Any:
        """The sum of a tree of arrays over all workers.

        Arrays travel together, a few large messages for all; half types are summed in
        float32.
        """
        if self.size == 1:
            return tree
        leaves = sorted(flat(tree).items())  # the same order everywhere, whatever the tree's
        paths, arrays = [path for path, _ in leaves], [array for _, array in leaves]
        exact = [a.astype(mx.float32) if a.dtype in _HALVES else a for a in arrays]
        # What goes wrong before the first message is this worker's own error, not a lost one.
        mx.eval(exact)
        self._meet_alike(sum(a.nbytes for a in exact))
        summed: list[mx.array] = [mx.array(0)] * len(exact)
        for bucket in _buckets(exact):
            together = self._all_sum(mx.concatenate([exact[i].reshape(-1) for i in bucket]))
            ends = np.cumsum([exact[i].size for i in bucket])
            parts = mx.split(together, ends[:-1].tolist())
            for i, part in zip(bucket, parts, strict=True):
                summed[i] = part.reshape(arrays[i].shape).astype(arrays[i].dtype)
        return tree_unflatten(list(zip(paths, summed, strict=True)))

    def from_first(self, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """The first worker's arrays, bit by bit; every worker gives some of the same shapes."""
        if self.size == 1:
            return dict(arrays)
        names = sorted(arrays)
        # As bytes, with zeros everywhere else: a sum of numbers would lose the sign of -0.
        given = [arrays[name].reshape(-1).view(mx.uint8) for name in names]
        if not self.first:
            given = [mx.zeros_like(data) for data in given]
        taken = self.sum(given)
        return {
            name: data.view(arrays[name].dtype).reshape(arrays[name].shape)
            for name, data in zip(names, taken, strict=True)
        }

    def require_same(self, facts: Mapping[str, str]) -> None:
        """Compare what has to be the same everywhere.

        Args:
            facts: what each is called, and a text that holds all of it.

        Raises:
            RunError: one of them differs; the message names the worker.
        """
        digests = [sha256(f"{name}\0{text}".encode()).hexdigest() for name, text in facts.items()]
        everyone = [text.split() for text in self.texts(" ".join(digests))]
        for rank, theirs in enumerate(everyone):
            for name, one, other in zip(facts, everyone[0], theirs, strict=True):
                if one != other:
                    raise RunError(
                        f"worker {rank} does not have the same {name} as worker 0",
                        remedy="every worker needs the same on its own disk",
                    )

    # ---------------------------------------------------------------------- how they stop

    def ask_to_stop(self) -> None:
        """Ask all workers to stop; they agree on it with their next message."""
        self._asked = True

    @property
    def stopping(self) -> bool:
        """Whether all are to stop; between two messages the same on every worker."""
        return self._asked if self.size == 1 else self._agreed

    def __enter__(self) -> Workers:
        self._depth += 1
        if self._depth == 1:
            self._asked = self._agreed = False
            if self.size > 1:
                _end_when_told()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._depth -= 1
        if self._depth or self.size == 1:
            return
        end_in_peace()
        if isinstance(error, WorkerLost | KeyboardInterrupt):
            return
        told = None
        if isinstance(error, Exception) and not isinstance(error, WorkerFailed | Stopped):
            told = self._fail(error)
        # The launcher ends the others when one leaves with an error: the first may still
        # have something to write.
        with _as_far_as_it_goes():
            self.barrier()
        if told is not None:
            raise told from error

    def _fail(self, error: Exception) -> WorkerFailed | None:
        """Tell the others; what to raise instead, if one before this one fails with it."""
        with _as_far_as_it_goes():
            try:
                self._meet(failure=str(error))
            except WorkerFailed as told:
                if told.rank != self.rank:
                    return told
        error.add_note(f"  on worker {self.rank} of {self.size}")
        return None

    # --------------------------------------------------------------------------- messages

    def _meet(
        self, size: int = 0, numbers: Sequence[float] = (), *, failure: str | None = None
    ) -> _Headers:
        """Exchange headers.

        Args:
            size: bytes of the message that follows.
            numbers: up to `_NUMBERS`, so that a few need no message of their own.
            failure: what went wrong here.
        """
        header = np.zeros(1, _HEADER)
        header["failed"], header["asked"], header["size"] = failure is not None, self._asked, size
        header["numbers"][0, : len(numbers)] = numbers
        if self.size == 1:
            return header
        headers = self._gather(header.view(np.uint8)).view(_HEADER)[:, 0]
        self._agreed = self._agreed or bool(headers["asked"].any())
        if (failed := np.flatnonzero(headers["failed"])).size:
            # Those that had something else to say do not go on to say it.
            text = (failure or "").encode(errors="replace")
            sizes = self._gather(np.array([len(text)], np.int64).view(np.uint8)).view(np.int64)
            texts = self._texts(text, sizes[:, 0])
            raise WorkerFailed(int(failed[0]), texts[failed[0]])
        return headers

    def _meet_alike(self, size: int) -> None:
        if len(set(self._meet(size)["size"])) > 1:
            raise RuntimeError("workers are out of step: their messages differ in size")

    def _texts(self, mine: bytes, sizes: npt.NDArray[np.int64]) -> list[str]:
        padded = np.zeros(max(1, sizes.max()), np.uint8)
        padded[: len(mine)] = np.frombuffer(mine, np.uint8)
        rows = self._gather(padded)
        return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]

    def _gather(self, mine: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """(workers, bytes): what each worker gives."""
        with _losing():
            together = mx.distributed.all_gather(mx.array(mine), group=self._group)
            mx.eval(together)
        return np.array(together).reshape(self.size, -1)

    def _all_sum(self, array: mx.array) -> mx.array:
        with _losing():
            total = mx.distributed.all_sum(array, group=self._group)
            mx.eval(total)
        return total

    # --------------------------------------------------------------------- random numbers

    @contextmanager
    def own_randomness(self) -> Iterator[None]:
        """Draw numbers of this worker's own in the block.

        MLX's random state is the same on all workers before it and after it, however many
        numbers each has drawn: it alone, saved with a checkpoint, brings back all streams.
        """
        if self.size == 1:
            yield
            return
        keys = mx.random.split(random_key(), self.size + 1)
        set_random_key(keys[self.rank])
        try:
            yield
        finally:
            set_random_key(keys[self.size])


def join() -> Workers:
    """This process among those that the launcher started with it, or alone.

    Waits until all of them have come.

    Raises:
        RunError: they cannot be connected.
    """
    if worker_rank() is None:
        return Workers()
    try:
        group = mx.distributed.init(strict=True)
    except RuntimeError as error:
        raise RunError(
            f"the workers cannot be connected: {error}",
            remedy="check addresses and ports of the hostfile, and that MLX has the backend "
            "here; see docs/distributed.md",
        ) from None
    return Workers(group)


@contextmanager
def _losing() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if fault_of(error) is not None:
            raise  # it is this worker's own
        raise WorkerLost(
            f"another worker has ended, or cannot be reached any more: {error}",
            remedy="what it said is above; go on from the latest checkpoint with --resume",
        ) from None


@contextmanager
def _as_far_as_it_goes() -> Iterator[None]:
    """Of a last message: another worker may be gone, and this one's GPU may have failed."""
    try:
        yield
    except WorkerLost:
        pass
    except RuntimeError as error:
        if fault_of(error) is None:
            raise


def _buckets(arrays: Sequence[mx.array]) -> Iterator[list[int]]:
    """Indices of arrays that travel together: of one type, up to `MESSAGE_BYTES`."""
    for dtype in dict.fromkeys(array.dtype for array in arrays):
        bucket: list[int] = []
        filled = 0
        for index, array in enumerate(arrays):
            if array.dtype != dtype:
                continue
            if bucket and filled + array.nbytes > MESSAGE_BYTES:
                yield bucket
                bucket, filled = [], 0
            bucket.append(index)
            filled += array.nbytes
        yield bucket


def _end_when_told() -> None:
    """On SIGTERM, which launchers send when another worker has ended, end with an error.

    Python's handlers wait for the main thread, which may itself be waiting for the worker
    that is gone: a thread that the signal wakes ends the process after `GRACE` seconds.
    """
    if threading.current_thread() is not threading.main_thread():
        return

    def told(_signal: int, _frame: FrameType | None) -> None:
        raise WorkerLost(
            "the launcher has ended this worker, as it does when another one fails",
            remedy="go on from the latest checkpoint with --resume",
        )

    def watch(wakened: socket.socket) -> None:
        while wakened.recv(1) != bytes([signal.SIGTERM]):
            pass
        time.sleep(GRACE)
        os._exit(1)

    wakened, waker = socket.socketpair()
    waker.setblocking(False)
    signal.signal(signal.SIGTERM, told)
    signal.set_wakeup_fd(waker.detach(), warn_on_full_buffer=False)
    threading.Thread(target=watch, args=[wakened], daemon=True).start()


def end_in_peace() -> None:
    """What is left is to say and keep what happened: the launcher's signal interrupts no more."""
    if threading.current_thread() is threading.main_thread():
        # Not ignored: whoever hangs is still ended after `GRACE` seconds.
        signal.signal(signal.SIGTERM, lambda _signal, _frame: None)
