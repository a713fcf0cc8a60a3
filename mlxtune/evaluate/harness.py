"""Tasks of EleutherAI's lm-evaluation-harness, through mlx-lm's own adapter to it.

What a task asks and how it is scored is theirs; the model is loaded by us, so that a run,
a GGUF or an adapter is measured as any other model is.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlxtune.data.render import Renderer
from mlxtune.errors import MlxtuneError
from mlxtune.install import install_extra
from mlxtune.models.load import LoadedModel
from mlxtune.train.subject import find_subject


def run_tasks(
    model: str,
    tasks: Sequence[str],
    *,
    adapter: Path | None = None,
    base: str | None = None,
    task_path: Path | None = None,
    limit: int | None = None,
    progress: Callable[[str], None] = lambda _stage: None,
) -> dict[str, Any]:
    """What lm-eval measures of a model.

    Args:
        model, adapter, base: as in `find_subject`.
        tasks: names of tasks or groups.
        task_path: a folder of task files beside lm-eval's own.
        limit: the first so many documents of each task.
        progress: is told what is being done.

    Returns:
        `lm_eval`: its version, and `results`: task to metric to figure, as lm-eval names
        them.

    Raises:
        MlxtuneError: lm-eval is not installed, or has no such task.
        RunError, ModelError: the model cannot be loaded.
    """
    try:
        from lm_eval.tasks import TaskManager
        from mlx_lm.evaluate import MLXLM
    except ImportError as error:
        raise MlxtuneError(
            f"tasks are run by another package: {error.name}",
            where="--tasks",
            remedy=install_extra("lm-eval"),
        ) from None
    if task_path is not None and not task_path.is_dir():
        raise MlxtuneError("there is no such folder", where=f"--task-path {task_path}")
    # The libraries tell their progress on stdout, which is for figures.
    with redirect_stdout(sys.stderr):
        manager = _manager(TaskManager, tasks, task_path)
        for task in tasks:
            if not manager.match_tasks([task]):
                raise MlxtuneError(
                    f"lm-eval {version('lm_eval')} has no task {task!r}",
                    where="--tasks",
                    remedy="`lm-eval ls tasks` lists them; --task-path adds a folder of your own",
                )
        loaded = find_subject(model, adapter=adapter, base=base).load()
        progress(f"tasks: {', '.join(tasks)}")
        found = _evaluated(_wrapped(MLXLM, loaded), tasks, manager, limit)
    return {"lm_eval": version("lm_eval"), "results": found["results"]}


def _evaluated(wrapped: Any, tasks: Sequence[str], manager: Any, limit: int | None) -> Any:
    """What lm-eval's own entry gives.

    Raises:
        MlxtuneError: a task's data is neither here nor to be had.
    """
    from lm_eval import evaluator

    try:
        with _without_git(evaluator):
            return evaluator.simple_evaluate(
                model=wrapped,
                tasks=list(tasks),
                task_manager=manager,
                limit=limit,
                apply_chat_template=wrapped.use_chat_template,
                bootstrap_iters=1000,
                torch_random_seed=None,  # nothing here is torch's, which takes long to import
            )
    except (OSError, ConnectionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise MlxtuneError(
            f"a task's data cannot be had: {reason}",
            where="--tasks",
            remedy="most tasks download their data once; a task of files goes by --task-path",
        ) from error


@contextmanager
def _without_git(evaluator: Any) -> Iterator[None]:
    """Keep lm-eval from asking git for the commit of the folder that it is called in.

    Outside a checkout git complains past us to the terminal; inside one the commit is the
    user's own, which says nothing of the model.
    """
    asked = evaluator.get_git_commit_hash
    evaluator.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = asked


def _manager(made: Any, tasks: Sequence[str], task_path: Path | None) -> Any:
    """What knows the tasks: the folder alone if it has all, since lm-eval's are thousands."""
    if task_path is None:
        return made()
    own = made(include_path=str(task_path), include_defaults=False)
    if all(own.match_tasks([task]) for task in tasks):
        return own
    return made(include_path=str(task_path))


def _wrapped(wrapper: Any, loaded: LoadedModel) -> Any:
    """mlx-lm's adapter around a model that is loaded already: its own would load another."""
    made = wrapper.__new__(wrapper)
    super(wrapper, made).__init__()
    made._model, made.tokenizer = loaded.model, _with_rows_checked(loaded)
    made._max_tokens, made._batch_size, made._sampler = None, 8, None
    made.use_chat_template = loaded.tokenizer.chat_template is not None
    return made


class _RowsChecked(TokenizerWrapper):  # type: ignore[misc]
    """A tokenizer that refuses text with tokens that the model's embedding has no rows for."""

    _renderer: Renderer

    def encode(self, text: str, **options: Any) -> list[int]:
        """Token ids of a text, as transformers gives them.

        Raises:
            ModelError: one of them has no row in the embedding.
        """
        ids: list[int] = self._tokenizer.encode(text, **options)
        self._renderer.require_rows(ids)
        return ids


def _with_rows_checked(loaded: LoadedModel) -> TokenizerWrapper:
    """The model's tokenizer for mlx-lm's adapter, which encodes texts itself."""
    checked = copy.copy(loaded.tokenizer)
    checked.__class__ = _RowsChecked
    checked._renderer = loaded.renderer()
    return checked
