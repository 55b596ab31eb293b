"""Label photographs with a tiny random model of each family of transformers, compare, kill, resume, and train students.

    python benchmarks/teachers.py PHOTOS --output outputs/teachers

For each family: labels of the photographs as they are against the model's own processor and post-processing at the
size of the labels, and labels of photographs that already have that size against transformers' "depth-estimation"
pipeline, both as a share of the range of the map after 1 / depth for depth; a labeling killed by SIGKILL and started
again against an uninterrupted one, byte by byte; and the losses of a student of five steps. The models are those of
tests/made_transformers.py: random, so that their maps mean nothing, but computed by the code of the real ones.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import transformers  # noqa: E402
from made_transformers import FAMILIES, SLOW_FAMILIES, make_transformers_folder  # noqa: E402

from depth_anything.data.codec import decode  # noqa: E402
from depth_anything.data.labels import open_labels  # noqa: E402
from depth_anything.data.reader import JoinedRecords  # noqa: E402
from depth_anything.data.sample import decode_record  # noqa: E402
from depth_anything.data.shards import open_set  # noqa: E402
from depth_anything.preprocess import resize_shape  # noqa: E402

SIZE, MULTIPLE = 70, 14
NEAREST_M = {"depth_anything-metric": 0.02, "glpn": 0.01, "zoedepth": 0.01}
STUDENT = [
    "stage=student",
    "encoder=vitn",
    "steps=5",
    "batch_size=4",
    "logging.every=1",
    "validation.limit=2",
]


def run(words: list[str], *, cwd: Path) -> str:
    done = subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words)}\n{done.stderr[-2000:]}")
    return done.stdout


def label_command(family: str, photos: str, name: str) -> list[str]:
    return [
        str(ROOT / "train.py"),
        *(
            "stage=pseudolabel",
            "encoder=vitn",
            "sources=own",
            f"photos={photos}",
            f"teacher=transformers:{family}",
        ),
        *(f"labels=labels/{name}", f"name={name}", "data.codec=f32", f"image_size={SIZE}"),
        *("batch_size=2", "workers=0", "trainer=cpu"),
    ]


def labels_of(root: Path, photos: str, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield each photograph with its label."""
    images = open_set(root / photos)
    [folder] = (root / "labels" / name).iterdir()
    joined = JoinedRecords(images, open_labels(folder, images))
    for shard, count in joined.shards:
        for index in range(count):
            key, fields = joined.read(shard, index)
            image = decode_record(
                key, {n: v for n, v in fields.items() if not n.startswith("disparity")}
            ).image
            yield image, decode(fields["disparity.f32"])


def expected_map(
    family: str, folder: Path, image: np.ndarray, size: tuple[int, int], parts: dict[str, Any]
) -> np.ndarray:
    """Predict with transformers alone; with the pipeline where the label has the photograph's size."""
    picture = Image.fromarray(image)
    if image.shape[:2] == size:
        pipeline = parts.setdefault("pipe", transformers.pipeline("depth-estimation", model=str(folder)))
        values = pipeline(picture)["predicted_depth"]
    else:
        if "model" not in parts:
            parts["model"] = transformers.AutoModelForDepthEstimation.from_pretrained(folder).eval()
            parts["processor"] = transformers.AutoImageProcessor.from_pretrained(folder)
        with torch.no_grad():
            output = parts["model"](**parts["processor"](images=picture, return_tensors="pt"))
        source = {"source_sizes": [image.shape[:2]]} if family == "zoedepth" else {}
        process = parts["processor"].post_process_depth_estimation
        values = process(output, target_sizes=[size], **source)[0]["predicted_depth"]
    if family in ("dpt", "depth_anything"):
        return values.numpy()
    return 1 / np.maximum(values.numpy(), NEAREST_M.get(family, 0.01))


def worst_difference(root: Path, family: str, photos: str, name: str) -> float:
    parts: dict[str, Any] = {}
    worst = 0.0
    for image, values in labels_of(root, photos, name):
        expected = expected_map(family, root / family, image, values.shape, parts)
        worst = max(worst, float(np.abs(values - expected).max() / np.ptp(expected)))
    return worst


def killed_and_resumed(root: Path, family: str) -> tuple[int, bool]:
    """Kill labeling when its first shard is there; return the number of shards then, and whether the end is equal."""
    command = label_command(family, "small", f"{family}-killed")
    process = subprocess.Popen(
        [sys.executable, *command], cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    folder = root / f"labels/{family}-killed"
    while process.poll() is None and not list(folder.glob("*/*.json")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(list(folder.glob("*/[0-9]*.json")))
    run(command, cwd=root)

    def contents(name: str) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in (root / "labels" / name).rglob("*") if p.is_file()}

    return done, contents(f"{family}-killed") == contents(f"{family}-small")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("photos", type=Path, help="folder of photographs")
    parser.add_argument("--output", type=Path, default=Path("outputs/teachers"))
    parser.add_argument("--families", nargs="+", default=[*FAMILIES, *SLOW_FAMILIES])
    flags = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    root = flags.output.resolve()
    shutil.rmtree(root, ignore_errors=True)
    (root / "reduced").mkdir(parents=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for path in sorted(flags.photos.iterdir()):
        picture = Image.open(path).convert("RGB")
        height, width = resize_shape(picture.height, picture.width, SIZE, MULTIPLE)
        picture.resize((width, height), Image.Resampling.BICUBIC).save(root / f"reduced/{path.stem}.png")
    shard = ["-m", "depth_anything", "shard", "images"]
    run([*shard, str(flags.photos.resolve()), "photos"], cwd=root)
    run([*shard, "reduced", "small", "--per-shard", "2"], cwd=root)
    print(
        f"{'family':22} {'own sizes':>10} {'pipeline':>10} {'killed at':>10} {'same bytes':>10}  student's loss"
    )
    for family in flags.families:
        make_transformers_folder(family, root / family)
        for photos in ("photos", "small"):
            run(label_command(family, photos, f"{family}-{photos}"), cwd=root)
        differences = [
            worst_difference(root, family, photos, f"{family}-{photos}") for photos in ("photos", "small")
        ]
        done, same = killed_and_resumed(root, family)
        name = f"student-{family}"
        student = [*STUDENT, f"labels=labels/{family}-photos", f"name={name}", "image_size=70", "trainer=cpu"]
        run([str(ROOT / "train.py"), *student, "sources=own", "photos=photos", "workers=0"], cwd=root)
        rows = (root / f"outputs/{name}/metrics.csv").read_text().splitlines()
        column = rows[0].split(",").index("loss")
        losses = [f"{float(row.split(',')[column]):.3f}" for row in rows[1:] if row.split(",")[column]]
        print(
            f"{family:22} {differences[0]:10.1e} {differences[1]:10.1e} {done:10d} {str(same):>10}  {' '.join(losses)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
