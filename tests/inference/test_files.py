"""predict_files: every image once, nothing lost or overwritten, every skipped file with a reason."""

import io
import json
import tarfile

import cv2
import numpy as np
import OpenEXR
import pytest
import torch
from PIL import Image

from depth_anything.inference import files
from depth_anything.inference.files import PredictSettings, predict_files
from depth_anything.inference.formats import encode_map, encode_picture, encode_png
from depth_anything.inference.predictor import Predictor
from depth_anything.model.depth_anything import DepthAnything
from depth_anything.visualize import colorize


def jpeg(height=30, width=40, seed=0, **options):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", **options)
    return out.getvalue()


def put(folder, *names, data=None):
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(seed=i) if data is None else data)


def made(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def named(stems, *endings):
    return sorted(f"{stem}{ending}" for stem in stems for ending in (".png", ".json", *endings))


def test_a_folder_with_all_kinds_of_files(tmp_path, predictor):
    photos, maps = tmp_path / "my photos", tmp_path / "out"
    put(
        photos,
        "one.jpg",
        "deep/one.jpg",
        "Ünïcode 日本.jpg",
        "with spaces/a b c.jpg",
        ".hidden.jpg",
        "no_ending",
    )
    put(photos, "notes.txt", "deep/empty.jpg", data=b"")
    put(photos, "broken.jpg", data=jpeg()[:200])
    put(photos, "text.png", data=b"this is no picture")
    outcome = predict_files(predictor, photos, maps)
    stems = ("one", "deep/one", "Ünïcode 日本", "with spaces/a b c", ".hidden", "no_ending")
    assert made(maps) == named(stems, "_disparity.png")
    assert outcome.images == 6 and len(outcome.written) == 18
    assert sorted(outcome.skipped) == ["broken.jpg", "deep/empty.jpg", "notes.txt", "text.png"]
    assert all(outcome.skipped.values())


@pytest.mark.parametrize("content", [{}, {"notes.txt": b"no image"}])
def test_a_folder_without_images_is_an_error(tmp_path, predictor, content):
    (tmp_path / "photos").mkdir()
    for name, data in content.items():
        (tmp_path / "photos" / name).write_bytes(data)
    with pytest.raises(ValueError, match="photos"):
        predict_files(predictor, tmp_path / "photos", tmp_path / "out")


@pytest.mark.parametrize(
    ("names", "stems"),
    [
        (("a.jpg", "a.png"), ("a_jpg", "a_png")),
        (("a.jpg", "A.JPG"), ("A_JPG", "a_jpg_2")),  # one file on the disks of many
        (("e\u0301.jpg", "\xe9.jpg"), ("e\u0301_jpg", "\xe9_jpg_2")),
        (("a.jpg", "a_disparity.jpg"), ("a", "a_disparity_2")),  # the map of one is the picture of the other
        (("a.jpg", "a.png", "a_jpg.png"), ("a_jpg", "a_png", "a_jpg_2")),
        (("a.jpg", "deep/a.jpg"), ("a", "deep/a")),
        (("a.jpg", "a.xyz"), ("a", "a_xyz")),  # a name that is no image's gives way
    ],
)
def test_equal_names_do_not_overwrite_each_other(tmp_path, predictor, names, stems):
    put(tmp_path / "photos", *names)
    outcome = predict_files(predictor, tmp_path / "photos", tmp_path / "out")
    assert sorted(set(made(tmp_path / "out"))) == named(stems, "_disparity.png")
    assert len(outcome.written) == len(set(map(str, outcome.written))) == 3 * len(names)
    told = [json.loads(path.read_text())["image"] for path in (tmp_path / "out").rglob("*.json")]
    assert sorted(told) == sorted(names)


def test_caption_files_do_not_change_output_names(tmp_path, predictor):
    put(tmp_path / "photos", "a.jpg")
    put(tmp_path / "photos", "a.txt", data=b"a caption")
    predict_files(predictor, tmp_path / "photos", tmp_path / "out", settings=PredictSettings(formats=()))
    assert made(tmp_path / "out") == named(["a"])


def test_lists_and_tars(tmp_path, predictor):
    put(tmp_path, "far/away/a.jpg", "far/b.jpg", "lists/c.jpg")
    (tmp_path / "lists/l.txt").write_text(f"c.jpg\n\n{tmp_path / 'far/away/a.jpg'}\n../far/b.jpg\nnone.jpg\n")
    outcome = predict_files(
        predictor, tmp_path / "lists/l.txt", tmp_path / "out1", settings=PredictSettings(())
    )
    assert made(tmp_path / "out1") == named(["far/away/a", "far/b", "lists/c"])
    assert list(outcome.skipped) == ["none.jpg"]
    for mode, name in (("w", "t.tar"), ("w:gz", "t.tar.gz")):
        with tarfile.open(tmp_path / name, mode) as tar:
            tar.add(tmp_path / "far", "photos")
        predict_files(
            predictor, tmp_path / name, tmp_path / name[2:], settings=PredictSettings(()), batch_size=2
        )
        assert made(tmp_path / name[2:]) == named(["photos/away/a", "photos/b"])


def test_exif_rotation_is_applied(tmp_path, predictor):
    exif = Image.Exif()
    exif[0x0112] = 6
    put(tmp_path / "photos", "a.jpg", data=jpeg(30, 40, exif=exif))
    predict_files(predictor, tmp_path / "photos", tmp_path / "out")
    with Image.open(tmp_path / "out/a.png") as image:
        assert image.size == (30 + 50 + 30, 40)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batching_keeps_results_and_order(tmp_path, predictor, batch_size):
    names = [f"{i}.jpg" for i in range(7)]
    put(tmp_path / "photos", *names)
    put(tmp_path / "photos", "2.5.jpg", data=b"broken")
    put(tmp_path / "photos", "3.5.jpg", data=jpeg(40, 30))
    seen = []
    hook = predictor.model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    try:
        predict_files(
            predictor,
            tmp_path / "photos",
            tmp_path / "out",
            settings=PredictSettings(["npy"]),
            batch_size=batch_size,
        )
    finally:
        hook.remove()
    assert max(seen) == batch_size and sum(seen) == 8
    for name in names:
        pixels = np.asarray(Image.open(tmp_path / "photos" / name))
        got = np.load(tmp_path / "out" / f"{name[0]}_disparity.npy")
        np.testing.assert_allclose(
            got, predictor.predict(pixels), atol=2e-3
        )  # JPEG decoders differ by a level


def test_no_partial_files_are_left_on_a_full_disk(tmp_path, predictor, monkeypatch):
    put(tmp_path / "photos", "a.jpg")

    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "atomic_write", full)
    with pytest.raises(OSError, match="No space left"):
        predict_files(predictor, tmp_path / "photos", tmp_path / "out")
    assert made(tmp_path / "out") == []


