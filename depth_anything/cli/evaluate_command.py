"""`depth-anything evaluate`: evaluate models, or maps on disk, on a labeled set or on public benchmarks."""

import argparse
import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depth_anything.cli.options import (
    ARGUMENT_FLAGS,
    MAX_METERS,
    WEIGHTS_HELP,
    add_command,
    add_focal_flags,
    add_inference_flags,
    add_multi_scale_flag,
    add_version_flag,
    build_predictor,
    build_segmentation_predictor,
    check_output,
    check_single_model,
    float_in_range,
    format_count,
    int_in_range,
    list_weight_files,
    load_segmentation_weights,
    load_weights,
)
from depth_anything.data.address import escape_unprintable
from depth_anything.errors import UserError
from depth_anything.progress import track

if TYPE_CHECKING:
    from depth_anything.evaluation.runner import EvalModel
    from depth_anything.evaluation.task import EvalResult, EvalTask

MAX_MEAN_MAP_FRAMES = 1000
"""The most frames of the training set that are averaged to the mean map."""

_RUN_FILES = {"model.safetensors": "", "best.safetensors": "-best"}
"""Files of a run folder → what a table appends to the run's name."""

RANK_TIMEOUT_DAYS = 7
"""How long processes of torchrun wait for the slowest one."""


def add_evaluate(commands: Any) -> None:
    """Declare `evaluate`."""
    evaluate = add_command(
        commands, "evaluate", "evaluate models on a labeled set or benchmarks; write a report", run=_evaluate
    )
    several: dict[str, Any] = {"nargs": "+", "action": "extend", "default": []}
    evaluate.add_argument("--weights", metavar="[NAME=]PATH", help=f"models: {WEIGHTS_HELP}", **several)
    evaluate.add_argument(
        "--predictions",
        metavar="[NAME=]DIR",
        help="maps of any program: .npy, .exr, or the 16-bit .png of predict, named as their images",
        **several,
    )
    evaluate.add_argument(
        "--quantity",
        choices=("disparity", "depth"),
        help="quantity of --predictions, if the files do not say it",
    )
    _add_image_flags(evaluate)
    evaluate.add_argument(
        "--protocol", metavar="NAME", help="da2, marigold, moge or zoedepth (da2, or the benchmark's own)"
    )
    evaluate.add_argument(
        "--max-depth",
        type=float_in_range("--max-depth", most=MAX_METERS, unit="meters"),
        metavar="METERS",
        help="largest depth compared, instead of the set's or the benchmark's own",
    )
    evaluate.add_argument(
        "--mean-map",
        metavar="SET",
        help="also evaluate the mean disparity of this training set, a baseline that ignores the image",
    )
    evaluate.add_argument(
        "--output", metavar="DIR", help="folder of the report (outputs/evaluate-<set or benchmarks>)"
    )
    evaluate.add_argument(
        "--limit",
        type=int_in_range("--limit", least=1),
        metavar="N",
        help="number of images, evenly spaced (all)",
    )
    evaluate.add_argument(
        "--compare",
        action="store_true",
        help="also print published results: MiDaS 3.1, Depth Anything V1 and V2",
    )
    evaluate.add_argument(
        "--part",
        type=_parse_share,
        default=(1, 1),
        metavar="K/N",
        help="evaluate the K-th of N shares; the last process to finish writes the report (not with torchrun)",
    )
    evaluate.add_argument("--encoder", metavar="NAME", help="timm ViT of weights whose file does not say it")
    add_version_flag(evaluate)
    evaluate.add_argument(
        "--weights-max-depth",
        type=float_in_range("--weights-max-depth", most=MAX_METERS, unit="meters"),
        metavar="M",
        help="meters of a metric model whose file does not say it",
    )
    add_focal_flags(evaluate, default="of images whose records do not say it: assumed")
    add_inference_flags(evaluate)
    add_multi_scale_flag(evaluate)
    evaluate.set_defaults(
        flags={**ARGUMENT_FLAGS, "max_depth": "--weights-max-depth {}", "quantity": "--quantity {}"}
    )


def _add_image_flags(evaluate: argparse.ArgumentParser) -> None:
    images = evaluate.add_mutually_exclusive_group(required=True)
    images.add_argument("--data", metavar="SET", help="labeled set with depth")
    images.add_argument(
        "--benchmarks",
        nargs="+",
        metavar="NAME",
        help="public benchmarks (a wrong name lists them), or MODULE:NAME of your own",
    )
    evaluate.add_argument(
        "--root",
        metavar="DIR",
        help="folder of all benchmarks, with a folder of its name for each, or that of a single benchmark",
    )


