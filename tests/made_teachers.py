"""Photographs in shards, and labels of them made in this process, for tests of teachers."""

import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from depth_anything.data.codec import decode
from depth_anything.data.labels import open_labels
from depth_anything.data.reader import JoinedRecords
from depth_anything.data.sample import Frame, encode_frame
from depth_anything.data.shards import open_set, write_manifest
from depth_anything.data.tars import write_shard
from depth_anything.progress import ProgressLine
from depth_anything.teachers.teacher import Photographs, Teacher
from depth_anything.training.pseudolabel import PseudoLabel, ShardBatches, ShardData, label_data_arguments

SIZES = ((56, 84), (70, 56))  # photographs at these sizes are labeled at image_size=56 without resizing


def photograph(number: int, size: tuple[int, int]) -> np.ndarray:
    """A smooth picture, uint8 (H,W,3)."""
    coarse = np.random.default_rng(number).integers(0, 256, (5, 6, 3), np.uint8)
    return np.array(Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC))


def write_photographs(
    root: Path, *, counts: tuple[int, ...] = (3, 2), sizes: tuple[tuple[int, int], ...] = SIZES
) -> dict[str, np.ndarray]:
    """Write a set "photos" of PNG records; returns the pixels by key."""
    infos, pictures = [], {}
    for shard, count in enumerate(counts):
        records = []
        for number in range(count):
            key = f"photos/{shard}/{number}"
            pictures[key] = photograph(10 * shard + number, sizes[number % len(sizes)])
            frame = Frame(key, pictures[key], {"name": f"trip/{shard}-{number}.jpg"})
            records.append((key, encode_frame(frame, codec="f32", original=_png(pictures[key]))))
        infos.append(write_shard(root / f"photos/{shard}.tar", records))
    write_manifest(root / "photos", name="photos", shards=infos, meta={"licence": "CC0-1.0"})
    return pictures


def _png(picture: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG")
    return out.getvalue()


def open_data(teacher: Teacher, root: Path, *, labels: str = "labels", **typed: Any) -> ShardData:
    """Open the sets as `train.py stage=pseudolabel` does."""
    settings: dict[str, Any] = {
        "sets": {"photos": str(root / "photos")},
        "labels": str(root / labels),
        "batch_size": 2,
        "image_size": 56,
        "workers": 0,
        "precision": "32-true",
        "codec": "f32",
        **typed,
    }
    arguments = label_data_arguments(
        teacher, image_size=settings["image_size"], precision=settings["precision"]
    )
    return ShardData(**settings, **arguments)


def label(
    teacher: Teacher,
    root: Path,
    *,
    stop_after: int | None = None,
    kill_after: int | None = None,
    labels: str = "labels",
    **typed: Any,
) -> str:
    """Label in this process, without Lightning's Trainer.

    After `stop_after` batches it raises KeyboardInterrupt; after `kill_after` this process sends itself SIGKILL.
    """
    data = open_data(teacher, root, labels=labels, **typed)
    if not data.finished():
        module = PseudoLabel(teacher.module_argument(), data)  # type: ignore[arg-type]
        module._bar = ProgressLine("labeling", enabled=False)
        batches = ShardBatches(
            data.labels,
            image_size=data.image_size,
            patch=data.patch,
            batch_size=data.batch_size,
            rank=0,
            world=1,
            resized=data.resized,
        )
        for number, batch in enumerate(batches):
            if number == stop_after:
                data.release_leases()
                raise KeyboardInterrupt
            if number == kill_after:
                os.kill(os.getpid(), signal.SIGKILL)
            with torch.no_grad():
                module.predict_step(batch, number)
        module.on_predict_end()
    return data.summary()


def labels_of(root: Path, labels: str = "labels") -> dict[str, np.ndarray]:
    """Return the labels by key."""
    images = open_set(root / "photos", name="photos")
    joined = JoinedRecords(images, open_labels(root / labels / "photos", images))
    maps = {}
    for shard, count in joined.shards:
        for index in range(count):
            key, fields = joined.read(shard, index)
            maps[key] = decode(fields[next(name for name in fields if name.startswith("disparity."))])
    return maps


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the contents of a folder's files by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def largest_difference(maps: dict[str, np.ndarray], expected: Callable[[str], np.ndarray]) -> float:
    """Return the largest difference of maps, as a share of the range of the expected one."""
    return max(
        float(np.abs(values - expected(key)).max() / np.ptp(expected(key))) for key, values in maps.items()
    )


def batch_of(picture: np.ndarray, size: tuple[int, int]) -> Photographs:
    """A batch of one photograph."""
    return Photographs(torch.from_numpy(picture[None]), size, ["photos/0/0"], [{"name": "a.jpg"}])
