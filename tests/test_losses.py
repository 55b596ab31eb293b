import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from depth_anything.losses import (
    feature_alignment_loss,
    gradient_matching_loss,
    invariant_losses,
    scale_shift_invariant_loss,
    silog_loss,
)

SSI = scale_shift_invariant_loss
GM = gradient_matching_loss


def position_weight(prediction):
    """A weight in [0, 1] for each pixel, the same for all images; about a tenth are 0."""
    weight = np.random.default_rng(5).random(prediction.shape[1:])
    return torch.from_numpy(np.where(weight < 0.1, 0, weight)).expand(prediction.shape).float()


def weighted(loss, **options):
    return lambda p, t, v, **more: loss(p, t, v, pixel_weight=position_weight(p), **options, **more)


MAP_LOSSES = {
    "ssi": SSI,
    "ssi trimmed": partial(SSI, trim=0.1),
    "gm": GM,
    "gm trimmed": partial(GM, trim=0.1),
    "silog": silog_loss,
    "silog variance alone": partial(silog_loss, variance_focus=1.0),
    "ssi hybrid": partial(SSI, normalization="hybrid", levels=2, trim=0.1),
    "ssi local": partial(SSI, normalization="local", levels=2),
    "ssi raw": partial(SSI, normalization="none"),
    "ssi weighted": weighted(SSI, trim=0.1),
    "gm weighted": weighted(GM),
}
all_map_losses = pytest.mark.parametrize("loss", MAP_LOSSES.values(), ids=MAP_LOSSES.keys())
invariant = pytest.mark.parametrize("loss", list(MAP_LOSSES.values())[:4], ids=list(MAP_LOSSES)[:4])


def maps(batch=8, height=19, width=23, *, seed=0, dtype=torch.float64):
    """Positive maps; the images have 0, 1, 2, all, and about 70 % valid pixels."""
    rng = np.random.default_rng(seed)
    prediction, target = np.exp(rng.normal(size=(2, batch, height, width)))
    valid = rng.random((batch, height, width)) < 0.7
    if batch >= 4:
        valid[:3] = False
        valid[1, 4, 5] = valid[2, 4, 5] = valid[2, 4, 6] = True
        valid[3] = True
    return (
        torch.from_numpy(prediction).to(dtype),
        torch.from_numpy(target).to(dtype),
        torch.from_numpy(valid),
    )


def tokens(batch=4, count=12, channels=6, *, seed=0, noise=0.6):
    rng = np.random.default_rng(seed)
    student = rng.normal(size=(batch, count, channels))
    teacher = student + noise * rng.normal(size=student.shape)
    student[0] = teacher[0]  # an image without a far token
    return torch.from_numpy(student), torch.from_numpy(teacher)


# Plain references: an image at a time, loops, from the formulae.


