"""Functions, folders of maps, ONNX files and networks as teachers: values, records, failures, resuming."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from made_configs import make_config
from made_teachers import batch_of, files_of, label, labels_of, photograph, write_photographs

from depth_anything import DepthAnything, save_model
from depth_anything.data.labels import open_labels, read_label_sidecar
from depth_anything.data.shards import open_set
from depth_anything.errors import UserError
from depth_anything.teachers.network_teacher import NetworkTeacher
from depth_anything.teachers.open_teacher import is_present, open_teacher, teacher_kind
from depth_anything.teachers.teacher import LabelMaps, MapKind, Photographs, Teacher

GREEN = """
def {name}(photograph):
    return photograph[..., 1] / 50 + 1.0
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Write and import a module of teachers, afresh in each test."""
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    (tmp_path / "code").mkdir()

    def write(text: str) -> Path:
        sys.modules.pop("some_teachers", None)
        importlib.invalidate_caches()
        path = tmp_path / "code/some_teachers.py"
        path.write_text(text)
        path.touch()
        sys.dont_write_bytecode = True
        return path

    yield write  # type: ignore[misc]
    sys.modules.pop("some_teachers", None)


def open_spec(spec: str, **typed: str) -> Teacher:
    return open_teacher(spec, multiple=14, **typed)  # type: ignore[arg-type]


# --- which kind ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        ("transformers:apple/DepthPro-hf", "transformers"),
        ("transformers:/models/a:b", "transformers"),
        ("folder:maps", "folder"),
        ("export/model.onnx", "onnx"),
        ("my.package:Class.method", "function"),
        ("depth_anything_v2_vitl.pth", "network"),
        ("runs/a:b/model.safetensors", "network"),
        ("outputs/teacher", "network"),
        ("folder:", "network"),
    ],
)
def test_the_spec_names_the_kind(spec: str, kind: str) -> None:
    assert teacher_kind(spec) == kind


def test_a_file_with_a_colon_in_its_name_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a:b").touch()
    assert teacher_kind("a:b") == "network" and is_present("a:b") and not is_present("c.pth")


# --- conversion ------------------------------------------------------------------------------------------------


def test_values_become_disparity() -> None:
    values = torch.tensor([[0.0, 0.5, 2.0, 4.0, torch.inf, torch.nan]])
    kept = MapKind("disparity", "relative").to_disparity(values)
    torch.testing.assert_close(kept, torch.tensor([[0, 0.5, 2, 4, torch.nan, torch.nan]]), equal_nan=True)
    meters = MapKind("depth", "m").to_disparity(values)
    torch.testing.assert_close(
        meters, torch.tensor([[100, 2, 0.5, 0.25, torch.nan, torch.nan]]), equal_nan=True
    )
    bounded = MapKind("depth", "m", 20.0).to_disparity(values[:, :4])
    torch.testing.assert_close(bounded, torch.tensor([[50, 2, 0.5, 0.25]]))
    relative = MapKind("depth", "relative").to_disparity(torch.tensor([[[0.0, 5.0, 5.0]], [[0.0, 5e3, 5e3]]]))
    torch.testing.assert_close(relative, torch.tensor([[[200, 0.2, 0.2]], [[0.2, 2e-4, 2e-4]]]))


@pytest.mark.parametrize(("quantity", "unit"), [("depth", "1/m"), ("disparity", "m"), ("height", "m")])
def test_impossible_kinds_are_refused(quantity: str, unit: str) -> None:
    with pytest.raises(UserError):
        MapKind(quantity, unit)


# --- functions -------------------------------------------------------------------------------------------------

WAYS = {
    "attributes": GREEN.format(name="teach")
    + "teach.quantity, teach.unit, teach.licence = 'depth', 'm', 'MIT'\n",
    "returned": GREEN.format(name="green") + "def teach(x):\n    return green(x), 'depth', 'm'\n",
    "object": (
        "import torch\nclass Green:\n    quantity, unit = 'depth', 'm'\n    def __call__(self, photograph):\n"
        "        return torch.from_numpy(photograph[..., 1] / 50 + 1.0)[None]\nteach = Green()\n"
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_labels_are_those_of_the_function(way: str, module: Callable[[str], Path], tmp_path: Path) -> None:
    pictures = write_photographs(tmp_path, sizes=((60, 90), (100, 80)))
    module(WAYS[way])
    teacher = open_spec("some_teachers:teach")
    label(teacher, tmp_path)
    sizes = {(60, 90): (56, 84), (100, 80): (70, 56)}
    for key, values in labels_of(tmp_path).items():
        expected = 1 / (pictures[key][..., 1] / 50 + 1.0)
        size = sizes[expected.shape]
        expected = cv2.resize(expected.astype(np.float32), size[::-1], interpolation=cv2.INTER_LINEAR)
        assert values.shape == size
        np.testing.assert_allclose(values, expected, atol=1e-5)
    meta = open_labels(tmp_path / "labels/photos", open_set(tmp_path / "photos")).meta
    assert meta["unit"] == "1/m" and meta["teacher"]["file"] == "some_teachers:teach"
    assert meta["licence"] == ("CC0-1.0 AND MIT" if way == "attributes" else "CC0-1.0 AND unknown")


def test_a_function_that_was_changed_is_another_teacher(
    module: Callable[[str], Path], tmp_path: Path
) -> None:
    write_photographs(tmp_path)
    weights = tmp_path / "weights.bin"
    weights.write_bytes(b"one")
    text = WAYS["attributes"] + f"teach.files = [{str(weights)!r}]\n"
    module(text)
    label(open_spec("some_teachers:teach"), tmp_path)
    weights.write_bytes(b"two")
    module(text)
    with pytest.raises(UserError, match="labels=FOLDER"):
        label(open_spec("some_teachers:teach"), tmp_path)
    weights.write_bytes(b"one")
    label(open_spec("some_teachers:teach"), tmp_path)
    module(text + "# changed\n")
    with pytest.raises(UserError, match="labels=FOLDER"):
        label(open_spec("some_teachers:teach"), tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match="weights.bin"):
        open_spec("some_teachers:teach")


def test_a_function_must_say_what_it_returns(module: Callable[[str], Path]) -> None:
    module(GREEN.format(name="teach"))
    with pytest.raises(UserError, match="teacher_quantity=depth"):
        open_spec("some_teachers:teach")
    with pytest.raises(UserError, match="teacher_unit=m"):
        open_spec("some_teachers:teach", quantity="depth")
    facts = open_spec("some_teachers:teach", quantity="depth", unit="m", licence="CC-BY-4.0").facts
    assert (facts.quantity, facts.unit, facts.licence) == ("depth", "m", "CC-BY-4.0")
    assert open_spec("some_teachers:teach", quantity="disparity").facts.unit == "relative"
    module(WAYS["attributes"])
    with pytest.raises(UserError, match="teacher_quantity=disparity"):
        open_spec("some_teachers:teach", quantity="disparity")
    for spec in ("some_teachers:absent", "no_such_module:teach", "some_teachers:GREEN"):
        with pytest.raises(UserError, match=spec):
            open_spec(spec)
    module("GREEN = 3\nclass Teach: pass\n")
    for spec in ("some_teachers:GREEN", "some_teachers:Teach"):
        with pytest.raises(UserError, match="no function"):
            open_spec(spec)


FAILING = """
def teach(photograph):
    if photograph.shape[0] > 60:
        {what}
    return photograph[..., 1] / 50 + 1.0
