"""Loggers of a run: metrics.csv always, and Weights & Biases, TensorBoard or any Lightning logger when asked for."""

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pytorch_lightning.loggers import Logger, WandbLogger
from pytorch_lightning.loggers.logger import DummyLogger, rank_zero_experiment

from depth_anything.data.address import redact_secrets
from depth_anything.disk import atomic_write, name_write_errors


def logger_nodes(logger: Mapping[str, Any] | None) -> list[Any]:
    """List the `_target_` nodes of the config's `logger`.

    Args:
        logger: Names to nodes, as `logger=[wandb,tensorboard]` composes them, or a single node. Values without a
            `_target_` are settings that nodes share, as `logger.project`.
    """
    if not logger:
        return []
    if "_target_" in logger:
        return [logger]
    return [node for node in logger.values() if isinstance(node, Mapping) and "_target_" in node]


def build_loggers(metrics: Path, added: Sequence[Logger], *, step: int, main: bool) -> list[Logger]:
    """List the loggers of a rank.

    Args:
        metrics: Path of metrics.csv, which rank 0 always writes.
        added: Loggers of the config.
        step: Step from which the run continues; later rows of metrics.csv are dropped.
        main: Whether this is rank 0. Other ranks get a DummyLogger, as Lightning's monitors need one on every rank.
    """
    if not main:
        return [DummyLogger()]
    table = MetricsCSV(metrics)
    table.rewind(step)
    wrapped = [SafeLogger(logger) for logger in added]
    if any(isinstance(logger, OfflineFallbackWandbLogger) for logger in added):
        rows = read_metrics(metrics).rows
        for logger in wrapped:
            logger.replay(rows)
    return [table, *wrapped]


@dataclass
class MetricsTable:
    """Content of metrics.csv.

    Attributes:
        columns: Names in the header.
        rows: The complete rows, column to text.
        damaged: Number of lines that are not complete rows: cut short, overwritten, zero bytes. All lines if the header
            has no step.
    """

    columns: list[str]
    rows: list[dict[str, str]]
    damaged: int


