"""Stands in for `python` in the jobs of the cluster: asks a server to fork a process that has imported torch.

A Python that imports torch and Lightning itself costs ten seconds of a core, and the tests start some fifty. The
process that Slurm starts and signals is this one. It hands signals on to the forked process, which has its output,
arguments, folder and environment, and which the server kills when this process is killed (tests/fork_server.py).
"""

import fcntl
import json
import os
import signal
import sys
from types import FrameType

FORWARDED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def main() -> None:
    """Run the command and end as it ended."""
    process = 0
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if process:
            os.kill(process, number)

    for number in FORWARDED_SIGNALS:
        signal.signal(number, forward)
    server, own = os.environ["FORK_SERVER"], os.getpid()
    pipe = f"{server}.{own}"
    os.mkfifo(pipe)
    answers = open(os.open(pipe, os.O_RDWR))  # for reading only, but opened so that it waits for the server
    job = {"words": sys.argv[1:], "cwd": os.getcwd(), "environment": dict(os.environ)}
    request = {
        "pipe": pipe,
        "files": [f"/proc/{own}/fd/{number}" for number in (1, 2)],
        "job": job,
        "parent": own,
    }
    with open(server, "w") as queue:
        fcntl.flock(queue, fcntl.LOCK_EX)  # others write to it too
        print(json.dumps(request), file=queue, flush=True)
    process = int(answers.readline())
    for number in received:
        os.kill(process, number)
    code = int(answers.readline())
    os.unlink(pipe)
    if code < 0:
        if -code in FORWARDED_SIGNALS:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(own, -code)
    os._exit(code)


if __name__ == "__main__":
    main()