def test_images_are_decoded_ahead_of_the_network(tmp_path, predictor, monkeypatch):
    put(tmp_path / "photos", *(f"{i}.jpg" for i in range(6)))
    decoded, at_once = [], []
    decode = files.decode_image
    monkeypatch.setattr(files, "decode_image", lambda data: (decoded.append(1), decode(data))[1])

    class Slow(Predictor):
        def predict_batch(self, images, *, prepared=None):
            if not at_once:
                for _ in range(60_000):  # until what may be decoded ahead is
                    if len(decoded) == 3:
                        break
                    torch.empty(1).share_memory_()
                    __import__("time").sleep(0.01)
            at_once.append(len(decoded))
            return super().predict_batch(images, prepared=prepared)

    predict_files(Slow(predictor.model, device="cpu", input_size=28), tmp_path / "photos", tmp_path / "out")
    assert at_once[0] == 3 and len(at_once) == 6


def test_output_folder_inside_the_input_folder(tmp_path, predictor):
    put(tmp_path, "a.jpg")
    with pytest.raises(ValueError, match=str(tmp_path)):
        predict_files(predictor, tmp_path, tmp_path)
    for _ in range(2):
        assert predict_files(predictor, tmp_path, tmp_path / "maps").images == 1


# Encoding


def test_constant_maps_are_encoded(predictor):
    image, map = np.zeros((4, 5, 3), np.uint8), np.full((4, 5), 3.5, np.float32)
    data, _ = encode_picture(image, map, predictor, colormap="Spectral_r", pred_only=True)
    shown = np.asarray(Image.open(io.BytesIO(data)))
    assert (shown == colorize(np.array([[0.0, 1.0]]))[0, 0]).all()
    for bits in (8, 16):
        back = Image.open(io.BytesIO(encode_png(map, bits=bits, quantity="disparity", unit="relative")))
        assert (np.asarray(back) == 0).all() and float(back.text["low"]) == 3.5 == float(back.text["high"])


