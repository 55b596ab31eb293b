import math

import numpy as np
import pytest
import torch

from depth_anything.metrics import depth_metrics

NAMES = ("abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog", "d1", "d2", "d3")


def maps(batch=5, *, seed=0):
    rng = np.random.default_rng(seed)
    target = np.exp(rng.normal(size=(batch, 13, 17)))
    prediction = target * np.exp(0.4 * rng.normal(size=target.shape) + 0.1)
    valid = rng.random(target.shape) < 0.6
    valid[0] = False
    valid[1] = False
    valid[1, 2, 3] = True
    return torch.from_numpy(prediction), torch.from_numpy(target), torch.from_numpy(valid)


def reference(prediction, target, valid):
    """One image in plain Python, from the formulae; no valid pixel: NaN."""
    pairs = list(zip(prediction[valid].tolist(), target[valid].tolist(), strict=True))
    if not pairs:
        return dict.fromkeys(NAMES, math.nan)

    def mean(values):
        return math.fsum(values) / len(pairs)

    logs = [math.log(p / t) for p, t in pairs]
    ratios = [max(p / t, t / p) for p, t in pairs]
    return {
        "abs_rel": mean(abs(p - t) / t for p, t in pairs),
        "sq_rel": mean((p - t) ** 2 / t for p, t in pairs),
        "rmse": math.sqrt(mean((p - t) ** 2 for p, t in pairs)),
        "rmse_log": math.sqrt(mean(d * d for d in logs)),
        "log10": mean(abs(math.log10(p / t)) for p, t in pairs),
        "silog": math.sqrt(mean(d * d for d in logs) - 0.5 * mean(logs) ** 2),
        "d1": mean(r < 1.25 for r in ratios),
        "d2": mean(r < 1.25**2 for r in ratios),
        "d3": mean(r < 1.25**3 for r in ratios),
    }


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_the_formulae_image_by_image(dtype, tolerance):
    prediction, target, valid = maps()
    metrics = depth_metrics(prediction.to(dtype), target.to(dtype), valid)
    assert tuple(metrics) == NAMES
    for i in range(len(valid)):
        for name, expected in reference(prediction[i], target[i], valid[i]).items():
            value = metrics[name]
            assert value.shape == (len(valid),) and value.dtype == dtype
            assert value[i].item() == pytest.approx(expected, rel=tolerance, nan_ok=True), name


def test_known_values():
    prediction = torch.tensor([[[1.0, 4.0, 10.0]]])
    target = torch.tensor([[[1.0, 2.0, 5.5]]])
    metrics = depth_metrics(prediction, target, target < 5)
    root = math.log(2) / math.sqrt(2)
    expected = (0.5, 1.0, math.sqrt(2), root, math.log10(2) / 2, root * math.sqrt(0.75), 0.5, 0.5, 0.5)
    assert [metrics[name].item() for name in NAMES] == pytest.approx(expected)


def test_a_ratio_on_the_bound_is_a_miss():
    target = torch.ones(1, 1, 2)
    metrics = depth_metrics(torch.tensor([[[1.25, 1.5625]]]), target, target > 0)
    assert [metrics[name].item() for name in ("d1", "d2", "d3")] == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -1.0, 0.0])
def test_what_lies_outside_valid_does_not_matter(rubbish):
    prediction, target, valid = maps()
    expected = depth_metrics(prediction, target, valid)
    dirty = depth_metrics(prediction.where(valid, rubbish), target.where(valid, rubbish), valid)
    for name in NAMES:
        assert torch.equal(dirty[name][1:], expected[name][1:]), name
        assert dirty[name][0].isnan()


@pytest.mark.parametrize("dead", [0.0, -3.0])
def test_a_prediction_that_is_no_depth_is_a_miss_but_leaves_the_table_finite(dead):
    target = torch.ones(1, 1, 4)
    prediction = torch.tensor([[[1.0, 1.0, 1.0, dead]]])
    metrics = depth_metrics(prediction, target, target > 0)
    assert all(value.isfinite().all() for value in metrics.values())
    assert metrics["d3"].item() == 0.75
    assert metrics["abs_rel"].item() == pytest.approx((1 - dead) / 4)


def test_a_nan_prediction_is_seen():
    prediction, target, valid = maps()
    valid[2, 0, 0] = True
    prediction[2, 0, 0] = math.nan
    metrics = depth_metrics(prediction, target, valid)
    for name in NAMES[:6]:
        assert metrics[name].isnan().tolist() == [True, False, True, False, False], name
    prediction[2, 0, 0] = 1e9
    assert metrics["d1"][2] == depth_metrics(prediction, target, valid)["d1"][2]


def test_halves_are_computed_in_float32():
    prediction, target, valid = (x.bfloat16() if x.is_floating_point() else x for x in maps())
    metrics = depth_metrics(prediction, target, valid)
    wide = depth_metrics(prediction.float(), target.float(), valid)
    for name in NAMES:
        assert metrics[name].dtype == torch.float32
        assert torch.equal(metrics[name][1:], wide[name][1:])
