"""Measure images/s of a training step, compared with the same network in a plain loop.

    python benchmarks/bench_train.py --output outputs/bench/train.json
    python benchmarks/bench_train.py --encoder vitl --batch 16 --checkpointing --compile --output vitl.json

The variants alternate in one process with one network, one optimizer and one batch on the device:

    plain   zero_grad, forward, losses, backward, clip, step, and nothing else
    step    the stage's module under pl.Trainer, without callbacks
    run     the same with the callbacks of a real run: metrics, progress bar, checkpoints (none is due), signals
    shards  as `run`, with the loader reading the labeled set --shards

A window is a number of steps of one variant; after each window of the framework the plain loop runs one, and the
ratio compares these two, so that other load affects both. The device is synchronized at the ends of a window only
(except for the framework's own log line, once per window).
"""

import argparse
import json
import platform
import re
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import timm
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor

from depth_anything.data.shards import open_set
from depth_anything.data.transforms import normalize
from depth_anything.devices import peak_tflops
from depth_anything.losses import feature_alignment_loss, invariant_losses
from depth_anything.model.depth_anything import DepthAnything
from depth_anything.model.encoder import ENCODERS
from depth_anything.model.flops import count_flops as count_model_flops
from depth_anything.training.base import DepthModule
from depth_anything.training.check_config import resolve_config
from depth_anything.training.config import RunConfig
from depth_anything.training.lightning import build_callbacks
from depth_anything.training.loggers import MetricsCSV
from depth_anything.training.recipes import Recipe
from depth_anything.training.run import build_trainer
from depth_anything.training.run_dir import RunDir
from depth_anything.training.valid_pixels import ValidPixelCheck

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
NEVER = 10**9


@dataclass(frozen=True)
class Settings:
    """What is measured, and for how long."""

    stage: str
    encoder: str
    device: str
    precision: str
    image_size: int
    batch: int
    steps: int
    repeats: int
    warmup: int
    checkpointing: bool
    compile: bool
    shards: str | None
    workers: int
    seed: int


@dataclass(frozen=True)
class Window:
    """One side's turn."""

    seconds: float
    wait_s: float  # for data, by the host's clock
    peak_gib: float | None  # allocated on the device; None on a CPU


@dataclass(frozen=True)
class Bench:
    """What the sides share."""

    settings: Settings
    config: RunConfig
    module: DepthModule
    frozen: DepthAnything | None
    batch: dict[str, Any]
    folder: Path


def parse(argv: list[str] | None) -> tuple[Settings, Path | None]:
    """Read the command line; what it leaves open depends on the device."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--stage", choices=("teacher", "student"), default="teacher", help="student: features too"
    )
    parser.add_argument("--encoder", choices=ENCODERS, help="default: vits on a GPU, else vitn")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", choices=("bf16-mixed", "32-true"), help="default: bf16-mixed on a GPU")
    parser.add_argument(
        "--image-size", type=int, help="side of the crop, pixels; default: 518 on a GPU, else 98"
    )
    parser.add_argument("--batch", type=int, default=16, help="images a step")
    parser.add_argument("--steps", type=int, help="of a window; default: 20 on a GPU, else 5")
    parser.add_argument("--repeats", type=int, default=7, help="windows a side")
    parser.add_argument("--warmup", type=int, default=5, help="steps before the first window of a side")
    parser.add_argument("--checkpointing", action="store_true", help="recompute encoder blocks")
    parser.add_argument("--compile", action="store_true", help="compile encoder blocks")
    parser.add_argument("--shards", help="a labeled set for a fourth side, fed by the loader (stage teacher)")
    parser.add_argument("--workers", type=int, default=2, help="of that loader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file")
    found = vars(parser.parse_args(argv))
    output = found.pop("output")
    if found["device"] == "auto":
        found["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    gpu = found["device"] == "cuda"
    found["encoder"] = found["encoder"] or ("vits" if gpu else "vitn")
    found["precision"] = found["precision"] or ("bf16-mixed" if gpu else "32-true")
    found["image_size"] = found["image_size"] or (518 if gpu else 98)
    found["steps"] = found["steps"] or (20 if gpu else 5)
    if found["shards"] and found["stage"] == "student":
        parser.error("--shards holds labeled images, which teach a teacher; type --stage teacher")
    if found["image_size"] % 14:
        parser.error(f"--image-size {found['image_size']} is no multiple of the patch; type a multiple of 14")
    return Settings(**found), output


def compose_config(settings: Settings, folder: Path) -> RunConfig:
    """Compose the stage as train.py does, the paper's numbers but for what is measured here."""
    overrides = {
        "stage": settings.stage,
        "size": "paper",
        "logger": "none",
        "encoder": settings.encoder,
        "batch_size": settings.batch,
        "image_size": settings.image_size,
        "workers": settings.workers,
        "init": "null",
        "steps": NEVER,
        "checkpoint.every": NEVER,
        "logging.every": settings.steps,
        "recipe.checkpointing": settings.checkpointing,
        "recipe.compile": settings.compile,
        "trainer.accelerator": settings.device,
        "trainer.devices": 1,
        "trainer.precision": settings.precision,
    }
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("train", [f"{key}={value}" for key, value in overrides.items()])
    cfg.run_dir = str(folder)
    return resolve_config(cfg)


