"""metrics.csv: one row a step, continued by a resumed run, and wandb offline without a key."""

import csv
from pathlib import Path

import pytest

from depth_anything.training.loggers import MetricsCSV


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_numbers_of_a_step_share_a_row(tmp_path: Path) -> None:
    log = MetricsCSV(tmp_path / "metrics.csv")
    log.log_metrics({"loss": 1.0}, step=1)
    log.log_metrics({"loss": 0.5}, step=2)
    log.log_metrics({"val_d1": 0.9}, step=2)
    log.log_metrics({"loss": 0.25}, step=3)
    log.save()
    assert rows(log.path) == [
        {"step": "1", "loss": "1.0", "val_d1": ""},
        {"step": "2", "loss": "0.5", "val_d1": "0.9"},
        {"step": "3", "loss": "0.25", "val_d1": ""},
    ]


@pytest.mark.parametrize("resumed", [0, 2, 3])
def test_a_resumed_run_writes_each_step_once(tmp_path: Path, resumed: int) -> None:
    path = tmp_path / "metrics.csv"
    log = MetricsCSV(path)
    for step in range(1, 5):
        log.log_metrics({"loss": float(step)}, step=step)
    log.save()
    log = MetricsCSV(path)
    log.rewind(resumed)
    for step in range(resumed + 1, 6):
        log.log_metrics({"loss": 10.0 * step}, step=step)
    log.save()
    assert [int(row["step"]) for row in rows(path)] == [1, 2, 3, 4, 5]
    assert [float(row["loss"]) for row in rows(path)] == [
        float(step) if step <= resumed else 10.0 * step for step in range(1, 6)
    ]
