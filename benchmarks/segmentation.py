"""Does an encoder trained on depth help segmentation, at a tiny scale? From random weights and from a depth student.

    python benchmarks/segmentation.py --seeds 0 1 2 --output outputs/segmentation-comparison

Without --encoder the quickstart runs first: a teacher on synthetic scenes, its labels of photographic scenes, and a
student, whose encoder is the one compared. For each seed and head the stage runs twice, from random weights and from
that encoder, with the same samples; the last model is evaluated on unseen scenes. segmentation.json and
segmentation.md have the results: mIoU of each run, mean and standard deviation, and the verdict.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEADS = {
    "dpt": ("the DPT head, everything trained", ["head=dpt"]),
    "probe": (
        "a linear layer on frozen features",
        ["head=linear", "freeze_encoder=true", "recipe.head_lr=1e-2"],
    ),
}
STARTS = ("random", "depth")


def run(*command: str) -> float:
    """Run a command of this project, stop at its first failure, and return its seconds."""
    print("$", shlex.join(command), flush=True)
    begin = time.monotonic()
    subprocess.run([sys.executable, *command], check=True)
    return time.monotonic() - begin


def train_depth_student(folder: Path, data: Path) -> Path:
    """Run the quickstart and return its student."""
    train = [str(ROOT / "train.py"), f"output_dir={folder}", f"data_dir={data}"]
    for stage in ("teacher", "pseudolabel", "student"):
        run(*train, f"stage={stage}", f"labels={folder / 'labels'}" if stage != "teacher" else "seed=0")
    return folder / "student-vitn-tiny" / "model.safetensors"


def measure(
    folder: Path, data: Path, encoder: Path, *, head: str, start: str, seed: int, extra: list[str]
) -> dict:
    """Train and evaluate one run; return its scores."""
    name = f"{head}-{start}-{seed}"
    init = f"init={encoder}" if start == "depth" else "init=null"
    train = [str(ROOT / "train.py"), "stage=segmentation", f"output_dir={folder}", f"data_dir={data}"]
    seconds = run(
        *train, *HEADS[head][1], init, f"seed={seed}", f"name={name}", "validation.every=1000000", *extra
    )
    report = folder / name / "report"
    run("-m", "depth_anything", "evaluate", "--weights", str(folder / name), "--data",
        str(data / "scenes-classes-validation"), "--output", str(report))  # fmt: skip
    model = json.loads((report / "results.json").read_text())["models"][0]
    return {
        "head": head,
        "start": start,
        "seed": seed,
        "seconds": round(seconds),
        **model["means"],
        "iou": model["iou"],
    }


def verdict(random: list[float], depth: list[float]) -> str:
    """Say in words whether the depth encoder helps: a difference within the spread of the seeds is noise."""
    gain = statistics.mean(depth) - statistics.mean(random)
    spread = max(statistics.stdev(random), statistics.stdev(depth)) if len(random) > 1 else 0.0
    if abs(gain) <= 2 * spread or len(random) < 2:
        return f"within noise ({100 * gain:+.1f} points)"
    return f"{'helps' if gain > 0 else 'hurts'} ({100 * gain:+.1f} points)"


def format_results(rows: list[dict]) -> str:
    """Write the results as a Markdown table."""
    lines = [
        "| head | encoder | mIoU % of each seed | mean ± sd | pixel accuracy % | depth encoder |",
        "|---|---|---|---|---|---|",
    ]
    for head in dict.fromkeys(row["head"] for row in rows):
        values = {s: [r["miou"] for r in rows if r["head"] == head and r["start"] == s] for s in STARTS}
        for start in STARTS:
            own = values[start]
            spread = statistics.stdev(own) if len(own) > 1 else 0.0
            accuracy = statistics.mean(
                r["accuracy"] for r in rows if r["head"] == head and r["start"] == start
            )
            seeds = ", ".join(f"{100 * value:.1f}" for value in own)
            said = verdict(values["random"], values["depth"]) if start == "depth" else ""
            lines.append(
                f"| {HEADS[head][0]} | {start} | {seeds} | {100 * statistics.mean(own):.1f} ± {100 * spread:.1f} | "
                f"{100 * accuracy:.1f} | {said} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--heads", nargs="+", choices=list(HEADS), default=list(HEADS))
    parser.add_argument("--encoder", type=Path, help="a vitn checkpoint in place of the quickstart's student")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the scenes")
    parser.add_argument("--output", type=Path, default=Path("outputs/segmentation-comparison"))
    parser.add_argument("extra", nargs="*", help="keys of the segmentation runs, as steps=100")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    encoder = options.encoder or train_depth_student(options.output, options.data)
    file = options.output / "segmentation.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    for seed in options.seeds:
        for head in options.heads:
            for start in STARTS:
                if any((r["head"], r["start"], r["seed"]) == (head, start, seed) for r in rows):
                    continue  # measured by an earlier call
                rows.append(
                    measure(
                        options.output,
                        options.data,
                        encoder,
                        head=head,
                        start=start,
                        seed=seed,
                        extra=options.extra,
                    )
                )
                file.write_text(json.dumps(rows, indent=1))
    text = format_results(rows)
    (options.output / "segmentation.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
