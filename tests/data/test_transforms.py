import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.v2 import functional as reference

from depth_anything.data.codec import encode
from depth_anything.data.transforms import (
    Crop,
    apply_cutmix,
    crop_encoded_map,
    crop_image,
    crop_map,
    draw_crop,
    draw_cutmix_box,
    draw_perturbation,
    normalize,
    perturb,
)

STILL = [1, 1, 1, 0, 0, 0]
GOLDEN_VIEW = Crop(height=518, width=686, top=3, left=149, side=448, flip=True)
GOLDEN_PERTURBATION = [1.1791954, 0.9013036, 0.8163545, -0.0518750, 0, 1.0027565]
GOLDEN_BOX = [0.0855114, 0.1778541, 0.4145634, 0.8458474]


class NoSync(TorchDispatchMode):
    """Raises where the CPU would have to wait for values of the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket._qualified_op_name not in ("aten::_local_scalar_dense", "aten::nonzero"), (
            func
        )
        return func(*args, **(kwargs or {}))


def ramp(height, width):
    """An image whose red is x and green is y, as fractions of the frame, and maps of the same."""
    y, x = np.mgrid[:height, :width].astype(np.float32) + 0.5
    image = np.stack([x / width * 255, y / height * 255, np.full_like(x, 9)], 2)
    return image.round().astype(np.uint8), x / width, y / height


@pytest.mark.parametrize(
    ("source", "target"),
    [((768, 1024), (518, 686)), ((96, 128), (518, 691)), ((540, 960), (518, 921)), ((518, 686), (518, 686))],
)
@pytest.mark.parametrize("flip", [False, True])
def test_image_and_map_stay_aligned(source, target, flip):
    image, x, y = ramp(*source)
    view = Crop(*target, top=0, left=71, side=518, flip=flip)
    square, across, down = crop_image(image, view), crop_map(x, view), crop_map(y, view)
    assert square.shape == (518, 518, 3) and square.dtype == np.uint8 and square.flags.c_contiguous
    assert across.shape == (518, 518) and across.dtype == np.float32 and across.flags.c_contiguous
    columns = (np.arange(518) + 71.5) / target[1]
    expected = columns[::-1] if flip else columns
    rows = (np.arange(518) + 0.5) / target[0]
    half_pixel = [0.5 / side + 1e-6 for side in source]
    assert np.abs(across - expected).max() <= half_pixel[1]
    assert np.abs(down - rows[:, None]).max() <= half_pixel[0]
    inner = (slice(4, -4), slice(4, -4))  # the bicubic kernel is biased inwards at the border
    assert np.abs(square[inner][..., 0] / 255 - across[inner]).max() <= half_pixel[1] + 1.01 / 255
    assert np.abs(square[inner][..., 1] / 255 - down[inner]).max() <= half_pixel[0] + 1.01 / 255
    error = (square[..., 0] / 255.0 - across)[inner].mean()
    assert abs(error) < 3e-4  # no shift to either side


@pytest.mark.parametrize("flip", [False, True])
def test_crop_equals_slicing(flip):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
    values = rng.random((40, 60), np.float32)
    view = Crop(40, 60, top=3, left=11, side=28, flip=flip)
    cut = (slice(3, 31), slice(11, 39))
    turn = np.fliplr if flip else np.asarray
    assert (crop_image(image, view) == turn(image[cut])).all()  # equal size: not resampled
    assert (crop_map(values, view) == turn(values[cut])).all()
    larger = Crop(70, 100, top=3, left=11, side=28, flip=flip)
    whole = reference.resize(
        torch.from_numpy(image).permute(2, 0, 1), [70, 100], interpolation=3, antialias=True
    )
    assert (crop_image(image, larger) == turn(whole.permute(1, 2, 0).numpy()[cut])).all()
    rows, columns = (
        np.round((np.arange(n) + 0.5) * m / n - 0.5 + 1e-9).astype(int) for n, m in ((70, 40), (100, 60))
    )
    assert (crop_map(values, larger) == turn(values[rows][:, columns][cut])).all()


def test_map_values_are_never_interpolated():
    values = np.array([[np.nan, 1, np.inf], [2, -3, 1e30], [0, 5, np.nan]], np.float32)
    shown = crop_map(values, Crop(7, 8, 0, 0, 7, False))
    assert shown[2:, 0].tolist() == [2, 2, 2, 0, 0] and shown[:, 3].tolist() == [1, 1, -3, -3, -3, 5, 5]
    assert np.isnan(shown).sum() == 2 * 3 + 2 * 2 and np.isinf(shown).sum() == 2 * 2


def test_crops_are_uniform_and_depend_on_the_number():
    views = [draw_crop(30, 41, 28, seed=4, n=n) for n in range(4000)]
    assert views[17] == draw_crop(30, 41, 28, seed=4, n=17) != draw_crop(30, 41, 28, seed=5, n=17)
    assert {view.top for view in views} == {0, 1, 2} and {view.left for view in views} == set(range(14))
    assert np.bincount([view.left for view in views]).min() > 200
    assert 0.46 < np.mean([view.flip for view in views]) < 0.54
    assert draw_crop(28, 28, 28, seed=0, n=0).top == 0


def test_golden_draws():
    assert draw_crop(518, 686, 448, seed=1, n=2) == GOLDEN_VIEW
    assert draw_perturbation(1, 3).tolist() == pytest.approx(GOLDEN_PERTURBATION, abs=1e-6)
    assert draw_cutmix_box(1, 3).tolist() == pytest.approx(GOLDEN_BOX, abs=1e-6)


def test_normalize():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    got = normalize(torch.from_numpy(image))
    expected = (image / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    assert got.shape == (2, 3, 5, 7) and got.dtype == torch.float32
    assert got.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(got.permute(0, 2, 3, 1).numpy(), expected, atol=1e-6)


def test_perturbation_strengths():
    drawn = np.stack([draw_perturbation(3, n) for n in range(6000)])
    assert drawn.dtype == np.float32 and (drawn[5] == draw_perturbation(3, 5)).all()
    jittered = drawn[:, 0] != 1
    assert abs(jittered.mean() - 0.8) < 0.02 and (drawn[~jittered][:, :4] == [1, 1, 1, 0]).all()
    for column, (low, high) in enumerate([(0.5, 1.5)] * 3 + [(-0.25, 0.25)]):
        values = drawn[jittered, column]
        assert low <= values.min() < low + 0.01 and high - 0.01 < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.02
    assert set(drawn[:, 4]) == {0, 1} and abs(drawn[:, 4].mean() - 0.2) < 0.02
    sigma = drawn[drawn[:, 5] > 0, 5]
    assert abs(len(sigma) / 6000 - 0.5) < 0.02 and 0.1 <= sigma.min() < 0.12 and 1.98 < sigma.max() <= 2.0
    assert np.abs(np.corrcoef(drawn.T) - np.eye(6))[:4, 4:].max() < 0.05


def rows():
    drawn = [draw_perturbation(0, n) for n in range(8)]
    alone = [[0.6, 1, 1, 0, 0, 0], [1, 1.4, 1, 0, 0, 0], [1, 1, 0.5, 0, 0, 0], [1, 1, 1, -0.2, 0, 0]]
    return torch.tensor(
        np.array([STILL, *alone, [1, 1, 1, 0, 1, 0], [1, 1, 1, 0, 0, 1.7], *drawn]), dtype=torch.float32
    )


def images(count, size=32):
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(count, 3, size, size, generator=generator)
    image[:, :, :8] = image[:, :1, :8]  # gray has no hue
    image[:, :, 8:12] = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1)
    image[:, :, 12:14] = 0
    return image


def test_perturb_equals_torchvision_sample_by_sample():
    perturbation = rows()
    image = images(len(perturbation))
    got = perturb(image, perturbation)
    for one, row, result in zip(image, perturbation.tolist(), got, strict=True):
        brightness, contrast, saturation, hue, grey, sigma = row
        one = reference.adjust_brightness(one, brightness)
        one = reference.adjust_contrast(one, contrast)
        one = reference.adjust_saturation(one, saturation)
        one = reference.adjust_hue(one, hue)
        if grey:
            one = reference.rgb_to_grayscale(one, num_output_channels=3)
        if sigma:
            one = reference.gaussian_blur(one, [13, 13], [sigma, sigma])
        assert (result - one).abs().max() < 2e-5, row
    torch.testing.assert_close(got[0], image[0], atol=1e-6, rtol=0)
    assert got.shape == image.shape and got.min() > -1e-6 and got.max() < 1 + 1e-6


def test_each_sample_is_perturbed_independently():
    perturbation = rows()
    image = images(len(perturbation))
    together = perturb(image, perturbation)
    for i in range(len(image)):
        torch.testing.assert_close(
            perturb(image[i : i + 1], perturbation[i : i + 1])[0], together[i], atol=1e-6, rtol=0
        )


def test_perturb_keeps_float32_under_autocast_and_does_not_synchronize():
    perturbation = rows()
    image = (images(len(perturbation)) * 255).byte().permute(0, 2, 3, 1).contiguous()
    expected = normalize(image, perturbation)
    assert (expected[1:] - normalize(image)[1:]).abs().amax((1, 2, 3)).min() > 0.01
    with torch.autocast("cpu", dtype=torch.bfloat16), NoSync():
        assert torch.equal(normalize(image, perturbation), expected)
    with pytest.raises(AssertionError), NoSync():
        image.float().sum().item()


def test_cutmix():
    image = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 3, 20, 10)
    target = torch.arange(3.0).view(3, 1, 1).expand(3, 20, 10)
    valid = torch.tensor([True, False, True]).view(3, 1, 1).expand(3, 20, 10)
    box = torch.tensor([[0.1, 0.2, 0.5, 0.6], [0, 0, 0, 0], [0, 0, 1, 1]])
    mixed = apply_cutmix({"image": image, "target": target, "valid": valid}, box)
    region = mixed["region"]
    assert region[0, 2:10, 2:6].all() and region[0].sum() == 32 and not region[1].any() and region[2].all()
    assert (mixed["image"][0, :, region[0]] == 2).all() and (mixed["image"][0, :, ~region[0]] == 0).all()
    assert torch.equal(mixed["target"], mixed["image"][:, 0])
    assert mixed["valid"][0].all() and not mixed["valid"][1:].any()


def test_cutmix_boxes():
    boxes = np.stack([draw_cutmix_box(0, n) for n in range(3000)])
    assert boxes.dtype == np.float32 and boxes.min() >= 0 and boxes.max() <= 1 + 1e-6
    height, width = (boxes[:, 2:] - boxes[:, :2]).T
    used = height > 0
    assert abs(used.mean() - 0.5) < 0.03 and not boxes[~used].any()
    area = (height * width)[used]
    assert 0.019 < area.min() < 0.03 and 0.37 < area.max() <= 0.4001


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shape", [(60, 80), (31, 40), (143, 95), (7, 301)])
def test_crop_of_an_encoded_map_equals_crop_of_the_decoded_one(shape, flip):
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    values[:3, :4], values[-1, -2:] = np.nan, np.inf
    for top, left in ((0, 0), (18, 38), (7, 11)):
        view = Crop(60, 80, top, left, 42, flip)
        out = np.full((42, 42), 7, np.float32)
        crop_encoded_map(encode(values, codec="f32"), view, out=out)
        np.testing.assert_array_equal(out, crop_map(values, view))
