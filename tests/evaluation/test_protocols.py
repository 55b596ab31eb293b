"""Each protocol against plain numpy in float64, written from the formulas: masks, crops, zeros, constants."""

import math

import numpy as np
import pytest

from depth_anything.data.sample import Frame
from depth_anything.evaluation.benchmarks.benchmark import Benchmark, DepthLimits
from depth_anything.evaluation.benchmarks.benchmark_catalog import load_benchmark
from depth_anything.evaluation.evaluate import METRICS, crop_to_view, evaluate, score_map
from depth_anything.evaluation.protocols import CROPS, PROTOCOLS, EvalProtocol, find_protocol

SHAPES = {"eigen_nyu": (480, 640), "garg": (375, 1242), "eigen_kitti": (352, 1216), None: (60, 80)}


def reference_metrics(p, t):
    """The nine numbers of 1-D predictions and truths."""
    logs = np.log(p) - np.log(t)
    ratio = np.maximum(p / t, t / p)
    return {
        "abs_rel": np.mean(np.abs(p - t) / t),
        "sq_rel": np.mean((p - t) ** 2 / t),
        "rmse": np.sqrt(np.mean((p - t) ** 2)),
        "rmse_log": np.sqrt(np.mean(logs**2)),
        "log10": np.mean(np.abs(np.log10(p) - np.log10(t))),
        "silog": np.sqrt(np.mean(logs**2) - 0.5 * np.mean(logs) ** 2),
        "d1": np.mean(ratio < 1.25),
        "d2": np.mean(ratio < 1.25**2),
        "d3": np.mean(ratio < 1.25**3),
    }


def inside(crop, shape):
    """The crops' pixels, written out."""
    height, width = shape
    rows, columns = np.mgrid[:height, :width]
    bounds = {
        None: (0, height, 0, width),
        "eigen_nyu": (45, 471, 41, 601),
        "garg": (0.40810811 * height, 0.99189189 * height, 0.03594771 * width, 0.96405229 * width),
        "eigen_kitti": (0.3324324 * height, 0.91351351 * height, 0.03594771 * width, 0.96405229 * width),
    }
    top, bottom, left, right = (int(bound) for bound in bounds[crop])
    return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)


def fitted(x, y):
    return np.linalg.lstsq(np.stack([x, np.ones_like(x)], 1), y, rcond=None)[0]


def reference(name, prediction, depth, quantity, *, low, high, crop):
    """What the four protocols say, each in its own words."""
    p, t = prediction.astype(np.float64), depth.astype(np.float64)
    with np.errstate(invalid="ignore"):
        valid = (t >= low) & (t <= high) if name == "da2" else (t > low) & (t < high)
    valid &= np.isfinite(t) & inside(crop, depth.shape)
    t = t[valid]
    inner = p[valid]
    if quantity == "disparity" and name == "marigold":
        scale, shift = fitted(inner[inner > 0], 1 / t[inner > 0])
        inner = 1 / np.maximum(scale * inner + shift, 1e-3)
    elif quantity == "disparity":
        scale, shift = fitted(inner, 1 / t)
        inner = 1 / np.maximum(scale * inner + shift, 1 / t.max() if name == "moge" else 1 / high)
    elif name == "marigold":
        scale, shift = fitted(inner, t)
        inner = scale * inner + shift
    return reference_metrics(np.clip(inner, max(low, 1e-6), high), t), int(valid.sum())


def make(shape, quantity, seed=0):
    """A depth with sky, holes and zeros, and a prediction of it with zeros and negative values."""
    rng = np.random.default_rng(seed)
    depth = np.exp(rng.uniform(math.log(0.5), math.log(120), shape)).astype(np.float32)
    depth.flat[::17], depth.flat[1::19], depth.flat[2::23] = 0.0, np.nan, np.inf
    known = np.where(np.isfinite(depth) & (depth > 0), depth, 50)
    noise = np.exp(rng.normal(0, 0.2, shape))
    prediction = known * noise if quantity == "depth" else 3 / known * noise + 0.05
    prediction.flat[3::29] = 0.0
    if quantity == "disparity":
        prediction.flat[4::31] = -1.0
    return prediction.astype(np.float32), depth