def normalised(x):
    median = sorted(x)[(len(x) - 1) // 2]
    deviation = sum(abs(v - median) for v in x) / len(x)
    return (x - median) / max(deviation, 1e-6)


def kept_by(residual, trim):
    """Indices, in reading order, without the floor(trim * n) largest; the later of equals go first."""
    order = sorted(range(len(residual)), key=lambda i: (abs(residual[i]), i))
    return sorted(order[: len(residual) - math.floor(round(trim * len(residual), 9))])


def reference_ssi(prediction, target, valid, *, trim=0.0):
    total = 0.0
    for p, t, v in zip(prediction, target, valid, strict=True):
        if v.sum() < 2:
            continue
        residual = normalised(p[v]) - normalised(t[v])
        kept = kept_by(residual, trim)
        total += sum(abs(residual[i]) for i in kept) / len(kept)
    return total / len(prediction)


def reference_gm(prediction, target, valid, *, trim=0.0, scales=4):
    total = 0.0
    for p, t, v in zip(prediction, target, valid, strict=True):
        if v.sum() < 2:
            continue
        residual = normalised(p[v]) - normalised(t[v])
        pixels = np.argwhere(v)
        known = {tuple(pixels[i]): residual[i] for i in kept_by(residual, trim)}
        for stride in [2**k for k in range(scales)]:
            seen = {yx: r for yx, r in known.items() if yx[0] % stride == 0 and yx[1] % stride == 0}
            edges = [
                abs(r - seen[other])
                for (y, x), r in seen.items()
                for other in [(y, x + stride), (y + stride, x)]
                if other in seen
            ]
            total += sum(edges) / max(len(seen), 1)
    return total / len(prediction)


def reference_error(p, t, *, normalization, levels):
    """|p - t| of the valid pixels of one image by equations 1 to 6 of Distill Any Depth, pixel by pixel."""
    if normalization == "none":
        return np.abs(p - t)
    counts = {"global": [1], "hybrid": [2**k for k in range(levels)], "local": [2 ** (levels - 1)]}
    low, high = t.min(), t.max()
    errors = np.zeros((len(counts[normalization]), len(t)))
    for row, segments in enumerate(counts[normalization]):
        groups = {}
        for i, value in enumerate(t):
            number = min(int((value - low) / (high - low) * segments), segments - 1) if high > low else 0
            groups.setdefault(number, []).append(i)
        for members in groups.values():
            difference = np.array(normalised(p[members])) - np.array(normalised(t[members]))
            errors[row, members] = np.abs(difference)
    return errors.mean(0)


def reference_weighted(prediction, target, valid, weight, *, trim, normalization, levels, scales):
    """Both invariant losses with a weight of each pixel."""
    ssi = gm = 0.0
    for p, t, v, w in zip(prediction, target, valid, weight, strict=True):
        v = v & (w > 0)
        if v.sum() < 2:
            continue
        error = reference_error(p[v], t[v], normalization=normalization, levels=levels)
        kept = kept_by(error, trim)
        ssi += sum(error[i] * w[v][i] for i in kept) / sum(w[v][i] for i in kept)
        residual = p[v] - t[v] if normalization == "none" else normalised_difference(p[v], t[v])
        pixels = np.argwhere(v)
        known = {tuple(pixels[i]): residual[i] for i in kept}
        for stride in [2**k for k in range(scales)]:
            seen = {yx: r for yx, r in known.items() if yx[0] % stride == 0 and yx[1] % stride == 0}
            edges = [
                abs(r - seen[other]) * min(w[y, x], w[other])
                for (y, x), r in seen.items()
                for other in [(y, x + stride), (y + stride, x)]
                if other in seen
            ]
            gm += sum(edges) / (sum(w[yx] for yx in seen) or 1)
    return ssi / len(prediction), gm / len(prediction)


def normalised_difference(p, t):
    return np.array(normalised(p)) - np.array(normalised(t))


def reference_silog(prediction, target, valid, *, variance_focus=0.5):
    total = 0.0
    for p, t, v in zip(prediction, target, valid, strict=True):
        if v.sum() < 2:
            continue
        d = np.log(p[v]) - np.log(t[v])
        total += math.sqrt(np.mean(d**2) - variance_focus * np.mean(d) ** 2)
    return total / len(prediction)


def reference_feature(student, teacher, *, tolerance=0.85):
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(s, t, strict=True)]
        far = [1 - c for c in cosines if c < tolerance]
        total += sum(far) / len(far) if far else 0.0
    return total / len(student)


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


CASES = {
    "two pixels": lambda p, t, v: (p[2:3], t[2:3], v[2:3]),
    "constant target": lambda p, t, v: (p, torch.full_like(t, 7.3), v),
    "constant prediction": lambda p, t, v: (torch.full_like(p, 0.7), t, v),
    "both constant": lambda p, t, v: (torch.full_like(p, 0.7), torch.full_like(t, 7.3), v),
    "prediction of zeros": lambda p, t, v: (torch.zeros_like(p), t, v),
    "all sky": lambda p, t, v: (p, torch.zeros_like(t), torch.ones_like(v)),
    "half sky": lambda p, t, v: (p, torch.where(t > t.median(), t, 0), torch.ones_like(v)),
    "perfect": lambda p, t, v: (t.clone(), t, v),
    "proportional": lambda p, t, v: (3 * t, t, v),
    "faint": lambda p, t, v: (p * 1e-12, t * 1e-12, v),
}


@all_map_losses
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_degenerate_images_are_finite_with_finite_gradients(loss, case, dtype):
    prediction, target, valid = case(*maps(dtype=dtype))
    prediction.requires_grad_()
    value = loss(prediction, target, valid)
    value.backward()
    assert value.isfinite() and value >= 0
    assert prediction.grad.isfinite().all()


