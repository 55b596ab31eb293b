"""Where numbers go: a CSV file always, Weights & Biases when asked."""

import atexit
import csv
import hashlib
import io
import netrc
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger, WandbLogger
from pytorch_lightning.loggers.logger import rank_zero_experiment


class MetricsCSV(Logger):
    """One row a step in metrics.csv; a resumed run continues the file at its own step.

    Lightning's CSVLogger deletes the file of the interrupted run.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Write to `path`; nothing is created before the first number."""
        super().__init__()
        self.path = Path(path)
        self._columns: list[str] = []
        self._row: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """Lightning's name for the logger."""
        return "csv"

    @property
    def version(self) -> str:
        """There is one file a run."""
        return ""

    def log_hyperparams(self, params: Any) -> None:
        """Do nothing: config.yaml holds them."""

    def rewind(self, step: int) -> None:
        """Drop rows after `step`, which a run resumed from `step` will write again."""
        if not self.path.is_file():
            return
        with open(self.path, newline="") as file:
            rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
        self._columns = list(rows[0]) if rows else []
        self._rewrite(rows)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add numbers to the row of `step`."""
        if self._row and self._row["step"] != step:
            self.save()
        self._row.update({"step": step, **metrics})

    def save(self) -> None:
        """Write the row that is being filled."""
        if not self._row:
            return
        new = [name for name in self._row if name not in self._columns]
        if new:
            rows = []
            if self.path.is_file():
                with open(self.path, newline="") as file:
                    rows = list(csv.DictReader(file))
            self._columns += new
            self._rewrite([*rows, self._row])
        else:
            with open(self.path, "a", newline="") as file:
                csv.DictWriter(file, self._columns).writerow(self._row)
        self._row = {}

    def last(self, prefix: str) -> dict[str, str]:
        """Read the newest numbers whose names begin so, without the beginning; none where there are none."""
        self.save()
        if not self.path.is_file():
            return {}
        with open(self.path, newline="") as file:
            rows = [
                {
                    name.removeprefix(prefix): value
                    for name, value in row.items()
                    if name.startswith(prefix) and value
                }
                for row in csv.DictReader(file)
            ]
        return next((row for row in reversed(rows) if row), {})

    def finalize(self, status: str) -> None:
        """Write what is left."""
        self.save()

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_text(text.getvalue(), newline="")
        os.replace(temporary, self.path)


class SafeLogger(Logger):
    """Another logger, which never stops a run: where it fails it says so once and is not called again."""

    def __init__(self, logger: Logger) -> None:
        """Wrap `logger`."""
        super().__init__()
        self._logger: Logger | None = logger

    @property
    def name(self) -> str | None:
        """Name of the wrapped logger."""
        return self._call(lambda logger: logger.name)

    @property
    def version(self) -> int | str | None:
        """Version of the wrapped logger."""
        return self._call(lambda logger: logger.version)

    @property
    def save_dir(self) -> str | None:
        """Folder of the wrapped logger."""
        return self._call(lambda logger: logger.save_dir)

    @property
    def experiment(self) -> Any:
        """What the wrapped logger writes to, opened at the first call; None where it has failed."""
        return self._call(lambda logger: getattr(logger, "experiment", None))

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log numbers."""
        self._call(lambda logger: logger.log_metrics(metrics, step))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Log parameters."""
        self._call(lambda logger: logger.log_hyperparams(params, *args, **kwargs))

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        """Log pictures where the wrapped logger takes any."""
        self._call(
            lambda logger: logger.log_image(key, images, step) if hasattr(logger, "log_image") else None
        )

    def save(self) -> None:
        """Write what the wrapped logger holds back."""
        self._call(lambda logger: logger.save())

    def finalize(self, status: str) -> None:
        """End the wrapped logger."""
        self._call(lambda logger: logger.finalize(status))

    def _call(self, use: Callable[[Any], Any]) -> Any:
        if self._logger is None:
            return None
        try:
            return use(self._logger)
        except Exception as error:  # a service that died, a disk that is full, a library's own fault
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            print(
                f"{type(self._logger).__name__} fails ({said}); training goes on without it, and metrics.csv has "
                "every number",
                file=sys.stderr,
            )
            self._logger = None
            atexit.register(_ignore_lost_connections)  # Python calls the last one registered first
            return None


def _ignore_lost_connections() -> None:
    """Keep a library's farewell to a service that has died from printing a traceback at exit."""
    told = sys.unraisablehook

    def hook(lost: Any) -> None:
        if not isinstance(lost.exc_value, ConnectionError):
            told(lost)

    sys.unraisablehook = hook


class OfflineWandbLogger(WandbLogger):
    """Weights & Biases, which goes offline where the service cannot be reached or refuses the key."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run, opened at the first call."""
        import wandb

        try:
            return super().experiment
        except wandb.errors.CommError as error:  # of the network, or of the key
            if self._offline:
                raise
            said = str(error).splitlines()[0]
            print(f"wandb goes offline ({said}); type  wandb sync  later to send the run", file=sys.stderr)
            wandb.teardown()
            os.environ.pop("WANDB_API_KEY", None)  # one that is refused would be refused offline, too
            self._offline = True
            return super().experiment


def legal_id(name: str) -> str:
    """Make a run's name an id that Weights & Biases takes; the same for the same name, and another for another.

    >>> legal_id("student-vits"), legal_id("exp/one")
    ('student-vits', 'exp-one-79fb1d2a')
    """
    kept = re.sub(r"[:;,#?/'\x00-\x1f\x7f]+", "-", name)[:100].strip()
    if name and kept == name:
        return name
    return f"{kept}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def wandb_logger(*, project: str, name: str, folder: str) -> WandbLogger:
    """Open a Weights & Biases run whose id follows from the run's name, so that a requeued job goes on with it.

    Without a key (WANDB_API_KEY or ~/.netrc) or a network it writes offline into the run folder; `wandb sync` sends
    it later.
    """
    try:
        known = netrc.netrc().authenticators("api.wandb.ai") is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        known = False
    offline = not (known or os.environ.get("WANDB_API_KEY")) or os.environ.get("WANDB_MODE") == "offline"
    Path(folder).mkdir(parents=True, exist_ok=True)
    return OfflineWandbLogger(
        project=project, name=name[:128], id=legal_id(name), resume="allow", save_dir=folder, offline=offline
    )