@pytest.mark.parametrize("quantity", ["disparity", "depth"])
@pytest.mark.parametrize(
    ("name", "low", "high", "crop"),
    [
        ("da2", 1e-3, 80.0, None),
        ("da2", 1e-3, 10.0, "eigen_nyu"),
        ("da2", 1e-3, 80.0, "garg"),
        ("marigold", 1e-3, 10.0, "eigen_nyu"),
        ("marigold", 1e-5, 80.0, "eigen_kitti"),
        ("marigold", 1e-5, math.inf, None),
        ("moge", 0.0, math.inf, None),
        ("zoedepth", 1e-3, 80.0, "garg"),
    ],
)
def test_protocols_equal_numpy(name, low, high, crop, quantity):
    depth_limits = {name: DepthLimits(low, high, eval_crop=crop or "")}
    rules = find_protocol(name, benchmark=a_benchmark(depth_limits))
    prediction, depth = make(SHAPES[crop], quantity)
    frame = Frame("k", np.zeros((*depth.shape, 3), np.uint8), {}, depth=depth)
    if (name, quantity) == ("zoedepth", "disparity"):
        with pytest.raises(ValueError, match="'zoedepth'.*da2, marigold, moge"):
            score_map(prediction, frame, quantity=quantity, protocol=rules)
        return
    row = score_map(prediction, frame, quantity=quantity, protocol=rules)[1]
    expected, count = reference(name, prediction, depth, quantity, low=low, high=high, crop=crop)
    assert row["valid"] == count > 1000
    for metric in METRICS:
        assert row[metric] == pytest.approx(expected[metric], rel=1e-6, abs=1e-9), metric


@pytest.mark.parametrize("name", ["da2", "marigold", "moge"])
@pytest.mark.parametrize("value", [0.0, 7.0])
def test_constant_predictions_are_the_mean_of_what_is_fitted(name, value):
    depth = make((60, 80), "depth")[1].clip(0.5, 40)
    frame = Frame("k", np.zeros((60, 80, 3), np.uint8), {}, depth=depth)
    constant = np.full((60, 80), value, np.float32)
    row = score_map(constant, frame, quantity="disparity", protocol=PROTOCOLS[name])[1]
    t = depth[np.isfinite(depth)].astype(np.float64)
    mean = 1 / np.mean(1 / t)
    if (
        name == "marigold" and value == 0
    ):  # nothing is above zero, so that nothing is fitted: as far as it goes
        mean = 80.0
    assert row["abs_rel"] == pytest.approx(np.mean(np.abs(mean - t) / t), rel=1e-6)


def test_one_valid_pixel_and_none():
    image = np.zeros((4, 4, 3), np.uint8)
    depth = np.full((4, 4), np.nan, np.float32)
    noise = np.random.default_rng(0).random((4, 4), np.float32)
    for name, rules in PROTOCOLS.items():
        quantity = "depth" if name == "zoedepth" else "disparity"
        none = score_map(noise, Frame("k", image, {}, depth=depth.copy()), quantity=quantity, protocol=rules)[
            1
        ]
        assert none["valid"] == 0 and math.isnan(none["abs_rel"])
        one = depth.copy()
        one[1, 2] = 5.0
        row = score_map(noise, Frame("k", image, {}, depth=one), quantity=quantity, protocol=rules)[1]
        assert row["valid"] == 1
        if name != "zoedepth":
            assert row["abs_rel"] < 1e-6


def test_pixels_outside_of_a_crop_never_matter():
    rules = EvalProtocol("x", fitted=("disparity",), eval_crop="garg")
    prediction, depth = make((375, 1242), "disparity")
    frame = Frame("k", np.zeros((375, 1242, 3), np.uint8), {}, depth=depth)
    before = score_map(prediction, frame, quantity="disparity", protocol=rules)[1]
    outside = ~inside("garg", depth.shape)
    prediction[outside], depth[outside] = np.nan, 3.0
    assert score_map(prediction, frame, quantity="disparity", protocol=rules)[1] == before