teach.quantity = "disparity"
"""


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("raise ValueError('too tall')", "too tall"),
        ("return photograph[:20, :, 1]", "aspect ratio"),
        ("return photograph", "shape"),
        ("return 'map'", "str"),
        ("return photograph[..., 1] * float('nan')", "no numbers"),
        ("return photograph[..., 1] / 0.0 + float('inf')", "no numbers"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_a_photograph_without_a_map_keeps_its_reason(
    what: str, reason: str, module: Callable[[str], Path], tmp_path: Path
) -> None:
    write_photographs(tmp_path)
    module(FAILING.format(what=what))
    summary = label(open_spec("some_teachers:teach"), tmp_path)
    assert "3 labels of photos" in summary and "2 skipped" in summary
    sidecar = read_label_sidecar(tmp_path / "labels/photos", "0")
    assert sidecar is not None and list(sidecar.skipped) == ["photos/0/1"]
    assert reason in sidecar.skipped["photos/0/1"]


def test_a_function_that_fails_everywhere_stops_the_run(
    module: Callable[[str], Path], tmp_path: Path
) -> None:
    write_photographs(tmp_path)
    module(FAILING.format(what="pass").replace("return photograph", "raise ValueError('never'); photograph"))
    with pytest.raises(UserError, match="never"):
        label(open_spec("some_teachers:teach"), tmp_path)
    module(FAILING.format(what="raise RuntimeError('out of memory')"))
    with pytest.raises(UserError, match="RuntimeError.*photos/1/1.*out of memory"):
        label(open_spec("some_teachers:teach"), tmp_path)
    assert not list((tmp_path / "labels").rglob("*.tar"))


# --- folders of maps -------------------------------------------------------------------------------------------


def write_maps(folder: Path, pictures: dict[str, np.ndarray], *, ending: str) -> dict[str, np.ndarray]:
    """Write a map per photograph, named as its file."""
    maps = {}
    (folder / "trip").mkdir(parents=True)
    for number, (key, picture) in enumerate(pictures.items()):
        maps[key] = (1 + number + picture[..., 0] / 100).astype(np.float32)
        _, shard, record = key.split("/")
        np.save(folder / f"trip/{shard}-{record}{ending}.npy", maps[key])
    return maps


@pytest.mark.parametrize("quantity", ["depth", "disparity"])
def test_labels_are_the_maps_of_the_folder(tmp_path: Path, quantity: str) -> None:
    pictures = write_photographs(tmp_path)
    maps = write_maps(tmp_path / "maps", pictures, ending=f"_{quantity}")
    teacher = open_spec(f"folder:{tmp_path / 'maps'}", licence="CC-BY-4.0")
    label(teacher, tmp_path)
    for key, values in labels_of(tmp_path).items():
        np.testing.assert_allclose(values, maps[key] if quantity == "disparity" else 1 / maps[key], rtol=1e-6)
    meta = open_labels(tmp_path / "labels/photos", open_set(tmp_path / "photos")).meta
    assert meta["unit"] == ("relative" if quantity == "disparity" else "1/m")
    assert meta["licence"] == "CC-BY-4.0 AND CC0-1.0"


def test_missing_and_wrong_maps_are_reported(tmp_path: Path) -> None:
    pictures = write_photographs(tmp_path)
    write_maps(tmp_path / "maps", pictures, ending="_depth")
    spec = f"folder:{tmp_path / 'maps'}"
    before = open_spec(spec).facts.fingerprint
    (tmp_path / "maps/trip/0-1_depth.npy").unlink()
    np.save(tmp_path / "maps/trip/0-2_depth.npy", np.ones((84, 56), np.float32))
    assert open_spec(spec).facts.fingerprint != before
    assert "2 skipped" in label(open_spec(spec), tmp_path)
    sidecar = read_label_sidecar(tmp_path / "labels/photos", "0")
    assert sidecar is not None
    assert "no prediction" in sidecar.skipped["photos/0/1"]
    assert "aspect ratio" in sidecar.skipped["photos/0/2"]
    for number in range(3):
        (tmp_path / f"maps/trip/0-{number}_depth.npy").unlink(missing_ok=True)
    with pytest.raises(UserError, match="no map for 3 of 3 images"):
        label(open_spec(spec), tmp_path, labels="other")


def test_folders_without_a_quantity_or_maps_are_refused(tmp_path: Path) -> None:
    write_maps(tmp_path / "maps", {"photos/0/0": photograph(0, (56, 84))}, ending="")
    spec = f"folder:{tmp_path / 'maps'}"
    with pytest.raises(UserError, match="teacher_quantity=disparity.* teacher_quantity=depth"):
        open_spec(spec)
    assert open_spec(spec, quantity="depth").facts.unit == "m"
    assert open_spec(spec, quantity="depth", unit="relative").facts.unit == "relative"
    assert open_spec(spec, quantity="disparity", unit="1/m").facts.unit == "1/m"
    (tmp_path / "empty").mkdir()
    for name in ("empty", "none"):
        with pytest.raises(UserError, match=name):
            open_spec(f"folder:{tmp_path / name}")
    write_maps(tmp_path / "deep", {"photos/0/0": photograph(0, (56, 84))}, ending="_depth")
    with pytest.raises(UserError, match="leave out teacher_quantity=disparity"):
        open_spec(f"folder:{tmp_path / 'deep'}", quantity="disparity")


# --- ONNX files ------------------------------------------------------------------------------------------------


def write_program(network: DepthAnything, path: Path, *, metadata: bool = True) -> Path:
    """Write a program with the metadata of an export, which takes a minute: 2 + 0.25 * green + 0.5 * red."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from depth_anything.export import program_metadata

    helper, tensor = onnx.helper, onnx.numpy_helper.from_array
    weights = tensor(np.array([0.5, 0.25, 0], np.float32).reshape(1, 3, 1, 1), "weights")
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["image", "weights", "bias"], ["maps"]),
            helper.make_node("Squeeze", ["maps", "axis"], ["depth"]),
        ],
        "g",
        [helper.make_tensor_value_info("image", 1, ["b", 3, "h", "w"])],
        [helper.make_tensor_value_info("depth", 1, ["b", "h", "w"])],
        [weights, tensor(np.array([2.0], np.float32), "bias"), tensor(np.array([1]), "axis")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    if metadata:
        helper.set_model_props(model, program_metadata(network, precision="fp32"))
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("kind", ["relative", "metric", "calibrated"])
def test_a_program_labels_photographs_at_the_size_of_the_labels(kind: str, tmp_path: Path) -> None:
    from depth_anything.data.transforms import normalize, resize_image

    network = DepthAnything("vitn", max_depth=20.0 if kind == "metric" else None)
    network.calibration = (0.3, 0.02) if kind == "calibrated" else None
    network.licence = "CC-BY-NC-4.0" if kind == "metric" else None
    typed = {} if kind == "metric" else {"licence": "MIT"}
    teacher = open_spec(str(write_program(network, tmp_path / "p.onnx")), **typed)
    assert teacher.facts.licence == ("CC-BY-NC-4.0" if kind == "metric" else "MIT")
    assert teacher.facts.unit == ("relative" if kind == "relative" else "m") and teacher.multiple == 14
    pictures = write_photographs(tmp_path, sizes=((60, 90), (100, 80)))
    label(teacher, tmp_path)
    for key, values in labels_of(tmp_path).items():
        pixels = normalize(torch.from_numpy(resize_image(pictures[key], *values.shape))[None])[0].numpy()
        expected = 2 + 0.25 * pixels[1] + 0.5 * pixels[0]
        if kind != "relative":
            expected = 1 / np.maximum(expected, 0.02 if kind == "metric" else 0.01)
        np.testing.assert_allclose(values, expected, rtol=1e-4)


def test_programs_without_metadata_are_refused(tmp_path: Path) -> None:
    network = DepthAnything("vitn")
    write_program(network, tmp_path / "other.onnx", metadata=False)
    (tmp_path / "broken.onnx").write_bytes(b"no program")
    for name in ("other", "broken", "none"):
        with pytest.raises(UserError, match=f"{name}.onnx"):
            open_spec(str(tmp_path / f"{name}.onnx"))
    with pytest.raises(UserError, match="teacher_quantity"):
        open_spec(str(write_program(network, tmp_path / "same.onnx")), quantity="depth")


# --- networks of this project ----------------------------------------------------------------------------------


def test_a_network_resizes_photographs_itself(tmp_path: Path) -> None:
    """As a member of several teachers, where others want the photographs as they are."""
    from depth_anything.data.transforms import resize_image

    torch.manual_seed(0)
    network = NetworkTeacher(DepthAnything("vitn"))
    picture = photograph(1, (60, 90))
    whole = network.predict(batch_of(picture, (56, 84))).disparity
    resized = network.predict(batch_of(resize_image(picture, 56, 84), (56, 84))).disparity
    assert torch.equal(whole, resized) and whole.shape == (1, 56, 84)


# --- more than a map -------------------------------------------------------------------------------------------


class WeightedTeacher(Teacher):
    """Stores a second map with each label."""

    multiple, input_text = 14, "a test"

    def __init__(self, facts: Teacher) -> None:
        super().__init__()
        self.facts = facts.facts

    def predict(self, photographs: Photographs) -> LabelMaps:
        maps = torch.rand(len(photographs.keys), *photographs.size)
        return LabelMaps(maps, extra={"weight": torch.full_like(maps, 0.25)})


def test_more_maps_are_stored_next_to_the_label(tmp_path: Path, module: Callable[[str], Path]) -> None:
    from depth_anything.data.codec import decode
    from depth_anything.data.reader import Records

    write_photographs(tmp_path)
    module(WAYS["attributes"])
    label(WeightedTeacher(open_spec("some_teachers:teach")), tmp_path)
    labels = open_labels(tmp_path / "labels/photos", open_set(tmp_path / "photos"))
    _, fields = Records(labels).read("photos/0", 0)
    assert sorted(fields) == ["disparity.f32", "weight.f32"]
    assert (decode(fields["weight.f32"]) == 0.25).all()
    assert json.loads((tmp_path / "labels/photos/0.json").read_text())["records"] == 3


def test_labels_of_a_function_are_the_same_after_a_stop(
    module: Callable[[str], Path], tmp_path: Path
) -> None:
    write_photographs(tmp_path, counts=(3, 3))
    module(WAYS["attributes"])
    teacher = open_spec("some_teachers:teach")
    label(teacher, tmp_path, labels="whole", batch_size=1)
    with pytest.raises(KeyboardInterrupt):
        label(teacher, tmp_path, batch_size=1, stop_after=5)
    label(teacher, tmp_path, batch_size=1)
    assert files_of(tmp_path / "labels/photos") == files_of(tmp_path / "whole/photos")


def test_official_metric_weights_are_inverted(tmp_path: Path) -> None:
    """By the name of the file, which says the range; "vits" is 22 million parameters and quick."""
    from depth_anything.data.transforms import normalize
    from depth_anything.training.initialization import (
        open_run_teacher,
    )

    torch.manual_seed(2)
    network = DepthAnything("vits", max_depth=20.0).eval()
    file = tmp_path / "depth_anything_v2_metric_hypersim_vits.pth"
    save_model(network, file, format="official")
    config = make_config("stage=pseudolabel", "size=tiny", teacher=str(file), image_size=518)
    teacher = open_run_teacher(config)
    assert teacher.facts.unit == "m" and teacher.facts.conversion == "1 / depth, depth from 0.02 to 20 m"
    assert teacher.facts.licence == "Apache-2.0"  # as the authors say for the small ones
    picture = batch_of(photograph(0, (56, 84)), (56, 84))
    with torch.no_grad():
        expected = 1 / network(normalize(picture.image)).clamp(min=0.02)
        torch.testing.assert_close(teacher.predict(picture).disparity, expected)