def read_metrics(path: Path) -> MetricsTable:
    """Read metrics.csv, also one that a power failure or an editor has damaged; a missing file has no rows.

    Raises:
        OSError: If the file exists and cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return MetricsTable([], [], 0)
    incomplete = bool(lines.pop().strip())  # a complete row ends with a newline
    lines = [line for line in lines if line.strip()]
    columns = _split_fields(lines[0]) if lines else []
    if columns.count("step") != 1 or len(set(columns)) < len(columns):
        return MetricsTable([], [], len(lines) + incomplete)
    rows = [
        dict(zip(columns, fields, strict=True))
        for line in lines[1:]
        if _is_valid_row(fields := _split_fields(line), columns)
    ]
    return MetricsTable(columns, rows, len(lines) - 1 - len(rows) + incomplete)


def read_latest(path: Path, prefix: str) -> dict[str, str]:
    """Read the newest numbers of metrics.csv whose names start with `prefix`; the prefix is removed; {} without any."""
    for row in reversed(read_metrics(path).rows):
        numbers = {name: value for name, value in row.items() if name.startswith(prefix) and value}
        if numbers:
            return {name.removeprefix(prefix): value for name, value in numbers.items()}
    return {}


def _split_fields(line: bytes) -> list[str]:
    """Split a line into its fields; an empty list if it is not text."""
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
    """Write one row a step to metrics.csv; a resumed run continues the file at its own step.

    Lightning's CSVLogger deletes the file of the interrupted run and rewrites the whole file at every save.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Write to `path`; the file is created with the first number."""
        super().__init__()
        self.path = Path(path)
        self._columns: list[str] = []
        self._pending: list[dict[str, Any]] = []  # rows that are not written yet
        self._written_step = -1

    @property
    def name(self) -> str:
        """Lightning's name for the logger."""
        return "csv"

    @property
    def version(self) -> str:
        """Empty: a run has one file."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run folder, which Lightning's callbacks ask for as `trainer.log_dir`."""
        return str(self.path.parent)

    def log_hyperparams(self, params: Any) -> None:
        """Do nothing: config.yaml holds them."""

    def rewind(self, step: int) -> None:
        """Drop rows after `step`, which the resumed run will write again, and damaged lines.

        A file with damaged lines is copied to metrics.csv.damaged, and named on stderr.
        """
        if not self.path.is_file():
            return
        table = read_metrics(self.path)
        if table.damaged:
            copy = self.path.with_name(f"{self.path.name}.damaged")
            shutil.copyfile(self.path, copy)
            print(
                f"{self.path} has {table.damaged} damaged lines: {len(table.rows)} complete rows are kept, and a copy "
                f"of the damaged file is {copy.name}",
                file=sys.stderr,
            )
        rows = [row for row in table.rows if int(row["step"]) <= step]
        if rows:
            self._columns, self._written_step = table.columns, int(rows[-1]["step"])
            self._rewrite(rows)
        else:
            self.path.unlink()

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add numbers to the row of `step`, and write the rows before it.

        The row of the step before waits for one step more: Lightning's DeviceStatsMonitor is one step late.
        """
        row = next((row for row in self._pending if row["step"] == step), None)
        if row is None:
            row = {"step": step}
            self._pending = sorted([*self._pending, row], key=lambda row: row["step"])
        row.update(metrics)
        # An error on one rank of several must wait for `save`, which reports it to all ranks.
        with contextlib.suppress(OSError):
            self._write(self._pending[:-2])

    def save(self) -> None:
        """Write all rows that are not written yet.

        Raises:
            OSError: If the disk is full or cannot be written. The file keeps its complete rows, and the new ones are
                written by the next `save`.
        """
        self._write(self._pending)

    def _write(self, rows: list[dict[str, Any]]) -> None:
        if not rows:
            return
        names = dict.fromkeys(name for row in rows for name in row)
        if names.keys() <= set(self._columns) and rows[0]["step"] > self._written_step:
            self._append(rows)
        else:  # a new column, or more numbers for a row that is written
            table, before = read_metrics(self.path), self._columns
            self._columns = list(dict.fromkeys([*table.columns, *before, *names]))
            by_step: dict[int, dict[str, Any]] = {}
            for row in [*table.rows, *rows]:
                by_step.setdefault(int(row["step"]), {}).update(row)
            try:
                self._rewrite([by_step[step] for step in sorted(by_step)])
            except OSError:
                self._columns = before
                raise
        self._written_step = max(self._written_step, rows[-1]["step"])
        self._pending = [row for row in self._pending if not any(row is written for written in rows)]

    def finalize(self, status: str) -> None:
        """Write what is left; after an error, which may be a full disk, without raising another one."""
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
    """Wrap a logger so that it never stops a run: after its first error it is reported and no longer called."""

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
        """The wrapped logger's experiment, opened at the first call; None after an error."""
        return self._call(lambda logger: getattr(logger, "experiment", None))

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log numbers."""
        self._call(lambda logger: logger.log_metrics(metrics, step))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Log parameters."""
        self._call(lambda logger: logger.log_hyperparams(params, *args, **kwargs))

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        """Log pictures, (H,W,3) uint8, if the wrapped logger or its experiment (TensorBoard's) accepts any."""
        self._call(lambda logger: _log_image(logger, key, images, step))

    def replay(self, rows: Sequence[Mapping[str, str]]) -> None:
        """Give the rows of metrics.csv to a wrapped logger that cannot continue its files (`replay`)."""
        if rows and hasattr(self._logger, "replay"):
            self._call(lambda logger: logger.replay(rows))

    def save(self) -> None:
        """Write what the wrapped logger buffers."""
        self._call(lambda logger: logger.save())

    def finalize(self, status: str) -> None:
        """End the wrapped logger."""
        self._call(lambda logger: logger.finalize(status))

    def _call(self, use: Callable[[Any], Any]) -> Any:
        if self._logger is None:
            return None
        try:
            return use(self._logger)
        except Exception as error:  # a service that died, a full disk, a bug of a library
            message = f"{type(error).__name__}: {error}".splitlines()[0]
            print(
                f"{type(self._logger).__name__} fails ({message}); training continues without it, and metrics.csv has "
                "every number",
                file=sys.stderr,
            )
            self._logger = None
            atexit.register(_silence_connection_errors_at_exit)  # Python calls the last one registered first
            return None


