"""Compare the training loader with the authors' loader and with the minimal work, from shard to batch.

    OMP_NUM_THREADS=1 nice -n -15 python benchmarks/bench_data.py [--images FOLDER] [--json FILE]

All sides read the same JPEGs and maps, of 1024 x 768, each with its own DataLoader of 1 and of 2 workers. They take
turns, so that other programs slow all of them equally. CPU time is that of all processes of a side.

    theirs             the official metric_depth code: cv2, float64, cubic without antialiasing, whole frames are
                       normalized and cropped last; a JPEG and a 16-bit PNG of full size per sample
    ours               image and label shards as training reads them, labels with a short side of 518
    ours, pre-resized  the same with images of that size, JPEG quality 92, as `shard --short-side 518` writes them
    bare               the minimal work of any loader on the same bytes: decode image and label, resize the image; the
                       bytes are in memory, and no batch is sent to the main process
    bare, image        the same without the label

Ours normalizes on the device; measured separately ("normalise").
"""

import argparse
import json
import os
import platform
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from depth_anything.data import codec
from depth_anything.data.dataset import StreamDataset, return_batch
from depth_anything.data.loader import PREFETCH_BATCHES, build_stream_loader
from depth_anything.data.reader import JoinedRecords
from depth_anything.data.shards import write_manifest
from depth_anything.data.stream import MicroBatchSampler
from depth_anything.data.tars import write_shard
from depth_anything.data.timing import LoaderTimer, StageTimer, median_and_iqr, minimal_decode, timed_sample
from depth_anything.data.transforms import normalize, resize_image
from depth_anything.preprocess import IMAGENET_MEAN, IMAGENET_STD, resize_shape

SHARD = "000000"
ENDINGS = ("", ", pre-resized")
COPIES = 32


