"""How long a checkpoint takes to write, hash, read back and copy, and what of that a training waits for.

    python benchmarks/bench_checkpoint.py vits vitb --folder outputs/bench

The state is that of a run: the weights of the depth network and the two moments of Adam, in float32. The steps are
those of a small batch on the CPU, so that a background write competes with them for cores, which it does not on a GPU.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from depth_anything.model.depth_anything import DepthAnything
from depth_anything.model.integrity import has_digest, save_with_digest
from depth_anything.training.checkpoint_writer import copy_to_cpu, flush_to_disk, write_checkpoint

SIDE, BATCH = 112, 2


def seconds(work: Callable[[], Any]) -> float:
    """Return the wall time of a call, in seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def time_parts(state: dict[str, Any], folder: Path, repeats: int) -> dict[str, float]:
    """Time the parts of a checkpoint, in seconds: the median of some repeats."""
    path, times = folder / "bench.ckpt", []

    def save_plain() -> None:
        torch.save(state, path)
        flush_to_disk(path)

    def save() -> None:
        digest.append(save_with_digest(state, path))
        flush_to_disk(path)

    digest: list[str] = []
    for _ in range(repeats):
        times.append(
            {
                "write": seconds(save_plain),
                "write + hash": seconds(save),
                "read back": seconds(lambda: has_digest(path, digest[-1])),
                "copy": seconds(lambda: copy_to_cpu(state)),
            }
        )
        path.unlink()
    return {name: statistics.median(one[name] for one in times) for name in times[0]}


def time_steps(
    step: Callable[[], None], state: dict[str, Any], path: Path, mode: str, steps: int
) -> tuple[float, float]:
    """Save once before some steps, wait at the end; return the wall time of all, and of the save call, in seconds."""
    with ThreadPoolExecutor(1) as thread:
        pending: Future[None] = Future()
        pending.set_result(None)
        start = time.perf_counter()
        if mode == "synchronous":
            write_checkpoint(state, path)
        elif mode == "asynchronous":
            pending = thread.submit(write_checkpoint, copy_to_cpu(state), path)
        saved = time.perf_counter() - start
        for _ in range(steps):
            step()
        pending.result()
        return time.perf_counter() - start, saved


def main() -> None:
    """Print one row an encoder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("encoders", nargs="+")
    parser.add_argument("--folder", type=Path, default=Path("outputs/bench"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for encoder in options.encoders:
        model = DepthAnything(encoder)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, foreach=True)
        images = torch.rand(BATCH, 3, SIDE, SIDE)

        def step(model: Any = model, optimizer: Any = optimizer, images: Any = images) -> None:
            optimizer.zero_grad()
            model(images).mean().backward()
            optimizer.step()

        step()
        state = {"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()]}
        parts = time_parts(state, options.folder, options.repeats)
        path = options.folder / "bench.ckpt"
        size = sum(value.nbytes for value in model.state_dict().values()) * 3 / 1e9
        print(f"{encoder}: {size:.2f} GB, {os.cpu_count()} cores; seconds:")
        print("  " + ", ".join(f"{name} {value:.2f}" for name, value in parts.items()))
        for mode in ("none", "synchronous", "asynchronous"):
            runs = [time_steps(step, state, path, mode, options.steps) for _ in range(options.repeats)]
            total, saved = (statistics.median(values) for values in zip(*runs, strict=True))
            print(
                f"  {mode}: {options.steps} steps {total:.2f}, of which the save call {saved:.2f}", flush=True
            )
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
