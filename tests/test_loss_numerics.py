"""Degenerate images, invalid pixels, precisions, and no waiting for the device in the losses."""

import pytest
import torch
from loss_references import SSI, all_map_losses, maps, tokens
from torch.utils._python_dispatch import TorchDispatchMode

from depth_anything.losses import feature_alignment_loss

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
