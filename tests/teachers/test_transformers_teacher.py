"""Transformers models as teachers: maps of their own pipeline, known quantities, refusal of bad folders."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from fork_server import ForkServer
from made_teachers import batch_of, files_of, label, labels_of, largest_difference, write_photographs
from made_transformers import FAMILIES, NEAR_FAMILY, make_transformers_folder
from PIL import Image
from safetensors.torch import load_file, save_file

from depth_anything.data.labels import open_labels
from depth_anything.data.shards import open_set
from depth_anything.errors import UserError
from depth_anything.teachers.open_teacher import is_present, open_teacher
from depth_anything.teachers.teacher import Photographs, Teacher

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4
"""Of the range of a map."""
ONE_AT_A_TIME = 1e-6
"""The same for batch_size=1, as the pipeline runs a model; a larger batch is multiplied, and rounded, otherwise."""
# Family → quantity, unit, farthest and nearest depth in meters. The numbers are those of made_transformers.py.
KINDS = {
    "dpt": ("disparity", "relative", None, None),
    "zoedepth": ("depth", "m", 10, 0.01),
    "depth_pro": ("depth", "m", None, 0.01),
    "depth_anything": ("disparity", "relative", None, None),
    "depth_anything-metric": ("depth", "m", 20, 0.02),
    "glpn": ("depth", "m", 10, 0.01),
    NEAR_FAMILY: ("depth", "m", 20, 0.02),
}


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity(verbosity)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for family in (*FAMILIES, NEAR_FAMILY):
        make_transformers_folder(family, root / family)
    return root


def open_folder(folder: Path, **typed: str) -> Teacher:
    return open_teacher(f"transformers:{folder}", multiple=14, **typed)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def teachers(folders: Path) -> Callable[[str], Teacher]:
    """The teacher of each family, opened once."""
    return cache(lambda family: open_folder(folders / family))


def pipeline_disparity(family: str, folder: Path, pictures: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What transformers' own pipeline returns, and its reciprocal for depth."""
    pipeline = transformers.pipeline("depth-estimation", model=str(folder))
    nearest = KINDS[family][3]
    maps = {}
    for key, picture in pictures.items():
        values = pipeline(Image.fromarray(picture))["predicted_depth"].numpy()
        maps[key] = values if nearest is None else 1 / np.maximum(values, nearest)
    return maps


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_equal_the_pipeline(
    family: str, folders: Path, teachers: Callable[[str], Teacher], tmp_path: Path
) -> None:
    pictures = write_photographs(tmp_path)
    assert "5 labels of photos" in label(teachers(family), tmp_path)
    label(teachers(family), tmp_path, labels="single", batch_size=1)
    expected = pipeline_disparity(family, folders / family, pictures)
    maps = labels_of(tmp_path)
    assert {key: values.shape for key, values in maps.items()} == {
        key: picture.shape[:2] for key, picture in pictures.items()
    }
    assert all(expected[key].std() > 0.02 * np.abs(expected[key]).mean() for key in pictures)
    assert largest_difference(maps, expected.__getitem__) < TOLERANCE
    assert largest_difference(labels_of(tmp_path, "single"), expected.__getitem__) < ONE_AT_A_TIME


def test_labels_equal_the_pipeline_where_depth_is_near_zero(
    folders: Path, teachers: Callable[[str], Teacher], tmp_path: Path
) -> None:
    """Bicubic resizing makes depth negative; both sides are compared after the stated conversion."""
    pictures = write_photographs(tmp_path)
    label(teachers(NEAR_FAMILY), tmp_path, batch_size=1)
    expected = pipeline_disparity(NEAR_FAMILY, folders / NEAR_FAMILY, pictures)
    assert max(values.max() for values in expected.values()) == pytest.approx(1 / KINDS[NEAR_FAMILY][3])
    assert largest_difference(labels_of(tmp_path), expected.__getitem__) < ONE_AT_A_TIME


@pytest.mark.parametrize("family", FAMILIES)
def test_the_label_set_records_what_the_model_predicts(
    family: str, teachers: Callable[[str], Teacher]
) -> None:
    quantity, unit, farthest, nearest = KINDS[family]
    record = teachers(family).describe()
    assert (record["quantity"], record["unit"], record["licence"]) == (quantity, unit, "Apache-2.0")
    assert (record["conversion"] is None) == (quantity == "disparity")
    assert all(f"{value:g} " in f"{record['conversion']} " for value in (farthest, nearest) if value)


