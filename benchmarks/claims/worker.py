"""What a job does, in a process of its own: train, write sets, judge a network, or paint a picture."""

import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.claims.figures import FIGURES_VERSION, file_digest, read_figures, row_key
from benchmarks.claims.images import (
    SCENE_TESTS,
    TestSet,
    list_tests,
    read_test,
    real_tests,
    scene_tests,
    set_digest,
)
from depth_anything import Predictor, load_model
from depth_anything.cli import main as command_line
from depth_anything.data.sample import Frame, decode_image
from depth_anything.data.shards import open_set
from depth_anything.disk import atomic_write
from depth_anything.evaluation.evaluate import evaluate, score_map
from depth_anything.evaluation.frames import compute_mean_map, read_frames
from depth_anything.evaluation.protocols import find_protocol
from depth_anything.ingest.find_files import IMAGE_SUFFIXES
from depth_anything.scenes.render import write_scenes
from depth_anything.training.check_config import resolve_config
from depth_anything.training.command import run_command
from depth_anything.training.config import RunConfig
from depth_anything.training.data import write_missing_scenes
from depth_anything.visualize import colorize, colorize_by_distance, make_panel

ROOT = Path(__file__).resolve().parents[2]
PICTURE_ROWS = 4
PICTURE_WIDTH = 200
MAX_PICTURE_BYTES = 280_000


def run(kind: str, arguments: Mapping[str, Any], log: Path, threads: int) -> None:
    """Do a job; its output goes to a log file, its exit code says whether it succeeded."""
    log.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(threads)
    JOBS[kind](**arguments)


def train(typed: Sequence[str]) -> None:
    """Run train.py; a finished run is not repeated, an interrupted one is continued."""
    print("python train.py", *typed, flush=True)
    sys.argv = ["train.py", *typed]
    run_command(ROOT / "configs")


def shard(typed: Sequence[str]) -> None:
    """Run `depth-anything shard`."""
    print("depth-anything shard", *typed, flush=True)
    sys.exit(command_line(["shard", *typed]))


def read_config(typed: Sequence[str]) -> RunConfig:
    """Compose and check a config as train.py does."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return resolve_config(compose("train", list(typed)))


def write_sets(typed: Sequence[str]) -> None:
    """Write the procedural training sets of a config."""
    sources = read_config(typed).sources
    folders = [scene.root for scene in sources.scenes.values() if scene.root != sources.validation]
    write_missing_scenes(sources.scenes, folders)


def write_test(typed: Sequence[str], look: str, count: int) -> None:
    """Write unseen scenes of a look, otherwise as the validation scenes of a config."""
    config = read_config(typed)
    root = Path(config.data_dir) / f"scenes-test-{look}"
    validation = config.sources.scenes["validation"]
    spec = replace(validation.spec, look=look, count=count, seed=SCENE_TESTS[look])
    write_scenes(root, spec, per_shard=validation.per_shard)


def judge(model: str | None, data: str, real: str | None, train_set: str, output: str) -> None:
    """Judge a network, or the mean map of the training scenes, on all tests; write the figures as JSON.

    Figures that the file already has, of the same network and the same images, are kept.

    Args:
        model: Folder of the run; None for the mean map.
        data: Folder of the sets.
        real: Folder of real images, if any.
        train_set: The labeled training set, for the mean map.
        output: The JSON file (`figures.py`).
    """
    tests = list_tests(Path(data), Path(real) if real else None)
    source: Any
    if model is None:
        source, digest = compute_mean_map(read_frames(train_set, limit=1000)), open_set(train_set).digest
    else:
        file = Path(model) / "model.safetensors"
        network = load_model(file)
        source = Predictor(network, device="cpu", input_size=network.input_size)
        digest = file_digest(file)
    known = {row_key(row): row for row in read_figures(Path(output), digest)}
    for test in tests:
        key = (test.test, test.name, set_digest(test))
        if key not in known:
            known[key] = {**judge_set(source, test), "images_digest": key[2]}
        print(known[key], flush=True)
    names = {(test.test, test.name): set_digest(test) for test in tests}
    rows = [
        row for key, row in known.items() if names.get(key[:2], key[2]) == key[2]
    ]  # none of replaced images
    content = {"version": FIGURES_VERSION, "digest": digest, "sets": rows}
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    atomic_write(Path(output), json.dumps(content, indent=1).encode())


def judge_set(source: Any, test: TestSet) -> dict[str, Any]:
    """Evaluate one set as `depth-anything evaluate` does, with boundary F1 where its truth is sharp."""
    protocol = replace(find_protocol("da2"), sharp=test.sharp)
    result = evaluate(source, read_test(test), name=test.name, protocol=protocol)
    metrics = ("abs_rel", "d1", *(["boundary_f1"] if test.sharp else []))
    means = {metric: result.means[metric] for metric in metrics}
    return {"test": test.test, "set": test.name, "images": result.images, **means}


def paint(models: Sequence[tuple[str, str]], world: str, data: str, real: str | None, output: str) -> None:
    """Paint images, their truth, and the maps of some networks in the colors of the truth.

    Args:
        models: Title and folder of the run of each column.
        world: "embedded" paints unseen scenes; "real" paints judged frames, and photographs without truth.
        data: Folder of the sets.
        real: Folder of real images.
        output: The JPEG.
    """
    predictors = []
    for _, folder in models:
        network = load_model(Path(folder) / "model.safetensors")
        predictors.append(Predictor(network, device="cpu", input_size=network.input_size))
    protocol = find_protocol("da2")
    rows = []
    for frame in _examples(world, Path(data), Path(real) if real else None):
        maps = [predictor.predict(frame.image) for predictor in predictors]
        if frame.depth is None:
            blank = np.full_like(frame.image, 255)
            painted = [colorize_by_distance(map_, quantity="disparity") for map_ in maps]
            rows.append([frame.image, blank, *painted])
            continue
        truth = 1.0 / frame.depth.clip(protocol.min_depth, protocol.max_depth)
        low, high = float(np.nanmin(truth)), float(np.nanmax(truth))
        row = [frame.image, colorize(truth, low=low, high=high)]
        for map_ in maps:
            depth, _ = score_map(map_, frame, quantity="disparity", protocol=protocol)
            row.append(colorize(1.0 / depth, low=low, high=high))
        rows.append(row)
    titles = ["image", "truth", *(title for title, _ in models)]
    picture = Image.fromarray(make_panel(rows, titles=titles, max_width=PICTURE_WIDTH))
    for quality in range(90, 20, -10):
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=quality)
        if len(stream.getvalue()) <= MAX_PICTURE_BYTES:
            break
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    atomic_write(Path(output), stream.getvalue())


def _examples(world: str, data: Path, real: Path | None) -> list[Frame]:
    if world == "embedded" or real is None:
        looks = [test for test in scene_tests(data)]
        return [frame for test in looks for frame in read_frames(test.root, limit=PICTURE_ROWS // 2)]
    frames = [next(read_test(test)) for test in real_tests(real, data)]
    step = max(1, len(frames) // PICTURE_ROWS)
    photographs = sorted(
        path for path in (real / "photos").glob("*") if path.suffix.lower() in IMAGE_SUFFIXES
    )
    chosen = photographs[:: max(1, len(photographs) // PICTURE_ROWS)][:PICTURE_ROWS]
    return frames[::step][:PICTURE_ROWS] + [
        Frame(path.stem, decode_image(path.read_bytes())) for path in chosen
    ]


JOBS = {
    "train": train,
    "shard": shard,
    "write_sets": write_sets,
    "write_test": write_test,
    "judge": judge,
    "paint": paint,
}