def _evaluate(options: argparse.Namespace) -> int:
    share, rank = options.part, None
    if "TORCHELASTIC_RUN_ID" in os.environ:
        if options.part != (1, 1):
            raise ValueError("torchrun shares the images by itself: leave out --part")
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        share = (rank + 1, ranks)
    if not (options.weights or options.predictions or options.mean_map):
        raise ValueError("nothing to evaluate: add --weights PATH, --predictions DIR or --mean-map SET")
    if options.benchmarks and not options.root:
        raise ValueError("where are the benchmarks? add --root DIR, with a folder of its name for each")
    tasks, missing = _load_tasks(options)
    models = _load_models(options)
    for task in tasks:
        for model in models:
            task.check_source(model.name, model.source)
    names = dict.fromkeys(options.benchmarks or [tasks[0].name])
    folder = Path(options.output or f"outputs/evaluate-{'-'.join(names)}")
    if not rank:  # torchrun's first process writes the report
        check_output(
            _report_files(tasks, folder, options),
            own=_is_earlier_report,
            inputs=[
                path
                for weights in parse_named_paths(options.weights).values()
                for path in list_weight_files(weights)
            ],
        )
    failures = _score_share(models, tasks, folder, share=share, raises=len(tasks) == 1 and rank is None)
    with _gather_failures(rank, failures) as all_failures:
        if all_failures is None:
            return 0
        return _write_reports(models, tasks, folder, options, missing + all_failures, share=share)


def _report_files(tasks: "list[EvalTask]", folder: Path, options: argparse.Namespace) -> list[Path]:
    names = ("results.json", "results.csv", "table.txt", "report.html")
    folders = [folder if options.data else folder / task.name for task in tasks]
    summaries = [] if options.data else [folder / "summary.json", folder / "summary.txt"]
    return [place / name for place in folders for name in names] + summaries


def _is_earlier_report(path: Path) -> bool:
    """Whether a file belongs to an earlier report, by the JSON file in its folder."""
    name, keys = "results.json", {"models", "versions"}
    if path.name.startswith("summary"):
        name, keys = "summary.json", {"benchmarks", "versions"}
    try:
        return keys <= json.loads((path.parent / name).read_text(encoding="utf-8")).keys()
    except (OSError, ValueError, AttributeError):
        return False


def _load_tasks(options: argparse.Namespace) -> "tuple[list[EvalTask], list[str]]":
    """Open the set or the benchmarks; also return, one sentence each, which benchmarks are missing."""
    from depth_anything.data.shards import open_set
    from depth_anything.evaluation.benchmarks.benchmark_catalog import load_benchmark
    from depth_anything.evaluation.runner import MissingData, task_from_benchmark, task_from_set

    limits = {"limit": options.limit, "max_depth": options.max_depth}
    if _is_segmentation(options):
        return [_load_segmentation_task(options)], []
    if options.data:
        return [task_from_set(open_set(options.data), protocol=options.protocol or "da2", **limits)], []
    tasks: list[EvalTask] = []
    missing: list[str] = []
    for benchmark in [load_benchmark(name) for name in dict.fromkeys(options.benchmarks)]:
        try:
            tasks.append(task_from_benchmark(benchmark, options.root, protocol=options.protocol, **limits))
        except MissingData as error:
            missing.append(str(error))
    if not tasks:
        raise ValueError("; ".join(missing))
    return tasks, missing


def _is_segmentation(options: argparse.Namespace) -> bool:
    """Return whether the models are segmentation models.

    Raises:
        UserError: If some are and some are not, or flags of depth or of classes are given for the other kind.
    """
    from depth_anything.model.segmentation_files import is_segmentation_file

    paths = parse_named_paths(options.weights)
    kinds = {name: is_segmentation_file(path) for name, path in paths.items()}
    found = [name for name, is_segmentation in kinds.items() if is_segmentation]
    if not found:
        if options.multi_scale:
            raise UserError("--multi-scale is for segmentation models", "leave it out")
        return False
    flags = {
        "--mean-map": options.mean_map,
        "--predictions": options.predictions,
        "--protocol": options.protocol,
    }
    flags |= {"--max-depth": options.max_depth, "--weights-max-depth": options.weights_max_depth}
    flags |= {"--benchmarks": options.benchmarks, "--encoder": options.encoder, "--compare": options.compare}
    typed = [flag for flag, value in flags.items() if value]
    if typed or not all(kinds.values()):
        other = (
            typed[0]
            if typed
            else next(name for name, is_segmentation in kinds.items() if not is_segmentation)
        )
        raise UserError(
            f"{found[0]} is a segmentation model, and {other} is for depth",
            "evaluate segmentation models alone, with --data SET and a set that has class maps",
        )
    return True


