"""Images a second that one core brings from shard to batch, beside the same work done the authors' way.

    python benchmarks/bench_data.py [--images FOLDER] [--json FILE]

Both sides start from the same JPEGs and the same maps. Ours: image and label shards as training reads them, the label
at the short side of 518. Theirs: the chain of the official metric_depth loader (float64, cv2 cubic without
antialiasing, whole frames normalised and cut last), reading a JPEG and a 16-bit PNG of full size per sample. Ours
leaves normalising to the device; a second ratio counts it in. All on one thread, by process CPU time, from warm files.
"""

import argparse
import json
import os
import platform
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from depth_anything.data import codec
from depth_anything.data.dataset import StreamDataset
from depth_anything.data.sample import Frame, decode_image, disparity_target
from depth_anything.data.shards import JoinedRecords, write_manifest, write_shard
from depth_anything.data.transforms import View, draw_view, normalize, resize_image, view_image, view_map
from depth_anything.preprocess import IMAGENET_MEAN, IMAGENET_STD, resize_shape

SHARD = "000000"
NAMES = ("image", "target", "valid")


def procedural(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """An image with detail at all scales, uint8 BGR."""
    image = np.zeros((height, width, 3), np.float32)
    for octave in range(2, 9):
        noise = rng.normal(size=(2**octave * 3 // 4, 2**octave, 3)).astype(np.float32)
        image += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC) * 0.7**octave
    return np.clip(128 + 60 * image / image.std(), 0, 255).astype(np.uint8)


def photographs(folder: Path, height: int, width: int) -> Iterator[np.ndarray]:
    """The photographs of a folder, cut to the benchmark's shape."""
    for path in sorted(folder.iterdir()):
        image = cv2.imread(str(path))
        if image is not None:
            scale = max(height / image.shape[0], width / image.shape[1])
            image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
            yield cv2.resize(image[:height, :width], (width, height))


def disparity(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A ground plane, things standing on it, sky, and the noise of a network's output; in [0, 1]."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    values = np.clip(y / height - 0.4, 0, 1)
    for _ in range(60):
        left, foot = rng.uniform(0, width), rng.uniform(0.45, 1) * height
        inside = (np.abs(x - left) < rng.uniform(1, 60)) & (y < foot) & (y > foot - rng.uniform(20, 300))
        values[inside] = foot / height - 0.4
    noise = cv2.GaussianBlur(rng.normal(size=(height, width)).astype(np.float32), (0, 0), 1)
    return np.clip((values + 3e-4 * noise / noise.std() * (values > 0)) / 0.61, 0, 1)


def write_inputs(root: Path, args: argparse.Namespace) -> JoinedRecords:
    """Write every original twice: as files for their side, and as records for ours."""
    rng = np.random.default_rng(0)
    found = photographs(args.images, args.height, args.width) if args.images else iter(())
    pictures = list(found)[: args.count] or [
        procedural(rng, args.height, args.width) for _ in range(args.count)
    ]
    size = resize_shape(args.height, args.width, args.side)
    images, labels = [], []
    for i, picture in enumerate(pictures):
        jpeg = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
        whole = disparity(rng, args.height, args.width)
        (root / f"{i}.jpg").write_bytes(jpeg)
        cv2.imwrite(str(root / f"{i}.png"), np.rint(whole * 65535).astype(np.uint16))
        label = cv2.resize(whole, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
        images.append((f"bench/{i}", {"jpg": jpeg}))
        labels.append((f"bench/{i}", {"disparity.q12": codec.encode(label, codec="q12")}))
    args.count = len(pictures)
    image_shard = write_shard(root / "images" / f"{SHARD}.tar", images)
    label_shard = write_shard(root / "labels" / f"{SHARD}.tar", labels)
    meta = {"images": {"hashes": {SHARD: image_shard.hash}}}
    return JoinedRecords(
        write_manifest(root / "images", name="bench", shards=[image_shard], meta={}),
        write_manifest(root / "labels", name="bench", shards=[label_shard], meta=meta),
    )


class Stages:
    """CPU milliseconds by stage, a list of one figure an image each."""

    def __init__(self) -> None:
        self.milliseconds: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.milliseconds[name].append(1e3 * (time.process_time() - start))

    def medians(self) -> dict[str, float]:
        return {name: round(float(np.median(values)), 3) for name, values in self.milliseconds.items()}


def theirs(
    root: Path, numbers: list[int], side: int, rng: np.random.Generator, stage: Stages
) -> dict[str, Any]:
    """One micro-batch as the official loader makes it."""
    samples = []
    for i in numbers:
        with stage("read and decode JPEG"):
            image = cv2.imread(str(root / f"{i}.jpg"))
        with stage("RGB in float64"):
            image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB) / 255.0
        with stage("read and decode 16-bit PNG"):
            depth = cv2.imread(str(root / f"{i}.png"), cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH) / 65535.0
        height, width = resize_shape(*image.shape[:2], side)
        with stage("resize image"):
            image = cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)
        with stage("resize map"):
            depth = cv2.resize(depth, (width, height), interpolation=cv2.INTER_NEAREST)
        with stage("normalise"):
            image = (image - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
            image = np.ascontiguousarray(image.transpose(2, 0, 1)).astype(np.float32)
            depth = np.ascontiguousarray(depth.astype(np.float32))
        with stage("cut"):
            top, left = rng.integers(0, height - side + 1), rng.integers(0, width - side + 1)
            image, depth = (
                image[:, top : top + side, left : left + side],
                depth[top : top + side, left : left + side],
            )
            samples.append((torch.from_numpy(image), torch.from_numpy(depth), torch.from_numpy(depth <= 1)))
    start = time.process_time()
    batch = {name: torch.stack([sample[i] for sample in samples]) for i, name in enumerate(NAMES)}
    stage.milliseconds["stack"].append(1e3 * (time.process_time() - start) / len(numbers))
    return batch


def our_stages(source: JoinedRecords, numbers: list[int], side: int, stage: Stages) -> None:
    """The hops of StreamDataset, taken one by one."""
    for i in numbers:
        with stage("read two records, crc"):
            key, fields = source.read(f"bench/{SHARD}", i)
        with stage("decode JPEG"):
            image = decode_image(fields["jpg"])
        with stage("decode label"):
            label = codec.decode(fields["disparity.q12"])
        with stage("draw the view"):
            view = draw_view(*label.shape, side, seed=0, n=i)
        with stage("resize image"):
            image = resize_image(image, view.height, view.width)
        with stage("cut and flip"):
            view_image(image, view)
            small = view_map(label, view)
        with stage("target and mask"):
            disparity_target(Frame(key, image, disparity=small))


def bare(root: Path, numbers: list[int], view: View) -> None:
    """What no loader can do without: decode the JPEGs and resize them."""
    for i in numbers:
        data = np.fromfile(root / f"{i}.jpg", np.uint8)
        resize_image(cv2.imdecode(data, cv2.IMREAD_COLOR), view.height, view.width)


def per_image(work: Callable[[], Any], count: int) -> tuple[float, Any]:
    """CPU milliseconds an image of one micro-batch, and what the work returned."""
    start = time.process_time()
    made = work()
    return 1e3 * (time.process_time() - start) / count, made


def measure(root: Path, source: JoinedRecords, args: argparse.Namespace) -> dict[str, Any]:
    """All figures; the sides take turns, so that a busy machine slows both."""
    data = StreamDataset([source], seed=0, streams=args.batch, image_size=args.side)
    view = draw_view(*resize_shape(args.height, args.width, args.side), args.side, seed=0, n=0)
    rng, their_stages, stages = np.random.default_rng(0), Stages(), Stages()
    milliseconds: dict[str, list[float]] = defaultdict(list)
    for repeat in range(args.repeats + 1):
        start = repeat * args.batch
        turn = [(start + i) % args.count for i in range(args.batch)]
        numbers = range(start, start + args.batch)
        their_figure, _ = per_image(partial(theirs, root, turn, args.side, rng, their_stages), args.batch)
        our_figure, made = per_image(partial(data.__getitems__, numbers), args.batch)
        normalise_figure, _ = per_image(partial(normalize, made["image"]), args.batch)
        bare_figure, _ = per_image(partial(bare, root, turn, view), args.batch)
        our_stages(source, turn, args.side, stages)
        if repeat:  # the first warms up
            figures = (their_figure, our_figure, normalise_figure, bare_figure)
            for name, value in zip(("theirs", "ours", "normalise", "bare"), figures, strict=True):
                milliseconds[name].append(value)
    series = {name: np.array(values) for name, values in milliseconds.items()}
    return {
        "ratio": spread(series["theirs"] / series["ours"]),
        "ratio_with_normalise": spread(series["theirs"] / (series["ours"] + series["normalise"])),
        "images_per_second": {name: spread(1e3 / series[name]) for name in ("ours", "theirs", "bare")},
        "milliseconds": {name: spread(values) for name, values in series.items()},
        "stages": {"ours": stages.medians(), "theirs": their_stages.medians()},
    }


def spread(values: np.ndarray) -> dict[str, float]:
    low, middle, high = np.percentile(values, [25, 50, 75])
    return {"median": round(float(middle), 3), "iqr": round(float(high - low), 3)}


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return {
        "cpu": names[0].split(":")[1].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cv2": cv2.__version__,
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=Path, help="folder of photographs; without it textures are made up")
    parser.add_argument("--count", type=int, default=16, help="originals at most")
    parser.add_argument("--height", type=int, default=768)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--side", type=int, default=518, help="short side and crop")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        source = write_inputs(Path(folder), args)
        results = measure(Path(folder), source, args)
    settings = {name: value for name, value in vars(args).items() if name not in ("json", "images")}
    settings["originals"] = "photographs" if args.images else "procedural"
    record = {
        "benchmark": "data",
        "version": 1,
        "machine": machine(),
        "settings": settings,
        "results": results,
    }
    for side in ("theirs", "ours"):
        rate, cost = results["images_per_second"][side], results["milliseconds"][side]
        print(
            f"{side}: {rate['median']:.1f} images/s a core (IQR {rate['iqr']:.1f}), {cost['median']:.2f} ms an image"
        )
        for name, value in results["stages"][side].items():
            print(f"    {value:7.2f} ms  {name}")
    for name in ("bare", "normalise"):
        cost = results["milliseconds"][name]
        print(f"{name}: {cost['median']:.2f} ms an image (IQR {cost['iqr']:.2f})")
    for name in ("ratio", "ratio_with_normalise"):
        print(f"{name}: {results[name]['median']:.2f} (IQR {results[name]['iqr']:.2f})")
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return record


if __name__ == "__main__":
    main()
