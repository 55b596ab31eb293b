"""Measure whether meters carry to other focal lengths, with and without a canonical camera, at a tiny scale.

    python benchmarks/metric_focal.py --seeds 0 1 2 --output outputs/metric-focal

A relative network is trained once on scenes of 40 to 80 degrees. From it stage=metric is trained for each seed

- on scenes of one camera of 60 degrees,
- on the same scenes with cameras of 40 to 80 degrees, and
- on those with `canonical_focal`.

The network of one camera is also judged as if it had been trained with the focal length of that camera as the canonical
one: the targets are the same, so only predictions differ. Test scenes are the same in all fields of view; only the lens
changes. Nothing is fitted, except where "5 images" says so: there `depth-anything calibrate` found a scale on five
scenes that are not in the test set. Two constants are compared: the best one of the test scenes, which nobody can know,
and the best one of these five.

metric_focal.json and metric_focal.md have the results.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from meters import FAR, NEAR, ROOT, Constant, best_constant, predictor, run

from depth_anything import DepthAnything, load_model
from depth_anything.data.intrinsics import resize_focal
from depth_anything.data.sample import Frame
from depth_anything.evaluation.evaluate import evaluate
from depth_anything.evaluation.frames import read_frames
from depth_anything.inference.focal import fov_to_focal
from depth_anything.preprocess import resize_shape

HEIGHT, WIDTH, IMAGE_SIZE = 112, 144, 42
RELATIVE_STEPS, RELATIVE_SIZE = 200, 70
ONE_FOV = 60.0
TRAIN = {"one": (ONE_FOV, ONE_FOV), "varied": (40.0, 80.0)}
"""Set → range of horizontal fields of view, degrees."""
TESTS = {"60": (60.0, 60.0), "40-80": (40.0, 80.0), "22-30": (22.0, 30.0), "95-115": (95.0, 115.0)}
CANONICAL_FOCAL = 18.0
"""Pixels at IMAGE_SIZE, below those of all cameras of training: canonical depth then never exceeds the true depth."""
LOOKS = ("synthetic", "photographic")
CALIBRATION_IMAGES = 5


def write_sets(data: Path) -> None:
    """Render the scenes that are missing."""

    def write(name: str, look: str, count: int, seed: int, fov: tuple[float, float]) -> None:
        size = ["--count", str(count), "--size", str(HEIGHT), str(WIDTH), "--seed", str(seed)]
        field = ["--fov", *map(str, fov)]
        run("-m", "depth_anything", "shard", "scenes", str(data / name), "--look", look, *size, *field)

    for name, fov in TRAIN.items():
        write(f"train-{name}", "synthetic", 512, 1, fov)
    for look in LOOKS:
        for name, fov in TESTS.items():
            write(f"test-{look}-{name}", look, 64, 101, fov)
        write(f"known-{look}", look, CALIBRATION_IMAGES, 103, TRAIN["varied"])


def train(options: argparse.Namespace) -> dict[str, list[Path]]:
    """Train what is not finished yet; return the run folders of each way, one for each seed."""
    data, output = options.data, options.output
    common = [str(ROOT / "train.py"), f"output_dir={output}", "encoder=vitn", "sources=own", "workers=0"]
    common += ["checkpoint.every=1000"]
    relative = [f"steps={RELATIVE_STEPS}", f"image_size={RELATIVE_SIZE}", "name=relative"]
    run(*common, "stage=teacher", f"photos={data / 'train-varied'}", *relative)
    init = output / "relative" / "model.safetensors"
    runs: dict[str, list[Path]] = {}
    for seed in options.seeds:
        for name, photos, focal in (
            ("one", "one", "null"),
            ("varied", "varied", "null"),
            ("canonical", "varied", str(CANONICAL_FOCAL)),
        ):
            metric = [f"photos={data / f'train-{photos}'}", "stage=metric", f"init={init}", f"seed={seed}"]
            metric += [f"steps={options.steps}", f"image_size={IMAGE_SIZE}"]
            metric += [f"name={name}-{seed}", f"canonical_focal={focal}"]
            run(*common, *metric, *options.override)
            runs.setdefault(name, []).append(output / f"{name}-{seed}")
    return runs


def candidates(runs: dict[str, list[Path]], number: int) -> dict[str, DepthAnything]:
    """Load the networks of a seed under their names in the table."""
    one_as_canonical = load_model(runs["one"][number])
    shape = resize_shape(HEIGHT, WIDTH, IMAGE_SIZE)
    one_as_canonical.canonical_focal = resize_focal(fov_to_focal(ONE_FOV, WIDTH), (HEIGHT, WIDTH), shape)
    return {
        "one camera of 60°": load_model(runs["one"][number]),
        "one camera of 60°, as canonical": one_as_canonical,
        "cameras of 40 to 80°": load_model(runs["varied"][number]),
        "**cameras of 40 to 80°, canonical**": load_model(runs["canonical"][number]),
    }


def judge(source: object, frames: Sequence[Frame]) -> float:
    """Compare meters with meters, nothing fitted: the mean AbsRel."""
    return evaluate(source, frames, max_depth=FAR).means["abs_rel"]  # type: ignore[arg-type]


def calibrate(model: Path, known: Path, output: Path) -> DepthAnything:
    """Scale a model by the known depth of a set."""
    count = ["--limit", str(CALIBRATION_IMAGES)]
    flags = ["--weights", str(model), "--data", str(known), *count, "--device", "cpu"]
    run("-m", "depth_anything", "calibrate", *flags, "--output", str(output))
    return load_model(output)


def markdown(table: dict[str, dict[str, list[float]]], options: argparse.Namespace, minutes: float) -> str:
    """Write the figures as a table for each look."""
    command = shlex.join(["python", *sys.argv])
    lines = [
        f"Mean AbsRel ± standard deviation over {len(options.seeds)} seeds of stage=metric; `{command}`, "
        f"{minutes:.0f} minutes on {os.cpu_count()} cores ({platform.machine()}), {time.strftime('%Y-%m-%d')}. "
        f"{options.steps} steps each; truth from {NEAR:g} to {FAR:g} m; 64 scenes in each column, the same ones.",
    ]
    for look in LOOKS:
        heads = " | ".join(f"{name}°" for name in TESTS)
        lines += ["", f"| {look}, AbsRel ↓ | {heads} |", "|---" * (len(TESTS) + 1) + "|"]
        for name, figures in table.items():
            cells = [figures.get(f"{look} {test}", []) for test in TESTS]
            if all(cells):
                shown = (
                    f"{statistics.mean(c):.3f}" + (f" ± {statistics.stdev(c):.3f}" if len(set(c)) > 1 else "")
                    for c in cells
                )
                lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train, judge and write what came out, whichever wins."""
    parser = argparse.ArgumentParser(description="Do meters carry to cameras of other focal lengths?")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default %(default)s")
    parser.add_argument("--steps", type=int, default=120, help="of each run (default %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/metric-focal"), help="default %(default)s"
    )
    parser.add_argument(
        "--data", type=Path, default=Path("data/metric-focal"), help="of the scenes (default %(default)s)"
    )
    parser.add_argument("--train-only", action="store_true", help="stop after the training runs")
    parser.add_argument("override", nargs="*", help="for stage=metric, as start=all")
    options = parser.parse_args()
    begin = time.monotonic()
    write_sets(options.data)
    runs = train(options)
    if options.train_only:
        return
    table: dict[str, dict[str, list[float]]] = {}
    for look in LOOKS:
        known = list(read_frames(options.data / f"known-{look}"))
        sets = {test: list(read_frames(options.data / f"test-{look}-{test}")) for test in TESTS}
        for number, _ in enumerate(options.seeds):
            models = candidates(runs, number)
            for short, name in (
                ("varied", "cameras of 40 to 80°"),
                ("canonical", "**cameras of 40 to 80°, canonical**"),
            ):
                folder = runs[short][number]
                scaled = calibrate(
                    folder, options.data / f"known-{look}", folder / f"scaled-{look}.safetensors"
                )
                models[f"{name}, scaled by 5 images"] = scaled
            for test, frames in sets.items():
                rows: dict[str, object] = {
                    "best constant of the test scenes": Constant(best_constant(frames)),
                    "best constant of 5 images": Constant(best_constant(known)),
                }
                rows |= {name: predictor(model) for name, model in models.items()}
                for name, source in rows.items():
                    table.setdefault(name, {}).setdefault(f"{look} {test}", []).append(judge(source, frames))
    text = markdown(table, options, (time.monotonic() - begin) / 60)
    (options.output / "metric_focal.json").write_text(json.dumps(table, indent=1))
    (options.output / "metric_focal.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
