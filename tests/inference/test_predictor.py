"""Predictor: images of any size to maps of the same size."""

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from depth_anything.data.sample import decode_image
from depth_anything.inference import memory
from depth_anything.inference.predictor import FARTHEST_M, Predictor
from depth_anything.model.accelerate import accelerate
from depth_anything.model.depth_anything import DepthAnything
from depth_anything.model.metadata import build_metadata
from depth_anything.model.weights import load_model, save_model
from depth_anything.preprocess import resize_shape


def photograph(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return DepthAnything("vitn")


def test_predict_equals_the_authors_infer_image(model):
    image = photograph(61, 37)
    got = Predictor(model, device="cpu", input_size=98).predict(image)
    assert got.dtype == np.float32 and got.shape == (61, 37)
    np.testing.assert_allclose(got, model.infer_image(image[..., ::-1], input_size=98), atol=1e-6)


def sizes_seen_by(model):
    """Return a list that collects the shapes of the network's inputs."""
    seen = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    return seen


def small_timm():
    return DepthAnything("vit_tiny_patch16_224")


@pytest.mark.parametrize(
    ("build", "own", "multiple"),
    [(lambda: DepthAnything("vitn"), 70, 14), (lambda: DepthAnything("vitn"), 98, 14), (small_timm, 64, 16)],
)
@pytest.mark.parametrize("keep", ["memory", "safetensors", "transformers", "ckpt"])
def test_the_default_input_size_is_the_models(tmp_path, build, own, multiple, keep):
    model = build()
    model.input_size = own
    if keep == "ckpt":
        state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        torch.save({"state_dict": state, "depth_anything": build_metadata(model)}, tmp_path / "last.ckpt")
        model = load_model(tmp_path / "last.ckpt")
    elif keep != "memory":
        if keep == "transformers" and multiple == 16:
            pytest.skip("transformers has no timm encoders")
        save_model(model, tmp_path / "m", format=keep)
        model = load_model(tmp_path / "m")
    seen, image = sizes_seen_by(model), photograph(30, 40)
    predictor = Predictor(model, device="cpu")
    predictor.predict(image)
    model.infer_image(image)
    assert seen == [(1, 3, *resize_shape(30, 40, own, multiple))] * 2
    assert predictor.input_size == own


def test_official_encoders_have_input_size_518():
    with torch.device("meta"):
        assert [DepthAnything(name).input_size for name in ("vits", "vitb", "vitl", "vitg")] == [518] * 4


@pytest.mark.parametrize("size", [0, -5, 70.0, True, "70", float("nan")])
def test_invalid_input_sizes_are_refused(model, size):
    with pytest.raises(ValueError, match="input_size="):
        Predictor(model, device="cpu", input_size=size)
    with pytest.raises(ValueError, match="input_size="):
        model.infer_image(photograph(8, 8), input_size=size)


def test_batches_are_grouped_by_shape_and_keep_the_order(model):
    predictor = Predictor(model, device="cpu", input_size=56)
    images = [
        photograph(h, w, seed)
        for seed, (h, w) in enumerate([(40, 60), (60, 40), (41, 61), (80, 120), (9, 1)])
    ]
    seen = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    together = predictor.predict_batch(images)
    assert sorted(shape[0] for shape in seen) == [1, 1, 3]  # 40×60, 41×61 and 80×120 all become 56×84
    for image, got in zip(images, together, strict=True):
        assert got.shape == image.shape[:2] and got.dtype == np.float32
        np.testing.assert_allclose(got, predictor.predict(image), atol=1e-5)
    assert predictor.predict_batch([]) == []


def test_input_sides_are_multiples_of_the_patch_size():
    model = DepthAnything("vit_tiny_patch16_224")
    seen = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    Predictor(model, device="cpu", input_size=60).predict(photograph(30, 40))
    assert seen == [(1, 3, 64, 80)]


def test_model_is_kept_in_eval(model):
    model.train()
    predictor = Predictor(model, device="cpu")
    assert predictor.model is model and not model.training
    assert predictor.device == torch.device("cpu")


def test_quantity_and_unit(model):
    predictor = Predictor(model, device="cpu")
    assert (predictor.quantity, predictor.unit) == ("disparity", "relative")
    metric = Predictor(DepthAnything("vitn", max_depth=20), device="cpu", input_size=28)
    assert (metric.quantity, metric.unit) == ("depth", "m")
    depth = metric.predict(photograph(28, 28))
    assert 0 < depth.min() and depth.max() < 20


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precisions(model, precision):
    image = photograph(70, 70)
    exact = Predictor(model, device="cpu", input_size=98).predict(image)
    got = Predictor(model, device="cpu", input_size=98, precision=precision).predict(image)
    assert got.dtype == np.float32
    assert 0 < np.abs(got - exact).max() < 0.02
    assert next(model.parameters()).dtype == torch.float32


def test_a_model_on_an_accelerator_stays_there(model, monkeypatch):
    """ "auto" must not move a network that trains on the second GPU to the first."""
    meta = model.to("meta")
    assert Predictor(meta).device == torch.device("meta")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert Predictor(DepthAnything("vitn")).device == torch.device("cpu")


NO_IMAGES = {
    "16 bits": np.zeros((8, 8, 3), np.uint16),
    "16 bits, grey": np.zeros((8, 8), np.uint16),
    "floats": np.zeros((8, 8, 3), np.float32),
    "a mask": np.zeros((8, 8), bool),
    "integers": np.zeros((8, 8, 3), np.int64),
    "empty": np.zeros((0, 8, 3), np.uint8),
    "empty, grey": np.zeros((8, 0), np.uint8),
    "five channels": np.zeros((8, 8, 5), np.uint8),
    "channels first": np.zeros((3, 8, 8), np.uint8),
    "a row": np.zeros(8, np.uint8),
    "a batch": np.zeros((1, 8, 8, 3), np.uint8),
    "objects": np.full((8, 8, 3), None),
    "None": None,
    "PIL": Image.new("RGB", (8, 8)),
    "PIL with a palette": Image.new("P", (8, 8)),
    "a list": [[[0, 0, 0]]],
    "a tensor": torch.zeros(8, 8, 3, dtype=torch.uint8),
    "a path": "photo.jpg",
    "a number": 5,
}


@pytest.mark.parametrize("what", NO_IMAGES)
def test_arrays_that_are_not_images_are_refused(model, what):
    image, predictor = NO_IMAGES[what], Predictor(model, device="cpu", input_size=28)
    for take in (
        predictor.predict,
        predictor.predict_uncalibrated,
        predictor.prepare,
        model.infer_image,
        lambda image: predictor.predict_batch([photograph(8, 8), image]),
    ):
        with pytest.raises(ValueError, match=r"uint8 of shape \(height, width, 3\)") as raised:
            take(image)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("images", [photograph(8, 8), photograph(8, 8)[..., 0], None, "a.jpg", 5])
def test_a_single_image_instead_of_a_batch_is_refused(model, images):
    """The rows of an image would each count as a gray image."""
    with pytest.raises(ValueError, match="images"):
        Predictor(model, device="cpu", input_size=28).predict_batch(images)


def test_several_images_in_one_array_are_a_batch(model):
    predictor = Predictor(model, device="cpu", input_size=28)
    stack = np.stack([photograph(8, 9, seed) for seed in range(2)])
    np.testing.assert_array_equal(predictor.predict_batch(stack), predictor.predict_batch(list(stack)))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "RGB"])
