import numpy as np
import pytest
import torch

from depth_anything import geometry
from depth_anything.geometry import (
    align_least_squares,
    depth_to_disparity,
    disparity_to_depth,
    masked_float,
    masked_median,
    masked_order_index,
    robust_scale_shift,
)


def maps(batch: int = 6, height: int = 7, width: int = 9, *, seed: int = 0, share: float = 0.7):
    """Random maps whose images have from none to all pixels valid."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, batch, height, width))
    valid = rng.random((batch, height, width)) < share
    valid[0] = False
    valid[1] = False
    valid[1, 3, 4] = True
    valid[2] = True
    return torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(valid)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_masked_float_hides_invalid_values_and_gradients(value):
    x = torch.tensor([1.0, value], requires_grad=True)
    y = masked_float(x, torch.tensor([True, False])).exp()
    y.sum().backward()
    assert y.tolist() == pytest.approx([torch.e, 1.0])
    assert x.grad.tolist() == pytest.approx([torch.e, 0.0])


@pytest.mark.parametrize(
    ("given", "computed"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_masked_float_converts_half_precision_only(given, computed):
    x = torch.ones(3, dtype=given)
    assert masked_float(x, x > 0).dtype == computed


def test_median_is_the_lower_one_of_the_valid_pixels():
    x, _, valid = maps()
    expected = [
        np.sort(v[m])[(m.sum() - 1) // 2] if m.any() else 0.0
        for v, m in zip(x.numpy(), valid.numpy(), strict=True)
    ]
    assert masked_median(x, valid).tolist() == expected


@pytest.mark.parametrize("count", range(1, 13))
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.95])
def test_selection_and_sort_find_the_same_rank(count, share):
    def rank(n):
        return n - (n * int(share * 100)) // 100 - 1

    rng = np.random.default_rng(count)
    x = torch.from_numpy(rng.integers(0, 6, size=(20, 12)).astype(np.float32))
    valid = torch.zeros(20, 12, dtype=torch.bool)
    for row in valid:
        row[torch.from_numpy(rng.permutation(12)[:count])] = True
    expected = [[r[v].sort().values[rank(count)].item()] for r, v in zip(x, valid, strict=True)]
    wanted = rank(valid.sum(1, keepdim=True))
    assert x.gather(1, masked_order_index(x, valid, rank=rank)).tolist() == expected
    assert x.gather(1, geometry._select_by_kthvalue(x, valid, wanted, rank(12))).tolist() == expected
    assert x.gather(1, geometry._select_by_sort(x, valid, wanted)).tolist() == expected


def test_median_of_half_sky_and_of_values_as_large_as_the_filling():
    x = torch.tensor([[[0.0, 0.0, 0.0, 3.0]], [[-3e38, 3e38, 3e38, -3e38]]])
    valid = torch.tensor([[[True, True, True, True]], [[True, True, False, False]]])
    assert masked_median(x, valid).tolist() == [0.0, pytest.approx(-3e38)]


def test_the_gradient_of_the_median_goes_to_its_pixel():
    x = torch.tensor([[[4.0, torch.nan, 1.0, 3.0]]], requires_grad=True)
    masked_median(x, ~x.isnan()).sum().backward()
    assert x.grad.tolist() == [[[0.0, 0.0, 0.0, 1.0]]]


def test_scale_and_shift_are_deviation_and_median():
    x, _, valid = maps()
    scale, shift = robust_scale_shift(x, valid)
    for s, t, v, m in zip(scale, shift, x.numpy(), valid.numpy(), strict=True):
        values = v[m] if m.any() else np.zeros(1)
        median = np.sort(values)[(len(values) - 1) // 2]
        assert t.item() == median
        assert s.item() == pytest.approx(max(np.abs(values - median).mean(), 1e-6))


def test_scale_and_shift_have_gradients():
    x, _, valid = maps()
    assert torch.autograd.gradcheck(
        lambda x: robust_scale_shift(x, valid), x.requires_grad_(), check_undefined_grad=False
    )


def test_disparity_of_depth_sky_and_unknown():
    depth = torch.tensor([0.5, 4.0, torch.inf, torch.nan, 0.0, -1.0], requires_grad=True)
    disparity = depth_to_disparity(depth)
    assert disparity[:3].tolist() == [2.0, 0.25, 0.0]
    assert disparity[3:].isnan().all()
    disparity[:2].sum().backward()
    assert depth.grad.tolist() == [-4.0, -0.0625, 0.0, 0.0, 0.0, 0.0]


def test_depth_is_bounded_by_the_least_disparity_of_all_or_of_each_image():
    disparity = torch.tensor([[[2.0, 0.001, 0.0, -5.0]]]).expand(2, 1, 4)
    assert disparity_to_depth(disparity, min_disparity=0.01)[0, 0].tolist() == pytest.approx(
        [0.5, 100.0, 100.0, 100.0]
    )
    each = disparity_to_depth(disparity, min_disparity=torch.tensor([0.1, 0.5])[:, None, None])
    assert each.amax((1, 2)).tolist() == [10.0, 2.0]
    assert disparity_to_depth(torch.tensor([0.0]), min_disparity=0.0).tolist() == [torch.inf]


def test_alignment_equals_lstsq():
    x, y, valid = maps()
    scale, shift = align_least_squares(x, y, valid)
    for i in range(2, len(x)):
        p, t = x[i][valid[i]].numpy(), y[i][valid[i]].numpy()
        expected, *_ = np.linalg.lstsq(np.stack([p, np.ones_like(p)], 1), t, rcond=None)
        np.testing.assert_allclose([scale[i], shift[i]], expected, rtol=1e-10)


def test_alignment_far_from_the_origin_is_exact_to_the_last_digit_of_float32():
    """Sums in float32 miss the last digits here, and uncentered ones lose the scale altogether."""
    x = 1e4 + torch.rand(16, 50, 60, generator=torch.Generator().manual_seed(0))
    scale, shift = align_least_squares(x, 3 * (x - 1e4) + 2, x > 0)
    assert scale.dtype == shift.dtype == torch.float32
    assert scale.tolist() == [3.0] * 16
    assert shift.tolist() == [2.0 - 3e4] * 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("constant", [0.0, 0.1, -7e5])
def test_alignment_of_a_constant_prediction_gives_the_mean_of_the_target(constant, dtype):
    _, y, valid = maps()
    scale, shift = align_least_squares(torch.full_like(y, constant, dtype=dtype), y, valid)
    assert scale.tolist() == [0.0] * 6
    expected = [v[m].mean() if m.any() else 0.0 for v, m in zip(y.numpy(), valid.numpy(), strict=True)]
    np.testing.assert_allclose(shift, expected, rtol=1e-12)


def test_alignment_ignores_invalid_pixels():
    x, y, valid = maps()
    expected = align_least_squares(x, y, valid)
    x[~valid], y[~valid] = torch.nan, torch.inf
    for value, wanted in zip(align_least_squares(x, y, valid), expected, strict=True):
        assert torch.equal(value, wanted)
