"""Label photographs with a tiny random model of each family of transformers, compare, kill, resume, and train students.

    python benchmarks/teachers.py PHOTOS --output outputs/teachers

For each family, as shares of the range of the map after 1 / depth for depth:

- own sizes: labels of the photographs as they are, against the model's own processor and post-processing at the size
  of the labels;
- pipeline: labels of photographs that already have that size, against transformers' "depth-estimation" pipeline, which
  runs one photograph at a time, as batch_size=1 does;
- batch of 2: labels with batch_size=2 against those with batch_size=1, which shows the rounding of float32; and the
  same as depth, before 1 / depth.

Then a labeling killed by SIGKILL and started again is compared with an uninterrupted one, byte by byte, and a student
of five steps is trained. Last, two teachers are merged by `teacher_rule=confidence`; merged.png shows their agreement.
The models are those of tests/made_transformers.py: random, so that their maps mean nothing, but computed by the code
of the real ones. teachers.md has the results.
"""

import argparse
import os
import platform
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also because forks have no threads

import hydra  # noqa: E402, F401  this and _dynamo for the forks
import torch._dynamo  # noqa: E402, F401
import transformers  # noqa: E402
from fork_server import run_job  # noqa: E402
from made_transformers import FAMILIES, NEAR_FAMILY, SLOW_FAMILIES, make_transformers_folder  # noqa: E402

from depth_anything.data.codec import decode  # noqa: E402
from depth_anything.data.labels import open_labels  # noqa: E402
from depth_anything.data.reader import JoinedRecords  # noqa: E402
from depth_anything.data.sample import decode_record  # noqa: E402
from depth_anything.data.shards import open_set  # noqa: E402
from depth_anything.preprocess import resize_shape  # noqa: E402
from depth_anything.training import run as _run  # noqa: E402, F401  for the forks
from depth_anything.training import student as _student  # noqa: E402, F401

SIZE, MULTIPLE = 70, 14
NEAREST_M = {"depth_anything-metric": 0.02, NEAR_FAMILY: 0.02, "glpn": 0.01, "zoedepth": 0.01}
STUDENT = [
    "stage=student",
    "encoder=vitn",
    "steps=5",
    "batch_size=4",
    "logging.every=1",
    "validation.limit=2",
]


def start(words: Sequence[str], *, cwd: Path) -> tuple[int, Path]:
    """Start a command in a fork, which need not import torch, Lightning and transformers again; its pid and stderr."""
    files = [str(cwd / name) for name in ("stdout.txt", "stderr.txt")]
    for file in files:
        Path(file).unlink(missing_ok=True)
    process = os.fork()
    if process == 0:
        code = 70
        try:
            code = run_job(list(words), str(cwd), dict(os.environ), files)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return process, Path(files[1])


def run(words: Sequence[str], *, cwd: Path) -> str:
    """Run a command in a fork; stop at its first failure."""
    process, errors = start(words, cwd=cwd)
    if os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]):
        sys.exit(f"{' '.join(words)}\n{errors.read_text()[-2000:]}")
    return (cwd / "stdout.txt").read_text()


def label_command(teacher: str, photos: str, name: str, *typed: str) -> list[str]:
    """Return the words that label a set; `teacher` as it is typed."""
    words = ["stage=pseudolabel", "encoder=vitn", "sources=own", f"photos={photos}", f"teacher={teacher}"]
    words += [f"labels=labels/{name}", f"name={name}", "data.codec=f32", f"image_size={SIZE}"]
    return [str(ROOT / "train.py"), *words, "workers=0", "trainer=cpu", *(typed or ["batch_size=1"])]


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


