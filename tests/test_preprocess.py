import math

import numpy as np
import pytest
from PIL import Image

from depth_anything.preprocess import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    preprocess_image,
    preprocess_transformers,
    resize_shape,
    transformers_resize_shape,
)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (480, 640, (518, 686)),
        (375, 1242, (518, 1722)),
        (436, 1024, (518, 1218)),
        (4032, 6048, (518, 770)),
        (500, 300, (868, 518)),
        (518, 518, (518, 518)),
        (1, 1, (518, 518)),
        (2000, 1000, (1036, 518)),
    ],
)
def test_sizes_of_the_official_code(height, width, expected):
    assert resize_shape(height, width) == expected


def authors_rule(height, width, short_side, multiple):
    """The rule in numpy: nearest multiple, half to even, ceil below the lower bound."""
    scale = max(short_side / height, short_side / width)
    sides = []
    for side in (height, width):
        x = scale * side
        y = int(np.round(x / multiple) * multiple)
        sides.append(y if y >= short_side else int(np.ceil(x / multiple) * multiple))
    return tuple(sides)


@pytest.mark.parametrize("short_side", [14, 28, 100, 126, 252, 518, 519, 770])
def test_equals_the_rule_for_many_sizes(short_side):
    rng = np.random.default_rng(short_side)
    for height, width in rng.integers(1, 5000, size=(300, 2)).tolist():
        shape = resize_shape(height, width, short_side)
        assert shape == authors_rule(height, width, short_side, 14)
        assert min(shape) >= short_side and shape[0] % 14 == shape[1] % 14 == 0


def test_half_is_rounded_to_even():
    assert resize_shape(28, 35, 28) == (28, 28)  # 2.5 patches
    assert resize_shape(28, 49, 28) == (28, 56)  # 3.5 patches
    assert resize_shape(480, 640, 512, 16) == (512, 688)  # 42.67 patches
    assert resize_shape(480, 640, 100, 16) == (112, 128)


def cubic(distance):
    """Keys' kernel with a = -0.75, as in OpenCV."""
    x = abs(distance)
    if x <= 1:
        return 1.25 * x**3 - 2.25 * x**2 + 1
    return -0.75 * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def resize_weights(source, goal):
    """(goal, source): pixel centers at halves, four taps whatever the scale, the border repeated."""
    weights = np.zeros((goal, source))
    for i in range(goal):
        centre = (i + 0.5) * source / goal - 0.5
        for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
            weights[i, min(max(tap, 0), source - 1)] += cubic(centre - tap)
    return weights


@pytest.mark.parametrize(("height", "width"), [(20, 30), (61, 40), (28, 42), (90, 200)])
def test_equals_bicubic_interpolation_without_antialiasing_in_numpy(height, width):
    rgb = np.random.default_rng(0).integers(0, 256, size=(height, width, 3), dtype=np.uint8)
    result = preprocess_image(rgb, short_side=28)
    h, w = authors_rule(height, width, 28, 14)
    resized = np.einsum(
        "yh,hwc,xw->cyx", resize_weights(height, h), rgb / 255, resize_weights(width, w), optimize=True
    )
    mean, std = (np.array(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    assert result.dtype == np.float32 and result.flags.c_contiguous
    np.testing.assert_allclose(
        result, (resized - mean) / std, atol=2e-4
    )  # positions are float32 in OpenCV; a grey level is 0.017


def test_channels_are_rgb_with_imagenet_constants():
    red = np.zeros((14, 14, 3), np.uint8)
    red[..., 0] = 255
    means = preprocess_image(red, short_side=14).mean((1, 2))
    np.testing.assert_allclose(means, [(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225], rtol=1e-6)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (240, 320, (392, 518)),  # enlarged as little as possible
        (480, 640, (518, 686)),
        (375, 1242, (518, 1722)),
        (1500, 2000, (518, 686)),
        (90, 60, (518, 350)),
        (518, 518, (518, 518)),
        (1, 100, (14, 518)),  # transformers would ask for no patch at all
    ],
)
def test_sizes_of_transformers(height, width, expected):
    assert transformers_resize_shape(height, width) == expected


def test_equals_the_processor_of_transformers():
    dpt = pytest.importorskip("transformers.models.dpt", reason="type  pip install transformers")
    processor = dpt.DPTImageProcessor(
        size={"height": 126, "width": 126},
        keep_aspect_ratio=True,
        ensure_multiple_of=14,
        resample=3,
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
    )
    rng = np.random.default_rng(0)
    for height, width in [(48, 64), (126, 126), (91, 300), (301, 200), (20, 133), (640, 480)]:
        rgb = rng.integers(0, 256, size=(height, width, 3), dtype=np.uint8)
        expected = processor(Image.fromarray(rgb), return_tensors="pt")["pixel_values"][0].numpy()
        result = preprocess_transformers(rgb, 126)
        assert result.dtype == np.float32 and result.flags.c_contiguous
        np.testing.assert_array_equal(result, expected)