@pytest.mark.parametrize("order", ["C", "F", "read-only", "turned"])
def test_gray_and_transparent_arrays_equal_their_files(model, mode, order):
    """A gray or transparent image gives the same map from a file and from an array, RGB or BGR."""
    channels = {"L": (), "LA": (2,), "RGBA": (4,), "RGB": (3,)}[mode]
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, *channels), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    assert Image.open(file).mode == mode
    rgb = decode_image(file.getvalue())
    predictor = Predictor(model, device="cpu", input_size=28)
    expected = predictor.predict(rgb)
    given = {
        "C": pixels,
        "F": np.asfortranarray(pixels),
        "read-only": np.asarray(Image.fromarray(pixels)),
        "turned": pixels[::-1].copy()[::-1],
    }[order]
    np.testing.assert_array_equal(predictor.predict(given), expected)
    np.testing.assert_allclose(model.infer_image(rgb[..., ::-1]), model.infer_image(bgr(given)), atol=1e-6)
    if mode == "L":
        np.testing.assert_array_equal(predictor.predict(given[..., None]), expected)
        tiled = Predictor(model, device="cpu", input_size=28, tiles=2)
        np.testing.assert_array_equal(tiled.predict(given), tiled.predict(rgb))


def bgr(pixels):
    """The array that cv2 reads from the same file."""
    if pixels.ndim == 2 or pixels.shape[2] == 2:
        return pixels
    return pixels[..., [2, 1, 0, 3][: pixels.shape[2]]]


