"""Measure images/s from image to map: Predictor, transformers' pipeline, and ONNX Runtime on our export.

    python benchmarks/bench_predict.py [--encoder vits] [--size 518] [--threads N] [--repeats 7] [--json FILE]

All three use the same random weights, image (518 x 518, which none of them resizes) and threads, and compute a
float32 map of the image's size from uint8 RGB. They alternate, so that other load affects all of them; a ratio
compares neighboring windows. A variant without its library is skipped. CPU only, so nothing is synchronized. `parts`
shows where Predictor spends its time.
"""

import argparse
import json
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from depth_anything import DepthAnything, Predictor, save_model

ROOT = Path(__file__).resolve().parents[1]
Side = Callable[[np.ndarray], object]


def photograph(size: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return cv2.resize(rng.integers(0, 256, (9, 9, 3), np.uint8), (size, size), interpolation=cv2.INTER_CUBIC)


def transformers_side(model: DepthAnything, folder: Path) -> Side:
    from transformers import pipeline

    save_model(model, folder / "hf", format="transformers")
    pipe = pipeline("depth-estimation", model=str(folder / "hf"), device="cpu")
    return lambda image: pipe(Image.fromarray(image))


def onnx_side(predictor: Predictor, folder: Path, threads: int) -> Side:
    import onnxruntime

    from depth_anything.export import export_model

    export_model(predictor.model, folder / "model.onnx", to="onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def predict(image: np.ndarray) -> np.ndarray:
        output = session.run(None, {name: predictor.prepare(image)[None]})[0]
        return predictor._resize(torch.from_numpy(output[0]), image.shape[:2])

    return predict


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def parts(predictor: Predictor, image: np.ndarray, repeats: int) -> dict[str, float]:
    """Median seconds of each step of `predict`."""
    prepared = predictor.prepare(image)
    output = predictor._run(prepared[None])[0]
    steps = {
        "prepare": lambda: predictor.prepare(image),
        "network": lambda: predictor._run(prepared[None]),
        "encoder": lambda: predictor.model.features(torch.from_numpy(prepared[None])),
        "resize": lambda: predictor._resize(output, image.shape[:2]),
    }
    with torch.inference_mode():
        return {
            name: statistics.median(seconds(step) for _ in range(repeats)) for name, step in steps.items()
        }


def measure(sides: dict[str, Side], image: np.ndarray, repeats: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():  # the first call of each allocates and plans
        side(image)
    for _ in range(repeats):
        for name, side in sides.items():
            times[name].append(seconds(lambda side=side: side(image)))
    return times


def metadata(arguments: argparse.Namespace) -> dict[str, Any]:
    def git(*words: str) -> str | None:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    cpu = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", cpu.read_text(), re.M) if cpu.exists() else None
    versions = {}
    for name in ("transformers", "onnxruntime"):
        if find_spec(name):
            versions[name] = __import__(name).__version__
    return {
        "commit": git("rev-parse", "HEAD"),
        "uncommitted": bool(git("status", "--porcelain")),
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": found[1] if found else platform.machine(),
        "threads": arguments.threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **versions,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoder", default="vits")
    parser.add_argument("--size", type=int, default=518)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model, image = DepthAnything(arguments.encoder), photograph(arguments.size)
    predictor = Predictor(model, device="cpu", input_size=arguments.size)
    sides: dict[str, Side] = {"predictor": predictor.predict}
    with tempfile.TemporaryDirectory() as folder:
        if find_spec("transformers"):
            sides["transformers"] = transformers_side(model, Path(folder))
        if find_spec("onnxruntime") and find_spec("depth_anything.export"):
            sides["onnxruntime"] = onnx_side(predictor, Path(folder), arguments.threads)
        times = measure(sides, image, arguments.repeats)
    result = {
        "made": metadata(arguments),
        "encoder": arguments.encoder,
        "size": arguments.size,
        "seconds": {
            name: {"median": statistics.median(values), "values": values} for name, values in times.items()
        },
        "speed_of_predictor_over": {
            name: statistics.median(b / a for a, b in zip(times["predictor"], values, strict=True))
            for name, values in times.items()
            if name != "predictor"
        },
        "parts": parts(predictor, image, arguments.repeats),
    }
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