def test_crops_of_other_sizes():
    box = CROPS["kb"](375, 1242)
    assert (box[0].start, box[0].stop, box[1].start, box[1].stop) == (23, 375, 13, 1229)
    with pytest.raises(ValueError, match="1242x350"):
        CROPS["kb"](350, 1242)
    assert CROPS["eigen_nyu"](480, 640) == (slice(45, 471), slice(41, 601))
    assert CROPS["eigen_pixels"](768, 1024) == (slice(45, 471), slice(41, 601))
    assert CROPS["eigen_pixels"](427, 561) == (slice(45, 427), slice(41, 561))
    assert CROPS["eigen_pixels"](30, 20) == (slice(30, 30), slice(20, 20))
    assert CROPS["eigen_nyu"](960, 1280) == (slice(90, 942), slice(82, 1202))


def test_zoedepth_crops_diode_as_its_code_does():
    indoor = find_protocol("zoedepth", benchmark=load_benchmark("diode_indoor"))
    assert CROPS[indoor.eval_crop](768, 1024) == (slice(45, 471), slice(41, 601)) and indoor.max_depth == 10
    outdoor = find_protocol("zoedepth", benchmark=load_benchmark("diode_outdoor"))
    assert outdoor.eval_crop == "garg" and outdoor.max_depth == 80


class Columns:
    """Predicts for each pixel its column, from the left of whatever it is shown."""

    quantity = "depth"

    def __init__(self):
        self.shapes = []

    def predict_batch(self, images):
        self.shapes += [image.shape for image in images]
        return [np.tile(np.arange(i.shape[1], dtype=np.float32) + 1, (i.shape[0], 1)) for i in images]


def test_the_model_is_shown_the_view_and_its_mirror():
    model = Columns()
    depth = np.full((375, 1242), 30.0, np.float32)
    frame = Frame("k", np.zeros((375, 1242, 3), np.uint8), {}, depth=depth)
    rules = find_protocol(
        "zoedepth",
        benchmark=a_benchmark({"zoedepth": DepthLimits(1e-3, 80, view_crop="kb", eval_crop="garg")}),
    )
    row = evaluate(model, [frame], protocol=rules).rows[0]
    assert model.shapes == [(352, 1216, 3)] * 2
    assert row["abs_rel"] == pytest.approx(50 / 30)  # the mean of both is 608.5 everywhere, lowered to 80
    assert row["valid"] == inside("garg", (352, 1216)).sum()
    with pytest.raises(ValueError, match="'k'.*kb.*1000x375"):
        crop_to_view(Frame("k", frame.image[:, :1000], {}, depth=depth[:, :1000]), rules)
    with pytest.raises(ValueError, match="'k'.*kb.*depth"):
        crop_to_view(Frame("k", frame.image, {}, depth=depth[:100]), rules)


def a_benchmark(depth_limits):
    return Benchmark(
        "b", "The B", 1, "", "https://b", "MIT", lambda root: [], lambda root, line: None, depth_limits
    )


def test_a_benchmark_knows_its_protocols():
    benchmark = a_benchmark({"da2": DepthLimits(1e-3, 10, eval_crop="eigen_nyu")})
    rules = find_protocol("da2", benchmark=benchmark)
    assert (rules.max_depth, rules.eval_crop, rules.view_crop) == (10, "eigen_nyu", None)
    with pytest.raises(ValueError, match="'moge'.*The B.*da2"):
        find_protocol("moge", benchmark=benchmark)
    assert find_protocol("da2", max_depth=20).max_depth == 20


def test_the_text_of_a_protocol_has_all_its_rules():
    for name, rules in PROTOCOLS.items():
        assert rules.text.startswith(f"{name}: ")
    nyu = find_protocol(
        "da2", benchmark=a_benchmark({"da2": DepthLimits(1e-3, 10, eval_crop="eigen_nyu")})
    ).text
    assert "least squares to 1/truth, raised to 1/10 m and inverted, clipped to 0.001–10 m" in nyu
    assert "of the eigen_nyu crop" in nyu
    assert "1/farthest truth" in PROTOCOLS["moge"].text and "clipped" not in PROTOCOLS["moge"].text
    assert "nothing fitted, mean with the mirrored image" in PROTOCOLS["zoedepth"].text
