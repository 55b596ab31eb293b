"""Label photographs with several transformers models, each time in a process that dies by SIGKILL, and once more.

Not a test; test_transformers_teacher.py starts it, once for all models because transformers takes seconds to import.
Arguments: folder of the models, folder of the photographs, names of the models. For each model the labels are NAME of
the second folder, and those of a process that was not killed are whole-NAME. A line of JSON on stdout has, by name,
the exit code of the killed process and the files that it left.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import transformers
from made_teachers import label

from depth_anything.teachers.open_teacher import open_teacher
from depth_anything.teachers.teacher import Teacher

KILL_AFTER = 4  # batches: one of the second shard's two is predicted


def open_model(folder: Path) -> Teacher:
    return open_teacher(f"transformers:{folder}", multiple=14)


def label_in_fork(folder: Path, root: Path, labels: str, **typed: Any) -> int:
    """Open the teacher and label in a process of its own; returns its exit code."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            label(open_model(folder), root, labels=labels, **typed)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def main(models: Path, root: Path, names: list[str]) -> None:
    transformers.logging.disable_progress_bar()
    left = {}
    for name in names:
        open_model(models / name)  # its modules are imported here, and not in each fork
        code = label_in_fork(models / name, root, name, kill_after=KILL_AFTER)
        left[name] = (code, sorted(path.name for path in (root / name / "photos").iterdir()))
        for labels in (name, f"whole-{name}"):
            if label_in_fork(models / name, root, labels):
                sys.exit(f"labeling {labels} failed")
    print(json.dumps(left))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
