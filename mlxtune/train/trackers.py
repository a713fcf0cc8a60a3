"""Where figures go besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow.

Each is an extra and is imported when a recipe asks for it in `[log] report_to`.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import secrets
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mlxtune.errors import MlxtuneError, StorageError
from mlxtune.install import install_extra
from mlxtune.train.metrics import Outline, Report, Silent
from mlxtune.train.run import RECIPE, Run

Params = Mapping[str, str]

# How their own words say the statuses of run.json.
_MLFLOW_STATUS = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
# MLflow takes no more parameters at once, and no longer ones.
_MLFLOW_AT_ONCE, _MLFLOW_LONGEST = 100, 6000


@dataclass(frozen=True)
class Tracker:
    """One that is told a run's figures.

    Attributes:
        logs: takes a step and figures by name.
        closes: takes how the run ended: finished, failed or interrupted.
    """

    logs: Callable[[int, dict[str, float]], None]
    closes: Callable[[str], None]


class Trackers(Silent):
    """Tells trackers what a run reports, as a reporter that is told it itself.

    A tracker that fails while the run goes on is left alone from then on: a curve is not
    worth the hours of training.

    Args:
        names: as `[log] report_to` has them.
        run: the run; keeps by what names its trackers know it.
        params: dotted keys of the recipe and their values.
    """

    def __init__(self, names: Sequence[str], run: Run, params: Params) -> None:
        self._names = dict.fromkeys(names)
        self._run = run
        self._params = params
        self._open: dict[str, Tracker] = {}

    def started(self, outline: Outline) -> None:
        """Open them.

        Raises:
            MlxtuneError: one cannot be reached or refuses the run.
        """
        for name in self._names:
            try:
                self._open[name] = _TRACKERS[name](self._run, self._params, outline.first_step)
            except StorageError:
                raise
            except Exception as error:
                raise MlxtuneError(
                    f"{name} cannot log this run: {_first_line(error)}",
                    where="log.report_to",
                    remedy=f"mend that, or train without it: --set log.report_to=[] ({name} "
                    "itself says more with --debug)",
                ) from error

    def reported(self, report: Report) -> None:
        """Hand on a report's figures."""
        figures = report.as_entry()
        step = figures.pop("step")
        self._tell(step, {f"train/{key}": float(value) for key, value in figures.items()})

    def measured(self, step: int, figures: Mapping[str, float], best: bool) -> None:
        """Hand on held-out figures."""
        self._tell(step, {f"eval/{name}": value for name, value in figures.items()})

    @contextmanager
    def closed(self) -> Iterator[Callable[[str], None]]:
        """Close them at the end, with the status that the block has told by then."""
        status = "failed"

        def tell(how: str) -> None:
            nonlocal status
            status = how

        try:
            yield tell
        finally:
            for name, tracker in self._open.items():
                self._try(name, lambda t=tracker: t.closes(status))  # type: ignore[misc]
            self._open.clear()

    def _tell(self, step: int, figures: dict[str, float]) -> None:
        failed = [
            name
            for name, tracker in self._open.items()
            if not self._try(name, lambda t=tracker: t.logs(step, figures))  # type: ignore[misc]
        ]
        for name in failed:
            del self._open[name]

    def _try(self, name: str, act: Callable[[], None]) -> bool:
        try:
            act()
        except Exception as error:
            warnings.warn(f"{name} gets no more figures: {_first_line(error)}", stacklevel=4)
            return False
        return True


def require_trackers(names: Sequence[str]) -> None:
    """See early that the libraries are there.

    Raises:
        MlxtuneError: one isn't installed.
    """
    for name in names:
        if not all(map(_is_installed, _modules(name))):
            raise MlxtuneError(
                f"{name} is not installed",
                where="log.report_to",
                remedy=install_extra(name),
            )


