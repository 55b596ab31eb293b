"""Test the paper's claim at a tiny scale: a student on pseudo-labels beats the same student on synthetic images.

    python benchmarks/claim.py --seeds 0 1 2 --output outputs/claim      (make claim)

For each seed the real stages run: a teacher on synthetic scenes, its labels of photographic scenes, a student on
those labels, and the same student (recipe, steps, seed) on the synthetic scenes and their exact depth. All are
evaluated on unseen photographic scenes, together with the mean map of the synthetic ones. The synthetic-only student
is evaluated on unseen synthetic scenes too: its loss between the looks shows how different they are. claim.json and
claim.md have the results, seed 0's folder a report with pictures.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from depth_anything import Predictor, load_model
from depth_anything.data.shards import open_set
from depth_anything.evaluation.evaluate import score_map as judge_map
from depth_anything.evaluation.frames import read_frames
from depth_anything.evaluation.protocols import find_protocol
from depth_anything.visualize import colorize, make_panel

ROOT = Path(__file__).resolve().parents[1]
TESTS = {"photographic": 101, "synthetic": 102}  # look → seed of its held-out scenes


def run(*command: str) -> None:
    """Run a command of this project and stop at its first failure."""
    print("$", shlex.join(command), flush=True)
    subprocess.run([sys.executable, *command], check=True, cwd=Path.cwd())


def stages(seed: int, folder: Path, data: Path, extra: Sequence[str]) -> None:
    """Run teacher, labels, student and the synthetic-only student of one seed."""
    train = [
        str(ROOT / "train.py"),
        "experiment=claim",
        f"seed={seed}",
        f"output_dir={folder}",
        f"data_dir={data}",
    ]
    labels = f"labels={folder / 'labels'}"
    run(*train, "stage=teacher", *extra)
    run(*train, "stage=pseudolabel", labels)
    run(*train, "stage=student", labels, *extra)
    alone = ["name=student-synthetic-only", "data.labels=null", "data.sets=${sources.labelled}"]
    run(*train, "stage=student", *alone, *extra)


def judge(folder: Path, data: Path, look: str) -> dict[str, dict[str, float]]:
    """Evaluate a seed's models on held-out scenes of a look; model name to its mean metrics."""
    weights = [
        f"teacher={folder / 'teacher-vitt-tiny'}",
        f"student={folder / 'student-vitn-tiny'}",
        f"synthetic-only={folder / 'student-synthetic-only'}",
    ]
    report = folder / f"report-{look}"
    test, mean = str(data / f"scenes-test-{look}"), str(data / "scenes-synthetic")
    command = ["evaluate", "--data", test, "--mean-map", mean, "--output", str(report), "--weights", *weights]
    run("-m", "depth_anything", *command)
    results = json.loads((report / "results.json").read_text())["models"]
    return {result["name"]: {key: result["means"][key] for key in ("abs_rel", "d1")} for result in results}


def paint(folder: Path, data: Path, output: Path, *, count: int = 6) -> None:
    """Put some held-out photographs, their truth and three models' maps, in the truth's colors, into one picture."""
    test = open_set(str(data / "scenes-test-photographic"))
    frames = list(read_frames(test, limit=count))
    protocol = find_protocol("da2")
    names = {
        "teacher": "teacher-vitt-tiny",
        "student": "student-vitn-tiny",
        "no labels": "student-synthetic-only",
    }
    models = {title: load_model(folder / name / "model.safetensors") for title, name in names.items()}
    predictors = [Predictor(model, device="cpu", input_size=model.input_size) for model in models.values()]
    rows = []
    for frame in frames:
        truth = 1.0 / frame.depth.clip(protocol.min_depth, protocol.max_depth)
        row = [frame.image, colorize(truth)]
        for predictor in predictors:
            prediction = predictor.predict(frame.image)
            depth, _ = judge_map(prediction, frame, quantity="disparity", protocol=protocol)
            row.append(colorize(1.0 / depth, low=float(truth.min()), high=float(truth.max())))
        rows.append(row)
    picture = make_panel(rows, titles=["image", "truth", *names])
    Image.fromarray(picture).save(output, quality=88)


