"""Names of all benchmarks of `depth-anything evaluate`; modules are imported on demand."""

from importlib import import_module

from depth_anything.evaluation.benchmarks.benchmark import Benchmark

BENCHMARKS = {
    "kitti": "kitti:KITTI",
    "nyu": "nyu:NYU",
    "nyu_filled": "nyu:NYU_FILLED",
    "sintel": "sintel:SINTEL",
    "sintel_clean": "sintel:SINTEL_CLEAN",
    "eth3d": "eth3d:ETH3D",
    "diode": "diode:DIODE",
    "diode_indoor": "diode:DIODE_INDOOR",
    "diode_outdoor": "diode:DIODE_OUTDOOR",
    "scannet": "scannet:SCANNET",
    "booster": "booster:BOOSTER",
    "booster_tom": "booster:BOOSTER_TOM",
    "ddad": "ddad:DDAD",
    "ibims": "ibims:IBIMS",
    "sunrgbd": "sunrgbd:SUNRGBD",
    "sunrgbd_filled": "sunrgbd:SUNRGBD_FILLED",
    "sunrgbd_v1": "sunrgbd:SUNRGBD_V1",
    "hypersim": "hypersim:HYPERSIM",
    "vkitti2": "vkitti2:VKITTI2",
    "da2k": "da2k:DA2K",
    "moge_nyu": "moge:MOGE_NYU",
    "moge_kitti": "moge:MOGE_KITTI",
    "moge_eth3d": "moge:MOGE_ETH3D",
    "moge_ibims": "moge:MOGE_IBIMS",
    "moge_gso": "moge:MOGE_GSO",
    "moge_sintel": "moge:MOGE_SINTEL",
    "moge_ddad": "moge:MOGE_DDAD",
    "moge_diode": "moge:MOGE_DIODE",
    "moge_spring": "moge:MOGE_SPRING",
    "moge_hammer": "moge:MOGE_HAMMER",
}
"""Name → "module:constant", relative to this package."""


def load_benchmark(name: str) -> Benchmark:
    """Import a benchmark: one of `BENCHMARKS`, or "module:constant" of a module on Python's path.

    Raises:
        ValueError: Unknown name (the message lists all names), or no benchmark of that name in the module.
    """
    if ":" in name:
        module, _, member = name.partition(":")
        try:
            benchmark = getattr(import_module(module), member)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"cannot import the benchmark {name}: {error}") from error
        if not isinstance(benchmark, Benchmark):
            raise ValueError(f"{name} is a {type(benchmark).__name__}, not a Benchmark")
        return benchmark
    if name not in BENCHMARKS:
        raise ValueError(
            f"unknown benchmark {name!r}; choose one of: {', '.join(BENCHMARKS)}, or MODULE:NAME"
        )
    module, _, member = BENCHMARKS[name].partition(":")
    known: Benchmark = getattr(import_module(f"depth_anything.evaluation.benchmarks.{module}"), member)
    return known
