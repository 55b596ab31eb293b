"""Values and invariances of the losses, compared with loops over the formulae."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from loss_references import (
    GM,
    MAP_LOSSES,
    SSI,
    all_map_losses,
    invariant,
    kept_by,
    maps,
    reference_error,
    reference_feature,
    reference_gm,
    reference_silog,
    reference_ssi,
    reference_weighted,
    tokens,
)

from depth_anything.losses import feature_alignment_loss, invariant_losses, silog_loss


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("loss", "reference"),
    [
        (SSI, reference_ssi),
        *[(partial(SSI, trim=t), partial(reference_ssi, trim=t)) for t in (0.1, 0.29, 0.5, 0.99)],
        (GM, reference_gm),
        *[(partial(GM, trim=t), partial(reference_gm, trim=t)) for t in (0.1, 0.29)],
        (partial(GM, scales=1), partial(reference_gm, scales=1)),
        (partial(GM, scales=6), partial(reference_gm, scales=6)),
        (silog_loss, reference_silog),
        (partial(silog_loss, variance_focus=0.15), partial(reference_silog, variance_focus=0.15)),
        (partial(silog_loss, variance_focus=0.85), partial(reference_silog, variance_focus=0.85)),
    ],
)
def test_equals_the_loops(loss, reference, seed):
    inputs = maps(seed=seed)
    expected = reference(*(x.numpy() for x in inputs))
    assert expected > 1e-3
    assert loss(*inputs).item() == pytest.approx(expected, rel=1e-12)
    narrow = loss(inputs[0].float(), inputs[1].float(), inputs[2])
    assert narrow.dtype == torch.float32 and narrow.shape == ()
    assert narrow.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("trim", [0.0, 0.1])
@pytest.mark.parametrize(
    ("normalization", "levels"), [("global", 3), ("hybrid", 3), ("hybrid", 4), ("local", 3), ("none", 3)]
)
def test_normalizations_and_pixel_weights_equal_the_loops(normalization, levels, trim):
    inputs = maps(seed=7)
    weight = torch.rand(inputs[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight = torch.where(weight < 0.2, 0, weight)
    options = {"trim": trim, "normalization": normalization, "levels": levels}
    expected = reference_weighted(*(x.numpy() for x in (*inputs, weight)), scales=3, **options)
    found = invariant_losses(*inputs, scales=3, gradient_trim=trim, pixel_weight=weight, **options)
    assert [x.item() for x in found] == pytest.approx(expected, rel=1e-12)
    assert torch.equal(found[0], SSI(*inputs, pixel_weight=weight, **options))
    plain = [
        reference_error(p[v], t[v], normalization=normalization, levels=levels) if v.sum() > 1 else None
        for p, t, v in zip(*(x.numpy() for x in inputs), strict=True)
    ]
    means = [e[kept_by(e, trim)].mean() if e is not None else 0.0 for e in plain]
    assert SSI(*inputs, **options).item() == pytest.approx(np.mean(means), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_of_one_change_no_bit(dtype):
    for batch in (maps(dtype=dtype), maps(batch=2, height=131, width=97, dtype=dtype)):
        results = []
        for weight in (None, torch.ones(batch[0].shape)):
            prediction = batch[0].clone().requires_grad_()
            ssi, gm = invariant_losses(
                prediction, *batch[1:], trim=0.1, gradient_trim=0.05, pixel_weight=weight
            )
            (ssi + 2 * gm).backward()
            results.append((ssi, gm, prediction.grad))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("bad", [0.0, -1.0, torch.nan])
def test_a_pixel_without_weight_is_invalid(bad):
    prediction, target, valid = maps()
    ignored = torch.rand(valid.shape, generator=torch.Generator().manual_seed(2)) < 0.3
    weight = torch.where(ignored, bad, 1.0)
    for loss in (partial(SSI, trim=0.1), partial(SSI, normalization="hybrid"), GM):
        expected = loss(prediction, target, valid & ~ignored)
        assert torch.equal(loss(prediction, target, valid, pixel_weight=weight), expected)


def test_hybrid_normalization_of_one_level_is_global():
    inputs = maps()
    for name in ("hybrid", "local"):
        assert torch.equal(SSI(*inputs, normalization=name, levels=1), SSI(*inputs))


def test_an_error_in_one_segment_does_not_reach_another():
    """The reason for local normalization: pixels far away keep a loss of 0 when near ones are wrong."""
    target = torch.tensor([[[0.0, 0.2, 0.3, 0.4, 7.0, 8.0, 9.0, 10.0]]])
    wrong = torch.tensor([[[0.0, 0.2, 0.3, 0.4, 60.0, 8.0, 9.0, 90.0]]])
    changes = {}
    for name in ("global", "local"):
        prediction = wrong.clone().requires_grad_()
        SSI(prediction, target, target >= 0, normalization=name, levels=2).backward()
        changes[name] = prediction.grad[target < 5].abs().max().item()
    assert changes["local"] == 0 < changes["global"]


@pytest.mark.parametrize("loss", [SSI, invariant_losses])
def test_an_unknown_normalization_is_refused(loss):
    with pytest.raises(ValueError, match=r"normalization=locl.*hybrid"):
        loss(*maps(), normalization="locl")


@pytest.mark.parametrize("tolerance", [0.85, 0.5, 1.1, -1.0])
def test_feature_alignment_equals_the_loops(tolerance):
    student, teacher = tokens()
    expected = reference_feature(student.numpy(), teacher.numpy(), tolerance=tolerance)
    assert feature_alignment_loss(student, teacher, tolerance=tolerance).item() == pytest.approx(expected)


@pytest.mark.parametrize("trim", [0.05, 0.1, 0.3, 0.6])
def test_trimming_among_equal_residuals_takes_the_last_in_reading_order(trim):
    """A threshold would keep or drop equal residuals together."""
    prediction, target, valid = maps()
    levels = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)[
        torch.bucketize(prediction, torch.tensor([0.6, 1.7]))
    ]
    inputs = (levels, torch.ones_like(target), valid)
    for loss, reference in [(SSI, reference_ssi), (GM, reference_gm)]:
        expected = reference(*(x.numpy() for x in inputs), trim=trim)
        assert loss(*inputs, trim=trim).item() == pytest.approx(expected, rel=1e-12)


def test_trimming_keeps_outliers_from_both_losses():
    prediction, target, valid = maps(dtype=torch.float32)
    good = torch.rand(target.shape, generator=torch.Generator().manual_seed(0)) > 0.05
    damaged = torch.where(good, target, target + 50)
    for loss in (SSI, GM):
        assert loss(target, damaged, valid, trim=0.1) < 0.6 * loss(target, damaged, valid)


def test_both_invariant_losses_together_are_the_two_apart():
    inputs = maps()
    for trims in [(0.0, 0.0), (0.1, 0.0), (0.1, 0.1), (0.0, 0.2)]:
        ssi, gm = invariant_losses(*inputs, scales=3, trim=trims[0], gradient_trim=trims[1])
        assert torch.equal(ssi, SSI(*inputs, trim=trims[0]))
        assert torch.equal(gm, GM(*inputs, scales=3, trim=trims[1]))


@pytest.mark.parametrize("trim", [-0.1, 1.0, math.nan])
@pytest.mark.parametrize("loss", [SSI, GM])
def test_trim_must_be_a_share(loss, trim):
    with pytest.raises(ValueError, match=r"trim=.*\[0, 1\)"):
        loss(*maps(), trim=trim)


@all_map_losses
def test_gradcheck(loss):
    images = slice(1, 6) if loss in list(MAP_LOSSES.values())[:6] else slice(2, 4)
    prediction, target, valid = (x[images] for x in maps(height=6, width=7, seed=3))
    inputs = (prediction.requires_grad_(), target.requires_grad_())
    assert torch.autograd.gradcheck(lambda p, t: loss(p, t, valid), inputs)


def test_gradcheck_of_feature_alignment():
    student, teacher = tokens()
    assert torch.autograd.gradcheck(feature_alignment_loss, (student.requires_grad_(), teacher))


@invariant
@pytest.mark.parametrize(("scale", "shift"), [(1e-3, 0.0), (7.0, -30.0), (400.0, 1e3)])
def test_invariant_to_the_scale_and_shift_of_either_map(loss, scale, shift):
    prediction, target, valid = maps()
    expected = loss(prediction, target, valid).item()
    assert loss(scale * prediction + shift, target, valid).item() == pytest.approx(expected, rel=1e-9)
    assert loss(prediction, scale * target + shift, valid).item() == pytest.approx(expected, rel=1e-9)
    assert loss(scale * target + shift, target, valid).item() < 1e-9
    assert loss(-prediction, target, valid).item() != pytest.approx(expected, rel=1e-3)


def test_silog_with_full_variance_focus_is_scale_invariant():
    prediction, target, valid = maps()
    expected = silog_loss(prediction, target, valid, variance_focus=1.0).item()
    assert silog_loss(9 * prediction, target, valid, variance_focus=1.0).item() == pytest.approx(expected)
    assert silog_loss(9 * prediction, target, valid).item() > 1.2 * expected


@pytest.mark.parametrize("pieces", [2, 4, 8])
@pytest.mark.parametrize(
    "loss", [*MAP_LOSSES.values(), feature_alignment_loss], ids=[*MAP_LOSSES, "feature alignment"]
)
def test_accumulated_micro_batches_are_the_batch(loss, pieces):
    inputs = tokens(batch=8) if loss is feature_alignment_loss else maps()
    whole = inputs[0].clone().requires_grad_()
    expected = loss(whole, *inputs[1:])
    expected.backward()
    apart = inputs[0].clone().requires_grad_()
    total = 0.0
    for part in zip(apart.chunk(pieces), *(x.chunk(pieces) for x in inputs[1:]), strict=True):
        value = loss(*part) / pieces
        value.backward(retain_graph=True)
        total += value.item()
    assert total == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(apart.grad, whole.grad, rtol=1e-12, atol=1e-15)


@all_map_losses
def test_images_with_fewer_than_two_valid_pixels_add_zero_with_their_graph(loss):
    prediction, target, valid = maps()
    prediction.requires_grad_()
    none = loss(prediction[:2], target[:2], valid[:2])
    assert none.item() == 0 and none.requires_grad
    none.backward()
    assert torch.equal(prediction.grad, torch.zeros_like(prediction))
    counted = loss(prediction, target, valid).item()
    assert counted == pytest.approx(loss(prediction[2:], target[2:], valid[2:]).item() * 6 / 8)


def test_feature_alignment_moves_only_tokens_below_the_tolerance():
    student, teacher = tokens()
    student.requires_grad_()
    feature_alignment_loss(student, teacher).backward()
    cosine = torch.cosine_similarity(student.detach(), teacher, dim=2)
    assert (cosine[1:] < 0.85).any() and (cosine[1:] >= 0.85).any()
    assert torch.equal(student.grad.abs().sum(2) > 0, cosine < 0.85)


def test_feature_alignment_without_far_tokens_is_zero_with_its_graph():
    _, teacher = tokens()
    student = (2 * teacher).requires_grad_()
    value = feature_alignment_loss(student, teacher)
    value.backward()
    assert value.item() == 0
    assert torch.equal(student.grad, torch.zeros_like(student))