def _load_segmentation_task(options: argparse.Namespace) -> "EvalTask":
    from depth_anything.data.shards import open_set
    from depth_anything.evaluation.segmentation_task import task_from_class_set

    return task_from_class_set(open_set(options.data), limit=options.limit)


def _load_segmentation_models(options: argparse.Namespace) -> "list[EvalModel]":
    """Load segmentation models; with --multi-scale each counts twice."""
    from depth_anything.evaluation.runner import EvalModel

    models = []
    for name, path in parse_named_paths(options.weights).items():
        model, facts = load_segmentation_weights(path)
        for multi_scale in (False, True) if options.multi_scale else (False,):
            predictor = build_segmentation_predictor(
                model, _on_local_rank_device(options), multi_scale=multi_scale
            )
            settings = {
                "device": str(predictor.device),
                "precision": options.precision,
                "window": predictor.input_size,
                "stride": predictor.stride,
                "short_side": predictor.short_side,
                "scales": ", ".join(f"{scale:g}" for scale in predictor.scales),
                "mirrored": predictor.flip,
            }
            models.append(
                EvalModel(f"{name} multi-scale" if multi_scale else name, predictor, facts | settings)
            )
    return models


def _load_models(options: argparse.Namespace) -> "list[EvalModel]":
    """Load the mean map, the networks and the folders of maps, in this order."""
    if _is_segmentation(options):
        return _load_segmentation_models(options)
    from depth_anything.evaluation.frames import compute_mean_map, read_frames
    from depth_anything.evaluation.predictions import PrecomputedMaps
    from depth_anything.evaluation.runner import EvalModel

    weights = parse_named_paths(options.weights)
    folders = parse_named_paths(options.predictions, flag="--predictions")
    check_single_model(options, len(weights))
    if both := set(weights) & set(folders):
        raise ValueError(f"weights and predictions are both called {both.pop()!r}: name one, as in a=PATH")
    models: list[EvalModel] = []
    facts: dict[str, Any]
    if options.mean_map:
        frames = read_frames(options.mean_map, limit=MAX_MEAN_MAP_FRAMES)
        baseline = compute_mean_map(track(frames, what="mean map"))
        facts = {
            "baseline": f"mean disparity of {options.mean_map}, the same for every image",
            "quantity": baseline.quantity,
            "fingerprint": f"sha256:{hashlib.sha256(baseline.map.tobytes()).hexdigest()}",
        }
        models.append(EvalModel("mean map", baseline, facts))
    for name, path in weights.items():
        network, facts = load_weights(
            path,
            input_size=options.input_size,
            encoder=options.encoder,
            max_depth=options.weights_max_depth,
            version=options.weights_version,
        )
        predictor = build_predictor(network, _on_local_rank_device(options))
        facts |= {
            "device": str(predictor.device),
            "quantity": predictor.quantity,
            "precision": options.precision,
            "resample": options.resample,
        }
        if predictor.canonical_focal is not None:
            facts |= {"focal": options.focal, "fov": options.fov}
        models.append(EvalModel(name, predictor, facts))
    for name, path in folders.items():
        maps = PrecomputedMaps(path, quantity=options.quantity)
        facts = {
            "predictions": str(path),
            "files": len(maps),
            "quantity": maps.quantity,
            "fingerprint": maps.fingerprint,
        }
        models.append(EvalModel(name, maps, facts))
    return models


def _score_share(
    models: "list[EvalModel]",
    tasks: "list[EvalTask]",
    folder: Path,
    *,
    share: tuple[int, int],
    raises: bool,
) -> list[str]:
    """Score this process's share of all tasks; return, one sentence each, what failed, or raise it."""
    from depth_anything.evaluation.runner import DiskFailure, MissingData, evaluate_share

    failures = []
    for task in tasks:
        try:
            for model in models:
                evaluate_share(model, task, folder, share=share)
        except (ValueError, OSError) as error:
            if raises:
                raise
            failures.append(
                str(error) if isinstance(error, MissingData | DiskFailure) else f"{task.name}: {error}"
            )
    return failures


