"""Run Python commands in processes forked from one that has imported torch, Lightning and Hydra.

A command such as `python train.py stage=teacher` then starts in a fraction of a second instead of six. The forked
process has the arguments, folder, environment, output and exit code of a fresh one. Commands that start ranks of
their own need a real process: see `needs_own_process`.

This file is both the client (`ForkServer`) and, run as a script, the server: a line of JSON on stdin describes a
command, the answer is a line on stdout with its exit code.
"""

import atexit
import json
import os
import runpy
import select
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
Completed = subprocess.CompletedProcess[str]


def needs_own_process(command: Sequence[str]) -> bool:
    """Return whether a command must not be forked: Lightning starts its ranks by the command line of the process."""
    return any(
        word == "trainer=ddp" or word.startswith(("trainer.devices=", "trainer.num_")) for word in command
    )


class ForkServer:
    """A process that forks; commands run one after another. Use as a context manager."""

    def __init__(self) -> None:
        """Start nothing yet: the server starts with the first command."""
        self._process: subprocess.Popen[str] | None = None

    def run(
        self, command: Sequence[str], *, cwd: Path, env: Mapping[str, str], timeout: float = 900
    ) -> Completed:
        """Run `python SCRIPT …` or `python -m MODULE …`, as `subprocess.run(capture_output=True, text=True)` does.

        Args:
            command: The words; the first is this Python.
            cwd: Its folder.
            env: Its whole environment.
            timeout: Seconds until the server and the command are killed.

        Raises:
            subprocess.TimeoutExpired: If it takes longer.
        """
        if needs_own_process(command):
            return subprocess.run(
                command, cwd=cwd, env=dict(env), capture_output=True, text=True, timeout=timeout
            )
        server = self._process = self._process or self._start()
        assert server.stdin is not None and server.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            files = [str(Path(folder) / name) for name in ("stdout", "stderr")]
            job = {"words": list(command[1:]), "cwd": str(cwd), "environment": dict(env), "files": files}
            print(json.dumps(job), file=server.stdin, flush=True)
            if not select.select([server.stdout], [], [], timeout)[0]:
                self._kill()
                raise subprocess.TimeoutExpired(list(command), timeout)
            code = int(server.stdout.readline())
            stdout, stderr = (Path(file).read_text(encoding="utf-8", errors="replace") for file in files)
        return subprocess.CompletedProcess(list(command), code, stdout, stderr)

    def close(self) -> None:
        """End the server."""
        if self._process is not None:
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.close()
            self._process.wait()
            self._process.stdout.close()
            self._process = None

    def _start(self) -> "subprocess.Popen[str]":
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        return subprocess.Popen(
            [sys.executable, __file__],
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def run_job(words: list[str], cwd: str, environment: dict[str, str], files: list[str]) -> int:
    """Become the process of a command, run it, and return its exit code."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for descriptor, name in enumerate(files, start=1):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    added = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    try:
        if words[0] == "-m":
            sys.path[:0] = [cwd, *added]
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
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


def serve() -> None:
    """Import what every command imports, then fork for each line of stdin."""
    sys.path[0] = str(ROOT)
    import hydra  # noqa: F401
    import torch._dynamo  # noqa: F401  Lightning would import it after the fork

    from depth_anything import cli  # noqa: F401
    from depth_anything.training import command, run, student  # noqa: F401

    del sys.path[0]
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            code = 70
            try:
                code = run_job(**json.loads(line))
                atexit._run_exitfuncs()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