@pytest.mark.parametrize("bits", [8, 16])
def test_a_round_trip_is_within_one_level(bits):
    map = np.random.default_rng(0).normal(2, 9, (50, 60)).astype(np.float32)
    back = Image.open(io.BytesIO(encode_png(map, bits=bits, quantity="depth", unit="m")))
    low, high, top = float(back.text["low"]), float(back.text["high"]), 2**bits - 1
    assert np.asarray(back).dtype == (np.uint8 if bits == 8 else np.uint16)
    values = low + np.asarray(back) / top * (high - low)
    assert np.abs(values - map).max() <= (high - low) / top * 0.501
    assert (back.text["quantity"], back.text["unit"], back.text["larger"]) == ("depth", "m", "farther")


@pytest.mark.parametrize("resample", ["official", "transformers"])
def test_bicubic_overshoot_does_not_wrap_around(resample):
    """Bicubic interpolation overshoots at edges: values below 0 must be black and not wrap to white."""
    model = DepthAnything("vitn")
    edges = np.zeros((9, 12, 3), np.uint8)
    edges[:, 6:] = 255
    seen = []
    predictor = Predictor(model, device="cpu", input_size=56, resample=resample)
    model.forward = lambda image, **rule: seen.append(image) or image[:, 0]  # the map is the image itself
    map = predictor.predict(edges)
    assert map[:, :4].max() < -1.5 and map[:, 8:].min() > 1.5
    painted = colorize(map, colormap="gray").astype(int)
    levels = (map - map.min()) / np.ptp(map) * 255
    assert np.abs(painted[..., 0] - levels).max() <= 1  # black is black, white white
    assert painted[:, :4].max() < 64 and painted[:, 8:].min() > 192


def test_values_outside_a_given_range_are_clipped():
    map = np.array([[-9.0, 0, 5, 10, 99]])
    data = encode_png(map, bits=16, quantity="disparity", unit="relative", low=0, high=10)
    with Image.open(io.BytesIO(data)) as image:
        assert np.asarray(image).tolist() == [[0, 0, 32768, 65535, 65535]]
        assert (image.text["low"], image.text["high"]) == ("0", "10")


# Output files and their record


def theirs(image, map, *, colormap):
    """The picture of the authors' run.py."""
    import matplotlib

    levels = ((map - map.min()) / (map.max() - map.min()) * 255.0).astype(np.uint8)
    if colormap == "gray":
        painted = np.repeat(levels[..., None], 3, axis=-1)
    else:
        painted = (matplotlib.colormaps[colormap](levels)[:, :, :3] * 255).astype(np.uint8)
    return np.hstack([image, np.full((image.shape[0], 50, 3), 255, np.uint8), painted])


@pytest.mark.parametrize("grayscale", [False, True])
@pytest.mark.parametrize("max_depth", [None, 20.0])
def test_the_picture_equals_the_authors(tmp_path, grayscale, max_depth):
    torch.manual_seed(0)
    model = DepthAnything("vitn", max_depth=max_depth)
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    (tmp_path / "photos").mkdir()
    Image.fromarray(pixels).save(tmp_path / "photos/a.png")
    predictor = Predictor(model, device="cpu", input_size=28)
    predict_files(
        predictor, tmp_path / "photos", tmp_path / "out", settings=PredictSettings((), grayscale=grayscale)
    )
    colormap = "gray" if grayscale else "Spectral" if max_depth else "Spectral_r"
    got = np.asarray(Image.open(tmp_path / "out/a.png"))
    expected = theirs(pixels, predictor.predict(pixels), colormap=colormap)
    if (
        grayscale and max_depth
    ):  # theirs paints the near of metric models black; here it is white in any picture
        expected[:, 90:] = 255 - expected[:, 90:]
    np.testing.assert_array_equal(got, expected)
    settings = PredictSettings((), grayscale=grayscale, pred_only=True)
    predict_files(predictor, tmp_path / "photos", tmp_path / "out", settings=settings)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out/a.png")), got[:, 90:])