def _write_reports(
    models: "list[EvalModel]",
    tasks: "list[EvalTask]",
    folder: Path,
    options: argparse.Namespace,
    missing: list[str],
    *,
    share: tuple[int, int],
) -> int:
    """Print the tables and write the reports of all finished tasks; name the others. Returns the exit code."""
    from depth_anything.evaluation.report import write_summary
    from depth_anything.evaluation.runner import collect_results
    from depth_anything.evaluation.table import format_overview, format_summary

    evaluated: list[tuple[EvalTask, list[EvalResult]]] = []
    for task in tasks:
        results = collect_results(models, task, folder)
        remaining = max(len(task.lines) - len(result.rows) for result in results)
        if remaining:
            who = "" if share[1] == 1 else f" (this was share {share[0]} of {share[1]})"
            print(
                f"{task.name}: {format_count(remaining, 'image')} of {len(task.lines)} not evaluated yet{who}"
            )
            continue
        _write_report(models, task, results, folder if options.data else folder / task.name, options)
        evaluated.append((task, results))
        for warning in [warning for result in results for warning in result.warnings]:
            print(f"depth-anything evaluate: {task.name}: {escape_unprintable(warning)}", file=sys.stderr)
    depth = [(task, results) for task, results in evaluated if task.protocol]
    if options.benchmarks and depth:
        write_summary(evaluated, folder, settings={"command": options.typed})
        print(f"\n{format_summary(depth)}")
        if options.compare and len(evaluated) > 1:
            print(f"\n{format_overview(evaluated)}")
    for sentence in missing:
        print(f"depth-anything evaluate: {escape_unprintable(sentence)}", file=sys.stderr)
    failed = any(result.non_finite for _, results in evaluated for result in results)
    return 1 if missing or failed else 0


def _write_report(
    models: "list[EvalModel]",
    task: "EvalTask",
    results: "list[EvalResult]",
    folder: Path,
    options: argparse.Namespace,
) -> None:
    """Write the report of one task and print its table."""
    from depth_anything.evaluation.report import write_report
    from depth_anything.evaluation.reported_results import find_reported_results
    from depth_anything.evaluation.table import build_table, format_table

    reported = (
        find_reported_results(task.name) if options.benchmarks else ()
    )  # a set may have a benchmark's name
    examples = task.examples({model.name: model.source for model in models}, results)
    settings = {"command": options.typed}
    page = write_report(task, results, folder, examples=examples, settings=settings, reported=reported)
    compared = options.compare and bool(reported)
    table = build_table(task, results, reported if compared else ())
    print(f"{format_table(table, task.notes(results))}\nreport: {escape_unprintable(page)}")
    if options.compare and not compared:
        print(
            f"{task.name}: no published result is known for {'a set of your own' if options.data else 'it'}"
        )
    if task.incomplete and not compared:
        print(f"{task.name}: {task.incomplete}")


def _on_local_rank_device(options: argparse.Namespace) -> argparse.Namespace:
    """Give each process that torchrun started on this machine its own device."""
    import torch

    if "TORCHELASTIC_RUN_ID" not in os.environ or options.device != "auto" or not torch.cuda.is_available():
        return options
    local = int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count()
    return argparse.Namespace(**{**vars(options), "device": f"cuda:{local}"})


@contextlib.contextmanager
def _gather_failures(rank: int | None, failures: list[str]) -> Iterator[list[str] | None]:
    """Wait for all processes of torchrun; yield the failures of all of them on rank 0, None on the others."""
    if rank is None:
        yield failures
        return
    from datetime import timedelta

    from torch import distributed

    distributed.init_process_group("gloo", timeout=timedelta(days=RANK_TIMEOUT_DAYS))
    try:
        gathered: list[list[str]] = [[]] * distributed.get_world_size()
        distributed.all_gather_object(gathered, failures)
        yield None if rank else list(dict.fromkeys(sentence for own in gathered for sentence in own))
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


def _parse_share(text: str) -> tuple[int, int]:
    k, slash, n = text.partition("/")
    if not (slash and k.isdigit() and n.isdigit() and 1 <= int(k) <= int(n)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a share: type 2/3 for the second of three")
    return int(k), int(n)


def parse_named_paths(paths: Sequence[str], *, flag: str = "--weights") -> dict[str, Path]:
    """Split [NAME=]PATH; a model without a name is named after its file, its run or its folder.

    Of weights at an address the paths are those of local copies.
    """
    from depth_anything.data.local_copy import local_path

    locate = local_path if flag == "--weights" else Path
    named: dict[str, Path] = {}
    for text in paths:
        name, equals, path = text.partition("=")
        if not equals or "://" in name or Path(text).exists():  # checkpoints may be called step=100.ckpt
            path = text
            file = locate(text).resolve()
            if file.name in _RUN_FILES:
                name = file.parent.name + _RUN_FILES[file.name]
            else:
                name = file.stem if file.is_file() else file.name
        name = escape_unprintable(name)  # tables print it
        if name in named:
            raise ValueError(
                f"two models are called {name!r}: name them, as in {flag} a={named[name]} b={path}"
            )
        named[name] = locate(path)
    return named