def spread(values: Sequence[float]) -> float:
    """Return the standard deviation over seeds, 0 for one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def summarise(seeds: Sequence[dict[str, dict[str, dict[str, float]]]]) -> dict[str, object]:
    """Reduce the seeds' figures to means, spreads, the gap between the looks and the verdict."""
    names = list(seeds[0]["photographic"])
    table = {
        name: {
            f"{look} {metric}": [seed[look][name][metric] for seed in seeds]
            for look in TESTS
            for metric in ("abs_rel", "d1")
        }
        for name in names
    }
    alone, student = table["synthetic-only"], table["student"]
    pairs = zip(alone["photographic abs_rel"], student["photographic abs_rel"], strict=True)
    margins = [a - s for a, s in pairs]
    gaps = [p / s - 1 for p, s in zip(alone["photographic abs_rel"], alone["synthetic abs_rel"], strict=True)]
    widest = max(spread(alone["photographic abs_rel"]), spread(student["photographic abs_rel"]))
    return {
        "table": table,
        "margin": statistics.mean(margins),
        "margins": margins,
        "spread": widest,
        "gap": statistics.mean(gaps),
        "gaps": gaps,
        "holds": statistics.mean(margins) > widest and min(margins) > 0 and statistics.mean(gaps) >= 0.2,
    }


def markdown(summary: dict[str, object], command: str, minutes: float, seeds: int) -> str:
    """Write the figures as a table a reader can check."""
    table: dict[str, dict[str, list[float]]] = summary["table"]  # type: ignore[assignment]
    columns = [f"{look} {metric}" for look in TESTS for metric in ("abs_rel", "d1")]
    lines = [
        f"Mean ± standard deviation over {seeds} seeds; `{command}`, {minutes:.0f} minutes on "
        f"{os.cpu_count()} cores ({platform.machine()}), {time.strftime('%Y-%m-%d')}.",
        "",
        "| | photographs AbsRel ↓ | photographs δ1 ↑ | synthetic AbsRel ↓ | synthetic δ1 ↑ |",
        "|---|---|---|---|---|",
    ]
    for name, figures in table.items():
        cells = [f"{statistics.mean(figures[c]):.3f} ± {spread(figures[c]):.3f}" for c in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        f"The student on labels wins by {summary['margin']:.3f} AbsRel; the wider spread of the two is "
        f"{summary['spread']:.3f}. From synthetic scenes to photographs the synthetic-only student loses "
        f"{summary['gap']:.0%}. The claim {'holds' if summary['holds'] else 'does not hold'}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the seeds and write what came out, whichever wins."""
    parser = argparse.ArgumentParser(
        description="Does a student on labels beat one on synthetic images alone?"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default %(default)s")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/claim"), help="folder (default %(default)s)"
    )
    parser.add_argument(
        "--data", type=Path, default=Path("data"), help="folder of the scenes (default %(default)s)"
    )
    parser.add_argument("override", nargs="*", help="for train.py, as recipe.gm_weight=0.5")
    options = parser.parse_args()
    begin = time.monotonic()
    for look, seed in TESTS.items():
        size = ["--count", "128", "--size", "112", "144", "--seed", str(seed)]
        run(
            "-m",
            "depth_anything",
            "shard",
            "scenes",
            str(options.data / f"scenes-test-{look}"),
            "--look",
            look,
            *size,
        )
    seeds = []
    for seed in options.seeds:
        folder = options.output / f"seed-{seed}"
        stages(seed, folder, options.data, options.override)
        seeds.append({look: judge(folder, options.data, look) for look in TESTS})
    summary = summarise(seeds)
    text = markdown(summary, shlex.join(["python", *sys.argv]), (time.monotonic() - begin) / 60, len(seeds))
    (options.output / "claim.json").write_text(json.dumps(summary, indent=1))
    (options.output / "claim.md").write_text(text)
    paint(options.output / f"seed-{options.seeds[0]}", options.data, options.output / "claim.jpg")
    print(text)


if __name__ == "__main__":
    main()
