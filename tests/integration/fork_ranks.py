"""Run trainings one after another, each in a process forked from one that has imported torch and Lightning.

Not a test; test_remote.py and test_signals.py start it. A line of JSON on stdin describes a run: its folder, arguments
and environment. The answer is a line on stdout with its exit code; its output is in stdout.txt and stderr.txt of the
folder.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import hydra  # noqa: E402
import recording_train  # noqa: E402
import torch._dynamo  # noqa: E402, F401  Lightning would import it after the fork

from depth_anything.training import student  # noqa: E402, F401


def child(folder: str, arguments: list[str], environment: dict[str, str]) -> int:
    os.environ.update(environment)
    os.setsid()
    os.chdir(folder)
    for descriptor, name in ((1, "stdout.txt"), (2, "stderr.txt")):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    recording_train.obey_environment()
    sys.argv = ["train.py", *arguments]
    configs = str(recording_train.ROOT / "configs")
    try:
        hydra.main(version_base="1.3", config_path=configs, config_name="train")(recording_train.run.main)()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else 1 if end.code else 0
    return 0


for line in sys.stdin:
    process = os.fork()
    if process == 0:
        code = 70
        try:
            code = child(**json.loads(line))
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
