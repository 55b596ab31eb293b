"""`depth-anything evaluate`: models, or maps that others made, judged on a labelled set or on public benchmarks."""

import argparse
import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depth_anything.cli.options import (
    ARGUMENT_FLAGS,
    MAX_METERS,
    WEIGHTS_HELP,
    add_command,
    add_inference_flags,
    add_version_flag,
    build_predictor,
    check_output,
    check_single_model,
    float_in_range,
    format_count,
    int_in_range,
    list_weight_files,
    load_weights,
)
from depth_anything.data.address import escape_unprintable
from depth_anything.progress import track

if TYPE_CHECKING:
    from depth_anything.evaluation.benchmarks.da2k import PairResult
    from depth_anything.evaluation.evaluate import DepthResult, MapSource
    from depth_anything.evaluation.runner import EvalTask

MAX_MEAN_MAP_FRAMES = 1000
"""How many frames of the training set the mean map is made of, at most."""

_RUN_FILES = {"model.safetensors": "", "best.safetensors": "-best"}
"""Files that every run has: what a table calls them, behind the run's name."""

RANK_TIMEOUT_DAYS = 7
"""For the slowest process of torchrun."""


def add_evaluate(commands: Any) -> None:
    """Declare `evaluate`."""
    evaluate = add_command(
        commands, "evaluate", "evaluate models on a labeled set or benchmarks; write a report", run=_evaluate
    )
    evaluate.add_argument(
        "--weights",
        nargs="+",
        action="extend",
        default=[],
        metavar="[NAME=]PATH",
        help=f"models: {WEIGHTS_HELP}",
    )
    evaluate.add_argument(
        "--predictions",
        nargs="+",
        action="extend",
        default=[],
        metavar="[NAME=]DIR",
        help="maps that any program made: .npy, .exr, or the 16-bit .png of predict, called as their images",
    )
    evaluate.add_argument(
        "--quantity", choices=("disparity", "depth"), help="what --predictions hold, if they do not say it"
    )
    images = evaluate.add_mutually_exclusive_group(required=True)
    images.add_argument("--data", metavar="SET", help="labelled set with depth")
    images.add_argument(
        "--benchmarks", nargs="+", metavar="NAME", help="public benchmarks; a wrong name lists them"
    )
    evaluate.add_argument(
        "--root",
        metavar="DIR",
        help="folder of the benchmarks, one of its name for each (or the only one's own)",
    )
    evaluate.add_argument(
        "--protocol", metavar="NAME", help="da2, marigold, moge or zoedepth (da2, or the benchmark's own)"
    )
    evaluate.add_argument(
        "--max-depth",
        type=float_in_range("--max-depth", most=MAX_METERS, unit="metres"),
        metavar="METRES",
        help="compare as far as this, in place of the set's or the benchmark's own range",
    )
    evaluate.add_argument(
        "--mean-map",
        metavar="SET",
        help="also judge the mean map of this training set, which looks at no image",
    )
    evaluate.add_argument(
        "--output", metavar="DIR", help="folder of the report (outputs/evaluate-<set or benchmarks>)"
    )
    evaluate.add_argument(
        "--limit",
        type=int_in_range("--limit", least=1),
        metavar="N",
        help="so many images, evenly spaced (all)",
    )
    evaluate.add_argument(
        "--compare",
        action="store_true",
        help="print what papers have beside what is measured: MiDaS 3.1, Depth Anything V1 and V2",
    )
    evaluate.add_argument(
        "--part",
        type=_parse_share,
        default=(1, 1),
        metavar="K/N",
        help="judge the K-th of N shares; whoever comes last writes the report (torchrun shares by itself)",
    )
    evaluate.add_argument(
        "--encoder", metavar="NAME", help="the timm ViT of weights whose file does not say it"
    )
    add_version_flag(evaluate)
    evaluate.add_argument(
        "--weights-max-depth",
        type=float_in_range("--weights-max-depth", most=MAX_METERS, unit="metres"),
        metavar="M",
        help="metres of a metric model whose file does not say it",
    )
    add_inference_flags(evaluate)
    evaluate.set_defaults(flags={**ARGUMENT_FLAGS, "max_depth": "--weights-max-depth {}"})