def test_unknown_precision_and_device(model):
    with pytest.raises(ValueError, match="precision='int8'.* fp32, bf16, fp16"):
        Predictor(model, precision="int8")
    for device in ("gpu", "cuda:99"):
        with pytest.raises(ValueError, match=f"device='{device}'"):
            Predictor(model, device=device)


def test_resample_transformers_equals_their_pipeline(tmp_path):
    """Processor, position rule and post-processing, against the installed transformers, on several aspect ratios."""
    transformers = pytest.importorskip("transformers", reason="type  pip install transformers")
    torch.manual_seed(0)
    model = DepthAnything("vitn")
    with torch.no_grad():
        for parameter in model.parameters():  # positions that matter, norms that do something
            parameter += 0.05 * torch.randn_like(parameter)
    save_model(model, tmp_path / "hf", format="transformers")
    theirs = transformers.pipeline("depth-estimation", model=str(tmp_path / "hf"), device="cpu")
    predictor = Predictor(model, device="cpu", input_size=model.input_size, resample="transformers")
    for height, width in [(48, 64), (70, 70), (64, 48), (40, 133), (200, 150), (300, 90)]:
        image = photograph(height, width)
        expected = theirs(Image.fromarray(image))["predicted_depth"].numpy()
        got = predictor.predict(image)
        assert np.abs(got - expected).max() < 1e-5 * np.ptp(expected)
    assert model.position_rule == "official"


def test_resample_modes_differ_for_images_that_are_not_square(model):
    ways = [Predictor(model, device="cpu", input_size=70, resample=r) for r in ("official", "transformers")]
    official, transformers = (way.predict(photograph(60, 90)) for way in ways)
    assert np.abs(official - transformers).max() > 1e-3 * np.ptp(official)
    with pytest.raises(ValueError, match="resample='pil'.* official, transformers"):
        Predictor(model, resample="pil")
    with pytest.raises(ValueError, match="resample='transformers'"):
        Predictor(DepthAnything("vit_tiny_patch16_224"), device="cpu", resample="transformers")


def test_two_position_rules_on_one_model_do_not_interfere(model):
    """One predictor runs during the forward pass of another, as with two threads."""
    with torch.no_grad():
        model.pretrained.pos_embed.normal_()
    ways = {
        r: Predictor(model, device="cpu", input_size=70, resample=r) for r in ("official", "transformers")
    }
    image = photograph(70, 98)
    # Neither mode resizes this size, so only the position rule differs.
    alone = {rule: way.predict(image) for rule, way in ways.items()}
    assert np.abs(alone["official"] - alone["transformers"]).max() > 1e-3

    for outer, inner in (("official", "transformers"), ("transformers", "official")):
        between = []

        def interrupt(*_, inner=inner, between=between):
            if not between:
                between.append(None)
                between[0] = ways[inner].predict(image)

        hook = model.pretrained.patch_embed.register_forward_hook(interrupt)
        np.testing.assert_array_equal(ways[outer].predict(image), alone[outer])
        hook.remove()
        np.testing.assert_array_equal(between[0], alone[inner])