def test_every_format_states_quantity_unit_and_direction(tmp_path, predictor):
    put(tmp_path / "photos", "a.jpg")
    every = ("png8", "png16", "npy", "npz", "exr", "ply", "glb")
    outcome = predict_files(
        predictor,
        tmp_path / "photos",
        tmp_path / "out",
        settings=PredictSettings(every),
        model_info={"weights": "w.pth"},
    )
    out = tmp_path / "out"
    notes = json.loads((out / "a.json").read_text())
    assert set(notes["files"]) | {"a.json"} == set(made(out)) == {path.name for path in outcome.written}
    assert (notes["quantity"], notes["unit"], notes["larger"]) == ("disparity", "relative", "nearer")
    assert (notes["height"], notes["width"], notes["model"]["weights"]) == (30, 40, "w.pth")
    map = np.load(out / "a_disparity.npy")
    assert map.dtype == np.float32 and (notes["low"], notes["high"]) == (map.min(), map.max())
    with np.load(out / "a_disparity.npz") as archive:
        np.testing.assert_array_equal(archive["map"], map)
        assert [str(archive[key]) for key in ("quantity", "unit", "larger")] == [
            "disparity",
            "relative",
            "nearer",
        ]
    with OpenEXR.File(str(out / "a_disparity.exr")) as exr:
        np.testing.assert_array_equal(exr.channels()["Y"].pixels, map)
        header = exr.header()
        assert [header[key] for key in ("quantity", "unit", "larger")] == ["disparity", "relative", "nearer"]
    assert cv2.imread(str(out / "a_disparity.png"), cv2.IMREAD_UNCHANGED).dtype == np.uint16
    assert cv2.imread(str(out / "a_disparity_8bit.png"), cv2.IMREAD_UNCHANGED).dtype == np.uint8


def test_save_numpy_writes_meters_as_the_authors_do(tmp_path, predictor):
    put(tmp_path / "photos", "a.jpg")
    settings = PredictSettings((), save_numpy=True)
    with pytest.raises(ValueError, match="--save-numpy.*--format npy"):
        predict_files(predictor, tmp_path / "photos", tmp_path / "out", settings=settings)
    metric = Predictor(DepthAnything("vitn", max_depth=20), device="cpu", input_size=28)
    predict_files(metric, tmp_path / "photos", tmp_path / "out", settings=settings)
    depth = np.load(tmp_path / "out/a_raw_depth_meter.npy")
    assert depth.shape == (30, 40) and 0 < depth.min() < depth.max() < 20
    assert json.loads((tmp_path / "out/a.json").read_text())["larger"] == "farther"


def test_a_calibrated_model_paints_disparity_and_writes_meters(tmp_path):
    torch.manual_seed(0)
    model = DepthAnything("vitn")
    put(tmp_path / "photos", "a.jpg")
    folder = tmp_path / "photos"
    predict_files(Predictor(model, device="cpu", input_size=28), folder, tmp_path / "relative")
    model.calibration = (0.5, -0.2)
    predict_files(
        Predictor(model, device="cpu", input_size=28),
        folder,
        tmp_path / "metric",
        settings=PredictSettings(["npy"]),
    )
    relative, metric = (np.asarray(Image.open(tmp_path / name / "a.png")) for name in ("relative", "metric"))
    assert np.abs(relative.astype(int) - metric).max() <= 4  # a level apart where float32 rounds
    notes = json.loads((tmp_path / "metric/a.json").read_text())
    assert (notes["unit"], notes["model"]["calibration"]) == ("m", [0.5, -0.2])


def test_npy_contains_no_pickle():
    assert (
        np.load(io.BytesIO(encode_map(np.ones((2, 3), np.float32), "npy", quantity="depth", unit="m"))).sum()
        == 6
    )