def make_batch(settings: Settings) -> dict[str, Any]:
    """Make a micro-batch as the loader hands it over, on the device: noise, and a twentieth of it not valid."""
    shape = (settings.batch, settings.image_size, settings.image_size)
    rng = np.random.default_rng(settings.seed)
    batch = {
        "image": torch.from_numpy(rng.integers(0, 256, (*shape, 3), np.uint8)),
        "target": torch.from_numpy(rng.random(shape, np.float32)),
        "valid": torch.from_numpy(rng.random(shape, np.float32) > 0.05),
        "sample": torch.arange(settings.batch),
    }
    return {**{name: value.to(settings.device) for name, value in batch.items()}, "failed": []}


def build(settings: Settings, folder: Path) -> Bench:
    """Build the network from random weights, which take as long as trained ones, and the stage's module around it."""
    config = compose_config(settings, folder)
    torch.manual_seed(settings.seed)
    network = DepthAnything(settings.encoder)
    frozen = DepthAnything(settings.encoder) if settings.stage == "student" else None
    module = instantiate(config.module.as_dict(), network, frozen=frozen, _convert_="object")
    return Bench(settings, config, module, frozen, make_batch(settings), folder)


def plain_step(
    network: DepthAnything,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Any],
    recipe: Recipe,
    *,
    precision: str,
    frozen: DepthAnything | None = None,
) -> Tensor:
    """Make one step of the recipe, written as one would without a framework; return its loss."""
    optimizer.zero_grad()
    image = normalize(batch["image"])
    with torch.autocast(image.device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
        if frozen is None:
            prediction = network(image)
        else:
            prediction, features = network(image, return_features=True)
            with torch.no_grad():
                wanted = frozen.features(image)
    ssi, gm = invariant_losses(
        prediction,
        batch["target"],
        batch["valid"],
        scales=recipe.gm_scales,
        trim=recipe.trim,
        gradient_trim=recipe.gm_trim,
    )
    loss = recipe.ssi_weight * ssi + recipe.gm_weight * gm
    if frozen is not None:
        alignment = feature_alignment_loss(features, wanted, tolerance=recipe.alignment_tolerance)
        loss = loss + recipe.alignment_weight * alignment
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), recipe.clip_norm or float("inf"))
    optimizer.step()
    return loss.detach()


