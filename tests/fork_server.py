"""Run Python commands in processes forked from one that has imported torch, Lightning and Hydra.

A command such as `python train.py stage=teacher` then starts in a fraction of a second instead of six. The forked
process has the arguments, folder, environment, output and exit code of a fresh one. Ranks that Lightning starts, of a
command with trainer.devices=N, are forked too, and run the command line that Lightning gives them. So are the workers
of `python -m torch.distributed.run`, which is torchrun.

This file is both the client (`ForkServer`) and, run as a script, the server: a line of JSON on stdin describes a
command, and a named pipe of the command gets two lines: its process id when it starts, its exit code when it ends.
"""

import atexit
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NOWHERE = Path(os.devnull)
Completed = subprocess.CompletedProcess[str]


class ForkedCommand:
    """A running command, with what is used of `subprocess.Popen`: pid, returncode and wait."""

    def __init__(self, command: Sequence[str | Path], pipe: int) -> None:
        """Wait until the command has started; `pipe` is the file descriptor of its named pipe."""
        self.command, self.returncode = list(command), None
        self._pipe, self._read = pipe, b""
        self.pid = self._read_number(600)

    pid: int
    returncode: int | None

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it ends and return its exit code, negative for a signal.

        Raises:
            subprocess.TimeoutExpired: If it takes longer.
        """
        if self.returncode is None:
            self.returncode = self._read_number(timeout)
            os.close(self._pipe)
        return self.returncode

    def _read_number(self, timeout: float | None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while b"\n" not in self._read:
            left = None if end is None else max(end - time.monotonic(), 0)
            if not select.select([self._pipe], [], [], left)[0]:
                raise subprocess.TimeoutExpired(self.command, timeout or 0)
            part = os.read(self._pipe, 100)
            if not part:
                raise RuntimeError("the process that waits for the command has died")
            self._read += part
        line, _, self._read = self._read.partition(b"\n")
        return int(line)


class ForkServer:
    """A process that forks; any number of commands run at a time. Call `close` at the end."""

    def __init__(self) -> None:
        """Start nothing yet: the server starts with the first command."""
        self._process: subprocess.Popen[str] | None = None

    def start(
        self,
        command: Sequence[str | Path],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        stdout: Path = NOWHERE,
        stderr: Path = NOWHERE,
    ) -> ForkedCommand:
        """Start `python SCRIPT …`, `python -m MODULE …` or `python -c CODE …` in a session of its own.

        Args:
            command: The words; the first is this Python.
            cwd: Its folder; this process's by default.
            env: Its whole environment; this process's by default.
            stdout: File of its output, which is appended.
            stderr: File of its errors, which are appended.
        """
        server = self._process = self._process or self._start()
        assert server.stdin is not None
        with tempfile.TemporaryDirectory() as folder:
            pipe = os.path.join(folder, "pipe")
            os.mkfifo(pipe)
            reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
            environment = dict(os.environ if env is None else env)
            job = {
                "words": [*map(str, command[1:])],
                "cwd": str(cwd or Path.cwd()),
                "environment": environment,
            }
            print(
                json.dumps({"pipe": pipe, "files": [str(stdout), str(stderr)], "job": job}),
                file=server.stdin,
                flush=True,
            )
            return ForkedCommand(command, reader)

    def run(
        self,
        command: Sequence[str | Path],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 900,
    ) -> Completed:
        """Run a command as `subprocess.run(capture_output=True, text=True)` does.

        Args:
            command: As for `start`.
            cwd: As for `start`.
            env: As for `start`.
            timeout: Seconds until the command is killed.

        Raises:
            subprocess.TimeoutExpired: If it takes longer.
        """
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder) / name for name in ("stdout", "stderr")]
            process = self.start(command, cwd=cwd, env=env, stdout=files[0], stderr=files[1])
            try:
                code = process.wait(timeout)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise
            stdout, stderr = (file.read_text(encoding="utf-8", errors="replace") for file in files)
        return subprocess.CompletedProcess([*map(str, command)], code, stdout, stderr)

    def run_ranks(
        self, file: str, function: str, *arguments: str, timeout: float = 240, count: int = 2
    ) -> None:
        """Call a function of a Python file as `function(rank, *arguments)` in `count` processes at a time.

        Raises:
            RuntimeError: If one fails, with the errors of both.
            subprocess.TimeoutExpired: If they take longer than `timeout` seconds; they are killed.
        """
        code = "import runpy, sys; runpy.run_path(sys.argv[1])[sys.argv[2]](int(sys.argv[3]), *sys.argv[4:])"
        with tempfile.TemporaryDirectory() as folder:
            errors = Path(folder) / "stderr"
            commands = [
                [sys.executable, "-c", code, file, function, str(rank), *arguments] for rank in range(count)
            ]
            environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
            ranks = [self.start(command, env=environment, stderr=errors) for command in commands]
            try:
                codes = [rank.wait(timeout) for rank in ranks]
            except subprocess.TimeoutExpired:
                for rank in ranks:
                    if rank.returncode is None:
                        os.killpg(rank.pid, signal.SIGKILL)
                raise
            if any(codes):
                raise RuntimeError(f"exit codes {codes}: {errors.read_text()}")

    def close(self) -> None:
        """End the server."""
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait()
            self._process = None

    def _start(self) -> "subprocess.Popen[str]":
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        return subprocess.Popen(
            [sys.executable, __file__],
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            start_new_session=True,
        )


# The server


TORCHRUN = ["-m", "torch.distributed.run"]


def count_ranks(words: Sequence[str]) -> int:
    """Return how many ranks a command starts, with itself: N of trainer.devices=N, the last one.

    torchrun starts one worker, and up to two others for each restart.
    """
    if list(words[:2]) == TORCHRUN:
        restarts = next((word for word in words if word.startswith("--max-restarts=")), "=0")
        return 2 + 2 * int(restarts.partition("=")[2])
    typed = [word.partition("=")[2] for word in words if word.startswith("trainer.devices=")]
    return int(typed[-1]) if typed and typed[-1].isdigit() else 1


class ForkedRank:
    """Stands in for `subprocess.Popen` in Lightning and torchrun: hands the command to a process that waits for one."""

    waiting: list[tuple[int, int]] = []
    """Process id, and the file descriptor of its pipe."""

    def __init__(
        self, args: Sequence[str], *, env: Mapping[str, str], cwd: str | None = None, **options: Any
    ) -> None:
        self.pid, pipe = self.waiting.pop(0)
        self.returncode: int | None = None
        words = [word for word in args[1:] if word != "-u"]
        job = {"words": words, "cwd": cwd or os.getcwd(), "environment": dict(env)}
        with open(pipe, "w", encoding="utf-8") as file:
            json.dump(job, file)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, timeout: float) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired([], timeout)
            time.sleep(0.05)
        assert self.returncode is not None
        return self.returncode


def fork_ranks(count: int, *, sessions: bool = False) -> dict[str, Any] | None:
    """Fork the further ranks before a command has any state, and let the launcher of Lightning or torchrun use them.

    Args:
        count: Number of ranks, with this process.
        sessions: Give each a session of its own, as torchrun does.

    Returns:
        The job of a rank in its process, when rank 0 starts it; None in the process of the command.
    """
    from pytorch_lightning.strategies.launchers import subprocess_script
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    for _ in range(1, count):
        reader, writer = os.pipe()
        process = os.fork()
        if process == 0:
            for descriptor in (writer, *(pipe for _, pipe in ForkedRank.waiting)):
                os.close(descriptor)
            if sessions:
                os.setsid()
            with open(reader, encoding="utf-8") as file:
                job = file.read()
            if not job:  # rank 0 has ended without starting it
                os._exit(0)
            return json.loads(job)
        os.close(reader)
        ForkedRank.waiting.append((process, writer))
    subprocess_script.subprocess = SimpleNamespace(Popen=ForkedRank)  # type: ignore[assignment]
    subprocess_handler.Popen = ForkedRank  # type: ignore[assignment,misc]
    return None


def run_job(files: list[str], job: dict[str, Any]) -> int:
    """Become the process of a command, run it, and return its exit code."""
    os.setsid()
    for descriptor, name in enumerate(files, start=1):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    # As one of several ranks, by others:
    started = not {"LOCAL_RANK", "SLURM_PROCID"}.isdisjoint(job["environment"])
    torchrun = job["words"][:2] == TORCHRUN
    rank = fork_ranks(1 if started else count_ranks(job["words"]), sessions=torchrun)
    return run_words(**(rank or job))


def run_words(words: list[str], cwd: str, environment: dict[str, str]) -> int:
    """Run a command in this process, and return its exit code."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    added = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    try:
        if words[0] == "-m":
            sys.path[:0] = [cwd, *added]
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] == "-c":
            sys.path[:0] = ["", *added]
            sys.argv = ["-c", *words[2:]]
            sys.modules["__main__"] = ModuleType("__main__")
            exec(compile(words[1], "<string>", "exec"), sys.modules["__main__"].__dict__)
        else:
            sys.path[:0] = [str(Path(words[0]).resolve().parent), *added]
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else 1 if end.code else 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def supervise(pipe: str, files: list[str], job: dict[str, Any], parent: int | None = None) -> None:
    """Fork the process of a command, and write its process id and exit code into a named pipe.

    Args:
        pipe: Path of the pipe.
        files: Of stdout and stderr.
        job: Arguments of `run_words`.
        parent: A process that the command must not outlive (tests/cluster/fork_python.py).
    """
    parents = [] if parent is None else [os.pidfd_open(parent)]
    process = os.fork()
    if process == 0:
        code = 70
        try:
            code = run_job(files, job)
            atexit._run_exitfuncs()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    with open(pipe, "w") as file:
        print(process, file=file, flush=True)
        if parents and select.select([*parents, os.pidfd_open(process)], [], [])[0] == parents:
            with suppress(ProcessLookupError):  # it has no group of its own yet
                os.killpg(process, signal.SIGKILL)
            os.kill(process, signal.SIGKILL)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), file=file, flush=True)


def reap_ended() -> None:
    """Wait for the children that have ended: they leave no zombies, and their CPU time counts as this process's."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:  # there are none
        pass


def serve() -> None:
    """Import what every command imports, then fork for each line of stdin."""
    sys.path[0] = str(ROOT)
    import hydra  # noqa: F401
    import torch._dynamo  # noqa: F401  Lightning would import it after the fork
    import torch.distributed.run  # noqa: F401
    import webdataset  # noqa: F401

    from depth_anything import cli  # noqa: F401
    from depth_anything.training import command, initialization, pseudolabel, run, student  # noqa: F401

    for encoder in ("vitt", "vitn"):  # of most commands
        initialization.image_size_multiple(encoder)
    del sys.path[0]
    for line in sys.stdin:
        reap_ended()
        if os.fork() == 0:
            try:
                supervise(**json.loads(line))
            finally:
                os._exit(0)
    reap_ended()
    os._exit(0)  # Python's own end takes seconds with torch


if __name__ == "__main__":
    serve()