def _evaluate(options: argparse.Namespace) -> int:
    from depth_anything.evaluation.runner import check_quantity

    part, rank = options.part, None
    if "TORCHELASTIC_RUN_ID" in os.environ:
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        part = (rank + 1, ranks)
        if options.part != (1, 1):
            raise ValueError("torchrun shares the images out by itself: leave --part out")
    _check_options(options)
    trials, missing = _load_tasks(options)
    predictors, facts = _load_predictors(options)
    for trial in trials:
        for predictor in predictors.values():
            check_quantity(trial, predictor.quantity)
    names = dict.fromkeys(options.benchmarks or [trials[0].name])
    folder = Path(options.output or f"outputs/evaluate-{'-'.join(names)}")
    if not rank:  # of torchrun's processes the first writes the report
        check_output(
            _report_files(trials, folder, options),
            own=_is_earlier_report,
            inputs=[
                path
                for weights in parse_named_paths(options.weights).values()
                for path in list_weight_files(weights)
            ],
        )
    broken = _evaluate_tasks(
        predictors, facts, trials, folder, part=part, raises=len(trials) == 1 and rank is None
    )
    with _gather_failures(rank, broken) as told:
        if told is None:
            return 0
        return _write_reports(predictors, facts, trials, folder, options, missing + told, part=part)


def _report_files(trials: "list[EvalTask]", folder: Path, options: argparse.Namespace) -> list[Path]:
    """List the files that the reports will be."""
    names = ("results.json", "results.csv", "table.txt", "report.html")
    places = [folder if options.data else folder / trial.name for trial in trials]
    summaries = [] if options.data else [folder / "summary.json", folder / "summary.txt"]
    return [place / name for place in places for name in names] + summaries


def _is_earlier_report(path: Path) -> bool:
    """Tell a file of an earlier report by the figures beside it."""
    figures, keys = "results.json", {"models", "versions"}
    if path.name.startswith("summary"):
        figures, keys = "summary.json", {"benchmarks", "versions"}
    try:
        return keys <= json.loads((path.parent / figures).read_text(encoding="utf-8")).keys()
    except (OSError, ValueError, AttributeError):
        return False


def _check_options(options: argparse.Namespace) -> None:
    if not (options.weights or options.predictions or options.mean_map):
        raise ValueError("nothing to judge: give --weights PATH, --predictions DIR or --mean-map SET")
    if options.benchmarks and not options.root:
        raise ValueError("where are the benchmarks? add --root DIR, with a folder of its name for each")


def _load_tasks(options: argparse.Namespace) -> "tuple[list[EvalTask], list[str]]":
    """What to judge on, and in a sentence each which benchmarks are not there."""
    from depth_anything.data.shards import open_set
    from depth_anything.evaluation.benchmarks.catalog import load_benchmark as load_benchmark
    from depth_anything.evaluation.runner import MissingData, task_from_benchmark, task_from_set

    given = {"limit": options.limit, "max_depth": options.max_depth}
    if options.data:
        return [task_from_set(open_set(options.data), protocol=options.protocol or "da2", **given)], []
    trials, missing = [], []
    benchmarks = [load_benchmark(name) for name in dict.fromkeys(options.benchmarks)]
    for benchmark in benchmarks:
        try:
            trials.append(task_from_benchmark(benchmark, options.root, protocol=options.protocol, **given))
        except MissingData as error:
            missing.append(str(error))
    if not trials:
        raise ValueError("; ".join(missing))
    return trials, missing


def _load_predictors(options: argparse.Namespace) -> "tuple[dict[str, MapSource], dict[str, dict[str, Any]]]":
    from depth_anything.evaluation.frames import compute_mean_map, read_frames
    from depth_anything.evaluation.predictions import PrecomputedMaps

    named, folders = (
        parse_named_paths(options.weights),
        parse_named_paths(options.predictions, flag="--predictions"),
    )
    check_single_model(options, len(named))
    if both := set(named) & set(folders):
        raise ValueError(f"weights and predictions are both called {both.pop()!r}: name one, as in a=PATH")
    predictors: dict[str, MapSource] = {}
    facts: dict[str, dict[str, Any]] = {}
    if options.mean_map:
        frames = read_frames(options.mean_map, limit=MAX_MEAN_MAP_FRAMES)
        predictors["mean map"] = baseline = compute_mean_map(track(frames, what="mean map"))
        facts["mean map"] = {
            "baseline": f"mean disparity of {options.mean_map}, the same for every image",
            "quantity": baseline.quantity,
            "fingerprint": f"sha256:{hashlib.sha256(baseline.map.tobytes()).hexdigest()}",
        }
    for name, path in named.items():
        model, facts[name] = load_weights(
            path,
            input_size=options.input_size,
            encoder=options.encoder,
            max_depth=options.weights_max_depth,
            version=options.weights_version,
        )
        predictor = build_predictor(model, _on_local_rank_device(options))
        predictors[name] = predictor
        facts[name] |= {"device": str(predictor.device), "quantity": predictor.quantity}
        facts[name] |= {"precision": options.precision, "resample": options.resample}
    for name, path in folders.items():
        maps = PrecomputedMaps(path, quantity=options.quantity)
        predictors[name] = maps
        facts[name] = {
            "predictions": str(path),
            "files": len(maps),
            "quantity": maps.quantity,
            "fingerprint": maps.fingerprint,
        }
    return predictors, facts