class Stopwatch:
    """Seconds between two points of a device's work, which is waited for at these two points only."""

    def __init__(self, device: str) -> None:
        """Measure on "cuda" by its own events, on "cpu" by the clock."""
        self._cuda = device == "cuda"

    def start(self) -> None:
        """Wait for the device, forget its peak and begin."""
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._begin = self._mark()

    def stop(self, *, wait_s: float = 0.0) -> Window:
        """Wait for what was begun and tell how long it took."""
        end = self._mark()
        if not self._cuda:
            return Window(end - self._begin, wait_s, None)
        end.synchronize()
        peak = torch.cuda.max_memory_allocated() / GIB
        return Window(self._begin.elapsed_time(end) / 1000, wait_s, peak)

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class TakeTurns(pl.Callback):
    """Time windows of the Trainer's steps, and let the plain loop have its own between them."""

    def __init__(self, bench: Bench, plain: Callable[[torch.optim.Optimizer], object]) -> None:
        """Take turns with `plain`, which makes one step with the optimizer it is given."""
        self.bench, self.plain = bench, plain
        self.watch = Stopwatch(bench.settings.device)
        self.own: list[Window] = []
        self.others: list[Window] = []
        self._left = bench.settings.warmup
        self._warm = False

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start the clock of the first wait."""
        self._idle, self._wait = time.perf_counter(), 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, index: int) -> None:
        """Add the time since the last step ended."""
        self._wait += time.perf_counter() - self._idle

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        """Close a window that is full, hand over, and open the next."""
        self._left -= 1
        if self._left == 0:
            self._hand_over(trainer, module)
        self._idle = time.perf_counter()

    def _hand_over(self, trainer: pl.Trainer, module: DepthModule) -> None:
        settings, optimizer = self.bench.settings, trainer.optimizers[0]
        if self._warm:
            self.own.append(self.watch.stop(wait_s=self._wait))
        module.parts.clear()  # of the side without callbacks, where nobody else does
        steps = settings.steps if self._warm else settings.warmup
        self.watch.start()
        for _ in range(steps):
            self.plain(optimizer)
        window = self.watch.stop()
        if self._warm:
            self.others.append(window)
        self._warm, self._left, self._wait = True, settings.steps, 0.0
        trainer.should_stop = len(self.own) == settings.repeats
        self.watch.start()


class SameBatch:
    """A loader that has its batch already."""

    def __init__(self, batch: dict[str, Any]) -> None:
        """Hand `batch` over again and again."""
        self.batch = batch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield without end."""
        while True:
            yield self.batch


def measure(bench: Bench, *, callbacks: bool, shards: str | None = None) -> TakeTurns:
    """Let the Trainer and the plain loop take turns until each has had its windows."""
    settings, network, recipe = bench.settings, bench.module.model, bench.module.recipe

    def plain(optimizer: torch.optim.Optimizer) -> Tensor:
        return plain_step(
            network, optimizer, bench.batch, recipe, precision=settings.precision, frozen=bench.frozen
        )

    turns = TakeTurns(bench, plain)
    others = build_callbacks(bench.config, RunDir(bench.folder)) if callbacks else []
    if shards is None:  # one batch again and again is of no set whose records could be named
        others = [callback for callback in others if not isinstance(callback, ValidPixelCheck)]
    trainer = build_trainer(
        bench.config, [*others, turns], max_steps=NEVER
    )  # last: the others' work is in the step
    trainer.loggers = [MetricsCSV(bench.folder / "metrics.csv")] if callbacks else []
    if shards is None:
        trainer.fit(bench.module, train_dataloaders=SameBatch(bench.batch))
    else:
        node = replace(bench.config.data, sets={open_set(shards).name: shards}).as_dict()
        data = instantiate(node, micro_batch=settings.batch, patch=network.multiple, _convert_="all")
        trainer.fit(bench.module, datamodule=data)
    return turns


def count_flops(encoder: str, image_size: int, *, aligned: bool = False) -> dict[str, int]:
    """Count one image's multiplications and additions, in a copy without memory: on a CPU attention is missed.

    Args:
        encoder: Name.
        image_size: Side, pixels.
        aligned: The step also runs a frozen encoder forward.

    Returns:
        "forward" of the network, and "step": forward, backward and the frozen encoder, nothing recomputed.
    """
    with torch.device("meta"):
        network = DepthAnything(encoder)
    counted = count_model_flops(network, image_size, image_size, frozen_encoder=aligned)
    return {"forward": counted.forward, "step": counted.step}


def spread(values: list[float]) -> dict[str, Any]:
    """Sum repeats up."""
    low, median, high = np.percentile(values, [25, 50, 75]).tolist()
    return {"median": median, "iqr": high - low, "values": values}


