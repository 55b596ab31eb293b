"""The plan of one stage: what it computes, reads, writes and costs on a cluster.

With F the FLOP of a sample, P the peak of a GPU, G GPUs, B samples per step and MFU u (docs/scale.md):

    step       max(B·F / (G·P·u), gradients ÷ network), seconds, without failures
    gradients  2·4 bytes·parameters·(N − 1)/N through the network of each of N nodes
    hours      steps·step / goodput, where goodput comes from `simulate_goodput`
    cores      images/s ÷ images/s of a core
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from depth_anything.errors import UserError
from depth_anything.model.flops import count_flops, count_forward_flops
from depth_anything.planning import assumptions
from depth_anything.planning.assumptions import Cluster
from depth_anything.planning.goodput import (
    Checkpoints,
    Interruptions,
    daly_interval,
    job_mtbf_s,
    simulate_goodput,
)
from depth_anything.planning.set_sizes import total_size
from depth_anything.progress import format_duration
from depth_anything.teachers.open_teacher import teacher_kind
from depth_anything.training.batch_plan import extra_sets, split_batch
from depth_anything.training.config import RunConfig
from depth_anything.training.config_schema import DEPTH_STAGES
from depth_anything.training.headroom import CheckpointSchedule
from depth_anything.training.throughput import build_meta_network

SIMULATED_STARTS = 20_000
"""Starts that a simulation draws; its share of lost time is then right to a hundredth."""


@dataclass(frozen=True)
class Work:
    """What a stage computes. Rates are those of useful steps.

    Attributes:
        gpus: GPUs that it uses: the largest number that divides the batch; labeling uses all.
        images_per_gpu: Images per step and GPU; None for labeling.
        steps: Optimizer steps; None for labeling.
        samples: Images that are processed.
        flop_per_sample: Operations of the method for a sample: forward, backward, frozen encoder.
        recomputed_per_sample: Operations that activation checkpointing repeats.
        mfu: Share of the peak that `flop_per_sample` reaches, without waiting for the network.
        step_s: Seconds of a step; of labeling, of a shard on one GPU.
        images_per_s: Over all GPUs.
        gradient_bytes_per_s: Network of a node in one direction, so that gradients never delay a step.
        network_bound: Whether gradients, not arithmetic, set `step_s`.
    """

    gpus: int
    images_per_gpu: int | None
    steps: int | None
    samples: int
    flop_per_sample: int
    recomputed_per_sample: int
    mfu: float
    step_s: float
    images_per_s: float
    gradient_bytes_per_s: float = 0.0
    network_bound: bool = False

    @property
    def flop(self) -> float:
        """Operations of the stage, with what is repeated."""
        return float(self.samples) * (self.flop_per_sample + self.recomputed_per_sample)


@dataclass(frozen=True)
class DataFlow:
    """What a stage reads and writes; bytes are decimal.

    Attributes:
        records: Records of its sets.
        shards: Shards of its sets.
        passes: Times that every record is seen.
        read_bytes: Bytes of images and labels that are read.
        label_bytes: Bytes of label shards that are written.
        read_bytes_per_s: Bandwidth of the store.
        write_bytes_per_s: Bandwidth of writing labels.
        requests_per_s: Requests for records; an image and its label are in two tars.
        cores: Cores that load, or decode and encode, as many images as the GPUs take.
    """

    records: int
    shards: int
    passes: float
    read_bytes: float
    label_bytes: float
    read_bytes_per_s: float
    write_bytes_per_s: float
    requests_per_s: float
    cores: float


@dataclass(frozen=True)
class CheckpointPlan:
    """The checkpoints of a stage that trains.

    Attributes:
        bytes: Size of one: weights, and Adam's two moments of those that are trained, in float32.
        write_s: Seconds to write it.
        read_s: Seconds to read it back, before an older one is deleted.
        stop_s: Seconds that it stops the run: to write and read it; of an asynchronous one to copy it to the host, and
            to wait where the one before is not complete yet.
        behind_s: Seconds after that until it is complete; 0 unless it is asynchronous.
        count: Number of them.
        kept: Number of them that are there when the run ends.
        kept_bytes: The disk that these take, with one more while it is written.
        every_s: Seconds of steps between two, as configured.
        best_every_s: The best such time for these failures, by Daly.
    """

    bytes: int
    write_s: float
    read_s: float
    stop_s: float
    behind_s: float
    count: int
    kept: int
    kept_bytes: int
    every_s: float
    best_every_s: float


@dataclass(frozen=True)
class StagePlan:
    """A stage on a cluster.

    Attributes:
        stage: The stage.
        encoder: Its encoder.
        work: What it computes.
        data: What it reads and writes.
        checkpoints: What it saves; None for labeling, where each finished shard is saved.
        useful_hours: Hours of steps that are kept.
        goodput: Share of the wall time that these are.
        cost: GPU-hours times the price; None without a price.
    """

    stage: str
    encoder: str
    work: Work
    data: DataFlow
    checkpoints: CheckpointPlan | None
    useful_hours: float
    goodput: float
    cost: float | None = None

    @property
    def hours(self) -> float:
        """Wall time."""
        return self.useful_hours / self.goodput

    @property
    def gpu_hours(self) -> float:
        """Wall time of all GPUs that the stage uses."""
        return self.hours * self.work.gpus


@dataclass(frozen=True)
class NetworkCost:
    """What the network of a stage costs on any cluster.

    Attributes:
        flop: Operations of the method for a sample: of a training step, or to label a photograph and its crops.
        recomputed: Operations that activation checkpointing repeats.
        parameters: Number of its parameters.
        trained: Number of those that are trained.
        label_share: Pixels of a label and its crops as a share of 518×686; 0 where nothing is labeled.
    """

    flop: int
    recomputed: int = 0
    parameters: int = 0
    trained: int = 0
    label_share: float = 0.0


def count_network(config: RunConfig) -> NetworkCost:
    """Count the operations and parameters of a stage that trains a depth network, or of stage=pseudolabel.

    Args:
        config: The resolved config.

    Raises:
        UserError: If the stage cannot be planned.
    """
    if config.stage == "pseudolabel":
        return _count_labeling(config)
    if config.stage not in DEPTH_STAGES:
        stages = ", ".join(f"stage={stage}" for stage in (*DEPTH_STAGES, "pseudolabel"))
        raise UserError(f"stage={config.stage} cannot be planned", f"type one of {stages}")
    model, recipe = build_meta_network(config), config.recipe
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    flops = count_flops(
        model,
        config.image_size,
        config.image_size,
        frozen_encoder=bool(recipe.has("alignment_weight") and recipe.alignment_weight),
        checkpointing=recipe.checkpointing,
    )
    return NetworkCost(flops.step, flops.recomputed, parameters, trained)


def plan_stage(
    config: RunConfig, network: NetworkCost, cluster: Cluster, records: Mapping[str, int]
) -> StagePlan:
    """Plan a stage.

    Args:
        config: The resolved config.
        network: The counts of `count_network` for this config.
        cluster: Where it runs.
        records: Set to number of records, for sets that do not exist yet.

    Raises:
        UserError: If the size of a set is not known, or the batch cannot be split.
    """
    labeling = config.stage == "pseudolabel"
    plan = (_plan_labeling if labeling else _plan_training)(config, network, cluster, records)
    if cluster.price_per_gpu_hour is None:
        return plan
    return replace(plan, cost=plan.gpu_hours * cluster.price_per_gpu_hour)


def _plan_training(
    config: RunConfig, network: NetworkCost, cluster: Cluster, typed: Mapping[str, int]
) -> StagePlan:
    work = _training_work(config, network, cluster)
    mtbf_s = job_mtbf_s(work.gpus, cluster.gpu_hours_per_failure)
    checkpoints = _plan_checkpoints(config, network, cluster, work, mtbf_s)
    return StagePlan(
        config.stage,
        config.encoder,
        work,
        _training_data(config, cluster, work, typed),
        checkpoints,
        useful_hours=config.steps * work.step_s / 3600,
        goodput=_goodput(
            cluster, mtbf_s, Checkpoints(checkpoints.every_s, checkpoints.stop_s, checkpoints.behind_s)
        ),
    )


def _plan_checkpoints(
    config: RunConfig, network: NetworkCost, cluster: Cluster, work: Work, mtbf_s: float
) -> CheckpointPlan:
    """Plan the checkpoints of a run: each is written and read back, at once or behind the steps that follow."""
    size = assumptions.FLOAT_BYTES * (network.parameters + assumptions.ADAM_MOMENTS * network.trained)
    every_s, asynchronous = config.checkpoint.every * work.step_s, config.checkpoint.asynchronous
    saved = save_times(size, cluster, every_s, asynchronous=asynchronous)
    rare = save_times(size, cluster, math.inf, asynchronous=asynchronous)
    schedule = CheckpointSchedule.of_run(config)
    kept = schedule.kept_at_end()
    return CheckpointPlan(
        bytes=size,
        write_s=size / cluster.write_bytes_per_s,
        read_s=size / cluster.read_bytes_per_s,
        stop_s=saved.write_s,
        behind_s=saved.behind_s,
        count=schedule.count(),
        kept=kept,
        kept_bytes=(kept + 1) * size,
        every_s=every_s,
        best_every_s=max(rare.behind_s, daly_interval(rare.write_s, mtbf_s)),
    )


def save_times(size: float, cluster: Cluster, every_s: float, *, asynchronous: bool) -> Checkpoints:
    """Return for how long a checkpoint stops a run, and how much later it is complete.

    Args:
        size: Its bytes.
        cluster: Where it is written.
        every_s: Seconds of steps between two; one that is due before the last is complete waits for it.
        asynchronous: Only the copy to the host stops the run.
    """
    save_s = size / cluster.write_bytes_per_s + size / cluster.read_bytes_per_s
    if not asynchronous:
        return Checkpoints(every_s, save_s)
    return Checkpoints(every_s, size / assumptions.COPY_BYTES_PER_S + max(0.0, save_s - every_s), save_s)


def _training_work(config: RunConfig, network: NetworkCost, cluster: Cluster) -> Work:
    batch, flop = config.batch_size, network.flop
    gpus = max(d for d in range(1, min(cluster.gpus, batch) + 1) if batch % d == 0)
    split_batch(batch, gpus, config.micro_batch)
    mfu = cluster.mfu or _assumed_mfu(config.encoder) * flop / (flop + network.recomputed)
    compute_s = batch * flop / (gpus * cluster.device.peak_tflops * 1e12 * mfu)
    nodes = math.ceil(gpus / cluster.gpus_per_node)
    gradient_bytes = 2 * assumptions.FLOAT_BYTES * network.trained * (nodes - 1) / nodes
    step_s = max(compute_s, gradient_bytes / cluster.node_network_bytes_per_s)
    return Work(
        gpus=gpus,
        images_per_gpu=batch // gpus,
        steps=config.steps,
        samples=batch * config.steps,
        flop_per_sample=flop,
        recomputed_per_sample=network.recomputed,
        mfu=mfu,
        step_s=step_s,
        images_per_s=batch / step_s,
        gradient_bytes_per_s=gradient_bytes / compute_s,
        network_bound=step_s > compute_s,
    )


def _training_data(config: RunConfig, cluster: Cluster, work: Work, typed: Mapping[str, int]) -> DataFlow:
    sets = dict(config.data.sets)
    for added in extra_sets(config).values():
        sets.update(added)
    size = total_size(config, sets, typed)
    labeled_apart = config.stage == "student"  # labels are in tars of their own
    scale = (config.image_size / assumptions.REFERENCE_SIDE) ** 2
    label = assumptions.LABEL_BYTES if labeled_apart else assumptions.DEPTH_BYTES
    sample = (assumptions.IMAGE_BYTES + label) * scale
    if size.bytes is not None:
        sample = size.bytes / size.records + (label * scale if labeled_apart else 0.0)
    return DataFlow(
        records=size.records,
        shards=size.shards,
        passes=work.samples / size.records,
        read_bytes=work.samples * sample,
        label_bytes=0.0,
        read_bytes_per_s=work.images_per_s * sample,
        write_bytes_per_s=0.0,
        requests_per_s=work.images_per_s * (2 if labeled_apart else 1),
        cores=work.images_per_s * _core_s(cluster),
    )


def _plan_labeling(
    config: RunConfig, network: NetworkCost, cluster: Cluster, typed: Mapping[str, int]
) -> StagePlan:
    """Plan stage=pseudolabel: independent GPUs take whole shards, and a failure costs one of them its shard."""
    size = total_size(config, config.data.sets, typed)
    mfu = cluster.mfu or _assumed_mfu(config.encoder)
    gpus, per_shard = min(cluster.gpus, size.shards), size.records / size.shards
    shard_s = per_shard * network.flop / (cluster.device.peak_tflops * 1e12 * mfu)
    rate = gpus * per_shard / shard_s
    work = Work(
        gpus=gpus,
        images_per_gpu=None,
        steps=None,
        samples=size.records,
        flop_per_sample=network.flop,
        recomputed_per_sample=0,
        mfu=mfu,
        step_s=shard_s,
        images_per_s=rate,
    )
    image = assumptions.IMAGE_BYTES if size.bytes is None else size.bytes / size.records
    label = assumptions.LABEL_BYTES * network.label_share
    data = DataFlow(
        records=size.records,
        shards=size.shards,
        passes=1.0,
        read_bytes=size.records * image,
        label_bytes=size.records * label,
        read_bytes_per_s=rate * image,
        write_bytes_per_s=rate * label,
        requests_per_s=rate,
        cores=rate * _core_s(cluster, assumptions.ENCODE_LABEL_MS * network.label_share),
    )
    useful_s = math.ceil(size.shards / gpus) * shard_s  # the last shards leave some GPUs idle
    goodput = _goodput(cluster, job_mtbf_s(1, cluster.gpu_hours_per_failure), Checkpoints(shard_s, 0.0))
    return StagePlan(config.stage, config.encoder, work, data, None, useful_s / 3600, goodput)


def _count_labeling(config: RunConfig) -> NetworkCost:
    """Count the operations to label a photograph and its crops."""
    if [teacher_kind(spec) for spec in config.teachers] != ["network"]:
        raise UserError(
            f"teacher={config.teacher} is not one network of this project, whose operations can be counted",
            "leave teacher= out, and choose its size by encoder=",
        )
    model = build_meta_network(config)
    height = max(1, round(config.image_size / model.multiple)) * model.multiple
    width = round(height * assumptions.ASPECT / model.multiple) * model.multiple
    flop, pixels = count_forward_flops(model, height, width), height * width
    if config.label_crops:
        flop += config.label_crops * count_forward_flops(model, height, height)
        pixels += config.label_crops * height * height
    reference = assumptions.REFERENCE_SIDE * round(assumptions.REFERENCE_SIDE * assumptions.ASPECT / 14) * 14
    return NetworkCost(flop, label_share=pixels / reference)


def _goodput(cluster: Cluster, mtbf_s: float, checkpoints: Checkpoints) -> float:
    stops = Interruptions(mtbf_s, cluster.restart_s, cluster.time_limit_s)
    share = simulate_goodput(stops, checkpoints, starts=SIMULATED_STARTS).share
    if not share:
        raise UserError(
            f"no step would be kept: the job fails every {format_duration(mtbf_s)} and ends after "
            f"{format_duration(cluster.time_limit_s)}, a restart takes {format_duration(cluster.restart_s)}, and the "
            f"next checkpoint {format_duration(checkpoints.interval_s + checkpoints.write_s)}",
            "type a lower --restart or checkpoint.every=, or a higher --time-limit or --gpu-hours-per-failure",
        )
    return share


def _assumed_mfu(encoder: str) -> float:
    return assumptions.MFU.get(encoder, assumptions.OTHER_MFU)


def _core_s(cluster: Cluster, extra_ms: float = 0.0) -> float:
    """Return the seconds of one core per image: as measured on the cluster, or by our benchmarks and `extra_ms`."""
    if cluster.images_per_core is not None:
        return 1 / cluster.images_per_core
    return (assumptions.LOADER_MS + extra_ms) / 1e3