def test_gradient_of_a_constant_target():
    prediction, target, valid = maps()
    assert SSI(prediction, torch.full_like(target, 7.3), valid).item() == pytest.approx(6 / 8)
    assert SSI(torch.full_like(target, 0.1), torch.full_like(target, 7.3), valid).item() == 0


@all_map_losses
@pytest.mark.parametrize("rubbish", [torch.nan, torch.inf, -torch.inf, 1e38, 0.0])
def test_invalid_pixels_have_no_effect(loss, rubbish):
    prediction, target, valid = maps(dtype=torch.float32)
    clean = prediction.clone().requires_grad_()
    expected = loss(clean, target, valid)
    expected.backward()
    dirty = torch.where(valid, prediction, rubbish).requires_grad_()
    value = loss(dirty, torch.where(valid, target, rubbish), valid)
    value.backward()
    assert torch.equal(value, expected)
    assert torch.equal(dirty.grad, clean.grad)
    assert not dirty.grad[~valid].any()


@all_map_losses
@pytest.mark.parametrize("which", [0, 1])
def test_a_nan_inside_valid_is_not_hidden(loss, which):
    inputs = maps()
    inputs[which][4][valid_pixel(inputs[2][4])] = torch.nan
    assert loss(*inputs).isnan()


def valid_pixel(mask):
    return tuple(torch.nonzero(mask)[3].tolist())


def test_a_nan_token_is_not_hidden():
    student, teacher = tokens()
    student[2, 3, 1] = torch.nan
    assert feature_alignment_loss(student, teacher).isnan()


@all_map_losses
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precisions_are_computed_in_float32(loss, dtype):
    prediction, target, valid = maps(dtype=dtype)
    value = loss(prediction, target, valid)
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(prediction.float(), target.float(), valid))
    mixed = loss(prediction, target.float(), valid)
    assert torch.equal(mixed, value)


def test_feature_alignment_of_halves_runs_in_float32_even_under_autocast():
    student, teacher = (x.bfloat16() for x in tokens())
    expected = feature_alignment_loss(student.float(), teacher.float())
    with torch.autocast("cpu", torch.bfloat16):
        value = feature_alignment_loss(student, teacher)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)


@all_map_losses
def test_float64_stays_and_autocast_changes_nothing(loss):
    inputs = maps()
    assert loss(*inputs).dtype == torch.float64
    narrow = (inputs[0].float(), inputs[1].float(), inputs[2])
    expected = loss(*narrow)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(*narrow), expected)


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


def test_feature_alignment_of_a_zero_token_is_finite():
    student, teacher = tokens()
    student[1, 0] = 0
    student.requires_grad_()
    value = feature_alignment_loss(student, teacher)
    value.backward()
    assert value.isfinite() and student.grad.isfinite().all()


class NoSynchronization(TorchDispatchMode):
    """Fail on operations that read a value on the host or whose output size depends on values."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "item")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.FORBIDDEN, f"{name} waits for the device"
        boolean = [
            a for a in args[1:] if isinstance(a, list) for i in a if getattr(i, "dtype", None) == torch.bool
        ]
        assert not (name in ("index", "index_put", "index_put_") and boolean), "boolean indexing waits"
        return func(*args, **(kwargs or {}))


@all_map_losses
def test_no_host_synchronization(loss):
    prediction, target, valid = maps()
    prediction.requires_grad_()
    with NoSynchronization():
        loss(prediction, target, valid).backward()


def test_no_host_synchronization_of_feature_alignment():
    student, teacher = tokens()
    with NoSynchronization():
        feature_alignment_loss(student.requires_grad_(), teacher).backward()


@pytest.mark.parametrize(
    "wait", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: bool((x > 0).any())]
)
def test_the_check_for_synchronization_can_fail(wait):
    with pytest.raises(AssertionError, match="wait"), NoSynchronization():
        wait(torch.ones(3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@all_map_losses
def test_losses_on_a_gpu_are_the_same_without_synchronization(loss):
    inputs = maps()
    expected = loss(*inputs)
    prediction, target, valid = (x.cuda() for x in inputs)
    prediction.requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        value = loss(prediction, target, valid)
        value.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert value.item() == pytest.approx(expected.item(), rel=1e-9)
