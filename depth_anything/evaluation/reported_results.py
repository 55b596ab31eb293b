"""What others have published, to stand beside what is measured here: figures, whose, and by which rules.

A figure is comparable only with one measured by the same rules on the same files. Depth Anything's papers (arXiv
2401.10891, 2406.09414) state no rules for their zero-shot tables; those called da2 here give their figures within 7 %
on NYU and KITTI and on the rooms of DIODE, and do not on ETH3D and Sintel: `Published.remark` says so where it is so.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain


@dataclass(frozen=True)
class ReportedResult:
    """One model's figures on one benchmark.

    Attributes:
        model: As tables call it.
        benchmark: Its name in `benchmarks.catalogue`, or one of `WITHOUT_READER`.
        protocol: The rules, or those nearest to what is known of them.
        values: Metric of `metrics.depth_metrics`, or "accuracy" (DA-2K, 0 to 1), to value.
        source: Paper and table, or repository.
        rerun: It was measured by someone else with the released weights.
        remark: What a reader must know before comparing.
    """

    model: str
    benchmark: str
    protocol: str
    values: Mapping[str, float]
    source: str
    rerun: bool = False
    remark: str = ""


_V1_TABLE, _V2_TABLE = "arXiv 2401.10891, table 2", "arXiv 2406.09414, table 2"
_V1_METRIC_TABLES, _V2_METRIC_TABLE = "arXiv 2401.10891, metric tables", "arXiv 2406.09414, table 4"
_PLUMBLINE = "github.com/kmatzen/plumbline"

_REMARKS = {
    "eth3d": "not reproduced by anyone: released weights read a third lower on ETH3D's own files",
    "sintel": "not reproduced by anyone: released weights read less than half of it",
    "diode": "near the rooms alone (diode_indoor); all 771 images read three times as much",
    "ddad": "which images and depths is not said, and nobody has reported a rerun on DDAD's own files",
    "sunrgbd_v1": "its truth is most likely 1.25 times too near; ZoeDepth's own table has .119 for .520",
    "hypersim": "with one focal length for all scenes; which frames is not said",
    "vkitti2": "of 1,701 frames drawn without a seed; most likely these",
}
_BENCHMARKS = ("kitti", "nyu", "sintel", "eth3d", "diode", "ddad")
# Model, source, then AbsRel and d1 on each of `_BENCHMARKS`; None: not given.
_RELATIVE: tuple[tuple[str, str, tuple[tuple[float, float] | None, ...]], ...] = (
    (
        "MiDaS 3.1 BEiT-L-512",
        _V1_TABLE,
        ((0.127, 0.850), (0.048, 0.980), (0.587, 0.699), (0.139, 0.867), (0.075, 0.942), (0.251, 0.766)),
    ),
    (
        "Depth Anything V1 S",
        _V1_TABLE,
        ((0.080, 0.936), (0.053, 0.972), (0.464, 0.739), (0.127, 0.885), (0.076, 0.939), (0.247, 0.768)),
    ),
    (
        "Depth Anything V1 B",
        _V1_TABLE,
        ((0.080, 0.939), (0.046, 0.979), (0.432, 0.756), (0.126, 0.884), (0.069, 0.946), (0.232, 0.786)),
    ),
    (
        "Depth Anything V1 L",
        _V1_TABLE,
        ((0.076, 0.947), (0.043, 0.981), (0.458, 0.760), (0.127, 0.882), (0.066, 0.952), (0.230, 0.789)),
    ),
    (
        "Depth Anything V2 S",
        _V2_TABLE,
        ((0.078, 0.936), (0.053, 0.973), (0.500, 0.718), (0.142, 0.851), (0.073, 0.942), None),
    ),
    (
        "Depth Anything V2 B",
        _V2_TABLE,
        ((0.078, 0.939), (0.049, 0.976), (0.495, 0.734), (0.137, 0.858), (0.068, 0.950), None),
    ),
    (
        "Depth Anything V2 L",
        _V2_TABLE,
        ((0.074, 0.946), (0.045, 0.979), (0.487, 0.752), (0.131, 0.865), (0.066, 0.952), None),
    ),
    (
        "Depth Anything V2 G",
        _V2_TABLE,
        ((0.075, 0.948), (0.044, 0.979), (0.506, 0.772), (0.132, 0.862), (0.065, 0.954), None),
    ),
)
# Benchmark → AbsRel of V2 S, B, L by the da2 rules with the released weights; None: not measured.
_RERUN: dict[str, tuple[float | None, float | None, float | None]] = {
    "nyu": (0.0510, 0.0456, 0.0428),
    "kitti": (0.0770, 0.0756, 0.0710),
    "diode_indoor": (0.0720, None, None),
    "diode": (0.2196, 0.2182, 0.2142),
    "eth3d": (0.1012, 0.0936, 0.0888),
    "sintel": (None, None, 0.2321),
    "nyu_filled": (0.062, None, 0.0554),
}
# Benchmark → AbsRel of V2 L by the moge rules, as its makers have it, and as rerun; None: not given.
_MOGE: dict[str, tuple[float, float | None]] = {
    "moge_nyu": (0.0420, 0.0428),
    "moge_kitti": (0.0561, 0.0569),
    "moge_eth3d": (0.0473, 0.0473),
    "moge_ibims": (0.0348, 0.0348),
    "moge_gso": (0.0125, 0.0125),
    "moge_sintel": (0.214, 0.2139),
    "moge_ddad": (0.130, 0.1310),
    "moge_diode": (0.0533, 0.0529),
}
# Model, source, then d1 d2 d3 AbsRel RMSE log10 on NYU, and d1 d2 d3 AbsRel RMSE RMSElog on KITTI.
_METRIC = (
    (
        "ZoeDepth",
        _V1_METRIC_TABLES,
        (0.951, 0.994, 0.999, 0.077, 0.282, 0.033),
        (0.971, 0.996, 0.999, 0.054, 2.281, 0.082),
    ),
    (
        "Depth Anything V1 L, fine-tuned",
        _V1_METRIC_TABLES,
        (0.984, 0.998, 1.000, 0.056, 0.206, 0.024),
        (0.982, 0.998, 1.000, 0.046, 1.896, 0.069),
    ),
    (
        "Depth Anything V2 S, fine-tuned",
        _V2_METRIC_TABLE,
        (0.961, 0.996, 0.999, 0.073, 0.261, 0.032),
        (0.973, 0.997, 0.999, 0.053, 2.235, 0.081),
    ),
    (
        "Depth Anything V2 B, fine-tuned",
        _V2_METRIC_TABLE,
        (0.977, 0.997, 1.000, 0.063, 0.228, 0.027),
        (0.979, 0.998, 1.000, 0.048, 1.999, 0.072),
    ),
    (
        "Depth Anything V2 L, fine-tuned",
        _V2_METRIC_TABLE,
        (0.984, 0.998, 1.000, 0.056, 0.206, 0.024),
        (0.983, 0.998, 1.000, 0.045, 1.861, 0.067),
    ),
)
# Set → AbsRel and d1 in metres, zero-shot, of V1 L fine-tuned on rooms or streets, and of ZoeDepth.
_ZERO_SHOT = {
    "sunrgbd_v1": ((0.500, 0.660), (0.520, 0.545)),
    "ibims": ((0.150, 0.714), (0.169, 0.656)),
    "hypersim": ((0.363, 0.361), (0.407, 0.302)),
    "vkitti2": ((0.085, 0.913), (0.106, 0.844)),
    "diode_outdoor": ((0.794, 0.288), (0.814, 0.237)),
}
# The NTIRE 2024 challenge's validation images of Booster: δ1 as the paper calls it.
_NTIRE = (
    ("MiDaS", 0.259),
    ("Depth Anything V1", 0.535),
    ("Depth Anything V2", 0.836),
    ("DINOv2, fine-tuned on Booster", 0.758),
    ("Depth Anything V2, fine-tuned on Booster", 0.912),
    ("the challenge's winner", 0.917),
)
_DA2K = (
    ("Marigold", 0.868),
    ("GeoWizard", 0.881),
    ("DepthFM", 0.858),
    ("Depth Anything V1", 0.885),
    ("Depth Anything V2 S", 0.953),
    ("Depth Anything V2 B", 0.970),
    ("Depth Anything V2 L", 0.971),
    ("Depth Anything V2 G", 0.974),
)
SCENE_ACCURACY: Mapping[str, tuple[float, ...]] = {
    "Depth Anything V2 S": (0.929, 0.930, 0.984, 0.944, 0.957, 0.964, 0.992, 0.966),
    "Depth Anything V2 B": (0.962, 0.948, 0.987, 0.963, 0.967, 0.990, 1.000, 0.973),
    "Depth Anything V2 L": (0.964, 0.939, 0.990, 0.963, 0.973, 0.995, 0.992, 0.980),
}
"""Model → its accuracy on DA-2K for each of `da2k.SCENES`, 0 to 1 (arXiv 2406.09414, table 14)."""


WITHOUT_READER = ("booster_ntire2024",)
"""Benchmarks of published figures that have no reader of their own, since their truth is not public."""


def _relative() -> list[ReportedResult]:
    rows = []
    for model, source, figures in _RELATIVE:
        for benchmark, pair in zip(_BENCHMARKS, figures, strict=True):
            if pair is not None:
                values = dict(zip(("abs_rel", "d1"), pair, strict=True))
                rows.append(
                    ReportedResult(
                        model, benchmark, "da2", values, source, remark=_REMARKS.get(benchmark, "")
                    )
                )
    return rows


def _reruns() -> list[ReportedResult]:
    return [
        ReportedResult(f"Depth Anything V2 {size}", name, "da2", {"abs_rel": value}, _PLUMBLINE, rerun=True)
        for name, figures in _RERUN.items()
        for size, value in zip("SBL", figures, strict=True)
        if value is not None
    ]


def _moge() -> list[ReportedResult]:
    return [
        ReportedResult("Depth Anything V2 L", name, "moge", {"abs_rel": value}, source, rerun=rerun)
        for name, figures in _MOGE.items()
        for value, source, rerun in zip(figures, ("arXiv 2410.19115", _PLUMBLINE), (False, True), strict=True)
        if value is not None
    ]


def _metric() -> list[ReportedResult]:
    names = ("d1", "d2", "d3", "abs_rel", "rmse")
    return [
        ReportedResult(model, name, "zoedepth", dict(zip((*names, last), values, strict=True)), source)
        for model, source, nyu, kitti in _METRIC
        for name, last, values in (("nyu", "log10", nyu), ("kitti", "rmse_log", kitti))
    ] + [
        ReportedResult(
            model,
            name,
            "zoedepth",
            {"abs_rel": abs_rel, "d1": d1},
            _V1_METRIC_TABLES,
            remark=_REMARKS.get(name, ""),
        )
        for name, pairs in _ZERO_SHOT.items()
        for model, (abs_rel, d1) in zip(("Depth Anything V1 L, metric", "ZoeDepth"), pairs, strict=True)
    ]


def _ntire() -> list[ReportedResult]:
    source = "arXiv 2406.09414, table 12"
    remark = "15 images whose truth is not public; whether all pixels or glass and mirrors, is not known here"
    return [
        ReportedResult(model, "booster_ntire2024", "marigold", {"d1": value}, source, remark=remark)
        for model, value in _NTIRE
    ]


def _da2k() -> list[ReportedResult]:
    source = "arXiv 2406.09414, table 3"
    return [ReportedResult(model, "da2k", "da2k", {"accuracy": value}, source) for model, value in _DA2K]


REPORTED_RESULTS: tuple[ReportedResult, ...] = tuple(
    chain(_relative(), _reruns(), _moge(), _metric(), _ntire(), _da2k())
)
"""All that is known here, models from the oldest to the newest within each table."""


def find_reported_results(benchmark: str, *, protocol: str | None = None) -> tuple[ReportedResult, ...]:
    """What is published on a benchmark.

    Args:
        benchmark: Its name in `benchmarks.catalogue`.
        protocol: Only by these rules.

    Returns:
        The rows, first papers' then others'; empty if there is none.
    """
    return tuple(
        row for row in REPORTED_RESULTS if row.benchmark == benchmark and protocol in (None, row.protocol)
    )
