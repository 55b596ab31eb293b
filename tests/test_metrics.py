import math

import numpy as np
import pytest
import torch

from depth_anything.metrics import boundary_f1, depth_metrics

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


def test_a_ratio_at_the_threshold_is_a_miss():
    target = torch.ones(1, 1, 2)
    metrics = depth_metrics(torch.tensor([[[1.25, 1.5625]]]), target, target > 0)
    assert [metrics[name].item() for name in ("d1", "d2", "d3")] == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -1.0, 0.0])
def test_invalid_pixels_have_no_effect(rubbish):
    prediction, target, valid = maps()
    expected = depth_metrics(prediction, target, valid)
    dirty = depth_metrics(prediction.where(valid, rubbish), target.where(valid, rubbish), valid)
    for name in NAMES:
        assert torch.equal(dirty[name][1:], expected[name][1:]), name
        assert dirty[name][0].isnan()


@pytest.mark.parametrize("dead", [0.0, -3.0])
def test_zero_and_negative_predictions_keep_metrics_finite(dead):
    target = torch.ones(1, 1, 4)
    prediction = torch.tensor([[[1.0, 1.0, 1.0, dead]]])
    metrics = depth_metrics(prediction, target, target > 0)
    assert all(value.isfinite().all() for value in metrics.values())
    assert metrics["d3"].item() == 0.75
    assert metrics["abs_rel"].item() == pytest.approx((1 - dead) / 4)


def test_a_nan_prediction_gives_nan():
    prediction, target, valid = maps()
    valid[2, 0, 0] = True
    prediction[2, 0, 0] = math.nan
    metrics = depth_metrics(prediction, target, valid)
    for name in NAMES[:6]:
        assert metrics[name].isnan().tolist() == [True, False, True, False, False], name
    prediction[2, 0, 0] = 1e9
    assert metrics["d1"][2] == depth_metrics(prediction, target, valid)["d1"][2]


def test_half_precisions_are_computed_in_float32():
    prediction, target, valid = (x.bfloat16() if x.is_floating_point() else x for x in maps())
    metrics = depth_metrics(prediction, target, valid)
    wide = depth_metrics(prediction.float(), target.float(), valid)
    for name in NAMES:
        assert metrics[name].dtype == torch.float32
        assert torch.equal(metrics[name][1:], wide[name][1:])


def reference_boundaries(prediction, target, valid):
    """One image, pair by pair in plain Python floats, from the formula."""
    if not valid.any() or np.isnan(prediction[valid]).any():
        return math.nan
    height, width = target.shape
    ratios = [1.05 + 0.2 * step / 9 for step in range(10)]
    scores = []
    for ratio in ratios:
        precision = recall = 0.0
        for down, right in ((0, 1), (0, -1), (1, 0), (-1, 0)):
            found = true = both = 0
            for y in range(height):
                for x in range(width):
                    i, j = y + down, x + right
                    if not (0 <= i < height and 0 <= j < width and valid[y, x] and valid[i, j]):
                        continue
                    in_prediction = prediction[i, j] / prediction[y, x] > ratio
                    in_target = target[i, j] / target[y, x] > ratio
                    found, true = found + in_prediction, true + in_target
                    both += in_prediction and in_target
            precision += both / found / 4 if found else 0.0
            recall += both / true / 4 if true else 0.0
        scores.append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
    return math.fsum(k * f for k, f in zip(ratios, scores, strict=True)) / math.fsum(ratios)


def steps_and_noise(seed, *, noise, holes, shape=(5, 11, 14)):
    rng = np.random.default_rng(seed)
    target = np.exp(0.12 * rng.normal(size=shape))
    target[:, 3:7, 4:9] *= 0.5
    return target * np.exp(noise * rng.normal(size=shape)), target, rng.random(shape) >= holes


def boundaries(prediction, target, valid):
    return boundary_f1(*map(torch.from_numpy, (prediction, target, valid)))


