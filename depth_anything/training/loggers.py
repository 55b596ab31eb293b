"""Where numbers go: a CSV file always, Weights & Biases when asked."""

import csv
import io
import netrc
import os
import sys
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger, WandbLogger

from depth_anything.data.address import told


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


def wandb_logger(*, project: str, name: str, folder: str) -> WandbLogger:
    """Open a Weights & Biases run whose id is the run's name, so that a requeued job goes on with the same run.

    Without a key (WANDB_API_KEY or ~/.netrc) it writes offline into the run folder; `wandb sync` sends it later.
    """
    try:
        known = netrc.netrc().authenticators("api.wandb.ai") is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        known = False
    offline = not (known or os.environ.get("WANDB_API_KEY")) or os.environ.get("WANDB_MODE") == "offline"
    Path(folder).mkdir(parents=True, exist_ok=True)
    return WandbLogger(
        project=project,
        name=name,
        id=name,
        resume="allow",
        save_dir=folder,
        offline=offline,
        **_without_typed(),
    )


def _without_typed() -> dict[str, Any]:
    """Have Weights & Biases store no metadata where what was typed, which belongs to it, has a secret."""
    import wandb

    typed = " ".join(sys.argv)
    return {"settings": wandb.Settings(x_disable_meta=True)} if told(typed) != typed else {}