def test_a_map_of_another_size_is_that_of_the_models_own_post_processing(
    folders: Path, teachers: Callable[[str], Teacher]
) -> None:
    picture = np.array(Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5).resize((150, 100)))
    size = (56, 84)
    for family in ("zoedepth", "depth_pro", "dpt"):
        teacher = teachers(family)
        processor = transformers.AutoImageProcessor.from_pretrained(folders / family)
        model = transformers.AutoModelForDepthEstimation.from_pretrained(folders / family)
        with torch.no_grad():
            output = model(**processor(images=Image.fromarray(picture), return_tensors="pt"))
        source = {"source_sizes": [(100, 150)]} if family == "zoedepth" else {}
        [theirs] = processor.post_process_depth_estimation(output, target_sizes=[size], **source)
        expected = theirs["predicted_depth"].numpy()
        if family != "dpt":
            expected = 1 / np.maximum(expected, 0.01)
        ours = teacher.predict(batch_of(picture, size)).disparity[0].numpy()
        assert ours.shape == size
        assert np.abs(ours - expected).max() < TOLERANCE * np.ptp(expected), family


def test_labeling_that_was_stopped_continues_to_the_same_bytes(folders: Path, tmp_path: Path) -> None:
    write_photographs(tmp_path, counts=(3, 2, 2))
    label(open_folder(folders / "dpt"), tmp_path, labels="whole")
    with pytest.raises(KeyboardInterrupt):
        label(open_folder(folders / "dpt"), tmp_path, stop_after=4)
    assert [path.name for path in sorted((tmp_path / "labels/photos").glob("*.tar"))] == ["0.tar"]
    label(open_folder(folders / "dpt"), tmp_path)
    assert files_of(tmp_path / "labels/photos") == files_of(tmp_path / "whole/photos")


@pytest.fixture(scope="module")
def killed(
    folders: Path, tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer
) -> tuple[Path, dict[str, tuple[int, list[str]]]]:
    """Labels of each family by a process that died by SIGKILL and another that continued; and what the first left."""
    root = tmp_path_factory.mktemp("killed")
    write_photographs(root, counts=(3, 2, 2))
    tests = Path(__file__).resolve().parents[1]
    command = [sys.executable, str(tests / "teachers/killed_labeling.py"), str(folders), str(root), *FAMILIES]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"}
    done = fork_server.run(command, cwd=root, env=environment)
    assert done.returncode == 0, done.stderr
    return root, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_labeling_that_was_killed_continues_to_the_same_bytes(
    family: str, killed: tuple[Path, dict[str, tuple[int, list[str]]]]
) -> None:
    root, left = killed
    code, files = left[family]
    assert code == -signal.SIGKILL
    assert {"0.tar", ".1.lease"} <= set(files) and not {"1.tar", "manifest.json"} & set(files)
    whole = files_of(root / f"whole-{family}/photos")
    assert {"0.tar", "1.tar", "2.tar", "manifest.json"} <= set(whole)
    assert files_of(root / f"{family}/photos") == whole


def test_labels_of_another_model_are_refused(folders: Path, tmp_path: Path) -> None:
    write_photographs(tmp_path)
    copy = shutil.copytree(folders / "dpt", tmp_path / "copy")
    label(open_folder(folders / "dpt"), tmp_path)
    images = open_set(tmp_path / "photos")
    meta = open_labels(tmp_path / "labels/photos", images).meta
    assert meta["licence"] == "Apache-2.0 AND CC0-1.0" and meta["unit"] == "relative"
    assert open_folder(copy).facts.fingerprint == meta["teacher"]["fingerprint"]  # a copy is the same teacher
    config = json.loads((copy / "preprocessor_config.json").read_text())
    (copy / "preprocessor_config.json").write_text(json.dumps({**config, "image_mean": [0.4, 0.4, 0.4]}))
    with pytest.raises(UserError, match="labels=FOLDER"):
        label(open_folder(copy), tmp_path)