@pytest.mark.parametrize("noise", [0.0, 0.03, 0.3])
@pytest.mark.parametrize("holes", [0.0, 0.3, 0.9])
def test_boundary_f1_equals_the_formula(noise, holes):
    prediction, target, valid = steps_and_noise(7, noise=noise, holes=holes)
    scores = boundaries(prediction, target, valid)
    assert scores.shape == (5,) and scores.dtype == torch.float64
    expected = [reference_boundaries(*image) for image in zip(prediction, target, valid, strict=True)]
    assert scores.tolist() == pytest.approx(expected, abs=1e-6)
    assert 0 <= min(expected) and max(expected) <= 1 and (holes > 0.5 or max(expected) > 0.1)


def test_boundary_f1_without_contours():
    prediction, target, valid = steps_and_noise(3, noise=0.0, holes=0.2)
    flat = np.full_like(target, 2.0)
    none = np.zeros_like(valid)
    one = none.copy()
    one[:, 2, 2] = True
    assert boundaries(flat, target, valid).tolist() == [0.0] * 5
    assert boundaries(flat, flat, valid).tolist() == [0.0] * 5
    assert boundaries(target, flat, valid).tolist() == [0.0] * 5
    assert boundaries(prediction, target, one).tolist() == [0.0] * 5
    assert boundaries(prediction, target, none).isnan().all()
    assert reference_boundaries(flat[0], target[0], valid[0]) == 0
    thin = torch.ones(1, 1, 1)
    assert boundary_f1(thin, thin, thin > 0).tolist() == [0.0]


def test_boundary_f1_is_invariant_to_scale_not_shift():
    prediction, target, valid = steps_and_noise(5, noise=0.0, holes=0.0)
    perfect = boundaries(prediction, target, valid)
    assert perfect.tolist() == pytest.approx([1.0] * 5)
    assert torch.equal(boundaries(8 * prediction, target, valid), perfect)
    assert (boundaries(prediction + 1, target, valid) < 0.95).all()
    noisy = steps_and_noise(5, noise=0.05, holes=0.1)
    upside_down = boundaries(1 / noisy[0], 1 / noisy[1], noisy[2])
    assert upside_down.tolist() == pytest.approx(boundaries(*noisy).tolist(), abs=1e-9)


def test_blurred_and_shifted_boundaries_score_less():
    target = np.full((1, 12, 12), 6.0)
    target[:, 3:8, 3:8] = 3.0
    valid = target > 0
    blurred = target.copy()
    blurred[:, 2, 2:9] = blurred[:, 8, 2:9] = blurred[:, 2:9, 2] = blurred[:, 2:9, 8] = 4.2
    moved = np.roll(target, 1, (1, 2))
    scores = [boundaries(map_, target, valid).item() for map_ in (target, blurred, moved)]
    assert scores[0] == 1 and 0.3 < scores[1] < 0.9 and scores[2] == 0


@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -1.0, 0.0])
def test_boundaries_of_invalid_pixels_are_ignored(rubbish):
    prediction, target, valid = map(torch.from_numpy, steps_and_noise(9, noise=0.05, holes=0.4))
    expected = boundary_f1(prediction, target, valid)
    dirty = boundary_f1(prediction.where(valid, rubbish), target.where(valid, rubbish), valid)
    assert torch.equal(dirty, expected)
    prediction[2, 0, 0], valid[2, 0, 0] = math.nan, True
    assert boundary_f1(prediction, target, valid).isnan().tolist() == [False, False, True, False, False]


def test_boundary_f1_is_finite_for_zero_depth_and_half_precision():
    prediction, target, valid = map(torch.from_numpy, steps_and_noise(11, noise=0.05, holes=0.0))
    prediction[:, 5, 5], prediction[:, 6, 6], prediction[:, 2, 2] = 0.0, -3.0, math.inf
    assert boundary_f1(prediction, target, valid).isfinite().all()
    halves = boundary_f1(target.bfloat16(), target.bfloat16(), valid)
    assert halves.dtype == torch.float32 and (halves > 0.9).all()
