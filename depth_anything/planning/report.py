"""Print a plan as a table, with its assumptions, or write it as JSON."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from depth_anything.planning import assumptions
from depth_anything.planning.assumptions import Cluster
from depth_anything.planning.pipeline import PipelinePlan
from depth_anything.planning.stage_plan import StagePlan
from depth_anything.progress import format_duration

NONE = "–"
_PREFIXES = ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))

Row = tuple[str, Callable[[StagePlan], str], str]
"""Name of a row, its cell for a stage, and its cell for all stages."""


def format_quantity(value: float, unit: str) -> str:
    """Format a number with three digits and a decimal prefix.

    Example:
        >>> format_quantity(6.1054e12, "B"), format_quantity(92_160_000, ""), format_quantity(0, "B/s")
        ('6.11 TB', '92.2 M', '–')
    """
    if value == 0:
        return NONE
    factor, prefix = next(((f, p) for f, p in _PREFIXES if abs(value) >= f), (1.0, ""))
    scaled = value / factor
    digits = 0 if scaled >= 99.95 else 1 if scaled >= 9.995 else 2
    return f"{scaled:.{digits}f} {prefix}{unit}".rstrip()


def format_hours(hours: float) -> str:
    """Format hours with three digits.

    Example:
        >>> format_hours(0.0123), format_hours(31.25), format_hours(12345.6)
        ('0.012', '31.2', '12,346')
    """
    if hours < 1:
        return f"{hours:.3f}"
    return f"{hours:,.1f}" if hours < 100 else f"{hours:,.0f}"


def format_plan(plan: PipelinePlan) -> str:
    """Return the table of a plan: a column per stage, then its assumptions."""
    stages, several = plan.stages, len(plan.stages) > 1
    lines = [["", *(stage.stage for stage in stages)], ["", *(stage.encoder for stage in stages)]]
    lines = [[*line, text] for line, text in zip(lines, ("all", ""), strict=True)] if several else lines
    for name, cell, total in _rows(plan):
        cells = [cell(stage) for stage in stages]
        if any(text not in ("", NONE) for text in cells):
            lines.append([name, *cells, *([total] if several else [])])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in lines
    ]
    rule = "-" * max(map(len, text))
    cluster = plan.cluster
    title = (
        f"{cluster.gpus} × {cluster.device.label} ({cluster.device.peak_tflops:g} TFLOP/s in dense bf16), "
        f"{cluster.gpus_per_node} per node; nothing was run"
    )
    return "\n".join([title, "", *text[:2], rule, *text[2:], "", *describe_assumptions(plan)])


def _rows(plan: PipelinePlan) -> list[Row]:
    stages, price = plan.stages, plan.cost
    read = sum(stage.data.read_bytes for stage in stages)
    labels = sum(stage.data.label_bytes for stage in stages)
    return [
        ("GPUs used", lambda s: f"{s.work.gpus:,}", ""),
        ("images per GPU and step", lambda s: _or_none(s.work.images_per_gpu), ""),
        ("steps", lambda s: _or_none(s.work.steps), ""),
        ("samples", lambda s: format_quantity(s.work.samples, ""), ""),
        ("passes", lambda s: f"{s.data.passes:.3g}", ""),
        ("records", lambda s: f"{s.data.records:,}", ""),
        ("shards", lambda s: f"{s.data.shards:,}", ""),
        ("FLOP per sample", lambda s: format_quantity(s.work.flop_per_sample, ""), ""),
        ("  recomputed besides", lambda s: format_quantity(s.work.recomputed_per_sample, ""), ""),
        (
            "FLOP in all",
            lambda s: format_quantity(s.work.flop, ""),
            format_quantity(sum(s.work.flop for s in stages), ""),
        ),
        ("MFU", lambda s: f"{s.work.mfu:.1%}", ""),
        ("images/s", lambda s: f"{s.work.images_per_s:,.0f}", ""),
        ("goodput", lambda s: f"{s.goodput:.2%}", ""),
        ("hours", lambda s: format_hours(s.hours), format_hours(plan.hours)),
        ("GPU-hours", lambda s: format_hours(s.gpu_hours), format_hours(plan.gpu_hours)),
        (
            "cost",
            lambda s: NONE if s.cost is None else f"{s.cost:,.0f}",
            NONE if price is None else f"{price:,.0f}",
        ),
        ("CPU cores", lambda s: f"{s.data.cores:,.0f}", ""),
        ("  per GPU", lambda s: f"{s.data.cores / s.work.gpus:.1f}", ""),
        ("shards read", lambda s: format_quantity(s.data.read_bytes, "B"), format_quantity(read, "B")),
        (
            "label shards written",
            lambda s: format_quantity(s.data.label_bytes, "B"),
            format_quantity(labels, "B"),
        ),
        ("network, read", lambda s: format_quantity(s.data.read_bytes_per_s, "B/s"), ""),
        ("network, written", lambda s: format_quantity(s.data.write_bytes_per_s, "B/s"), ""),
        ("requests/s to the store", lambda s: f"{s.data.requests_per_s:,.0f}", ""),
        ("gradients per node", _gradients, ""),
        ("checkpoint", lambda s: _checkpoint(s, lambda c: format_quantity(c.bytes, "B")), ""),
        ("  written in", lambda s: _checkpoint(s, lambda c: f"{c.write_s:.1f} s"), ""),
        ("  read back in", lambda s: _checkpoint(s, lambda c: f"{c.read_s:.1f} s"), ""),
        ("  stops the run for", lambda s: _checkpoint(s, lambda c: f"{c.stop_s:.1f} s"), ""),
        (
            "  complete after",
            lambda s: _checkpoint(s, lambda c: f"{c.behind_s:.1f} s" if c.behind_s else NONE),
            "",
        ),
        ("  number", lambda s: _checkpoint(s, lambda c: f"{c.count:,}"), ""),
        ("  written in all", lambda s: _checkpoint(s, lambda c: format_quantity(c.count * c.bytes, "B")), ""),
        ("  kept", lambda s: _checkpoint(s, lambda c: f"{c.kept:,}"), ""),
        (
            "  disk, with a new one",
            lambda s: _checkpoint(s, lambda c: format_quantity(c.kept_bytes, "B")),
            "",
        ),
        ("  every", lambda s: _checkpoint(s, lambda c: format_duration(c.every_s)), ""),
        ("  best every (Daly)", lambda s: _checkpoint(s, lambda c: format_duration(c.best_every_s)), ""),
    ]


def _or_none(number: int | None) -> str:
    return NONE if number is None else f"{number:,}"


def _gradients(stage: StagePlan) -> str:
    text = format_quantity(stage.work.gradient_bytes_per_s, "B/s")
    return f"{text} !" if stage.work.network_bound else text


def _checkpoint(stage: StagePlan, cell: Callable[[Any], str]) -> str:
    return NONE if stage.checkpoints is None else cell(stage.checkpoints)


def describe_assumptions(plan: PipelinePlan) -> list[str]:
    """Return a line for each input of a plan that says whether it is counted, measured, typed or assumed."""
    c = plan.cluster
    lines = [
        "counted     FLOP on the meta device, forward and backward (torch.utils.flop_counter); parameters",
        f"{_typed(c.mfu)}MFU{'' if c.mfu else ', as no GPU was measured; what is recomputed lowers it'}",
    ]
    if c.images_per_core is None:
        lines.append(
            f"measured    {assumptions.LOADER_MS} ms of a core per sample, {assumptions.ENCODE_LABEL_MS} ms per label "
            "that is encoded (AMD EPYC)"
        )
    else:
        lines.append(f"typed       {c.images_per_core:g} images/s per core")
    lines += [
        f"assumed     bytes per record where there is no manifest: image {assumptions.IMAGE_BYTES:,}, label "
        f"{assumptions.LABEL_BYTES:,}, exact depth {assumptions.DEPTH_BYTES:,}",
        f"assumed     a failure every {c.gpu_hours_per_failure:,.0f} GPU-hours"
        f"{_source(c)}, a restart of {format_duration(c.restart_s)}, a time limit of "
        f"{format_duration(c.time_limit_s)}",
        f"assumed     {format_quantity(c.node_network_bytes_per_s, 'B/s')} per node for gradients, "
        f"{format_quantity(c.write_bytes_per_s, 'B/s')} to write a checkpoint, "
        f"{format_quantity(c.read_bytes_per_s, 'B/s')} to read it back",
    ]
    few = [s for s in plan.stages if s.work.gpus < c.gpus]
    lines += [f"note        {_name(s)} can use {s.work.gpus} of {c.gpus} GPUs: its {_limit(s)}" for s in few]
    bound = [s for s in plan.stages if s.work.network_bound]
    lines += [
        f"note        {_name(s)} waits for the network: gradients take longer than arithmetic" for s in bound
    ]
    thin = [s for s in plan.stages if s.work.images_per_gpu is not None and s.work.images_per_gpu < 4]
    if thin and c.mfu is None:
        names = ", ".join(map(_name, thin))
        lines.append(f"note        fewer than 4 images per GPU: {names} will not reach the assumed MFU")
    return lines


def _typed(value: float | None) -> str:
    return "assumed     " if value is None else "typed       "


def _source(cluster: Cluster) -> str:
    counted = cluster.gpu_hours_per_failure == assumptions.GPU_HOURS_PER_FAILURE
    return " (as counted for Llama 3)" if counted else ""


def _name(stage: StagePlan) -> str:
    return f"{stage.stage} {stage.encoder}"


def _limit(stage: StagePlan) -> str:
    if stage.work.images_per_gpu is None:
        return f"{stage.data.shards:,} shards are labeled one by one"
    return "batch must divide evenly"


def plan_as_dict(plan: PipelinePlan) -> dict[str, Any]:
    """Return a plan as plain values for JSON: seconds, hours, bytes and FLOP without prefixes."""
    cluster = asdict(plan.cluster)
    cluster["device"] = plan.cluster.device.name
    cluster["peak_tflops"] = plan.cluster.device.peak_tflops
    return {
        "overrides": list(plan.overrides),
        "cluster": cluster,
        "mfu": "assumed" if plan.cluster.mfu is None else "typed",
        "stages": [_stage_as_dict(stage) for stage in plan.stages],
        "all": {"hours": plan.hours, "gpu_hours": plan.gpu_hours, "cost": plan.cost},
    }


def _stage_as_dict(stage: StagePlan) -> dict[str, Any]:
    values = asdict(stage)
    values["work"]["flop"] = stage.work.flop
    return {**values, "hours": stage.hours, "gpu_hours": stage.gpu_hours}


def parse_records(typed: Sequence[str]) -> dict[str, int]:
    """Parse NAME=NUMBER arguments.

    Example:
        >>> parse_records(["own=20000", "web=3e6"])
        {'own': 20000, 'web': 3000000}

    Raises:
        ValueError: If one is not of this form, or the number is not a whole one above 0.
    """
    sizes = {}
    for one in typed:
        name, _, number = one.partition("=")
        value = float(number)
        if not name or value < 1 or value != int(value):
            raise ValueError(one)
        sizes[name] = int(value)
    return sizes
