"""Measure meters without alignment: what stage=metric learns from a relative network, at a tiny scale.

    python benchmarks/metric.py --seeds 0 1 2 --output outputs/metric

For each seed the real stages run at size=tiny: a relative network on synthetic scenes, then stage=metric on the same
scenes. Held-out scenes of both looks are evaluated in meters without a fit, and compared with

- the same network with its untrained head, and
- the best constant: the one depth with the lowest mean AbsRel on these test scenes. No network can know it.

metric.json and metric.md have the results.
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

from depth_anything import load_model
from depth_anything.data.sample import Frame
from depth_anything.evaluation.evaluate import evaluate
from depth_anything.evaluation.frames import read_frames
from depth_anything.training.check_config import parse_config
from depth_anything.training.initialization import build_model
from depth_anything.training.resume import read_config

TESTS = {"photographic": 101, "synthetic": 102}  # look → seed of its held-out scenes, as in claims/


def train(seed: int, folder: Path, data: Path, extra: Sequence[str]) -> Path:
    """Run both stages of a seed; return the folder of the metric run."""
    common = [str(ROOT / "train.py"), f"seed={seed}", f"output_dir={folder}", f"data_dir={data}"]
    run(*common, "stage=teacher", "encoder=vitn")
    run(*common, "stage=metric", f"init={folder / 'teacher-vitn-tiny' / 'model.safetensors'}", *extra)
    return folder / "metric-vitn-tiny"


def judge(predictor: object, frames: Sequence[Frame]) -> dict[str, float]:
    """Compare meters with meters, nothing fitted."""
    means = evaluate(predictor, frames, max_depth=FAR).means  # type: ignore[arg-type]
    return {key: means[key] for key in ("abs_rel", "d1")}


def markdown(table: dict[str, dict[str, list[float]]], command: str, minutes: float, seeds: int) -> str:
    """Write the figures as a table a reader can check."""
    columns = [f"{look} {metric}" for look in TESTS for metric in ("abs_rel", "d1")]
    lines = [
        f"Mean ± standard deviation over {seeds} seeds; `{command}`, {minutes:.0f} minutes on {os.cpu_count()} "
        f"cores ({platform.machine()}), {time.strftime('%Y-%m-%d')}. No alignment of any kind; truth from {NEAR:g} to "
        f"{FAR:g} m.",
        "",
        "| | photographs AbsRel ↓ | photographs δ1 ↑ | synthetic AbsRel ↓ | synthetic δ1 ↑ |",
        "|---|---|---|---|---|",
    ]
    for name, figures in table.items():
        cells = [
            f"{statistics.mean(figures[c]):.3f} ± {statistics.stdev(figures[c]) if seeds > 1 else 0:.3f}"
            for c in columns
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the seeds and write what came out, whichever wins."""
    parser = argparse.ArgumentParser(
        description="Does stage=metric find meters that no constant and no new head knows?"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default %(default)s")
    parser.add_argument("--output", type=Path, default=Path("outputs/metric"), help="default %(default)s")
    parser.add_argument("--data", type=Path, default=Path("data"), help="of the scenes (default %(default)s)")
    parser.add_argument("override", nargs="*", help="for stage=metric, as start=encoder")
    options = parser.parse_args()
    begin = time.monotonic()
    frames: dict[str, list[Frame]] = {}
    for look, seed in TESTS.items():
        test = str(options.data / f"scenes-test-{look}")
        size = ["--count", "128", "--size", "112", "144", "--seed", str(seed)]
        run("-m", "depth_anything", "shard", "scenes", test, "--look", look, "--layout", "varied", *size)
        frames[look] = list(read_frames(test))
    names = ("best constant of the test scenes", "untrained head", "**stage=metric**")
    table: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    for seed in options.seeds:
        folder = train(seed, options.output / f"seed-{seed}", options.data, options.override)
        untrained = build_model(parse_config(read_config(folder / "config.yaml")))
        for look in TESTS:
            constant = Constant(best_constant(frames[look]))
            candidates = (constant, predictor(untrained), predictor(load_model(folder)))
            for name, candidate in zip(names, candidates, strict=True):
                for metric, value in judge(candidate, frames[look]).items():
                    table[name].setdefault(f"{look} {metric}", []).append(value)
    command = shlex.join(["python", *sys.argv])
    text = markdown(table, command, (time.monotonic() - begin) / 60, len(options.seeds))
    (options.output / "metric.json").write_text(json.dumps(table, indent=1))
    (options.output / "metric.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