def share(values: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference as a share of the range of the expected map."""
    return float(np.abs(values - expected).max() / np.ptp(expected))


def worst_difference(root: Path, family: str, photos: str, name: str) -> float:
    parts: dict[str, Any] = {}
    return max(
        share(values, expected_map(family, root / family, image, values.shape, parts))
        for image, values in labels_of(root, photos, name)
    )


def batch_differences(root: Path, family: str) -> tuple[float, float]:
    """Return how labels of two photographs at once differ from labels of one: as stored, and as depth."""
    pairs = [
        (two, one)
        for (_, two), (_, one) in zip(
            *(labels_of(root, "small", f"{family}-{name}") for name in ("small-2", "small")), strict=True
        )
    ]
    stored = max(share(two, one) for two, one in pairs)
    if family in ("dpt", "depth_anything"):
        return stored, stored
    return stored, max(share(1 / two, 1 / one) for two, one in pairs)


def is_labeling(folder: Path) -> bool:
    """Return whether a shard has its labels and another is being labeled, which its lease shows."""
    leased = [lease.with_name(f"{lease.stem.removeprefix('.')}.json") for lease in folder.glob("*/.*.lease")]
    return bool(list(folder.glob("*/*.json"))) and any(not labels.exists() for labels in leased)


def killed_and_resumed(root: Path, family: str) -> tuple[int, bool]:
    """Kill labeling when its first shard is there; return the number of shards then, and whether the end is equal."""
    command = label_command(f"transformers:{family}", "small", f"{family}-killed", "batch_size=2")
    folder = root / f"labels/{family}-killed"
    process, _ = start(command, cwd=root)
    while not is_labeling(folder):
        if os.waitpid(process, os.WNOHANG)[0]:
            sys.exit(f"labeling with {family} ended before it was killed")
        time.sleep(0.005)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    done = len(list(folder.glob("*/[0-9]*.json")))
    run(command, cwd=root)

    def contents(name: str) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in (root / "labels" / name).rglob("*") if p.is_file()}

    return done, contents(f"{family}-killed") == contents(f"{family}-small-2")


def train_student(root: Path, labels: str, *typed: str) -> str:
    """Train a student of five steps; return its losses."""
    name = f"student-{labels}"
    words = [*STUDENT, f"labels=labels/{labels}", f"name={name}", f"image_size={SIZE}", "trainer=cpu"]
    run([str(ROOT / "train.py"), *words, "sources=own", "photos=photos", "workers=0", *typed], cwd=root)
    rows = (root / f"outputs/{name}/metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("loss")
    return " ".join(f"{float(row.split(',')[column]):.2f}" for row in rows[1:] if row.split(",")[column])


def measure_family(root: Path, family: str) -> str:
    """Do everything with one family; returns a row of the table."""
    make_transformers_folder(family, root / family)
    teacher = f"transformers:{family}"
    for photos in ("photos", "small"):
        run(label_command(teacher, photos, f"{family}-{photos}"), cwd=root)
    run(label_command(teacher, "small", f"{family}-small-2", "batch_size=2"), cwd=root)
    differences = [
        worst_difference(root, family, photos, f"{family}-{photos}") for photos in ("photos", "small")
    ]
    figures = [f"{value:.1e}" for value in (*differences, *batch_differences(root, family))]
    done, same = killed_and_resumed(root, family)
    cells = [*figures, f"{done} of 4", "yes" if same else "no", train_student(root, f"{family}-photos")]
    return f"| {family} | {' | '.join(cells)} |"


def merge(root: Path, families: Sequence[str]) -> str:
    """Label by the agreement of two families, paint it as merged.png, and train a student on it."""
    teachers = f"[{','.join(f'transformers:{family}' for family in families)}]"
    run(
        label_command(
            teachers, "photos", "merged", "teacher_rule=confidence", "data.codec=q12", "batch_size=1"
        ),
        cwd=root,
    )
    view = ["view", "labels/merged/own", "--images", "photos", "--output", "merged.png"]
    run(["-m", "depth_anything", *view], cwd=root)
    stats = run(["-m", "depth_anything", "stats", "labels/merged/own"], cwd=root)
    agreement = next((line.strip() for line in stats.splitlines() if "confidence" in line), "")
    losses = train_student(root, "merged", "label_weight=weight")
    return f"{' and '.join(families)} merged: {agreement}; losses of a student with label_weight=weight: {losses}."


def write_sets(photos: Path, root: Path) -> None:
    """Write the photographs as they are, and reduced to the size of their labels, as shards."""
    shutil.rmtree(root, ignore_errors=True)
    (root / "reduced").mkdir(parents=True)
    for path in sorted(photos.iterdir()):
        picture = Image.open(path).convert("RGB")
        height, width = resize_shape(picture.height, picture.width, SIZE, MULTIPLE)
        picture.resize((width, height), Image.Resampling.BICUBIC).save(root / f"reduced/{path.stem}.png")
    shard = ["-m", "depth_anything", "shard", "images"]
    run([*shard, str(photos.resolve()), "photos"], cwd=root)
    run([*shard, "reduced", "small", "--per-shard", "2"], cwd=root)


def main() -> None:
    """Measure each family, merge two, and write teachers.md."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("photos", type=Path, help="folder of photographs")
    parser.add_argument("--output", type=Path, default=Path("outputs/teachers"))
    parser.add_argument("--families", nargs="+", default=[*FAMILIES, *SLOW_FAMILIES, NEAR_FAMILY])
    flags = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    root = flags.output.resolve()
    write_sets(flags.photos, root)
    lines = [
        f"`{shlex.join(['python', *sys.argv])}`, {platform.machine()}, {os.cpu_count()} cores, one thread, "
        f"{time.strftime('%Y-%m-%d')}; torch {torch.__version__}, transformers {transformers.__version__}.",
        "",
        "| family | own sizes | pipeline | batch of 2 | … as depth | killed at shard | same bytes | student's losses |",
        "|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for family in flags.families:
        lines.append(measure_family(root, family))
        print(lines[-1], flush=True)
    if len(flags.families) > 1:
        lines += ["", merge(root, flags.families[:2])]
        print(lines[-1], flush=True)
    (root / "teachers.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