def _evaluate_tasks(
    predictors: "dict[str, MapSource]",
    facts: dict[str, dict[str, Any]],
    trials: "list[EvalTask]",
    folder: Path,
    *,
    part: tuple[int, int],
    raises: bool,
) -> list[str]:
    """Judge this process's share of all trials; in a sentence each what could not be, or raised."""
    from depth_anything.evaluation.runner import DiskFailure, MissingData, evaluate_share

    broken = []
    for trial in trials:
        for name, predictor in predictors.items():
            kept = _row_cache(trial, facts, folder, name, part)
            try:
                evaluate_share(
                    predictor,
                    trial,
                    kept,
                    name=name,
                    part=part,
                    watch=lambda lines, name, trial=trial: _with_progress(lines, f"{trial.name}, {name}"),  # type: ignore[misc]
                )
            except (ValueError, OSError) as error:
                if raises:
                    raise
                has_name = isinstance(error, MissingData | DiskFailure)
                broken.append(str(error) if has_name else f"{trial.name}: {error}")
                break
    return broken


def _write_reports(
    predictors: "dict[str, MapSource]",
    facts: dict[str, dict[str, Any]],
    trials: "list[EvalTask]",
    folder: Path,
    options: argparse.Namespace,
    missing: list[str],
    *,
    part: tuple[int, int],
) -> int:
    """Print the tables and write the reports of all trials that are through; say what is not."""
    from depth_anything.evaluation.compare import format_overview
    from depth_anything.evaluation.evaluate import NON_FINITE_NOTE, escape_control_characters
    from depth_anything.evaluation.report import write_summary
    from depth_anything.evaluation.table import format_summary, pair_warnings

    faults: list[str] = []  # of models, as against what is missing
    through: dict[str, list[DepthResult]] = {}
    points: dict[str, dict[str, PairResult]] = {}
    for trial in trials:
        rows = _collect_rows(trial, facts, folder, part=part)
        lacking = max(len(trial.lines) - len(own) for own in rows.values())
        if lacking:
            who = "" if part[1] == 1 else f" (this was share {part[0]} of {part[1]})"
            print(f"{trial.name}: {format_count(lacking, 'image')} of {len(trial.lines)} not judged yet{who}")
            continue
        place = folder if options.data else folder / trial.name
        judged = _write_report(predictors, facts, trial, rows, place, options)
        if trial.protocol is None:
            points[trial.name] = judged
            warned = pair_warnings(judged)
        else:
            through[trial.name] = list(judged.values())
            warned = [sentence for result in judged.values() for sentence in result.warnings]
        for sentence in warned:
            print(
                f"depth-anything evaluate: {trial.name}: {escape_control_characters(sentence)}",
                file=sys.stderr,
            )
        faults += [sentence for sentence in warned if NON_FINITE_NOTE in sentence]
    if options.benchmarks and through:
        cautions = [f"{trial.name}: {trial.incomplete}" for trial in trials if trial.incomplete]
        write_summary(through, folder, points=points, cautions=cautions, settings={"command": options.typed})
        print(f"\n{format_summary(through)}")
        if options.compare and len(through) + len(points) > 1:
            print(f"\n{format_overview(through, points, cautions=cautions)}")
    for sentence in missing:
        print(f"depth-anything evaluate: {escape_unprintable(sentence)}", file=sys.stderr)
    return 1 if missing or faults else 0


