"""metrics.csv has one row a step and is continued by a resumed run; other loggers never stop a run."""

import csv
import os
import resource
import sys
from pathlib import Path
from typing import Any

import pytest
from fork_server import ForkServer
from pytorch_lightning.loggers import Logger

from depth_anything.training import loggers
from depth_anything.training.loggers import MetricsCSV, SafeLogger, wandb_logger, wandb_run_id


def read_rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_numbers_of_a_step_share_a_row(tmp_path: Path) -> None:
    log = MetricsCSV(tmp_path / "metrics.csv")
    log.log_metrics({"loss": 1.0}, step=1)
    log.log_metrics({"loss": 0.5}, step=2)
    log.log_metrics({"val_d1": 0.9}, step=2)
    log.log_metrics({"loss": 0.25}, step=3)
    log.save()
    assert read_rows(log.path) == [
        {"step": "1", "loss": "1.0", "val_d1": ""},
        {"step": "2", "loss": "0.5", "val_d1": "0.9"},
        {"step": "3", "loss": "0.25", "val_d1": ""},
    ]


@pytest.mark.parametrize("saved", [True, False])
def test_numbers_that_come_late_join_the_row_of_their_step(tmp_path: Path, saved: bool) -> None:
    """Lightning's DeviceStatsMonitor logs a step after the next one has begun; a checkpoint may have saved the row."""
    log = MetricsCSV(tmp_path / "metrics.csv")
    for step in range(1, 5):
        log.log_metrics({"loss": float(step)}, step=step)
        if saved:
            log.save()
        log.log_metrics({"late": step - 1.0}, step=step - 1)
    log.save()
    assert [(row["step"], row["loss"], row["late"]) for row in read_rows(log.path)] == [
        ("0", "", "0.0"), ("1", "1.0", "1.0"), ("2", "2.0", "2.0"), ("3", "3.0", "3.0"), ("4", "4.0", ""),
    ]  # fmt: skip


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
    assert [int(row["step"]) for row in read_rows(path)] == [1, 2, 3, 4, 5]
    assert [float(row["loss"]) for row in read_rows(path)] == [
        float(step) if step <= resumed else 10.0 * step for step in range(1, 6)
    ]


def write_steps(path: Path, steps: int = 4) -> bytes:
    """Log steps and return the bytes of the file."""
    log = MetricsCSV(path)
    for step in range(1, steps + 1):
        log.log_metrics({"loss": float(step), "lr": 0.5}, step=step)
    log.save()
    return path.read_bytes()