def procedural(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Generate an image with detail at all scales, uint8 BGR."""
    image = np.zeros((height, width, 3), np.float32)
    for octave in range(2, 9):
        noise = rng.normal(size=(2**octave * 3 // 4, 2**octave, 3)).astype(np.float32)
        image += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC) * 0.7**octave
    return np.clip(128 + 60 * image / image.std(), 0, 255).astype(np.uint8)


def photographs(folder: Path, height: int, width: int) -> Iterator[np.ndarray]:
    """Yield the photographs of a folder, cropped to the shape of the benchmark."""
    for path in sorted(folder.iterdir()):
        image = cv2.imread(str(path))
        if image is not None:
            scale = max(height / image.shape[0], width / image.shape[1])
            image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
            yield cv2.resize(image[:height, :width], (width, height))


def disparity(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Generate a ground plane with objects on it, sky, and noise as of a network; in [0, 1]."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    values = np.clip(y / height - 0.4, 0, 1)
    for _ in range(60):
        left, foot = rng.uniform(0, width), rng.uniform(0.45, 1) * height
        inside = (np.abs(x - left) < rng.uniform(1, 60)) & (y < foot) & (y > foot - rng.uniform(20, 300))
        values[inside] = foot / height - 0.4
    noise = cv2.GaussianBlur(rng.normal(size=(height, width)).astype(np.float32), (0, 0), 1)
    return np.clip((values + 3e-4 * noise / noise.std() * (values > 0)) / 0.61, 0, 1)


def write_inputs(root: Path, args: argparse.Namespace) -> dict[str, JoinedRecords]:
    """Write each image as files for their loader, and as records for ours, in full size and pre-resized."""
    rng = np.random.default_rng(0)
    originals = photographs(args.images, args.height, args.width) if args.images else iter(())
    pictures = list(originals)[: args.count] or [
        procedural(rng, args.height, args.width) for _ in range(args.count)
    ]
    size = resize_shape(args.height, args.width, args.side)
    images: dict[str, list[Any]] = {ending: [] for ending in ENDINGS}
    labels = []
    for i, picture in enumerate(pictures):
        jpeg = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
        small = resize_image(picture, *size)
        whole = disparity(rng, args.height, args.width)
        (root / f"{i}.jpg").write_bytes(jpeg)
        cv2.imwrite(str(root / f"{i}.png"), np.rint(whole * 65535).astype(np.uint16))
        label = cv2.resize(whole, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
        images[ENDINGS[0]].append((f"bench/{i}", {"jpg": jpeg, "json": b"{}"}))
        smaller = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()
        images[ENDINGS[1]].append((f"bench/{i}", {"jpg": smaller, "json": b"{}"}))
        labels.append((f"bench/{i}", {"disparity.q12": codec.encode(label, codec="q12")}))
    args.count = len(pictures)
    # Each record many times: a pass of eight records would measure only its start.
    return {
        ending: joined(root / f"set{number}", copies(images[ending]), copies(labels))
        for number, ending in enumerate(ENDINGS)
    }


def copies(records: list[Any]) -> list[Any]:
    return [(f"{key}-{copy}", fields) for copy in range(COPIES) for key, fields in records]


def joined(root: Path, images: list[Any], labels: list[Any]) -> JoinedRecords:
    """Write images and labels as two sets and join them."""
    image_shard = write_shard(root / "images" / f"{SHARD}.tar", images)
    label_shard = write_shard(root / "labels" / f"{SHARD}.tar", labels)
    meta = {"images": {"hashes": {SHARD: image_shard.hash}}}
    return JoinedRecords(
        write_manifest(root / "images", name="bench", shards=[image_shard], meta={}),
        write_manifest(root / "labels", name="bench", shards=[label_shard], meta=meta),
    )


class Theirs(Dataset):
    """Samples of the official loader; the DataLoader stacks them."""

    def __init__(self, root: Path, count: int, side: int) -> None:
        self.root, self.count, self.side = root, count, side

    def __getitem__(self, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return theirs(self.root, n % self.count, self.side, np.random.default_rng(n))


def theirs(
    root: Path, i: int, side: int, rng: np.random.Generator, timer: StageTimer | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Load one sample as the authors' code does."""
    timer = timer or StageTimer()
    with timer("read and decode JPEG"):
        image = cv2.imread(str(root / f"{i}.jpg"))
    with timer("RGB in float64"):
        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB) / 255.0
    with timer("read and decode 16-bit PNG"):
        depth = cv2.imread(str(root / f"{i}.png"), cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH) / 65535.0
    height, width = resize_shape(*image.shape[:2], side)
    with timer("resize image"):
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)
    with timer("resize map"):
        depth = cv2.resize(depth, (width, height), interpolation=cv2.INTER_NEAREST)
    with timer("normalise"):
        image = (image - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
        image = np.ascontiguousarray(image.transpose(2, 0, 1)).astype(np.float32)
        depth = np.ascontiguousarray(depth.astype(np.float32))
    with timer("cut"):
        top, left = rng.integers(0, height - side + 1), rng.integers(0, width - side + 1)
        square = (slice(top, top + side), slice(left, left + side))
        image, depth = torch.from_numpy(image[(slice(None), *square)]), torch.from_numpy(depth[square])
    return image, depth, depth <= 1


class Bare(Dataset):
    """The minimal work; a batch is only a number."""

    def __init__(self, source: JoinedRecords, side: tuple[int, int], *, label: bool) -> None:
        (shard, count), *_ = source.shards
        self.records = [source.read(shard, i)[1] for i in range(count)]  # not in the CPU cache, as ours
        self.side, self.label = side, label

    def __getitems__(self, numbers: list[int]) -> int:
        cv2.setNumThreads(0)
        for n in numbers:
            minimal_decode(self.records[n % len(self.records)], self.side, label=self.label)
        return numbers[0]


def loaders(root: Path, sources: dict[str, JoinedRecords], args: argparse.Namespace) -> dict[str, Any]:
    """Return for each side a function from the number of workers to its loader."""

    def plain(dataset: Dataset, whole: bool) -> Any:
        def make(workers: int) -> DataLoader:
            batches = MicroBatchSampler(rank=0, world=1, size=args.batch)
            collate = {"collate_fn": return_batch} if whole else {}
            return DataLoader(
                dataset,
                batch_sampler=batches,
                num_workers=workers,
                prefetch_factor=PREFETCH_BATCHES,
                **collate,
            )

        return make

    def stream(source: JoinedRecords) -> Any:
        data = StreamDataset([source], seed=0, streams=args.batch, image_size=args.side)
        return lambda workers: build_stream_loader(data, micro_batch=args.batch, workers=workers)

    size = resize_shape(args.height, args.width, args.side)
    sides = {"theirs": plain(Theirs(root, args.count, args.side), False)}
    for ending, source in sources.items():
        sides[f"ours{ending}"] = stream(source)
        sides[f"bare{ending}"] = plain(Bare(source, size, label=True), True)
        sides[f"bare, image{ending}"] = plain(Bare(source, size, label=False), True)
    return sides


def measure_in_turns(sides: dict[str, Any], workers: int, args: argparse.Namespace) -> dict[str, Any]:
    """Measure CPU and wall milliseconds per image of each side, and ratios of sides measured in the same round."""
    timers = {name: LoaderTimer(make(workers)) for name, make in sides.items()}
    cpu, clock = defaultdict(list), defaultdict(list)
    for repeat in range(args.repeats + 1):
        for name, timer in timers.items():
            count = args.windows * workers if name == "theirs" else 4 * args.windows * workers
            used, passed = timer.measure(count)
            if repeat:  # the first round warms up
                cpu[name].append(1e3 * used / args.batch)
                clock[name].append(1e3 * passed / args.batch)
    for timer in timers.values():
        timer.close()
    return {
        "cpu_ms": {name: median_and_iqr(values) for name, values in cpu.items()},
        "images_per_second": {name: median_and_iqr(1e3 / np.array(values)) for name, values in clock.items()},
        "ratios": ratios(cpu),
        "ratios_by_the_clock": ratios(clock),
    }


def ratios(milliseconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Return the speedup over their loader, and the fraction of the minimal work's speed."""
    ours = {ending: np.array(milliseconds[f"ours{ending}"]) for ending in ENDINGS}
    rows = {f"theirs / ours{ending}": np.array(milliseconds["theirs"]) / ours[ending] for ending in ENDINGS}
    for bare in ("bare", "bare, image"):
        rows |= {f"{bare} / ours{e}": np.array(milliseconds[f"{bare}{e}"]) / ours[e] for e in ENDINGS}
    return {name: median_and_iqr(values) for name, values in rows.items()}


def measure_stages(root: Path, sources: dict[str, JoinedRecords], args: argparse.Namespace) -> dict[str, Any]:
    """Measure the milliseconds of each stage in one process, ours next to the minimal work."""
    found: dict[str, Any] = {}
    their_stages, normalizing = StageTimer(), StageTimer()
    ours = {ending: StageTimer() for ending in ENDINGS}
    data = {
        ending: StreamDataset([source], seed=0, streams=args.batch, image_size=args.side)
        for ending, source in sources.items()
    }
    for n in range(4 * args.count):
        theirs(root, n % args.count, args.side, np.random.default_rng(n), their_stages)
        for ending in ENDINGS:
            sample, fields, size = timed_sample(data[ending], n, ours[ending])
            minimal_decode(fields, size, ours[ending])
        image = torch.from_numpy(sample["image"])
        with normalizing("normalise"):
            normalize(image)
    for ending in ENDINGS:
        found[f"ours{ending}"] = ours[ending].rows()
    found["theirs"] = [(name, value, None) for name, value in their_stages.medians().items()]
    found["normalise"] = normalizing.medians()["normalise"]
    return found


def machine() -> dict[str, Any]:
    """Describe the machine."""
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
    parser.add_argument("--images", type=Path, help="folder of photographs; generated textures by default")
    parser.add_argument("--count", type=int, default=16, help="maximum number of images")
    parser.add_argument("--height", type=int, default=768)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--side", type=int, default=518, help="short side and crop")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument(
        "--windows",
        type=int,
        default=3,
        help="batches per worker and window of theirs; others read 4 times as many",
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path, help="write all results to this file")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        sources = write_inputs(Path(folder), args)
        results: dict[str, Any] = {"stages": measure_stages(Path(folder), sources, args)}
        sides = loaders(Path(folder), sources, args)
        results["workers"] = {str(n): measure_in_turns(sides, n, args) for n in args.workers}
    settings = {name: value for name, value in vars(args).items() if name not in ("json", "images")}
    settings["originals"] = "photographs" if args.images else "procedural"
    record = {
        "benchmark": "data",
        "version": 2,
        "machine": machine(),
        "settings": settings,
        "results": results,
    }
    print_results(results)
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return record


def print_results(results: dict[str, Any]) -> None:
    for side, rows in results["stages"].items():
        if side != "normalise":
            print(f"{side}, ms of one core per image, in one process; right: the minimal work")
            for name, ours, bare in rows:
                print(f"{ours:8.2f} {'' if bare is None else f'{bare:.2f}':>8}  {name}")
    print(f"{results['stages']['normalise']:8.2f}           normalize, on the CPU instead of the device")
    for workers, found in results["workers"].items():
        print(f"\n{workers} workers        ms of one core per image (IQR)    images/s (IQR)")
        for name, cost in found["cpu_ms"].items():
            rate = found["images_per_second"][name]
            print(
                f"{name:24} {cost['median']:8.2f} ({cost['iqr']:.2f}) {rate['median']:20.1f} ({rate['iqr']:.1f})"
            )
        for name, ratio in found["ratios"].items():
            clock = found["ratios_by_the_clock"][name]
            print(
                f"{name:36} {ratio['median']:6.2f} ({ratio['iqr']:.2f}), "
                f"wall clock {clock['median']:6.2f} ({clock['iqr']:.2f})"
            )


if __name__ == "__main__":
    main()
