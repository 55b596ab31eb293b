"""Does an encoder trained on depth help segmentation, at a tiny scale? From random weights and from a depth network.

    python benchmarks/segmentation.py --encoder outputs/student-vitn-tiny --seeds 0 1 2

For each seed and head the stage's own module trains twice on procedural scenes with the class of every pixel, from
random weights and from the encoder of a depth checkpoint, with the same samples in the same order and the numbers of
stage=segmentation size=tiny. The last weights are evaluated on unseen scenes, as `depth-anything evaluate` does.
`probe` is a linear layer on frozen features, `dpt` the DPT head with everything trained. segmentation.json keeps every
run, also of earlier calls with the same steps; segmentation.md has the table and the verdict.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytorch_lightning as pl
import torch

from depth_anything.data.shards import open_set
from depth_anything.evaluation.runner import score_lines
from depth_anything.evaluation.segmentation_task import task_from_class_set
from depth_anything.inference.segmentation import SegmentationPredictor
from depth_anything.model.segmentation import SegmentationModel, WindowRule
from depth_anything.model.weights import fingerprint, load_encoder
from depth_anything.scenes.render import write_scenes
from depth_anything.scenes.scene_set import SceneSetSpec
from depth_anything.training.lightning import trainer_arguments
from depth_anything.training.recipes import Recipe
from depth_anything.training.segmentation import Segmentation
from depth_anything.training.segmentation_data import SegmentationData, read_classes

HEADS = {"dpt": "DPT head, all trained", "probe": "linear layer, encoder frozen"}
STARTS = ("random", "depth")
SIDE = 70
SCENES = SceneSetSpec(look="photographic", count=64, seed=5, height=112, width=144, classes=True)


def train(options: argparse.Namespace, *, head: str, start: str, seed: int) -> SegmentationModel:
    """Train one network."""
    torch.manual_seed(seed)
    sets = {"scenes-classes": str(options.data / "scenes-classes")}
    model = SegmentationModel(
        options.size, classes=read_classes(sets), head="linear" if head == "probe" else "dpt"
    )
    model.input_size, model.window = SIDE, WindowRule(None, 46)
    if start == "depth":
        load_encoder(model, options.encoder)
    model.pretrained.requires_grad_(head != "probe")
    data = SegmentationData(
        sets=sets,
        labels=None,
        seed=seed,
        batch_size=8,
        micro_batch=8,
        patch=model.multiple,
        streams=64,
        image_size=SIDE,
        workers=0,
        perturb=False,
        scale_jitter=(0.5, 2.0),
        run_dir=str(options.output),
    )
    rate = 1e-2 if head == "probe" else 1e-3
    recipe = Recipe(
        steps=options.steps, encoder_lr=1e-3, head_lr=rate, weight_decay=0.01, warmup=0.05, clip_norm=1.0
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = trainer_arguments(callbacks=[], max_steps=options.steps, run_dir=folder)
        trainer = pl.Trainer(**arguments, accelerator="cpu", devices=1)
        module = Segmentation(model, recipe)
        trainer.fit(module, datamodule=data)
    return module.model


def measure(options: argparse.Namespace, *, head: str, start: str, seed: int) -> dict:
    """Train and evaluate one network; return its scores."""
    begin = time.monotonic()
    model = train(options, head=head, start=start, seed=seed)
    seconds = time.monotonic() - begin
    task = task_from_class_set(open_set(options.data / "scenes-classes-validation"), limit=options.limit)
    result = task.result("model", score_lines(SegmentationPredictor(model, device="cpu"), task, task.lines))
    row = {"head": head, "start": start, "seed": seed, "steps": options.steps, "seconds": round(seconds)}
    row |= {
        **result.means,
        "iou": dict(zip([c.name for c in task.classes], result.scores.iou.tolist(), strict=True)),
    }
    print(f"{head} {start} {seed}: mIoU {100 * row['miou']:.1f} % in {seconds:.0f} s", flush=True)
    return row


def verdict(random: list[float], depth: list[float]) -> str:
    """Say in words whether the depth encoder helps: a mean gain within twice the spread of the seeds is noise."""
    if len(random) < 2 or len(random) != len(depth):
        return "too few seeds"
    gain = 100 * (statistics.mean(depth) - statistics.mean(random))
    spread = 100 * max(statistics.stdev(random), statistics.stdev(depth))
    if abs(gain) <= 2 * spread:
        return f"within noise ({gain:+.1f} points)"
    return f"{'helps' if gain > 0 else 'hurts'} ({gain:+.1f} points)"


def format_results(rows: list[dict]) -> str:
    """Write the results as a Markdown table."""
    lines = ["| head | encoder | mIoU % by seed | mean ± sd | pixel accuracy % | depth encoder |"]
    lines.append("|---|---|---|---|---|---|")
    for head in dict.fromkeys(row["head"] for row in rows):
        chosen = {s: [r for r in rows if (r["head"], r["start"]) == (head, s)] for s in STARTS}
        values = {s: [r["miou"] for r in own] for s, own in chosen.items()}
        for start in (s for s in STARTS if values[s]):
            own = [100 * value for value in values[start]]
            spread = statistics.stdev(own) if len(own) > 1 else 0.0
            accuracy = statistics.mean(100 * r["accuracy"] for r in chosen[start])
            said = verdict(values["random"], values["depth"]) if start == "depth" else ""
            seeds = ", ".join(f"{value:.1f}" for value in own)
            cells = [
                HEADS[head],
                start,
                seeds,
                f"{statistics.mean(own):.1f} ± {spread:.1f}",
                f"{accuracy:.1f}",
                said,
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--encoder", type=Path, required=True, help="a depth checkpoint of the encoder --size"
    )
    parser.add_argument("--size", default="vitn", help="the encoder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--heads", nargs="+", choices=list(HEADS), default=list(HEADS))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument(
        "--scenes", type=int, default=512, help="scenes to train on; they are drawn on first use"
    )
    parser.add_argument("--limit", type=int, default=64, help="scenes to evaluate on")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--output", type=Path, default=Path("outputs/segmentation-comparison"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    write_scenes(options.data / "scenes-classes", replace(SCENES, count=options.scenes, seed=4))
    write_scenes(options.data / "scenes-classes-validation", SCENES)
    file = options.output / "segmentation.json"
    saved = json.loads(file.read_text()) if file.exists() else {"rows": []}
    rows = [row for row in saved["rows"] if row["steps"] == options.steps]
    for seed in options.seeds:
        for head in options.heads:
            for start in STARTS:
                if not any((r["head"], r["start"], r["seed"]) == (head, start, seed) for r in rows):
                    rows.append(measure(options, head=head, start=start, seed=seed))
                    facts = {
                        "encoder": fingerprint(options.encoder),
                        "scenes": options.scenes,
                        "size": options.size,
                    }
                    file.write_text(json.dumps({**facts, "rows": rows}, indent=1))
    text = format_results(rows)
    (options.output / "segmentation.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