DAMAGE = {
    "zeros at the end": (lambda b: b + bytes(512), [1, 2, 3, 4]),
    "the last row is zeros": (lambda b: b[:-11] + bytes(11), [1, 2, 3]),
    "half a row": (lambda b: b[:-5], [1, 2, 3]),
    "a row without the end of its line": (lambda b: b[:-2], [1, 2, 3]),
    "half a row, then zeros": (lambda b: b[:-5] + bytes(4096), [1, 2, 3]),
    "garbage in the middle": (lambda b: b.replace(b"2,2.0", b"\xff\xfe\x00,"), [1, 3, 4]),
    "a number that is none": (lambda b: b.replace(b"2,2.0", b"2,2.0.1"), [1, 3, 4]),
    "a step that is none": (lambda b: b.replace(b"2,2.0", b"two,2.0"), [1, 3, 4]),
    "a field too many": (lambda b: b.replace(b"3,3.0", b"3,3.0,7"), [1, 2, 4]),
    "an open quote": (lambda b: b.replace(b"3,3.0", b'3,"3.0'), [1, 2, 4]),
    "a header of zeros": (lambda b: bytes(10) + b[10:], []),
    "a header without a step": (lambda b: b.replace(b"step", b"epoch"), []),
    "a header with a name twice": (lambda b: b.replace(b"step,loss", b"step,step"), []),
    "zeros alone": (lambda b: bytes(len(b)), []),
    "binary garbage": (lambda b: bytes(range(256)) * 9, []),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_lines_are_dropped_and_reported(
    tmp_path: Path, damage: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    change, intact = damage
    path = tmp_path / "metrics.csv"
    path.write_bytes(damaged := change(write_steps(path)))
    log = MetricsCSV(path)
    log.rewind(4)
    printed = capsys.readouterr().err
    assert str(path) in printed and f"{len(intact)} complete rows" in printed
    assert (tmp_path / "metrics.csv.damaged").read_bytes() == damaged
    log.log_metrics({"loss": 9.0, "lr": 0.5}, step=5)
    log.save()
    assert [int(row["step"]) for row in read_rows(path)] == [*intact, 5]
    assert [row["loss"] for row in read_rows(path)] == [*(f"{step}.0" for step in intact), "9.0"]


@pytest.mark.parametrize(
    "change",
    [lambda b: b, lambda b: b.replace(b"\r\n", b"\n"), lambda b: b"\xef\xbb\xbf" + b, lambda b: b + b"\r\n"],
    ids=["as written", "LF", "byte order mark", "empty line"],
)
def test_changes_that_editors_make_are_not_damage(
    tmp_path: Path, change: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(change(write_steps(path)))
    log = MetricsCSV(path)
    log.rewind(3)
    log.log_metrics({"loss": 7.0, "lr": 0.5}, step=4)
    log.save()
    assert [row["loss"] for row in read_rows(path)] == ["1.0", "2.0", "3.0", "7.0"]
    assert capsys.readouterr().err == "" and len(list(tmp_path.iterdir())) == 1


def test_new_columns_are_added_to_an_older_table(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("old,step,loss\n7,1,0.5\n8,2,0.25\n")
    log = MetricsCSV(path)
    log.rewind(2)
    log.log_metrics({"loss": 0.125, "valid_share": 1.0}, step=3)
    log.save()
    assert read_rows(path) == [
        {"old": "7", "step": "1", "loss": "0.5", "valid_share": ""},
        {"old": "8", "step": "2", "loss": "0.25", "valid_share": ""},
        {"old": "", "step": "3", "loss": "0.125", "valid_share": "1.0"},
    ]


def limit_files(bytes_: int) -> tuple[int, int]:
    """Limit the size of files, as a full disk does; return the previous limits."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, before[1]))
    return before


@pytest.mark.parametrize("columns", ["known", "new"])
def test_after_a_full_disk_the_waiting_rows_are_written(tmp_path: Path, columns: str) -> None:
    path = tmp_path / "metrics.csv"
    log = MetricsCSV(path)
    log.log_metrics({"loss": 1.0}, step=1)
    log.save()
    before = path.read_bytes()
    more = {"loss": 2.0} if columns == "known" else {"loss": 2.0, "val_d1": 0.5}
    limits = limit_files(len(before) + 3)
    try:
        log.log_metrics(more, step=2)
        log.log_metrics({"loss": 3.0}, step=3)  # the row of step 2 does not fit and waits
        with pytest.raises(OSError) as raised:
            log.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(path) in str(raised.value)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["metrics.csv"]
    log.finalize("failed")
    assert [row["loss"] for row in read_rows(path)] == ["1.0", "2.0", "3.0"]


class Failing(Logger):
    """A logger that fails in one method, as one whose service has died."""

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
def test_a_failing_logger_is_reported_once_and_no_longer_called(
    where: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers.atexit, "register", lambda function: None)
    inner = Failing(where)
    logger = SafeLogger(inner)
    for _ in range(2):
        values = [logger.name, logger.version, logger.experiment]
        logger.log_metrics({"loss": 1.0}, step=1)
        logger.log_hyperparams({})
        logger.log_image("depth", [], step=1)
        logger.save()
        logger.finalize("success")
    printed = capsys.readouterr().err
    if where == "nowhere":
        assert (printed, inner.calls, values) == ("", 2 * len(PLACES), ["x", "1", "run"])
    else:
        assert printed.count("Failing") == 1 and "the service is gone" in printed and "metrics.csv" in printed
        assert inner.calls == PLACES.index(where) + 1


def test_a_logger_without_log_image_gets_no_pictures() -> None:
    SafeLogger(MetricsCSV("metrics.csv")).log_image("depth", [], step=1)


@pytest.mark.parametrize("name", ["exp/one", "a:b", " a ", "/", "", "x" * 300, "a\nb", "é/ß"])
def test_wandb_run_id_replaces_characters_that_wandb_rejects(name: str) -> None:
    run_id = wandb_run_id(name)
    assert run_id and run_id == run_id.strip() and len(run_id) <= 128 and not set(":;,#?/'\n") & set(run_id)
    assert run_id == wandb_run_id(name) != wandb_run_id(name + "/2")


def test_names_that_differ_only_in_rejected_characters_get_different_ids() -> None:
    assert (
        len({wandb_run_id(name) for name in ("exp/one", "exp:one", "exp-one", "exp//one", "exp/one ")}) == 5
    )


@pytest.mark.parametrize("name", ["teacher-vitt-tiny", "a_b.c", "a b", "x" * 100])
def test_a_valid_name_is_its_own_id(name: str) -> None:
    assert wandb_run_id(name) == name


@pytest.mark.parametrize(("server", "offline"), [(None, True), ("https://wandb.lab:8080", False)])
def test_the_key_of_a_server_of_your_own_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: str | None, offline: bool
) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    if server is not None:
        monkeypatch.setenv("WANDB_BASE_URL", server)
    monkeypatch.setenv("NETRC", str(tmp_path / "keys"))
    (tmp_path / "keys").write_text("machine wandb.lab login user password key\n")
    assert wandb_logger(project="p", name="n", folder=str(tmp_path))._offline == offline


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
    ("environment", "action", "message"),
    [
        ({"WANDB_MODE": "offline"}, "kill", "continues without it"),
        ({"WANDB_API_KEY": "refused", "WANDB_BASE_URL": "http://127.0.0.1:9"}, "leave", "offline"),
    ],
)
def test_wandb_that_dies_or_rejects_the_key_does_not_stop_a_run(
    tmp_path: Path, environment: dict[str, str], action: str, message: str, fork_server: ForkServer
) -> None:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    done = fork_server.run(
        [sys.executable, "-c", TRAINING, str(tmp_path), action],
        env={**clean, "WANDB_SILENT": "true", **environment},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [wandb_run_id("exp/one"), "trained"]
    assert message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert list(tmp_path.glob("wandb/offline-run-*"))


CONTINUED = """
import os, signal, sys
from pathlib import Path
from depth_anything.training.loggers import build_loggers, wandb_logger
run, first, last, end = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
wandb = wandb_logger(project="p", name="exp/one", folder=str(run))
loggers = build_loggers(run / "metrics.csv", [wandb], step=first - 1, main=True)
for step in range(first, last + 1):
    for logger in loggers:
        logger.log_metrics({"loss": 1 / step, "run": float(first)}, step=step)
loggers[0].save()
if end == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
for logger in loggers:
    logger.finalize("success")
wandb.experiment.finish()
"""


def read_wandb_history(path: Path) -> list[dict[str, float]]:
    """Read the rows of a .wandb file: records of protobuf in blocks, as in LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, start, rows, data = path.read_bytes(), 7, [], b""
    while start + 7 <= len(content):
        if 32768 - start % 32768 < 7:  # no room for a header at the end of a block
            start += 32768 - start % 32768
        size, kind = int.from_bytes(content[start + 4 : start + 6], "little"), content[start + 6]
        data += content[start + 7 : start + 7 + size]
        start += 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            record = Record.FromString(data)
            names = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            rows += [{name: float(value) for name, value in names.items()}] if names else []
            data = b""
    return rows


def test_an_offline_run_of_wandb_holds_every_step_once_after_restarts(
    tmp_path: Path, fork_server: ForkServer
) -> None:
    """Killed after step 4, continued from step 2, ended at 6, continued to 8."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    env = {**clean, "WANDB_SILENT": "true", "WANDB_MODE": "offline"}
    for first, last, end in ((1, 4, "kill"), (3, 6, "end"), (7, 8, "end")):
        words = ["-c", CONTINUED, str(tmp_path), str(first), str(last), end]
        done = fork_server.run([sys.executable, *words], env=env)
        assert done.returncode == (-9 if end == "kill" else 0), done.stderr
    run_id = wandb_run_id("exp/one")
    (newest,) = tmp_path.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb")
    rows = read_wandb_history(newest)
    assert [(row["trainer/global_step"], row["run"]) for row in rows] == [
        (step, first) for first, last in ((1, 2), (3, 6), (7, 8)) for step in range(first, last + 1)
    ]
    assert [row["loss"] for row in rows] == pytest.approx([1 / step for step in range(1, 9)])
    assert len(list(tmp_path.glob("wandb/earlier/offline-run-*"))) == 2