def _is_installed(module: str) -> bool:
    """Whether there is such a package; a mere folder of that name, as wandb leaves, is none."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


def _modules(name: str) -> tuple[str, ...]:
    if name == "mlflow" and "MLFLOW_TRACKING_URI" not in os.environ:
        return "mlflow", "sqlalchemy", "alembic"  # what its database in a file needs
    return ("tensorboardX",) if name == "tensorboard" else (name,)


def _tensorboard(run: Run, params: Params, first_step: int) -> Tracker:
    """Event files in the run's folder.

    What an earlier process wrote of steps that are run again is purged by TensorBoard.
    """
    from tensorboardX import SummaryWriter

    purged = first_step + 1 if first_step else 0  # at 0, before any step, there is a loss too
    writer = SummaryWriter(
        str(run.path / "tensorboard"),
        purge_step=purged,
        # Files are called after the second and read by name: two may begin in the same one.
        filename_suffix=f".{first_step:09d}",
    )
    recipe = (run.path / RECIPE).read_text(encoding="utf-8")
    writer.add_text("recipe", f"```toml\n{recipe}```", first_step)

    def logs(step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)
        writer.flush()  # a killed run keeps what it reported

    def closes(status: str) -> None:
        writer.add_text("status", status)
        writer.close()

    return Tracker(logs, closes)


def _mlflow(run: Run, params: Params, first_step: int) -> Tracker:
    """A run in the store that MLFLOW_TRACKING_URI names, else in the run's own folder.

    That is a database in a file: MLflow keeps its folders of text files for old runs only.
    """
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    logging.getLogger("mlflow").setLevel(logging.WARNING)  # that it makes tables is no news
    folder = (run.path / "mlruns").absolute()
    artifacts = None
    if (store := os.environ.get("MLFLOW_TRACKING_URI")) is None:
        folder.mkdir(exist_ok=True)
        store, artifacts = f"sqlite:///{folder / 'mlflow.db'}", (folder / "artifacts").as_uri()
    client = MlflowClient(tracking_uri=store)
    if (known := _known_as(run, "mlflow")) is None:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "mlxtune")
        experiment = client.get_experiment_by_name(name)
        number = (
            experiment.experiment_id
            if experiment is not None
            else client.create_experiment(name, artifact_location=artifacts)
        )
        known = client.create_run(number, run_name=params.get("name")).info.run_id
        _keep_name(run, "mlflow", known)
        values = [Param(key, value[:_MLFLOW_LONGEST]) for key, value in params.items()]
        for at in range(0, len(values), _MLFLOW_AT_ONCE):
            client.log_batch(known, params=values[at : at + _MLFLOW_AT_ONCE])
    else:
        client.update_run(known, status="RUNNING")

    def logs(step: int, figures: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        client.log_batch(known, [Metric(k, v, now, step) for k, v in figures.items()])

    def closes(status: str) -> None:
        client.set_terminated(known, _MLFLOW_STATUS[status])

    return Tracker(logs, closes)


def _wandb(run: Run, params: Params, first_step: int) -> Tracker:
    """A run of Weights & Biases; WANDB_PROJECT, WANDB_MODE and its other variables hold."""
    import wandb

    if (known := _known_as(run, "wandb")) is None:
        known = secrets.token_hex(4)
        _keep_name(run, "wandb", known)
    told = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "mlxtune"),
        name=params.get("name"),
        id=known,
        resume="allow",
        dir=str(run.path),
        config=dict(params),
        settings=wandb.Settings(console="off"),
    )

    def logs(step: int, figures: dict[str, float]) -> None:
        told.log(figures, step=step)

    def closes(status: str) -> None:
        told.summary["status"] = status
        told.finish(exit_code=0 if status == "finished" else 1)

    return Tracker(logs, closes)


_TRACKERS: dict[str, Callable[[Run, Params, int], Tracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
}


def _known_as(run: Run, tracker: str) -> str | None:
    """What a tracker calls this run, if it has been told of it."""
    names: Any = run.status().get("trackers")
    return names.get(tracker) if isinstance(names, dict) else None


def _keep_name(run: Run, tracker: str, name: str) -> None:
    run.write_status(trackers=run.status().get("trackers", {}) | {tracker: name})


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
