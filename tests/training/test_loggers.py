"""metrics.csv: one row a step, continued by a resumed run, and wandb offline without a key."""

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning.loggers import Logger

from depth_anything.training import loggers
from depth_anything.training.loggers import MetricsCSV, SafeLogger, legal_id


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


class Failing(Logger):
    """Fails in one of its methods, as a service that has died does."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.calls = where, 0

    def _at(self, place: str) -> None:
        self.calls += 1
        if place == self.where:
            raise ConnectionResetError("the service is gone")

    @property
    def name(self) -> str:
        self._at("name")
        return "x"

    @property
    def version(self) -> str:
        self._at("version")
        return "1"

    @property
    def experiment(self) -> str:
        self._at("experiment")
        return "run"

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        self._at("log_metrics")

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self._at("log_hyperparams")

    def log_image(self, key: str, images: Any, step: Any = None) -> None:
        self._at("log_image")

    def save(self) -> None:
        self._at("save")

    def finalize(self, status: str) -> None:
        self._at("finalize")


PLACES = ["name", "version", "experiment", "log_metrics", "log_hyperparams", "log_image", "save", "finalize"]


@pytest.mark.parametrize("where", [*PLACES, "nowhere"])
def test_a_logger_that_fails_is_told_of_once_and_left_alone(
    where: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers.atexit, "register", lambda function: None)
    inner = Failing(where)
    logger = SafeLogger(inner)
    for _ in range(2):
        said = [logger.name, logger.version, logger.experiment]
        logger.log_metrics({"loss": 1.0}, step=1)
        logger.log_hyperparams({})
        logger.log_image("depth", [], step=1)
        logger.save()
        logger.finalize("success")
    told = capsys.readouterr().err
    if where == "nowhere":
        assert (told, inner.calls, said) == ("", 2 * len(PLACES), ["x", "1", "run"])
    else:
        assert told.count("Failing") == 1 and "the service is gone" in told and "metrics.csv" in told
        assert inner.calls == PLACES.index(where) + 1


def test_a_logger_without_pictures_is_given_none() -> None:
    SafeLogger(MetricsCSV("metrics.csv")).log_image("depth", [], step=1)


@pytest.mark.parametrize("name", ["exp/one", "a:b", " a ", "/", "", "x" * 300, "a\nb", "é/ß"])
def test_a_name_that_is_no_id_becomes_one(name: str) -> None:
    made = legal_id(name)
    assert made and made == made.strip() and len(made) <= 128 and not set(":;,#?/'\n") & set(made)
    assert made == legal_id(name) != legal_id(name + "/2")


def test_names_that_differ_in_what_no_id_has_stay_apart() -> None:
    assert len({legal_id(name) for name in ("exp/one", "exp:one", "exp-one", "exp//one", "exp/one ")}) == 5


@pytest.mark.parametrize("name", ["teacher-vitt-tiny", "a_b.c", "a b", "x" * 100])
def test_a_name_that_is_an_id_stays(name: str) -> None:
    assert legal_id(name) == name


TRAINING = """
import os, sys, time
from depth_anything.training.loggers import SafeLogger, wandb_logger
logger = SafeLogger(wandb_logger(project="p", name="exp/one", folder=sys.argv[1]))
print(logger.experiment.id, flush=True)
logger.log_metrics({"loss": 1.0}, step=1)
children = [int(pid) for pid in os.listdir("/proc") if pid.isdecimal() and pid != str(os.getpid())]
def parent(pid):
    try:
        return int(open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[1])
    except OSError:
        return 0
for pid in [pid for pid in children if sys.argv[2] == "kill" and parent(pid) == os.getpid()]:
    os.kill(pid, 9)
while sys.argv[2] == "kill" and logger._logger is not None:
    logger.log_metrics({"loss": 1.0}, step=2)
    time.sleep(0.05)
logger.finalize("success")
print("trained", flush=True)
"""


@pytest.mark.parametrize(
    ("environment", "what", "said"),
    [
        ({"WANDB_MODE": "offline"}, "kill", "training goes on"),
        ({"WANDB_API_KEY": "refused"}, "leave", "offline"),
    ],
)
def test_wandb_that_dies_or_refuses_the_key_does_not_stop_a_run(
    tmp_path: Path, environment: dict[str, str], what: str, said: str
) -> None:
    pytest.importorskip("wandb")
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    done = subprocess.run(
        [sys.executable, "-c", TRAINING, str(tmp_path), what],
        env={**clean, "WANDB_SILENT": "true", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [legal_id("exp/one"), "trained"]
    assert said in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert list(tmp_path.glob("wandb/offline-run-*"))
