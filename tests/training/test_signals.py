"""Signals stop a process at once before the first step, and are recorded from then on; a second Ctrl-C always stops."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hydra.errors import InstantiationException
from omegaconf import OmegaConf

from depth_anything.training import run, signals
from depth_anything.training.lightning import requeue_slurm_job
from depth_anything.training.signals import HANDLED_SIGNALS, MAIN_PID_VARIABLE, SignalHandler, StoppedBySignal

ROOT = Path(__file__).resolve().parents[2]
ENDING = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in (
        "LOCAL_RANK",
        "RANK",
        "SLURM_PROCID",
        "SLURM_JOB_ID",
        "TORCHELASTIC_RUN_ID",
        MAIN_PID_VARIABLE,
    ):
        monkeypatch.delenv(key, raising=False)


@pytest.fixture
def handler(monkeypatch: pytest.MonkeyPatch) -> Iterator[SignalHandler]:
    before = {number: signal.getsignal(number) for number in HANDLED_SIGNALS}
    monkeypatch.setattr(signals.atexit, "register", lambda function: None)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    installed = SignalHandler()
    installed.install()
    yield installed
    for number, previous in before.items():
        signal.signal(number, previous)


def press(monkeypatch: pytest.MonkeyPatch, *times: float) -> list[int]:
    """Press Ctrl-C at these moments; return the exit codes of processes that ended at once."""
    codes: list[int] = []
    monkeypatch.setattr(signals.os, "_exit", codes.append)
    for moment in times:
        monkeypatch.setattr(signals.time, "monotonic", lambda moment=moment: moment)
        signal.raise_signal(signal.SIGINT)
    return codes


@pytest.mark.parametrize("number", ENDING)
def test_before_the_first_step_a_signal_ends_the_process_at_once(handler: SignalHandler, number: int) -> None:
    with pytest.raises(StoppedBySignal) as stopped:
        signal.raise_signal(number)
    assert stopped.value.code == 128 + number


@pytest.mark.parametrize("number", ENDING)
def test_from_the_first_step_on_a_signal_is_only_recorded(
    handler: SignalHandler, number: int, capfd: pytest.CaptureFixture[str]
) -> None:
    handler.defer()
    signal.raise_signal(number)
    with handler.interruptible():
        handler.raise_if_received()
    assert handler.received == number
    assert f"signal {number}" in capfd.readouterr().err


def test_the_first_signal_counts(handler: SignalHandler) -> None:
    """Slurm sends SIGTERM after SIGUSR1, and only SIGUSR1 requeues the job."""
    handler.defer()
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.raise_signal(number)
    assert handler.received == signal.SIGUSR1


@pytest.mark.parametrize(
    ("moments", "codes"),
    [((5.0,), []), ((5.0, 5.1), []), ((5.0, 5.1, 6.0), [130]), ((5.0, 60.0), [130])],
)
def test_a_second_press_of_ctrl_c_ends_the_process_at_once(
    handler: SignalHandler, monkeypatch: pytest.MonkeyPatch, moments: tuple[float, ...], codes: list[int]
) -> None:
    """`timeout -s INT` sends SIGINT twice, to the process and to its group."""
    handler.defer()
    assert press(monkeypatch, *moments) == codes
    assert handler.received == signal.SIGINT


def test_a_first_press_after_sigterm_is_not_a_second(
    handler: SignalHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler.defer()
    signal.raise_signal(signal.SIGTERM)
    assert press(monkeypatch, 5.0) == []


@pytest.mark.parametrize(
    ("environment", "at_once"),
    [
        ({}, True),
        ({"SLURM_PROCID": "1"}, True),  # srun ends the other tasks
        ({"LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x"}, True),  # torchrun, too
        ({"LOCAL_RANK": "1"}, False),
        ({"LOCAL_RANK": "0"}, False),
    ],
)
def test_a_rank_for_which_others_wait_only_records_a_signal(
    handler: SignalHandler, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], at_once: bool
) -> None:
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    if at_once:
        with pytest.raises(StoppedBySignal):
            signal.raise_signal(signal.SIGTERM)
        return
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(StoppedBySignal), handler.interruptible():
        raise AssertionError("not interrupted")


def test_a_rank_can_be_interrupted_inside_interruptible(
    handler: SignalHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(StoppedBySignal), handler.interruptible():
        signal.raise_signal(signal.SIGTERM)


def test_a_swallowed_exception_is_raised_again(handler: SignalHandler) -> None:
    try:
        signal.raise_signal(signal.SIGTERM)
    except BaseException:
        pass
    with pytest.raises(StoppedBySignal):
        handler.raise_if_received()


def test_a_forked_worker_ignores_the_handlers_of_its_parent(handler: SignalHandler) -> None:
    child = os.fork()
    if not child:
        try:
            signal.raise_signal(signal.SIGINT)
            os._exit(7 if handler.received == 0 else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_sighup_stays_ignored_under_nohup(handler: SignalHandler) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    handler.install()
    signal.raise_signal(signal.SIGHUP)
    assert handler.received == 0


def test_only_ranks_launched_by_lightning_exit_with_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """After any other code of a rank Lightning kills rank 0, whose exit code is the run's."""
    monkeypatch.setenv(MAIN_PID_VARIABLE, str(os.getppid()))
    assert StoppedBySignal(15).code == 143  # rank 0
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert StoppedBySignal(15).code == 0
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert StoppedBySignal(15).code == 143