def _log_image(logger: Any, key: str, images: list[Any], step: int | None) -> None:
    if hasattr(logger, "log_image"):
        logger.log_image(key, images, step)
        return
    writer: Any = getattr(logger, "experiment", None)
    if hasattr(writer, "add_image"):
        for image in images:
            writer.add_image(key, image, step, dataformats="HWC")


def _silence_connection_errors_at_exit() -> None:
    """Keep a library that says goodbye to a dead service from printing a traceback at exit."""
    default_hook = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, ConnectionError):
            default_hook(unraisable)

    sys.unraisablehook = hook


class OfflineFallbackWandbLogger(WandbLogger):
    """Weights & Biases logger that goes offline if the service cannot be reached or rejects the key."""

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
            message = str(error).splitlines()[0]
            print(
                f"wandb goes offline ({message}); type  wandb sync  later to upload the run", file=sys.stderr
            )
            wandb.teardown()
            os.environ.pop("WANDB_API_KEY", None)  # a rejected key would be rejected offline, too
            self._offline = True
            return super().experiment

    def replay(self, rows: Sequence[Mapping[str, str]]) -> None:
        """Log the rows of metrics.csv again if the run is offline.

        wandb continues no offline folder: each start writes a new one with the same id. With the rows, the newest
        folder holds every step once; the older ones are moved to wandb/earlier, where `wandb sync --sync-all` does not
        look.
        """
        folder = Path(self.experiment.dir).parent  # opens the run
        if not self._offline:
            return
        for row in rows:
            numbers = {name: float(value) for name, value in row.items() if value and name != "step"}
            self.log_metrics(numbers, step=int(row["step"]))
        for older in folder.parent.glob(f"offline-run-*-{self.version}"):
            if older != folder:
                earlier = folder.parent / "earlier"
                earlier.mkdir(exist_ok=True)
                os.replace(older, earlier / older.name)


def wandb_run_id(name: str) -> str:
    """Turn a run's name into an id that Weights & Biases accepts; different names get different ids.

    >>> wandb_run_id("student-vits"), wandb_run_id("exp/one")
    ('student-vits', 'exp-one-79fb1d2a')
    """
    cleaned = re.sub(r"[:;,#?/'\x00-\x1f\x7f]+", "-", name)[:100].strip()
    if name and cleaned == name:
        return name
    return f"{cleaned}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def wandb_logger(*, project: str, name: str, folder: str) -> WandbLogger:
    """Open a Weights & Biases run whose id follows from the run's name, so that a requeued job continues it.

    Without a key (WANDB_API_KEY or ~/.netrc) or a network it writes offline into the run folder; `wandb sync`
    uploads it later. WANDB_BASE_URL names a server of your own.
    """
    server = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        has_login = netrc.netrc(os.environ.get("NETRC")).authenticators(server) is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        has_login = False
    offline = not (has_login or os.environ.get("WANDB_API_KEY")) or os.environ.get("WANDB_MODE") == "offline"
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
    """Disable the metadata of Weights & Biases, which include the command line, if the command line has a secret."""
    import wandb

    command_line = " ".join(sys.argv)
    if redact_secrets(command_line) == command_line:
        return {}
    return {"settings": wandb.Settings(x_disable_meta=True)}
