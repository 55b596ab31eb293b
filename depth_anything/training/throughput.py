"""Throughput of a run: images per second, step time, wait for data, MFU, samples seen, and effective time."""

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from depth_anything.devices import peak_tflops
from depth_anything.disk import atomic_write
from depth_anything.model.depth_anything import DepthAnything
from depth_anything.model.flops import count_flops
from depth_anything.model.lora import add_adapters
from depth_anything.training.check_config import build_head
from depth_anything.training.config import RunConfig
from depth_anything.training.config_schema import DEPTH_STAGES

WRITE_INTERVAL_S = 10.0
"""Seconds between two writes of time.json, so that a kill loses no more of the wall time."""
PEAK_PRECISION = {
    "bf16-mixed": "bf16",
    "bf16-true": "bf16",
    "16-mixed": "fp16",
    "16-true": "fp16",
    "32-true": "tf32",
}
"""Precision of the Trainer → that of the matrix products; `trainer_arguments` lets float32 ones use tf32."""


class Throughput:
    """Measures the steps between two log lines on the host's clock, without waiting for the device.

    A log line waits for the device, so the time between two log lines is right, though a single step may be queued.
    Time is either useful (steps, with their wait for data) or a pause: what other callbacks do between two steps, as
    validation and saving.

    Attributes:
        useful_s: Seconds of all steps that led to the current weights, over all starts of the run.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        devices: int,
        flop_per_image: int | None = None,
        peak_flops: float | None = None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Start the clock.

        Args:
            batch_size: Images of a step, over all devices.
            devices: Number of devices.
            flop_per_image: Operations of a training step for an image; None if they are not counted.
            peak_flops: Peak of one device, FLOP/s; None if it is not known.
            now: Returns the time in seconds.
        """
        self.batch_size, self.devices = batch_size, devices
        self.flop_per_image, self.peak_flops, self._now = flop_per_image, peak_flops, now
        self.useful_s = 0.0
        self._read_at = self._ended_at = now()
        self._wait_s = self._pause_s = 0.0
        self._paused_since: float | None = None
        self._steps = 0
        self._total_steps, self._total_s, self._total_wait_s = 0, 0.0, 0.0

    def receive_batch(self) -> None:
        """A micro-batch has arrived: the time since the last one, or the pause after it, ended was a wait for data."""
        self._paused_since = None  # still set if no callback calls `end_pause`
        self._wait_s += self._now() - self._ended_at

    def count_step(self) -> None:
        """An optimizer step has ended."""
        self._steps += 1

    def end_batch(self) -> None:
        """The work on a micro-batch has ended; what follows until `end_pause` is a pause."""
        self._ended_at = self._paused_since = self._now()

    def end_pause(self) -> None:
        """The other callbacks have ended; the wait for the next micro-batch begins."""
        if self._paused_since is not None:
            self._pause_s += self._now() - self._paused_since
            self._paused_since, self._ended_at = None, self._now()

    def total_useful_s(self) -> float:
        """Return `useful_s` with the steps since the last log line."""
        return self.useful_s + self._busy_s()

    def _busy_s(self) -> float:
        now = self._now()
        pause = self._pause_s + (now - self._paused_since if self._paused_since is not None else 0.0)
        return now - self._read_at - pause

    def read(self) -> dict[str, float]:
        """Return the numbers of the steps since the last call."""
        busy, steps, wait = max(self._busy_s(), 1e-9), self._steps, self._wait_s
        self.useful_s += busy
        self._total_steps += steps
        self._total_s += busy
        self._total_wait_s += wait
        self._read_at = self._now()
        self._pause_s = self._wait_s = 0.0
        self._steps = 0
        if self._paused_since is not None:
            self._paused_since = self._read_at
        return self._numbers(steps, busy, wait)

    def average(self) -> dict[str, float]:
        """Return the numbers over all steps of this start that were read."""
        return self._numbers(self._total_steps, max(self._total_s, 1e-9), self._total_wait_s)

    def _numbers(self, steps: int, seconds: float, wait: float) -> dict[str, float]:
        rate = steps * self.batch_size / seconds
        numbers = {
            "images_per_s": rate,
            "images_per_s_device": rate / self.devices,
            "step_s": seconds / max(steps, 1),
            "data_wait": wait / seconds,
        }
        if self.flop_per_image is not None and self.peak_flops is not None:
            numbers["mfu"] = rate * self.flop_per_image / (self.devices * self.peak_flops)
        return numbers


class WallTime:
    """The wall time of all starts of a run, in time.json of its folder.

    A kill loses at most the time since the last write. Waiting in a queue between two starts does not count.
    """

    def __init__(
        self, path: Path, *, now: Callable[[], float] = time.time, began: float | None = None
    ) -> None:
        """Read the starts before this one.

        Args:
            path: The file.
            now: Returns the time in seconds.
            began: When this process started; found out by default.
        """
        self.path, self._now = path, now
        self.began = process_start() if began is None else began
        self.starts: list[dict[str, Any]] = []
        with suppress(OSError, ValueError, KeyError, TypeError):
            self.starts = [
                {
                    "began": float(start["began"]),
                    "seconds": float(start["seconds"]),
                    "step": int(start["step"]),
                }
                for start in json.loads(path.read_text())["starts"]
            ]
        self._written_at = -WRITE_INTERVAL_S

    def seconds(self) -> float:
        """Return the wall time of all starts."""
        return sum(start["seconds"] for start in self.starts) + self._now() - self.began

    def write(self, step: int, *, now: bool = False) -> None:
        """Write the file at most every WRITE_INTERVAL_S, or `now`; the next save reports a full disk."""
        if not now and self._now() - self._written_at < WRITE_INTERVAL_S:
            return
        self._written_at = self._now()
        this = {"began": self.began, "seconds": self._now() - self.began, "step": step}
        with suppress(OSError):
            atomic_write(self.path, json.dumps({"starts": [*self.starts, this]}, indent=1).encode())


def process_start() -> float:
    """Return when this process started, in seconds since the epoch; now if the system does not say."""
    try:
        ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return time.time()


def device_peak_flops(device: torch.device, precision: str) -> float | None:
    """Return the dense peak of a device for the Trainer's precision, FLOP/s; None if it is not known."""
    if device.type != "cuda" or precision not in PEAK_PRECISION:
        return None
    peak = peak_tflops(torch.cuda.get_device_name(device), precision=PEAK_PRECISION[precision])
    return None if peak is None else peak * 1e12


def build_meta_network(config: RunConfig) -> DepthAnything:
    """Build the network of a stage as it is trained, on the meta device: frozen parts, adapters, another head."""
    with torch.device("meta"):
        model = DepthAnything(config.encoder, max_depth=config.max_depth, head=build_head(config))
        if config.freeze_encoder:
            model.pretrained.requires_grad_(False)
        if config.lora:
            add_adapters(model, config.lora)
    return model


def count_flop_per_image(config: RunConfig) -> int | None:
    """Count the operations of a training step for one image, nothing recomputed; None for other than depth stages."""
    if config.stage not in DEPTH_STAGES:
        return None
    aligned = config.stage == "student" and bool(config.recipe.alignment_weight)
    model = build_meta_network(config)
    return count_flops(model, config.image_size, config.image_size, frozen_encoder=aligned).step
