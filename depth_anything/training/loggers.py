"""Where numbers go: a CSV file always, Weights & Biases when asked."""

import atexit
import contextlib
import csv
import errno
import hashlib
import io
import netrc
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger, WandbLogger
from pytorch_lightning.loggers.logger import rank_zero_experiment

from depth_anything.data.address import redact_secrets
from depth_anything.disk import atomic_write, name_write_errors


@dataclass
class MetricsTable:
    """What metrics.csv holds.

    Attributes:
        columns: The names of its header.
        rows: The whole rows, column to text.
        damaged: How many lines are no whole row: cut short, overwritten, of zero bytes. With a header that has no
            step, all of them.
    """

    columns: list[str]
    rows: list[dict[str, str]]
    damaged: int


def read_metrics(path: Path) -> MetricsTable:
    """Read metrics.csv, whatever a power cut or an editor has left of it; a missing file has no rows.

    Raises:
        OSError: If it is there and cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return MetricsTable([], [], 0)
    cut = bool(lines.pop().strip())  # every row that was written whole ends its line
    lines = [line for line in lines if line.strip()]
    columns = _split_fields(lines[0]) if lines else []
    if columns.count("step") != 1 or len(set(columns)) < len(columns):
        return MetricsTable([], [], len(lines) + cut)
    found = [
        dict(zip(columns, row, strict=True))
        for line in lines[1:]
        if _is_valid_row(row := _split_fields(line), columns)
    ]
    return MetricsTable(columns, found, len(lines) - 1 - len(found) + cut)


def _split_fields(line: bytes) -> list[str]:
    """Split a line into its fields; none where it holds what is no text."""
    try:
        text = line.decode("utf-8-sig").strip()
        return next(csv.reader([text]), []) if text.isprintable() else []
    except (UnicodeDecodeError, csv.Error):
        return []


def _is_valid_row(fields: list[str], columns: list[str]) -> bool:
    if len(fields) != len(columns):
        return False
    try:
        int(fields[columns.index("step")])
        return all(isinstance(float(value), float) for value in fields if value)
    except ValueError:
        return False


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
        self._waiting: list[dict[str, Any]] = []

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
        """Drop rows after `step`, which a run resumed from `step` will write again, and lines that are no rows.

        A file with damaged lines is kept as metrics.csv.damaged, and named on standard error.
        """
        if not self.path.is_file():
            return
        table = read_metrics(self.path)
        if table.damaged:
            aside = self.path.with_name(f"{self.path.name}.damaged")
            shutil.copyfile(self.path, aside)
            print(
                f"{self.path} has {table.damaged} damaged lines: {len(table.rows)} whole rows are kept, and the file "
                f"as it was is {aside.name}",
                file=sys.stderr,
            )
        rows = [row for row in table.rows if int(row["step"]) <= step]
        if rows:
            self._columns = table.columns
            self._rewrite(rows)
        else:
            self.path.unlink()

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add numbers to the row of `step`; the row before it is written, if need be with a later one."""
        if self._row and self._row["step"] != step:
            with contextlib.suppress(
                OSError
            ):  # on one rank of several: `save`, which all ranks hear of, raises it
                self.save()
        self._row.update({"step": step, **metrics})

    def save(self) -> None:
        """Write the row that is being filled, and those that could not be written before.

        Raises:
            OSError: If the disk is full or cannot be written. The file keeps its whole rows, and the new ones wait.
        """
        if self._row:
            self._waiting.append(self._row)
            self._row = {}
        if not self._waiting:
            return
        names = dict.fromkeys(name for row in self._waiting for name in row)
        if names.keys() <= set(self._columns):
            self._append(self._waiting)
        else:
            table, before = read_metrics(self.path), self._columns
            self._columns = list(dict.fromkeys([*table.columns, *before, *names]))
            try:
                self._rewrite([*table.rows, *self._waiting])
            except OSError:
                self._columns = before
                raise
        self._waiting = []

    def last(self, prefix: str) -> dict[str, str]:
        """Read the newest numbers whose names begin so, without the beginning; none where there are none."""
        self.save()
        rows = [
            {
                name.removeprefix(prefix): value
                for name, value in row.items()
                if name.startswith(prefix) and value
            }
            for row in read_metrics(self.path).rows
        ]
        return next((row for row in reversed(rows) if row), {})

    def finalize(self, status: str) -> None:
        """Write what is left; after an error, which may be a full disk, as far as it can be written."""
        with contextlib.nullcontext() if status == "success" else contextlib.suppress(OSError):
            self.save()

    def _append(self, rows: list[dict[str, Any]]) -> None:
        with name_write_errors(self.path), open(self.path, "ab", buffering=0) as file:
            end = file.tell()
            try:
                text = self._text(rows)
                if file.write(text) < len(text):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(end)
                raise

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(self.path, self._text(rows, header=True))

    def _text(self, rows: list[dict[str, Any]], *, header: bool = False) -> bytes:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns, restval="")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()


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
            atexit.register(_silence_connection_errors_at_exit)  # Python calls the last one registered first
            return None


def _silence_connection_errors_at_exit() -> None:
    """Keep a library's farewell to a service that has died from printing a traceback at exit."""
    told = sys.unraisablehook

    def hook(lost: Any) -> None:
        if not isinstance(lost.exc_value, ConnectionError):
            told(lost)

    sys.unraisablehook = hook


class OfflineFallbackWandbLogger(WandbLogger):
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


def wandb_run_id(name: str) -> str:
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
    return OfflineFallbackWandbLogger(
        project=project,
        name=name[:128],
        id=wandb_run_id(name),
        resume="allow",
        save_dir=folder,
        offline=offline,
        **_command_line_settings(),
    )


def _command_line_settings() -> dict[str, Any]:
    """Have Weights & Biases store no metadata where what was typed, which belongs to it, has a secret."""
    import wandb

    typed = " ".join(sys.argv)
    return {"settings": wandb.Settings(x_disable_meta=True)} if redact_secrets(typed) != typed else {}
