"""Walks through the code for measure_code.py: which files and functions of the package a command runs.

python tools/code_walks.py CHECKOUT photo           one walk, as a line of JSON
"""

import argparse
import contextlib
import inspect
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

PACKAGE = "depth_anything"
WALKS = ("photo", "frame", "sample", "key")
TITLES = {
    "photo": "a photo through predict",
    "frame": "a KITTI frame through evaluate",
    "sample": "a sample from shard to batch",
    "key": "a config key through train.py (dry run)",
}


def _name(code: CodeType) -> str:
    return f"{code.co_filename}:{code.co_firstlineno}"


class Trace:
    """Count the package's files, functions and crossings while it is active."""

    def __init__(self, package: Path) -> None:
        """Trace the files below a package's folder."""
        self.package = f"{package}{os.sep}"
        self.codes: set[CodeType] = set()
        self.calls: Counter[tuple[str, str]] = Counter()

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        """Take an event of sys.setprofile."""
        code = frame.f_code
        if event != "call" or code.co_name == "<module>" or not code.co_filename.startswith(self.package):
            return
        if code in self.codes and code.co_flags & inspect.CO_GENERATOR and frame.f_lasti > 8:
            return  # a generator that goes on
        self.codes.add(code)
        caller = frame.f_back
        while caller is not None and not caller.f_code.co_filename.startswith(self.package):
            caller = caller.f_back
        if caller is not None and caller.f_code.co_filename != code.co_filename:
            self.calls[_name(caller.f_code), _name(code)] += 1

    def start(self) -> None:
        """Count from here on, in this thread and in those to come."""
        threading.setprofile(self)
        sys.setprofile(self)

    def stop(self) -> None:
        """Count no more."""
        sys.setprofile(None)
        threading.setprofile(None)

    def counts(self) -> dict[str, Any]:
        """Return the counts, and the names of the files in the order of their names."""
        hidden = ("<lambda>", "<listcomp>", "<genexpr>", "<dictcomp>", "<setcomp>")
        files = sorted({code.co_filename.removeprefix(self.package) for code in self.codes})
        return {
            "files": len(files),
            "functions": sum(code.co_name not in hidden for code in self.codes),
            "crossings": sum(self.calls.values()),
            "distinct crossings": len(self.calls),
            "in": files,
        }


def _command_line(trace: Trace, arguments: list[str]) -> None:
    """Run `depth-anything` and trace it from where its arguments are parsed to its end."""
    from depth_anything.cli import main

    original = argparse.ArgumentParser.parse_args

    def parse(self: Any, *given: Any, **options: Any) -> Any:
        try:
            return original(self, *given, **options)
        finally:
            trace.start()

    argparse.ArgumentParser.parse_args = parse  # type: ignore[method-assign,assignment]
    try:
        _quietly(lambda: main(arguments))
    finally:
        trace.stop()
        argparse.ArgumentParser.parse_args = original  # type: ignore[method-assign]


def _quietly(command: Callable[[], Any]) -> None:
    """Run a command of the project without its output.

    Raises:
        RuntimeError: If it ends with another exit code than 0, with what it wrote.
    """
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            code = command()
        except SystemExit as end:
            code = end.code
    if code:
        raise RuntimeError(f"{code}\n{out.getvalue()}")


def _train(root: Path, *overrides: str) -> None:
    import runpy

    sys.argv = [str(root / "train.py"), *overrides]
    _quietly(lambda: runpy.run_path(sys.argv[0], run_name="__main__") and None)


def _picture(path: Path, width: int, height: int) -> None:
    import numpy as np
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    rows, columns = np.mgrid[0:height, 0:width]
    Image.fromarray(np.stack([rows % 256, columns % 256, (rows + columns) % 256], 2).astype(np.uint8)).save(
        path
    )


def _model(path: Path) -> None:
    from depth_anything import DepthAnything, save_model

    save_model(DepthAnything("vitn"), path)


def walk_photo(root: Path, package: Path) -> Trace:
    """Trace `depth-anything predict` on one photograph, the second of two runs."""
    _picture(Path("photo.jpg"), 128, 96)
    _model(Path("model.safetensors"))
    for number in (1, 2):
        trace, output = Trace(package), f"maps-{number}"
        command = ["predict", "photo.jpg", "--weights", "model.safetensors", "--output", output]
        _command_line(trace, [*command, "--device", "cpu"])
    return trace


def walk_frame(root: Path, package: Path) -> Trace:
    """Trace `depth-anything evaluate` on one frame in KITTI's layout, the second of two runs."""
    import numpy as np
    from PIL import Image

    drive = "2011_09_26_drive_0002_sync"
    _picture(Path("kitti/2011_09_26", drive, "image_02/data/0000000069.png"), 1242, 375)
    truth = Path("kitti", drive, "proj_depth/groundtruth/image_02/0000000069.png")
    truth.parent.mkdir(parents=True)
    depth = np.linspace(3, 60, 375)[:, None] * np.ones((1, 1242))
    Image.fromarray((depth * 256 * (np.indices(depth.shape).sum(0) % 5 == 0)).astype(np.uint16)).save(truth)
    _model(Path("model.safetensors"))
    for number in (1, 2):
        trace, output = Trace(package), f"report-{number}"
        command = ["evaluate", "--benchmarks", "kitti", "--root", ".", "--weights", "model.safetensors"]
        _command_line(trace, [*command, "--input-size", "70", "--output", output])
    return trace


SMALL = (
    "stage=teacher encoder=vitn batch_size=2 image_size=28 steps=1 workers=0 perturb=true trainer=cpu "
    "validation.limit=1 sources.scenes.synthetic.count=8 sources.scenes.validation.count=2 "
    "sources.scenes.synthetic.height=28 sources.scenes.synthetic.width=42"
).split()


def walk_sample(root: Path, package: Path) -> Trace:
    """Trace the making of a micro-batch of one sample, from an open shard, as the training loader asks for it."""
    from torch.utils.data import DataLoader
    from torch.utils.data._utils.fetch import _MapDatasetFetcher

    loaders: list[Any] = []
    original = DataLoader.__init__

    def remember(self: Any, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        loaders.append(self)

    DataLoader.__init__ = remember  # type: ignore[method-assign]
    _train(root, *SMALL)
    (loader,) = loaders
    fetcher = _MapDatasetFetcher(loader.dataset, True, loader.collate_fn, False)
    order = iter(loader.batch_sampler)
    for _ in range(8):
        fetcher.fetch(next(order)[:1])
    wanted, trace = next(order)[:1], Trace(package)
    trace.start()
    fetcher.fetch(wanted)
    trace.stop()
    return trace


def walk_key(root: Path, package: Path) -> Trace:
    """Trace a dry run of train.py with one key changed, the second of two."""
    _train(root, *SMALL, "recipe.head_lr=1e-4", "dry_run=true")
    trace = Trace(package)
    trace.start()
    _train(root, *SMALL, "recipe.head_lr=1e-4", "dry_run=true")
    trace.stop()
    return trace


def walk(name: str, root: Path) -> dict[str, Any]:
    """Run one walk in a process of its own and return its counts."""
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "WANDB_"))},
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    command = [sys.executable, str(Path(__file__).resolve()), str(root), name]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the walk {name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    checkout, chosen = Path(sys.argv[1]), sys.argv[2]
    print(json.dumps(globals()[f"walk_{chosen}"](checkout, checkout / PACKAGE).counts()))
