"""`depth-anything plan`: hours, GPU-hours, cores, bytes, network, checkpoints and money of a run, before it starts."""

import argparse
import json
from pathlib import Path
from typing import Any

from depth_anything.cli.options import add_command, float_in_range, int_in_range
from depth_anything.errors import UserError

_LARGE = 1e12


def add_plan(commands: Any) -> None:
    """Declare `plan`."""
    plan = add_command(
        commands,
        "plan",
        "compute hours, GPU-hours, cores, bytes, network, checkpoints and cost of the stages on a cluster",
        run=_run_plan,
    )
    plan.add_argument(
        "overrides",
        nargs="+",
        metavar="KEY=VALUE",
        help="as after train.py, before the flags; without stage= all stages, and encoder= chooses the students",
    )
    plan.add_argument(
        "--gpus",
        type=int_in_range("--gpus", least=1, most=1_000_000),
        default=8,
        metavar="N",
        help="number of GPUs (%(default)s)",
    )
    plan.add_argument("--device", default="h100", metavar="NAME", help="kind of GPU, as a100 (%(default)s)")
    plan.add_argument(
        "--peak-tflops",
        type=float_in_range("--peak-tflops", most=1e6, unit="TFLOP/s"),
        metavar="N",
        help="dense bf16 peak of a GPU from its data sheet, TFLOP/s, for a --device that is not known",
    )
    plan.add_argument(
        "--gpus-per-node",
        type=int_in_range("--gpus-per-node", least=1, most=1024),
        default=8,
        metavar="N",
        help="GPUs of a node (%(default)s)",
    )
    plan.add_argument(
        "--mfu",
        type=float_in_range("--mfu", most=1.0),
        metavar="N",
        help="measured MFU, as 0.38 (assumed by encoder: 0.25 to 0.40)",
    )
    plan.add_argument(
        "--images-per-core",
        type=float_in_range("--images-per-core", most=_LARGE, unit="images/s"),
        metavar="N",
        help="measured images/s of one core, as bench-data prints (that of our benchmarks)",
    )
    plan.add_argument(
        "--price-per-gpu-hour",
        type=float_in_range("--price-per-gpu-hour", most=_LARGE),
        metavar="N",
        help="price of a GPU-hour, in any currency",
    )
    plan.add_argument(
        "--records",
        nargs="+",
        default=[],
        metavar="SET=NUMBER",
        help="number of images of sets that do not exist yet",
    )
    _add_cluster_flags(plan)
    plan.add_argument("--json", action="store_true", help="print JSON instead of the table")


def _add_cluster_flags(plan: argparse.ArgumentParser) -> None:
    """Add the flags of the network, the store and failures, which have the defaults of `Cluster`."""
    for flag, unit, most, default, text in (
        ("--node-network", "GB/s", _LARGE, 400.0, "network of a node in one direction"),
        ("--write-speed", "GB/s", _LARGE, 1.0, "speed of writing a checkpoint"),
        ("--read-speed", "GB/s", _LARGE, 1.0, "speed of reading a checkpoint back"),
        ("--restart", "minutes", 1e6, 10.0, "from a failure to the next step"),
        ("--time-limit", "hours", 1e6, 24.0, "of a job, which is then requeued"),
    ):
        kind = float_in_range(flag, most=most, unit=unit)
        plan.add_argument(flag, type=kind, default=default, metavar="N", help=f"{text}, {unit} (%(default)g)")
    plan.add_argument(
        "--gpu-hours-per-failure",
        type=float_in_range("--gpu-hours-per-failure", most=_LARGE, unit="hours"),
        metavar="N",
        help="hours that one GPU runs without stopping its job (50,677, as counted for Llama 3)",
    )


def _run_plan(options: argparse.Namespace) -> None:
    from depth_anything.devices import Device, find_device
    from depth_anything.planning.assumptions import GPU_HOURS_PER_FAILURE, Cluster
    from depth_anything.planning.pipeline import plan_pipeline
    from depth_anything.planning.report import format_plan, parse_records, plan_as_dict

    if options.peak_tflops is None:
        device = find_device(options.device)
    else:
        device = Device(options.device, options.device, options.peak_tflops, cuda_name="")
    cluster = Cluster(
        device=device,
        gpus=options.gpus,
        gpus_per_node=options.gpus_per_node,
        mfu=options.mfu,
        images_per_core=options.images_per_core,
        price_per_gpu_hour=options.price_per_gpu_hour,
        node_network_bytes_per_s=options.node_network * 1e9,
        write_bytes_per_s=options.write_speed * 1e9,
        read_bytes_per_s=options.read_speed * 1e9,
        restart_s=options.restart * 60,
        time_limit_s=options.time_limit * 3600,
        gpu_hours_per_failure=options.gpu_hours_per_failure or GPU_HOURS_PER_FAILURE,
    )
    try:
        records = parse_records(options.records)
    except (ValueError, OverflowError) as error:
        raise UserError(
            f"--records {' '.join(options.records)} is not SET=NUMBER", "type it as --records own=20000"
        ) from error
    (plan,) = plan_pipeline(options.overrides, find_configs(), [cluster], records=records)
    print(json.dumps(plan_as_dict(plan), indent=1) if options.json else format_plan(plan))


def find_configs() -> Path:
    """Return the folder of config files: of the clone that the package is installed from, or of this folder.

    Raises:
        UserError: If neither has it.
    """
    import depth_anything

    for folder in (Path(depth_anything.__file__).resolve().parents[1], Path.cwd()):
        if (folder / "configs" / "train.yaml").is_file():
            return folder / "configs"
    raise UserError("there is no configs/train.yaml here", "run depth-anything plan in the folder of a clone")