def _write_report(
    predictors: "dict[str, MapSource]",
    facts: dict[str, dict[str, Any]],
    trial: "EvalTask",
    rows: dict[str, tuple[dict[str, Any], ...]],
    folder: Path,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Write one trial's report and print its table; name → result, or score on pairs of points."""
    from depth_anything.evaluation.benchmarks.da2k import PairResult
    from depth_anything.evaluation.evaluate import DepthResult
    from depth_anything.evaluation.report import write_pairs_report, write_task_report
    from depth_anything.evaluation.reported_results import find_reported_results
    from depth_anything.evaluation.table import format_pairs_table, format_table

    figures = (
        find_reported_results(trial.name) if options.benchmarks else ()
    )  # a set of that name is not the benchmark
    settings = {"command": options.typed}
    judged: dict[str, Any]
    if trial.protocol is None:
        judged = {name: PairResult(own) for name, own in rows.items()}
        page = write_pairs_report(
            predictors, trial, judged, folder, models=facts, settings=settings, published=figures
        )
        text = format_pairs_table(judged)
    else:
        judged = {name: DepthResult(name, trial.protocol, own, facts[name]) for name, own in rows.items()}
        results = list(judged.values())
        page = write_task_report(predictors, trial, results, folder, settings=settings, published=figures)
        text = format_table(results)
    beside = options.compare and bool(figures)
    if beside:
        text = (folder / "table.txt").read_text(encoding="utf-8").rstrip("\n")
    print(f"{text}\nreport: {escape_unprintable(page)}")
    if options.compare and not beside:
        whose = "a set of one's own" if options.data else "it"
        print(f"{trial.name}: nothing is published on {whose} that could stand beside this")
    if trial.incomplete and not beside:
        print(f"{trial.name}: {trial.incomplete}")
    return judged


def _collect_rows(
    trial: "EvalTask", facts: dict[str, dict[str, Any]], folder: Path, *, part: tuple[int, int]
) -> dict[str, tuple[dict[str, Any], ...]]:
    """The rows of each model that any process has kept."""
    from depth_anything.evaluation.runner import collect_rows

    return {name: collect_rows(trial, _row_cache(trial, facts, folder, name, part)) for name in facts}


def _row_cache(
    trial: "EvalTask", facts: dict[str, dict[str, Any]], folder: Path, name: str, part: tuple[int, int]
) -> Any:
    from depth_anything.evaluation.runner import open_row_cache

    # Where a network runs is no part of what it is: machines of several kinds may share the work.
    model = {
        key: value for key, value in facts[name].items() if key not in ("device", "weights", "predictions")
    }
    return open_row_cache(trial, model, folder, name=name, part=part)


def _with_progress(lines: Iterable[str], what: str) -> Iterator[str]:
    listed = list(lines)
    return track(listed, what=what, total=len(listed))


def _on_local_rank_device(options: argparse.Namespace) -> argparse.Namespace:
    """Of several processes on one machine that torchrun started, each takes the device of its number."""
    import torch

    if "TORCHELASTIC_RUN_ID" not in os.environ or options.device != "auto" or not torch.cuda.is_available():
        return options
    local = int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count()
    return argparse.Namespace(**{**vars(options), "device": f"cuda:{local}"})


@contextlib.contextmanager
def _gather_failures(rank: int | None, broken: list[str]) -> Iterator[list[str] | None]:
    """Wait until all processes of torchrun have judged their share; the one that concludes gets what broke anywhere."""
    if rank is None:
        yield broken
        return
    from datetime import timedelta

    from torch import distributed

    distributed.init_process_group("gloo", timeout=timedelta(days=RANK_TIMEOUT_DAYS))
    try:
        everywhere: list[list[str]] = [[]] * distributed.get_world_size()
        distributed.all_gather_object(everywhere, broken)
        yield None if rank else list(dict.fromkeys(sentence for own in everywhere for sentence in own))
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


def _parse_share(text: str) -> tuple[int, int]:
    k, slash, n = text.partition("/")
    if not (slash and k.isdigit() and n.isdigit() and 1 <= int(k) <= int(n)):
        raise argparse.ArgumentTypeError(f"{text!r} is no share: type 2/3 for the second of three")
    return int(k), int(n)


def parse_named_paths(paths: Sequence[str], *, flag: str = "--weights") -> dict[str, Path]:
    """Split [NAME=]PATH; a model without a name is called after its file, its run, or its folder."""
    named: dict[str, Path] = {}
    for text in paths:
        name, equals, path = text.partition("=")
        if not equals or Path(text).exists():  # checkpoints may be called step=100.ckpt
            path = text
            file = Path(text).resolve()
            name = (
                file.parent.name + _RUN_FILES[file.name]
                if file.name in _RUN_FILES
                else file.stem
                if file.is_file()
                else file.name
            )
        name = escape_unprintable(name)  # tables have it
        if name in named:
            raise ValueError(
                f"two models are called {name!r}: name them, as in {flag} a={named[name]} b={path}"
            )
        named[name] = Path(path)
    return named