def side(windows: list[Window], settings: Settings, *, flops: int, peak: float | None) -> dict[str, Any]:
    """Turn a side's windows into its numbers."""
    speed = spread([settings.batch * settings.steps / window.seconds for window in windows])
    memory = [window.peak_gib for window in windows if window.peak_gib is not None]
    return {
        "images_per_s": speed,
        "data_wait": spread([window.wait_s / window.seconds for window in windows]),
        "mfu": speed["median"] * flops / (peak * 1e12) if peak else None,
        "peak_gib": max(memory, default=None),
    }


def processor() -> str:
    """Name the CPU: the model where Linux tells it, else the architecture."""
    known = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", known.read_text(), re.M) if known.exists() else None
    return found[1] if found else platform.machine()


def metadata(settings: Settings) -> dict[str, Any]:
    """Say what was run, on what, and when."""

    def git(*words: str) -> str | None:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    gpu = settings.device == "cuda"
    return {
        "commit": git("rev-parse", "HEAD"),
        "uncommitted": bool(git("status", "--porcelain")),
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if gpu else processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if gpu else None,
        "pytorch_lightning": pl.__version__,
        "timm": timm.__version__,
    }


def report(settings: Settings, turns: dict[str, TakeTurns], parameters: int) -> dict[str, Any]:
    """Put the numbers together."""
    about = metadata(settings)
    peak = peak_tflops(about["device"])
    if peak is None:
        print(f"warning: no peak is known for {about['device']!r}, so there is no MFU", file=sys.stderr)
    flops = count_flops(settings.encoder, settings.image_size, aligned=settings.stage == "student")
    windows = {"plain": [window for turn in turns.values() for window in turn.others]}
    windows.update({name: turn.own for name, turn in turns.items()})
    ratios = {
        name: spread(
            [theirs.seconds / ours.seconds for ours, theirs in zip(turn.own, turn.others, strict=True)]
        )
        for name, turn in turns.items()
    }
    return {
        "benchmark": "train",
        "version": 1,
        "metadata": about,
        "settings": asdict(settings),
        "network": {"parameters": parameters, "flops_per_image": flops, "peak_bf16_tflops": peak},
        "sides": {name: side(own, settings, flops=flops["step"], peak=peak) for name, own in windows.items()},
        "ratio_to_plain": ratios,
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB,
    }


def print_table(result: dict[str, Any]) -> None:
    """Print what a person looks for first."""
    settings = result["settings"]
    words = [
        settings["stage"],
        settings["encoder"],
        f"{settings['image_size']} px",
        f"batch {settings['batch']}",
    ]
    words += [settings["precision"]] + [word for word in ("checkpointing", "compile") if settings[word]]
    print(f"{', '.join(words)}, {result['metadata']['device']}")
    print(f"{'':8}{'images/s':>10}{'IQR':>8}{'of plain':>10}{'MFU':>7}{'data wait':>11}{'GiB':>7}")
    for name, numbers in result["sides"].items():
        speed, ratio = numbers["images_per_s"], result["ratio_to_plain"].get(name)
        cells = [f"{speed['median']:.1f}", f"{speed['iqr']:.1f}", f"{ratio['median']:.3f}" if ratio else ""]
        cells += ["" if numbers["mfu"] is None else f"{numbers['mfu']:.1%}"]
        cells += [f"{numbers['data_wait']['median']:.1%}"]
        cells += ["" if numbers["peak_gib"] is None else f"{numbers['peak_gib']:.1f}"]
        print(f"{name:8}{cells[0]:>10}{cells[1]:>8}{cells[2]:>10}{cells[3]:>7}{cells[4]:>11}{cells[5]:>7}")


def main(argv: list[str] | None = None) -> None:
    settings, output = parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        bench = build(settings, Path(folder))
        turns = {"step": measure(bench, callbacks=False), "run": measure(bench, callbacks=True)}
        if settings.shards:
            turns["shards"] = measure(bench, callbacks=True, shards=settings.shards)
    result = report(settings, turns, sum(p.numel() for p in bench.module.model.parameters()))
    print_table(result)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
