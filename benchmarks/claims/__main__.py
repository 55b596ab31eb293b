"""Test the claims of the papers with tiny networks, on procedural scenes and on real photographs.

    python -m benchmarks.claims                        (make claims)
    python -m benchmarks.claims --real DIR             (make claims REAL=DIR)
    python -m benchmarks.claims --only a c --seeds 0

Finished runs and figures are kept in --output and --data: the same command continues, and another claim or seed only
adds what is missing. claims.json, claims.md and a picture for each claim and world are written to --output.
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.claims.figures import file_digest, read_figures, row_key
from benchmarks.claims.images import SCENE_TESTS, list_sets, list_tests, set_digest
from benchmarks.claims.jobs import START_SECONDS, Job, Scheduler
from benchmarks.claims.plan import (
    EMBEDDED,
    PRETRAIN,
    PRETRAIN_STEPS,
    REAL,
    SECONDS_PER_STEP,
    STUDENT_STEPS,
    TEACHER_STEPS,
    Claim,
    Run,
    list_claims,
    list_runs,
    runs_of,
)
from depth_anything.disk import atomic_write
from depth_anything.errors import UserError

PHOTO_SIDE = 112
"""Short side of stored photographs, pixels: more than a crop of 70 px needs."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.claims",
        description="Test the claims of Depth Anything with tiny networks.",
    )
    add = parser.add_argument
    keys = [claim.key for claim in list_claims(())]
    add("--only", nargs="+", choices=keys, default=keys, metavar="CLAIM", help="letters a to h (all)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="0 1 2")
    add("--real", type=Path, metavar="DIR", help="also on real photographs: DIR/photos and DIR/rgbd/SET")
    add(
        "--sizes",
        nargs="+",
        default=["vitn", "vitt"],
        metavar="ENCODER",
        help="students of claim c (vitn vitt)",
    )
    add("--encoder-file", type=Path, metavar="FILE", help="pretrained vitn encoder for claim g")
    add("--output", type=Path, default=Path("outputs/claims"), metavar="DIR", help="%(default)s")
    add("--data", type=Path, default=Path("data"), metavar="DIR", help="folder of the sets (%(default)s)")
    add(
        "--minutes",
        type=float,
        default=120,
        metavar="N",
        help="start no run that would end later (%(default)g)",
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    add("--jobs", type=int, default=min(cores, 8), metavar="N", help="runs at a time (%(default)s)")
    add("--threads", type=int, default=1, metavar="N", help="threads of a run (%(default)s)")
    add("--teacher-steps", type=int, default=TEACHER_STEPS, metavar="N", help="%(default)s")
    add("--student-steps", type=int, default=STUDENT_STEPS, metavar="N", help="%(default)s")
    add("--pretrain-steps", type=int, default=PRETRAIN_STEPS, metavar="N", help="%(default)s")
    add(
        "--scenes",
        type=int,
        default=None,
        metavar="N",
        help="scenes of each training set (as configs/sources)",
    )
    add("--test-scenes", type=int, default=128, metavar="N", help="unseen scenes of each look (%(default)s)")
    add(
        "--publish",
        metavar="NAME",
        help="write docs/claims.md, its pictures and benchmarks/results/claims_NAME.*",
    )
    add("override", nargs="*", metavar="KEY=VALUE", help="for every run of train.py, as recipe.warmup=0")
    options = parser.parse_args(arguments)
    for name in ("jobs", "threads", "teacher_steps", "student_steps", "pretrain_steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if wrong := [word for word in options.override if "=" not in word]:
        parser.error(f"{wrong[0]} is no KEY=VALUE")
    options.only, options.seeds = list(dict.fromkeys(options.only)), list(dict.fromkeys(options.seeds))
    return options


def check(options: argparse.Namespace) -> None:
    """Check the folders, and that --output holds runs of the same settings.

    Raises:
        UserError: Naming what is missing or differs.
    """
    if options.real is not None and not (options.real / "photos").is_dir():
        raise UserError(f"{options.real} has no folder photos", "see docs/claims.md for its layout")
    if options.real is not None and not list_sets(options.real):
        raise UserError(
            f"{options.real}/rgbd has no folder with a set.yaml", "see docs/claims.md for its layout"
        )
    if options.encoder_file is not None and not options.encoder_file.is_file():
        raise UserError(f"there is no file {options.encoder_file}", "type --encoder-file FILE of an encoder")
    now = {
        "teacher_steps": options.teacher_steps,
        "student_steps": options.student_steps,
        "pretrain_steps": options.pretrain_steps,
        "scenes": options.scenes,
        "test_scenes": options.test_scenes,
        "override": options.override,
        "data": str(options.data.resolve()),
    }
    path = options.output / "settings.json"
    if path.exists() and (before := json.loads(path.read_text())) != now:
        changed = ", ".join(f"{key}={before.get(key)}" for key in now if before.get(key) != now[key])
        raise UserError(f"{options.output} holds runs with {changed}", "type another --output")
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(now, indent=1).encode())


def run_folder(run: Run, seed: int, world: str, output: Path) -> Path:
    """Return the folder of a run; those that see no photograph are shared by the worlds."""
    outer = "all-seeds" if run.all_seeds else f"seed-{seed}"
    inner = "real" if world == REAL and run.photographs else ""
    return output / outer / inner / run.name


def figures_file(run: str, seed: int, world: str, output: Path, runs: dict[str, Run]) -> Path:
    """Return the file of a network's figures."""
    if run not in runs:
        return output / "figures" / f"{run}.json"
    inner = "-real" if world == REAL and runs[run].photographs else ""
    return output / "figures" / f"seed-{seed}{inner}-{run}.json"


def train_command(run: Run, seed: int, world: str, options: argparse.Namespace) -> list[str]:
    """Return the overrides of train.py for a run."""
    seeds = options.output / f"seed-{seed}"
    folder = run_folder(run, seed, world, options.output).parent
    typed = [f"experiment=claims/{run.experiment}", f"stage={run.stage}", f"encoder={run.encoder}"]
    typed += [f"name={run.name}", f"seed={0 if run.all_seeds else seed}", "workers=0", *run.typed]
    typed += [f"output_dir={quote(folder)}", f"data_dir={quote(options.data)}"]
    if "pretrain" in run.needs:
        typed.append(f"init={quote(run_folder(PRETRAIN, seed, world, options.output) / 'model.safetensors')}")
    if run.photographs and run.stage != "pretrain":
        labels = "small-labels" if run.experiment == "small-teacher" else "labels"
        typed.append(f"labels={quote(folder / labels)}")
    if run.photographs and world == REAL:
        typed += ["sources=photographs", f"photos={quote(options.data / 'real' / 'photographs')}"]
    if run.stage == "pseudolabel":
        typed.append(f"teacher={quote(seeds / run.needs[0] / 'model.safetensors')}")
    else:
        typed += [f"steps={steps_of(run, options)}", "sources.validation=null"]
    if options.scenes is not None:
        typed += scene_counts(options.scenes, ("synthetic",) if "sources=photographs" in typed else ())
    return [*typed, *options.override]


def quote(path: Path) -> str:
    """Quote a path for Hydra if it has characters with a meaning there."""
    text = str(path)
    if re.fullmatch(r"[\w./:@%+-]+", text):
        return text
    return "'" + text.replace("'", "\\'") + "'"


def steps_of(run: Run, options: argparse.Namespace) -> int:
    """Return the optimizer steps of a run; 0 for one that labels."""
    steps = {
        "teacher": options.teacher_steps,
        "student": options.student_steps,
        "pretrain": options.pretrain_steps,
    }
    return steps.get(run.stage, 0)


def scene_counts(count: int, names: Sequence[str] = ()) -> list[str]:
    """Return overrides for the number of scenes."""
    return [f"sources.scenes.{name}.count={count}" for name in names or ("synthetic", "photographic")]


def data_jobs(options: argparse.Namespace) -> list[Job]:
    """List the jobs that write sets."""
    data, count = options.data, scene_counts(options.scenes) if options.scenes is not None else []
    typed = ["experiment=claims/baseline", f"data_dir={quote(data)}", "stage=student", *count]
    sets = [Job("scenes", "write_sets", {"typed": typed}, 80)]
    if {"a", "d"} & set(options.only):
        degraded = {"typed": ["experiment=claims/noisy-labels", *typed[1:]]}
        sets.append(Job("degraded-scenes", "write_sets", degraded, 40, ("scenes",)))
    for look in SCENE_TESTS:
        arguments = {"typed": typed[:3], "look": look, "count": options.test_scenes}
        sets.append(Job(f"test-{look}", "write_test", arguments, 15))
    if options.real is not None:
        photos = ["images", str(options.real / "photos"), str(data / "real" / "photographs")]
        sets.append(Job("photographs", "shard", {"typed": [*photos, "--short-side", str(PHOTO_SIDE)]}, 20))
        for name in list_sets(options.real):
            source = [str(options.real / "rgbd" / name / "set.yaml"), str(data / "real" / "rgbd" / name)]
            sets.append(Job(f"rgbd/{name}", "shard", {"typed": ["custom", *source]}, 2, optional=True))
    return sets


def list_jobs(options: argparse.Namespace, claims: Sequence[Claim], runs: dict[str, Run]) -> list[Job]:
    """List all jobs, seed by seed, so that whole seeds are finished first."""
    jobs = data_jobs(options)
    tests = tuple(job.name for job in jobs if job.name.startswith(("test-", "rgbd/")))
    worlds = [EMBEDDED, *([REAL] if options.real is not None else [])]
    real = str(options.real) if options.real is not None else None
    places = {"data": str(options.data), "real": real, "train_set": str(options.data / "scenes-synthetic")}
    mean_map = str(figures_file("mean-map", 0, EMBEDDED, options.output, runs))
    jobs.append(
        Job("mean-map", "judge", {"model": None, "output": mean_map, **places}, 10, ("scenes", *tests))
    )
    for seed in options.seeds:
        for world in worlds:
            for run in runs_of(claims, runs):
                if world == REAL and not run.photographs:
                    continue
                name = job_name(run, seed, world)
                needs = [job_name(runs[need], seed, world) for need in run.needs]
                needs += ["photographs"] if world == REAL else ["scenes"]
                needs += ["degraded-scenes"] if run.experiment in ("noisy-labels", "keep-all-pixels") else []
                steps = steps_of(run, options)
                seconds = (
                    START_SECONDS + steps * SECONDS_PER_STEP.get(run.encoder, 2.0) + (0 if steps else 25)
                )
                typed = train_command(run, seed, world, options)
                folder = run_folder(run, seed, world, options.output)
                if not is_finished(folder, steps) and name not in {job.name for job in jobs}:
                    jobs.append(Job(name, "train", {"typed": typed}, seconds, tuple(needs)))
                if run.is_judged:
                    figures = figures_file(run.name, seed, world, options.output, runs)
                    if not is_judged(folder, figures, options):
                        arguments = {"model": str(folder), "output": str(figures), **places}
                        jobs.append(Job(f"judge/{name}", "judge", arguments, 12, (name, *tests)))
    return jobs


def is_finished(folder: Path, steps: int) -> bool:
    """Return whether a training run needs nothing; train.py finds the same, but takes seconds to start."""
    try:
        finished = json.loads((folder / "finished.json").read_text())
        return (folder / "model.safetensors").is_file() and finished["steps"] == steps
    except (OSError, ValueError, KeyError, TypeError):
        return False


def is_judged(folder: Path, figures: Path, options: argparse.Namespace) -> bool:
    """Return whether there are figures of a network on all tests that exist."""
    try:
        known = {row_key(row) for row in read_figures(figures, file_digest(folder / "model.safetensors"))}
        tests = list_tests(options.data, options.real)
        keys = {(test.test, test.name, set_digest(test)) for test in tests}
    except (OSError, ValueError):
        return False  # a set is not written yet
    return keys <= known and (options.real is None or any(test.test == "real" for test in tests))


def job_name(run: Run, seed: int, world: str) -> str:
    """Return the name of a run's job, which is that of its folder."""
    return run_folder(run, seed, world, Path()).as_posix()


def picture_jobs(options: argparse.Namespace, claims: Sequence[Claim], runs: dict[str, Run]) -> list[Job]:
    """List the jobs that paint a picture for each claim and world, of the first seed."""
    seed, jobs = options.seeds[0], []
    for world in [EMBEDDED, *([REAL] if options.real is not None else [])]:
        for claim in claims:
            folders = [
                (label.replace("–", "-"), run_folder(runs[name], seed, world, options.output))
                for label, name in claim.arms
                if name in runs
            ]
            models = [(label, str(path)) for label, path in folders if (path / "model.safetensors").is_file()]
            output = options.output / f"claim-{claim.key}-{world}.jpg"
            real = str(options.real) if options.real is not None else None
            arguments = {"models": models, "world": world, "data": str(options.data), "real": real}
            if models:
                name = f"picture/{claim.key}-{world}"
                jobs.append(Job(name, "paint", {**arguments, "output": str(output)}, 8, optional=True))
    return jobs


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, and write the results of all that is there."""
    options, begin = parse(arguments), time.monotonic()
    try:
        check(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    runs = list_runs(options.sizes, options.encoder_file.resolve() if options.encoder_file else None)
    claims = [claim for claim in list_claims(options.sizes) if claim.key in options.only]
    settings = {"parallel": options.jobs, "threads": options.threads}
    limit, logs = 60 * options.minutes, options.output / "logs"
    outcome = Scheduler(list_jobs(options, claims, runs), logs, seconds=limit, **settings).run()
    limit = max(60.0, limit - (time.monotonic() - begin))
    painted = Scheduler(picture_jobs(options, claims, runs), logs, seconds=limit, **settings).run()
    from benchmarks.claims.report import write_results

    text = write_results(options, claims, runs, minutes=(time.monotonic() - begin) / 60)
    print(text)
    for name in outcome.left:
        print(f"not run: {name}", file=sys.stderr)
    required = [name for name in outcome.failed if not name.startswith("rgbd/")]
    if required or outcome.left or painted.failed:
        print("some runs are missing; the same command continues", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
