"""Photographs, teachers and labels for the tests of stage=pseudolabel."""

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from depth_anything import DepthAnything, Predictor, save_model
from depth_anything.data.codec import decode
from depth_anything.data.labels import open_labels
from depth_anything.data.reader import JoinedRecords
from depth_anything.data.sample import Frame, encode_frame
from depth_anything.data.shards import write_manifest
from depth_anything.data.tars import ShardSet, write_shard
from depth_anything.progress import ProgressLine
from depth_anything.teachers.network_teacher import describe_teacher
from depth_anything.training.pseudolabel import (
    PseudoLabel,
    ShardBatches,
    ShardData,
)

SIZE = 28


def write_images(
    root: Path, *, counts: tuple[int, ...] = (5, 3), broken: tuple[int, ...] = (), wide: int = 3
) -> ShardSet:
    """Write shards of noise: every `wide`-th image is wider, and `broken` records of the first shard cannot be read."""
    infos = []
    for number, count in enumerate(counts):
        records = []
        for i in range(count):
            key = f"photos/{number}/{i}"
            width = 56 if i % wide == wide - 1 else 42
            pixels = np.random.default_rng([number, i]).integers(0, 256, (SIZE, width, 3), np.uint8)
            fields = encode_frame(Frame(key, pixels, {}), codec="f32")
            if number == 0 and i in broken:
                fields["jpg"] = b"no picture"
            records.append((key, fields))
        infos.append(write_shard(root / f"{number}.tar", records))
    return write_manifest(root, name="photos", shards=infos, meta={})


def make_teacher(kind: str = "relative") -> DepthAnything:
    """Build a random network whose maps vary; the depth of a metric one covers much of its range."""
    torch.manual_seed(4)
    metric = kind.startswith("metric")
    model = DepthAnything("vitn", max_depth=float(kind.removeprefix("metric")) if metric else None)
    last = model.depth_head.scratch.output_conv2[2]
    with torch.no_grad():
        last.weight *= 6 if metric else 1
    if kind == "calibrated":
        model.calibration = (0.3, 0.02)
    model.input_size = SIZE
    return model.eval()


def make_data(
    root: Path,
    model: DepthAnything,
    *,
    labels: str = "labels",
    labels_at: str | None = None,
    **changes: Any,
) -> ShardData:
    settings: dict[str, Any] = {
        "sets": {"photos": str(root / "photos")},
        "labels": labels_at or str(root / labels),
        "batch_size": 2,
        "image_size": SIZE,
        "workers": 0,
        "patch": model.multiple,
        "precision": "32-true",
        "teacher": describe_teacher(model, "runs/teacher/model.safetensors"),
        "codec": "f32",
    }
    return ShardData(**{**settings, **changes})


@torch.no_grad()
def label(data: ShardData, teacher: DepthAnything) -> str:
    """Label as the command does, in this process and without Lightning's Trainer."""
    if not data.finished():
        module = PseudoLabel(teacher, data)
        module._bar = ProgressLine("labeling", enabled=False)
        for number, batch in enumerate(batches_of(data, image_size=data.image_size)):
            module.predict_step(batch, number)
        module.on_predict_end()
    return data.summary()


def labels_of(root: Path, images: ShardSet, labels: str = "labels") -> dict[str, np.ndarray]:
    joined = JoinedRecords(images, open_labels(root / labels / "photos", images))
    maps = {}
    for shard, count in joined.shards:
        for index in range(count):
            key, fields = joined.read(shard, index)
            [name] = [name for name in fields if name.startswith("disparity.")]
            maps[key] = decode(fields[name])
    return maps


def reference(images: ShardSet, teacher: DepthAnything) -> dict[str, np.ndarray]:
    """Predict each photograph with Predictor and convert meters to their reciprocal."""
    from depth_anything.data.reader import Records
    from depth_anything.data.sample import decode_record

    predictor, records = Predictor(teacher, device="cpu", input_size=SIZE), Records(images)
    maps = {}
    for shard, count in records.shards:
        for index in range(count):
            frame = decode_record(*records.read(shard, index))
            map_ = predictor.predict(frame.image)
            maps[frame.key] = 1 / map_ if predictor.quantity == "depth" else map_
    return maps


def as_file(model: DepthAnything, path: Path) -> Path:
    save_model(model, path / "model.safetensors")
    return path / "model.safetensors"


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def write_lease(path: Path, *, pid: int) -> None:
    path.write_text(json.dumps({"host": socket.gethostname(), "pid": pid}))


def batches_of(data: ShardData, **changes: Any) -> ShardBatches:
    settings: dict[str, Any] = {"image_size": SIZE, "patch": 14, "batch_size": 2, "rank": 0, "world": 1}
    return ShardBatches(data.labels, **{**settings, **changes})


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