@pytest.mark.parametrize(
    "raised", [RuntimeError("Lightning"), ValueError("a codec"), InstantiationException("Hydra")]
)
def test_an_error_caused_by_a_signal_does_not_replace_it(
    handler: SignalHandler, monkeypatch: pytest.MonkeyPatch, raised: Exception
) -> None:
    """A library may raise an error of its own while it handles the signal's exception."""

    def interrupted(config: Any) -> None:
        with suppress(StoppedBySignal):
            signal.raise_signal(signal.SIGTERM)
        raise raised

    monkeypatch.setattr(run, "signal_handler", handler)
    monkeypatch.setattr(run, "redact_hydra_files", lambda: None)
    monkeypatch.setattr(run, "resolve_config", interrupted)
    with pytest.raises(StoppedBySignal) as stopped:
        run.main(OmegaConf.create())
    assert stopped.value.code == 143


def test_an_error_without_a_signal_is_printed(
    handler: SignalHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(config: Any) -> None:
        raise ValueError("the disk is away")

    monkeypatch.setattr(run, "signal_handler", handler)
    monkeypatch.setattr(run, "redact_hydra_files", lambda: None)
    monkeypatch.setattr(run, "resolve_config", failing)
    with pytest.raises(SystemExit, match="error: the disk is away"):
        run.main(OmegaConf.create())


def run_train_py(folder: Path, torch_module: str) -> "subprocess.CompletedProcess[str]":
    """Run train.py where `import torch` runs other code."""
    (folder / "torch.py").write_text(torch_module)
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "stage=teacher"],
        env={**os.environ, "PYTHONPATH": f"{folder}:{ROOT}"},
        cwd=folder,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("number", [2, 10, 15])
def test_train_py_installs_the_handlers_before_slow_imports(tmp_path: Path, number: int) -> None:
    done = run_train_py(tmp_path, f"import os\nos.kill(os.getpid(), {number})\nos._exit(3)")
    assert done.returncode == 128 + number, done.stderr
    assert f"signal {number}" in done.stderr and "Traceback" not in done.stderr


def test_a_signal_while_python_exits_leaves_no_traceback(tmp_path: Path) -> None:
    """A library's exit handler, as that which closes the connections of the ranks, may take a while."""
    done = run_train_py(
        tmp_path, "import atexit, os, sys\natexit.register(os.kill, os.getpid(), 15)\nsys.exit(3)"
    )
    assert done.returncode == 3 and done.stderr == ""


@pytest.mark.parametrize(
    ("scontrol", "message"),
    [(None, "no scontrol"), ("echo denied >&2; exit 1", "denied"), ("exit 3", "3"), ("exit 0", "")],
)
def test_a_failed_requeue_is_printed(
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    scontrol: str | None,
    message: str,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "777")
    if scontrol is not None:
        (tmp_path / "scontrol").write_text(f"#!/bin/sh\n{scontrol}\n")
        (tmp_path / "scontrol").chmod(0o755)
    requeue_slurm_job()
    printed = capsys.readouterr().err
    assert ("not queued again" in printed) == bool(message)
    assert message in printed and "Errno" not in printed


@pytest.mark.parametrize(
    ("environment", "job"),
    [
        ({"SLURM_JOB_ID": "777"}, "777"),
        ({"SLURM_JOB_ID": "778", "SLURM_ARRAY_JOB_ID": "770", "SLURM_ARRAY_TASK_ID": "0"}, "770_0"),
        ({"SLURM_JOB_ID": "770", "SLURM_ARRAY_JOB_ID": "770", "SLURM_ARRAY_TASK_ID": "7"}, "770_7"),
    ],
)
@pytest.mark.parametrize(("script", "requeues"), [(None, True), ("other", True), ("same", False)])
def test_either_python_or_the_batch_script_requeues(
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    job: str,
    script: str | None,
    requeues: bool,
) -> None:
    """A job that was submitted from within a job has that one's environment, and perhaps another script."""
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    if script is not None:
        monkeypatch.setenv(signals.SCRIPT_REQUEUES_VARIABLE, job if script == "same" else "1")
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    requeue_slurm_job()
    calls = tmp_path / "calls"
    assert (calls.read_text() if calls.exists() else "") == (f"requeue {job}\n" if requeues else "")


@pytest.mark.parametrize(
    ("number", "job", "script", "queued"),
    [
        (10, "777", "", "Slurm's job 777 is not queued again; start the same command again"),
        (10, "777", "777", "; the batch script queues Slurm's job 777 again"),
        (10, None, "777", "; start the same command again"),
        (15, "777", "777", "; start the same command again"),
    ],
)
def test_sigusr1_before_the_first_step_says_whether_slurm_requeues(
    handler: SignalHandler,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Any,
    number: int,
    job: str | None,
    script: str,
    queued: str,
) -> None:
    if job is not None:
        monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv(signals.SCRIPT_REQUEUES_VARIABLE, script)
    with pytest.raises(StoppedBySignal):
        signal.raise_signal(number)
    printed = capfd.readouterr().err
    assert queued in printed
    assert ("queued again" in printed or "queues" in printed) == (number == 10 and job is not None)
