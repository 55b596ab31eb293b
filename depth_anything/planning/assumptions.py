"""What a plan assumes: constants with their sources, and the cluster as it was typed."""

from dataclasses import dataclass

from depth_anything.devices import Device
from depth_anything.planning.goodput import GPU_HOURS_PER_FAILURE

MFU = {"vits": 0.25, "vitb": 0.30, "vitl": 0.40, "vitg": 0.40}
"""Assumed share of the dense bf16 peak, by encoder, without recomputation and with several images per GPU.

No GPU was measured. torchtitan's compiled Llama 3 8B reaches 39 % on eight H100s, 33 % uncompiled; small encoders leave
more of a GPU idle, and the DPT head's convolutions are slower than matrix products.
"""
OTHER_MFU = 0.25
"""The assumed share of any other encoder."""

PAPER_RECORDS = {
    "blendedmvs": 115_000,
    "hypersim": 60_000,
    "irs": 103_000,
    "tartanair": 306_000,
    "vkitti2": 20_000,
    "bdd100k": 8_200_000,
    "landmarks": 4_100_000,
    "imagenet21k": 13_100_000,
    "lsun": 9_800_000,
    "objects365": 1_700_000,
    "openimages": 7_800_000,
    "places365": 6_500_000,
    "sa1b": 11_100_000,
}
"""Images of the paper's sets (arXiv 2406.09414, table 7): 604 thousand synthetic and 62.3 million photographs."""

REFERENCE_SIDE = 518
"""Short side, pixels, to which the following sizes and times belong."""
RECORDS_PER_SHARD = 1000
"""Default of `depth-anything shard`."""
IMAGE_BYTES = 98_000
"""About that of a photograph resized to 518×686 in JPEG of quality 92."""
DEPTH_BYTES = 648_000
"""Exact depth of 518×686 in the codec f32, a Hypersim frame (benchmarks/results/codec_epyc2_202611.md)."""
LABEL_BYTES = 139_000
"""A label of 518×686 in the codec q12, the same frame and page."""
INDEX_BYTES = 70_000
"""Index of a shard of a thousand records, which each loader process reads once (docs/remote.md)."""
ASPECT = 4 / 3
"""Sides of a photograph that is labeled whole: 518×686, as the sizes above."""

LOADER_MS = 2.98
"""Milliseconds of a core per sample of pre-resized shards: two workers (benchmarks/results/data_epyc2_202611.json)."""
ENCODE_LABEL_MS = 3.7
"""Milliseconds of a core to encode a label in q12 (benchmarks/results/codec_epyc2_202611.md, the Hypersim frame)."""

FLOAT_BYTES = 4
"""Weights, gradients and Adam's two moments are float32 in bf16-mixed."""
ADAM_MOMENTS = 2
COPY_BYTES_PER_S = 20e9
"""From a GPU to pinned memory of its host, with which an asynchronous checkpoint begins: PCIe 4 × 16, assumed."""


@dataclass(frozen=True)
class Cluster:
    """Where a plan runs, what was measured there, and what it costs. The defaults are assumptions.

    Attributes:
        device: The accelerator.
        gpus: Number of accelerators.
        gpus_per_node: Accelerators per node.
        mfu: Measured MFU of a training step, as `bench_train.py` prints it; None for `MFU`.
        images_per_core: Measured images/s that one core loads; None for `LOADER_MS`.
        price_per_gpu_hour: In any currency; None for no price.
        node_network_bytes_per_s: Network of a node in one direction, for gradients: 8 × 400 Gbit/s, as a DGX H100.
        write_bytes_per_s: Speed at which one process writes a checkpoint.
        read_bytes_per_s: Speed at which it reads the checkpoint back.
        restart_s: From a failure to the first step of the next start.
        time_limit_s: Of a job, after which it is requeued; 24 hours in slurm/cluster.env.
        gpu_hours_per_failure: Hours that one GPU runs without stopping its job.
    """

    device: Device
    gpus: int
    gpus_per_node: int = 8
    mfu: float | None = None
    images_per_core: float | None = None
    price_per_gpu_hour: float | None = None
    node_network_bytes_per_s: float = 400e9
    write_bytes_per_s: float = 1e9
    read_bytes_per_s: float = 1e9
    restart_s: float = 600.0
    time_limit_s: float = 24 * 3600.0
    gpu_hours_per_failure: float = GPU_HOURS_PER_FAILURE
