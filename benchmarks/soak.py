"""Kill each stage with SIGKILL repeatedly, and compare the result with an uninterrupted run.

    python benchmarks/soak.py --kills 20 --output outputs/soak      (make soak)

Half of the kills come at random times, half while saving: at the n-th fsync or rename of the process, when
checkpoints, shards, labels and manifests become visible. A teacher and a student must end with the bytes of the
uninterrupted run's model; labeling must end with one label per image and the same bytes.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    "steps=40",
    "batch_size=4",
    "image_size=42",
    "checkpoint.every=3",
    "validation.every=20",
    "validation.limit=4",
    "sources.scenes.synthetic.count=48",
    "sources.scenes.photographic.count=48",
    "sources.scenes.validation.count=8",
    *(f"++sources.scenes.{name}.{key}" for name in ("synthetic", "photographic", "validation")
      for key in ("height=42", "width=56", "per_shard=12")),
)  # fmt: skip


#: Starts a command in a process group of its own, with an environment and a file for its errors; returns what
#: `subprocess.Popen` does: pid, returncode and wait(timeout).
Start = Callable[[list[str], dict[str, str], Path], Any]


def start_process(command: list[str], environment: dict[str, str], errors: Path) -> subprocess.Popen[bytes]:
    """Start a command in a new process."""
    with errors.open("wb") as file:
        return subprocess.Popen(
            command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=file
        )


def child(arguments: list[str]) -> None:
    """Run train.py in this process; where SOAK_DIE says so, kill it at a numbered system call."""
    call, _, number = os.environ["SOAK_DIE"].partition(":")
    if call:
        genuine, left = getattr(os, call), [int(number)]

        def counted(*args: object, **keywords: object) -> object:
            left[0] -= 1
            if left[0] == 0:
                os.killpg(0, signal.SIGKILL)
            return genuine(*args, **keywords)

        setattr(os, call, counted)
    sys.path.insert(0, str(ROOT))
    sys.argv = [str(ROOT / "train.py"), *arguments]
    import hydra

    from depth_anything.training.run import main

    hydra.main(version_base="1.3", config_path=str(ROOT / "configs"), config_name="train")(main)()


def kill_and_finish(
    arguments: Sequence[str], *, kills: int, seconds: float, rng: random.Random, start: Start
) -> int:
    """Start a stage until it ends by itself, killing it `kills` times on the way.

    Args:
        arguments: Command-line arguments of train.py.
        kills: Kills wanted; fewer where the stage ends before.
        seconds: How long an unbroken run takes; random kills fall within it.
        rng: Random numbers for the times of the kills.
        start: Starts this file with `--child` and the arguments.

    Returns:
        How many kills hit a process at work.

    Raises:
        RuntimeError: If a start that nobody killed fails, with the end of what it said.
    """
    command = [sys.executable, str(Path(__file__).resolve()), "--child", *arguments]
    hit = 0
    for attempt in range(3 * kills + 1):
        die = ""
        if hit < kills and attempt % 2:
            die = f"{rng.choice(['fsync', 'replace'])}:{rng.randint(1, 8)}"
        environment = {**os.environ, "SOAK_DIE": die, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        with tempfile.TemporaryDirectory() as folder:
            errors = Path(folder) / "stderr.txt"
            process = start(command, environment, errors)
            try:
                process.wait(timeout=seconds * rng.uniform(0.2, 1.0) if hit < kills and not die else None)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            said = errors.read_text(encoding="utf-8", errors="replace")
        if process.returncode == -signal.SIGKILL:
            hit += 1
        elif process.returncode:
            raise RuntimeError(f"{' '.join(arguments)} failed:\n{said[-2000:]}")
        else:
            return hit
    raise RuntimeError(f"{' '.join(arguments)} did not end after {3 * kills + 1} starts")


def digests(folder: Path, patterns: Sequence[str]) -> dict[str, str]:
    """Hash the files below a folder that match, by their relative path."""
    paths = sorted({path for pattern in patterns for path in folder.rglob(pattern)})
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def arguments_of(stage: str, place: Path, folder: Path) -> list[str]:
    """Prepare a place for a stage, with what the stages before left in `folder`, and say what to type."""
    if stage == "student":
        shutil.copytree(folder / "labels", place / "data" / "labels-tiny", dirs_exist_ok=True)
    arguments = [f"stage={stage}", f"data_dir={place / 'data'}", f"output_dir={place / 'outputs'}"]
    if stage == "pseudolabel":
        teacher = folder / "calm-teacher" / "outputs" / "teacher-vitt-tiny" / "model.safetensors"
        return [*arguments, f"teacher={teacher}", *(a for a in SMALL if not a.startswith("steps"))]
    return [*arguments, *SMALL]


def compare_stage(
    stage: str, folder: Path, *, kills: int, rng: random.Random, start: Start = start_process
) -> dict[str, object]:
    """Run a stage unbroken, then killed, from scratch again and again until there were `kills` kills; compare each.

    Args:
        stage: "teacher", "pseudolabel" or "student"; each needs what the one before left in `folder`.
        folder: Folder of all files.
        kills: At least so many in all, and at most five a run.
        rng: Random numbers for the times of the kills.
        start: Starts the stage.

    Returns:
        stage, kills, runs, files compared, equal, leftovers (torn files) and differing (names).
    """
    calm = folder / f"calm-{stage}"
    begin = time.perf_counter()
    kill_and_finish(arguments_of(stage, calm, folder), kills=0, seconds=0, rng=rng, start=start)
    seconds = time.perf_counter() - begin
    patterns = [f"outputs/{stage}-*/model.safetensors", "data/scenes-*/*"]
    if stage == "pseudolabel":
        patterns = ["labels-tiny/**/*.tar", "labels-tiny/**/*.json"]
        shutil.copytree(calm / "data" / "labels-tiny", folder / "labels")
    whole = digests(calm, patterns)
    hits, runs, leftovers, differing = 0, 0, [], []
    while hits < kills and runs < 4 * kills:
        broken = folder / f"broken-{stage}-{runs}"
        wanted = min(5, kills - hits)
        typed = arguments_of(stage, broken, folder)
        hits += kill_and_finish(typed, kills=wanted, seconds=seconds, rng=rng, start=start)
        runs += 1
        found = digests(broken, patterns)
        differing += [name for name in whole.keys() | found.keys() if whole.get(name) != found.get(name)]
        leftovers += [str(path) for path in broken.rglob(".*.tmp*")]
        shutil.rmtree(broken)
    equal = bool(whole) and not differing and hits >= kills
    return {
        "stage": stage, "kills": hits, "runs": runs, "files": len(whole), "equal": equal,
        "leftovers": leftovers, "differing": differing,
    }  # fmt: skip


def main() -> None:
    """Run the three stages one after another and write what came out."""
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="kills a stage (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/soak"), help="folder (default %(default)s)"
    )
    arguments = parser.parse_args()
    shutil.rmtree(arguments.output, ignore_errors=True)
    rng = random.Random(arguments.seed)
    outcomes = []
    for stage in ("teacher", "pseudolabel", "student"):
        outcomes.append(compare_stage(stage, arguments.output.resolve(), kills=arguments.kills, rng=rng))
        print(json.dumps(outcomes[-1]), flush=True)
    (arguments.output / "soak.json").write_text(json.dumps(outcomes, indent=1))
    if not all(outcome["equal"] for outcome in outcomes):
        sys.exit("a killed run ended differently from the unbroken one")


if __name__ == "__main__":
    main()