def test_an_unknown_model_type_needs_its_quantity(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("depth_anything.teachers.transformers_teacher.known_kind", lambda config: None)
    with pytest.raises(UserError, match="teacher_quantity=disparity.*teacher_unit=m"):
        open_folder(folders / "glpn")
    with pytest.raises(UserError, match="teacher_unit=relative"):
        open_folder(folders / "glpn", quantity="depth")
    assert open_folder(folders / "glpn", quantity="disparity").facts.unit == "relative"
    facts = open_folder(folders / "glpn", quantity="depth", unit="relative", licence="Apache-2.0").facts
    assert facts.unit == "relative" and "median" in str(facts.conversion)
    with pytest.raises(UserError, match="MIT.*Apache-2.0"):
        open_folder(folders / "glpn", licence="MIT", quantity="disparity")


def test_a_typed_quantity_replaces_that_of_the_table(folders: Path) -> None:
    facts = open_folder(folders / "dpt", quantity="depth", unit="m").facts
    assert (facts.quantity, facts.unit) == ("depth", "m")
    with pytest.raises(UserError, match="1/m"):
        open_folder(folders / "glpn", unit="1/m")


def test_a_model_without_field_of_view_has_no_meters(folders: Path) -> None:
    from depth_anything.teachers.transformers_teacher import known_kind

    config = transformers.AutoConfig.from_pretrained(folders / "depth_pro")
    config.use_fov_model = False
    assert known_kind(config).unit == "relative"
    assert known_kind(transformers.BertConfig()) is None


def test_depth_heads_of_dinov2_predict_meters() -> None:
    """facebook/dpt-dinov2-*-nyu and -kitti; Intel's DPT predicts disparity."""
    from depth_anything.teachers.transformers_teacher import known_kind

    kinds = [known_kind(transformers.DPTConfig(add_projection=flag)) for flag in (True, False)]
    assert [(kind.quantity, kind.unit) for kind in kinds] == [("depth", "m"), ("disparity", "relative")]


def edit_weights(folder: Path, drop: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(drop)}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_weights_are_refused_unless_they_are_unused(folders: Path, tmp_path: Path) -> None:
    """Intel/dpt-large lacks a layer that the network never calls (transformers issue #28292)."""
    unused = shutil.copytree(folders / "dpt", tmp_path / "unused")
    edit_weights(unused, "neck.fusion_stage.layers.0.residual_layer1.")
    picture = np.random.default_rng(0).integers(0, 256, (56, 84, 3), np.uint8)
    maps = [
        open_folder(path).predict(batch_of(picture, (56, 84))).disparity for path in (unused, folders / "dpt")
    ]
    assert torch.equal(*maps) and maps[0].isfinite().all()
    used = shutil.copytree(folders / "dpt", tmp_path / "used")
    edit_weights(used, "neck.fusion_stage.layers.1.residual_layer1.")
    with pytest.raises(UserError, match="lacks weights: neck.fusion_stage.layers.1.residual_layer1"):
        open_folder(used)


def test_pickled_weights_are_read_without_executing_code(folders: Path, tmp_path: Path) -> None:
    plain = shutil.copytree(folders / "glpn", tmp_path / "plain")
    torch.save(load_file(plain / "model.safetensors"), plain / "pytorch_model.bin")
    (plain / "model.safetensors").unlink()
    picture = batch_of(np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8), (56, 84))
    maps = [open_folder(path).predict(picture).disparity for path in (plain, folders / "glpn")]
    assert torch.equal(*maps)

    class Hostile:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"a": Hostile()}, plain / "pytorch_model.bin")
    with pytest.raises(UserError, match="plain"):
        open_folder(plain)
    assert not (tmp_path / "executed").exists()


def test_folders_that_are_no_depth_model_are_refused(folders: Path, tmp_path: Path) -> None:
    def refused(folder: Path) -> str:
        with pytest.raises(UserError) as raised:
            open_folder(folder)
        assert "\n" not in str(raised.value) and str(folder) in str(raised.value)
        return str(raised.value)

    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty")
    code = shutil.copytree(folders / "dpt", tmp_path / "code")
    config = json.loads((code / "config.json").read_text())
    auto = {"AutoConfig": "hack.Config", "AutoModelForDepthEstimation": "hack.Model"}
    (code / "config.json").write_text(json.dumps({**config, "model_type": "mine", "auto_map": auto}))
    (code / "hack.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    assert "never executed" in refused(code)
    assert not (tmp_path / "executed").exists()
    bert = tmp_path / "bert"
    transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(bert)
    refused(bert)
    half = shutil.copytree(folders / "dpt", tmp_path / "half")
    (half / "model.safetensors").unlink()
    assert "model.safetensors" in refused(half)
    (half / "model.safetensors").write_bytes(b"cut short")
    refused(half)
    bare = shutil.copytree(folders / "dpt", tmp_path / "bare")
    (bare / "preprocessor_config.json").unlink()
    refused(bare)


def test_a_model_that_the_hub_does_not_give_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folders: Path
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def offline(repository: str, **options: object) -> str:
        asked.append((repository, options["revision"]))
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert not is_present("transformers:nobody/nothing")
    with pytest.raises(UserError, match="hf download nobody/nothing.*transformers:FOLDER"):
        open_teacher("transformers:nobody/nothing@main", multiple=14)
    assert asked == [("nobody/nothing", None), ("nobody/nothing", "main")]
    with pytest.raises(UserError, match="there is no folder"):
        open_teacher(f"transformers:{tmp_path / 'none'}", multiple=14)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(folders / "dpt"))
    teacher = open_teacher("transformers:owner/dpt", multiple=14)
    assert teacher.facts.file == "transformers:owner/dpt"
    assert teacher.facts.fingerprint == open_folder(folders / "dpt").facts.fingerprint


def test_half_precision_gives_maps_near_those_of_single_precision(folders: Path) -> None:
    picture = np.array(Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5).resize((84, 56)))
    photographs: Photographs = batch_of(picture, (56, 84))
    for family in ("depth_anything-metric", "dpt"):
        teacher = open_folder(folders / family)
        exact = teacher.predict(photographs).disparity
        rounded = teacher.to(torch.bfloat16).predict(photographs).disparity
        assert rounded.dtype == torch.float32
        assert 0 < (rounded - exact).abs().max() < 0.2 * (exact.max() - exact.min())
