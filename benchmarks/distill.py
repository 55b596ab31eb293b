"""Compare students by normalization of the loss, labels of crops, and rule of two teachers, at a tiny scale.

    python benchmarks/distill.py --output outputs/distill --data data/distill

Two teachers (`vitn`, seeds 0 and 1) learn synthetic scenes and label photographic ones. On labels with two crops each,
of the first teacher, one student per row of tables 1 and 2 of Distill Any Depth (arXiv 2502.19204v2) is trained; on
labels of both teachers, one per `teacher_rule`. All students of a seed start from the same weights and see the same
samples. They are evaluated on scenes that nobody trained on, after the fit of scale and shift of the paper's protocol,
and so is one map, the mean of the training scenes: what is not better than it has not learned to look at the image.
distill.json and distill.md have the results; a second start continues.
"""

import argparse
import contextlib
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fork_server import ForkServer  # noqa: E402

from benchmarks.claims.images import TestSet  # noqa: E402
from benchmarks.claims.worker import judge_set  # noqa: E402
from depth_anything import Predictor, load_model  # noqa: E402
from depth_anything.evaluation.frames import compute_mean_map, read_frames  # noqa: E402

CROPS = "crop_share=0.5"
LOCAL_GLOBAL = "recipe.local_weight=0.5"
LOSSES = {
    "global": [],
    "none": ["recipe.normalization=none"],
    "local": ["recipe.normalization=local"],
    "hybrid": ["recipe.normalization=hybrid"],
    "hybrid, local-global": ["recipe.normalization=hybrid", LOCAL_GLOBAL],
    "hybrid, shared context": ["recipe.normalization=hybrid", CROPS],
    "hybrid, both": ["recipe.normalization=hybrid", CROPS, LOCAL_GLOBAL],
}
"""Row → what is typed; all on the labels of the first teacher."""
RULES = ("first", "random", "mean", "confidence")
TEST = "scenes-test"
TEST_SCENES = ["--count", "64", "--size", "112", "144", "--seed", "101", "--layout", "varied"]
METRICS = ("abs_rel", "d1", "boundary_f1")


def list_runs(flags: argparse.Namespace) -> dict[str, list[str]]:
    """List the trainings and labelings, name to what is typed, in the order in which they run."""
    common = [
        *("encoder=vitn", "image_size=56", "trainer=cpu", "workers=0", "validation.every=100000"),
        *("validation.limit=4", f"data_dir={flags.data}", f"output_dir={flags.output}"),
        *(f"sources.scenes.{name}.count=256" for name in ("synthetic", "photographic")),
        "sources.scenes.validation.count=8",
    ]
    teachers = {
        f"teacher-{seed}": ["stage=teacher", f"steps={flags.teacher_steps}", f"seed={seed}"]
        for seed in (0, 1)
    }
    files = [f"{flags.output}/{name}/model.safetensors" for name in teachers]
    label_sets = {"crops": [f"teacher={files[0]}", "label_crops=2"]}
    label_sets |= {rule: [f"teacher=[{','.join(files)}]", f"teacher_rule={rule}"] for rule in RULES}
    runs = dict(teachers)
    for labels, typed in label_sets.items():
        runs[f"labels-{labels}"] = ["stage=pseudolabel", f"labels={flags.data}/labels-{labels}", *typed]
    students = {row: ["labels-crops", *typed] for row, typed in LOSSES.items()}
    students |= {f"rule {rule}": [f"labels-{rule}"] for rule in RULES}
    students["rule confidence"].append("label_weight=weight")
    for seed in flags.seeds:
        for row, (labels, *typed) in students.items():
            words = ["stage=student", f"labels={flags.data}/{labels}", f"steps={flags.steps}", "batch_size=4"]
            runs[run_name(row, seed)] = [*words, f"seed={seed}", *typed]
    return {name: [*words, f"name={name}", *common] for name, words in runs.items()}


def run_all(flags: argparse.Namespace) -> None:
    """Run what is missing, each in a process that has imported torch already; stop at the first failure."""
    commands = {name: [str(ROOT / "train.py"), *words] for name, words in list_runs(flags).items()}
    scenes = ["shard", "scenes", str(flags.data / TEST), "--look", "photographic", *TEST_SCENES]
    commands = {TEST: ["-m", "depth_anything", *scenes], **commands}
    done = {TEST: flags.data / TEST / "manifest.json"}
    done |= {f"labels-{labels}": flags.data / f"labels-{labels}" for labels in ("crops", *RULES)}
    flags.output.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(ForkServer()) as server:
        for name, words in commands.items():
            path = done.get(name, flags.output / name / "model.safetensors")
            if path.is_file() or any(path.glob("*/manifest.json")):
                continue
            begin = time.monotonic()
            result = server.run([sys.executable, *words], cwd=flags.output, env=os.environ)
            if result.returncode:
                sys.exit(f"{shlex.join(words)}\n{result.stderr[-2000:]}")
            print(f"{name}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)


def run_name(row: str, seed: int) -> str:
    """Return the name of a student's run."""
    return f"student-{row.replace(', ', '-').replace(' ', '-')}-{seed}"


def judge(folder: Path | None, data: Path) -> dict[str, float]:
    """Evaluate a network on unseen photographic scenes; without one the mean map of the synthetic scenes."""
    source: Any
    if folder is None:
        source = compute_mean_map(read_frames(data / "scenes-synthetic", limit=1000))
    else:
        network = load_model(folder / "model.safetensors")
        source = Predictor(network, device="cpu", input_size=network.input_size)
    figures = judge_set(source, TestSet("photographic", "photographic", data / TEST, True))
    return {metric: figures[metric] for metric in METRICS}


def markdown(table: dict[str, list[dict[str, float]]], note: str) -> str:
    """Write mean and standard deviation over the seeds."""
    lines = [note, "", "| | AbsRel ↓ | δ1 ↑ | boundary F1 ↑ |", "|---|---|---|---|"]
    for row, figures in table.items():
        cells = []
        for metric in METRICS:
            values = [one[metric] for one in figures]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, evaluate, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default %(default)s")
    parser.add_argument("--steps", type=int, default=150, help="of a student (default %(default)s)")
    parser.add_argument("--teacher-steps", type=int, default=300, help="default %(default)s")
    parser.add_argument("--output", type=Path, default=Path("outputs/distill"), help="default %(default)s")
    parser.add_argument("--data", type=Path, default=Path("data/distill"), help="default %(default)s")
    flags = parser.parse_args(arguments)
    flags.output, flags.data = flags.output.resolve(), flags.data.resolve()
    os.environ["OMP_NUM_THREADS"] = "1"
    run_all(flags)
    table = {"the same map for every scene": [judge(None, flags.data)]}
    table |= {f"teacher {seed}": [judge(flags.output / f"teacher-{seed}", flags.data)] for seed in (0, 1)}
    for row in [*LOSSES, *(f"rule {rule}" for rule in RULES)]:
        table[row] = [judge(flags.output / run_name(row, seed), flags.data) for seed in flags.seeds]
    note = (
        f"Mean ± standard deviation over seeds {flags.seeds}; `{shlex.join(['python', *sys.argv])}`, one "
        f"core ({platform.machine()}, {os.cpu_count()} cores), {time.strftime('%Y-%m-%d')}. "
        f"{flags.teacher_steps} steps of a teacher, {flags.steps} of a student; 64 unseen photographic scenes."
    )
    (flags.output / "distill.json").write_text(json.dumps(table, indent=1) + "\n")
    (flags.output / "distill.md").write_text(markdown(table, note))
    print(markdown(table, note))


if __name__ == "__main__":
    main()