def test_threads_with_different_rules_share_a_model(model):
    with torch.no_grad():
        model.pretrained.pos_embed.normal_()
    ways = [Predictor(model, device="cpu", input_size=70, resample=r) for r in ("official", "transformers")]
    image = photograph(70, 98)
    alone = [way.predict(image) for way in ways]
    assert np.abs(alone[0] - alone[1]).max() > 1e-3
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda i: ways[i % 2].predict(image), range(24)))
    for i, map in enumerate(found):
        np.testing.assert_allclose(map, alone[i % 2], atol=1e-5)


@pytest.mark.parametrize("checkpoint", [True, False])
def test_the_position_rule_reaches_an_accelerated_model(model, checkpoint):
    with torch.no_grad():
        model.pretrained.pos_embed.normal_()
    ways = [Predictor(model, device="cpu", input_size=70, resample=r) for r in ("official", "transformers")]
    alone = [way.predict(photograph(70, 98)) for way in ways]
    assert np.abs(alone[0] - alone[1]).max() > 1e-3
    accelerate(model, checkpoint=checkpoint, compile=False)
    for way, expected in zip(ways, alone, strict=True):
        np.testing.assert_allclose(way.predict(photograph(70, 98)), expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 1), (2, 31), (4320, 7680)])
def test_images_of_any_size(model, shape):
    image = np.full((*shape, 3), 90, np.uint8)
    for resample in ("official", "transformers")[: 1 if max(shape) > 99 else 2]:
        map = Predictor(model, device="cpu", input_size=28, resample=resample).predict(image)
        assert map.shape == shape and np.isfinite(map).all()


@pytest.mark.parametrize("resample", ["official", "transformers"])
@pytest.mark.parametrize("shape", [(1, 1), (20, 30)])
def test_read_only_and_strided_images(model, resample, shape):
    """Pillow's arrays are read-only, and BGR images reversed to RGB have negative strides; neither warns."""
    image = photograph(*shape)
    predictor = Predictor(model, device="cpu", input_size=28, resample=resample)
    expected = predictor.predict(image)
    np.testing.assert_array_equal(predictor.predict(np.asarray(Image.fromarray(image))), expected)
    np.testing.assert_array_equal(predictor.predict(image[..., ::-1].copy()[..., ::-1]), expected)
    np.testing.assert_array_equal(predictor.predict(np.asfortranarray(image)), expected)


def test_elongated_images_are_refused(model):
    predictor = Predictor(model, device="cpu", input_size=28)
    with pytest.raises(ValueError, match="2000x1 .* 56000x28"):
        predictor.predict(photograph(1, 2000))
    assert predictor.predict(photograph(3, 90)).shape == (3, 90)


def test_images_prepared_by_another_thread(model):
    predictor = Predictor(model, device="cpu", input_size=28)
    images = [photograph(30, 40, seed) for seed in range(3)]
    prepared = [predictor.prepare(image) for image in images]
    for got, expected in zip(
        predictor.predict_batch(images, prepared=prepared), predictor.predict_batch(images), strict=True
    ):
        np.testing.assert_array_equal(got, expected)


def test_calibration_gives_meters(model):
    image = photograph(30, 40)
    disparity = Predictor(model, device="cpu", input_size=28).predict(image)
    model.calibration = (0.4, 0.1)
    predictor = Predictor(model, device="cpu", input_size=28)
    assert (predictor.quantity, predictor.unit, predictor.farthest) == ("depth", "m", FARTHEST_M)
    np.testing.assert_allclose(predictor.predict(image), 1 / (0.4 * disparity + 0.1), rtol=1e-5)
    tiled = Predictor(model, device="cpu", input_size=28, tiles=2).predict(image)
    assert tiled.shape == (30, 40) and (0 < tiled).all() and (tiled <= FARTHEST_M).all()


def test_an_input_size_too_large_for_memory_is_refused(monkeypatch):
    """Else the kernel would kill the process, and the other images with it."""
    monkeypatch.setattr(memory, "free_memory", lambda: 1 << 30)
    predictor = Predictor(DepthAnything("vitn"), device="cpu", input_size=2800)
    with pytest.raises(ValueError, match="--input-size"):
        predictor.predict(np.zeros((20, 30, 3), np.uint8))
    predictor.input_size = 700
    assert predictor.prepare(np.zeros((20, 20, 3), np.uint8)).shape == (3, 700, 700)
