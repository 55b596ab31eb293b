"""Several teachers as one, and labels of crops: what is stored, and a student that uses it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_configs import make_config
from torch import Tensor

from depth_anything import DepthAnything, save_model
from depth_anything.data.codec import decode
from depth_anything.data.dataset import StreamDataset
from depth_anything.data.label_fields import LabelOptions, decode_boxes
from depth_anything.data.labels import open_labels
from depth_anything.data.reader import JoinedRecords, Records
from depth_anything.data.sample import Frame, decode_record, encode_frame
from depth_anything.data.shards import open_set, write_manifest
from depth_anything.data.tars import ShardError, write_shard
from depth_anything.errors import UserError
from depth_anything.progress import ProgressLine
from depth_anything.teachers.combine import RULES, agreement_map, align_maps, choose_teacher
from depth_anything.teachers.crop_teacher import CropTeacher
from depth_anything.teachers.ensemble_teacher import EnsembleTeacher
from depth_anything.teachers.folder_teacher import FolderTeacher
from depth_anything.teachers.network_teacher import NetworkTeacher
from depth_anything.teachers.teacher import LabelMaps, Photographs, Teacher, TeacherFacts
from depth_anything.training.check_config import validate_config
from depth_anything.training.config import RunConfig
from depth_anything.training.initialization import open_run_teacher
from depth_anything.training.provenance import add_provenance
from depth_anything.training.pseudolabel import PseudoLabel, ShardBatches, ShardData, label_data_arguments

SIZE = 28


class FakeTeacher(Teacher):
    """Gives maps that were made for it, and counts what it was asked."""

    multiple, resized, input_text = 14, True, "given maps"

    def __init__(self, maps: Tensor, name: str = "a", *, failed: Sequence[int] = (), **facts: Any) -> None:
        super().__init__()
        self.maps, self.missing, self.asked = maps, set(failed), []
        known = {"licence": "MIT", "quantity": "disparity", "unit": "relative", "conversion": None}
        self.facts = TeacherFacts(fingerprint=f"sha256:{name}", file=name, **{**known, **facts})

    def predict(self, photographs: Photographs) -> LabelMaps:
        positions = [int(key.rpartition("/")[2]) for key in photographs.keys]
        self.asked += positions
        failed = {row: f"no map by {self.facts.file}" for row, i in enumerate(positions) if i in self.missing}
        return LabelMaps(self.maps[positions].clone(), failed)


def photographs(count: int) -> Photographs:
    keys = [f"s/0/{i}" for i in range(count)]
    return Photographs(torch.zeros(count, SIZE, SIZE, 3, dtype=torch.uint8), (SIZE, SIZE), keys, [{}] * count)


def random_maps(count: int, seed: int) -> Tensor:
    return torch.rand(count, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def test_first_asks_the_others_only_for_images_without_a_map() -> None:
    a, b = FakeTeacher(random_maps(4, 0), "a", failed=[1, 3]), FakeTeacher(random_maps(4, 1), "b", failed=[3])
    a.maps[2, 5, 5] = torch.nan
    result = EnsembleTeacher([a, b]).predict(photographs(4))
    assert a.asked == [0, 1, 2, 3] and b.asked == [1, 2, 3]
    assert torch.equal(result.disparity[:3], torch.stack([a.maps[0], b.maps[1], b.maps[2]]))
    assert result.failed == {3: "no map by a"} and not result.extra


def test_random_asks_the_teacher_of_the_key_in_any_batch() -> None:
    teachers = [FakeTeacher(random_maps(40, seed), str(seed)) for seed in range(3)]
    ensemble = EnsembleTeacher(teachers, rule="random", shares=[2, 1, 1])
    expected = [choose_teacher(f"s/0/{i}", [2, 1, 1]) for i in range(40)]
    assert set(expected) == {0, 1, 2}
    result = ensemble.predict(photographs(40)).disparity
    assert all(torch.equal(result[i], teachers[k].maps[i]) for i, k in enumerate(expected))
    assert sum(len(teacher.asked) for teacher in teachers) == 40
    kept = EnsembleTeacher(teachers, rule="random", shares=[2, 1, 1], confidence=True).predict(
        photographs(40)
    )
    assert torch.equal(kept.disparity, result) and kept.extra["confidence"].shape == result.shape


def test_mean_and_confidence_combine_what_there_is() -> None:
    scene = random_maps(3, 0)
    a, b = FakeTeacher(scene, "a"), FakeTeacher(3 * scene + 0.1 * random_maps(3, 1), "b", failed=[2])
    maps = torch.stack([a.maps, b.maps])
    maps[1, 2] = torch.nan
    aligned = align_maps(maps)
    mean = EnsembleTeacher([a, b], rule="mean").predict(photographs(3))
    torch.testing.assert_close(mean.disparity, aligned.maps.nanmean(0))
    assert not mean.extra and not mean.failed and torch.equal(mean.disparity[2], a.maps[2])
    kept = EnsembleTeacher([a, b], rule="confidence", tolerance=0.2).predict(photographs(3))
    assert torch.equal(kept.extra["confidence"], agreement_map(aligned, tolerance=0.2))
    assert not kept.extra["confidence"][2].any() and 0 < kept.extra["confidence"][0].mean() < 1


def test_mean_is_the_mean_and_confidence_the_median_of_three() -> None:
    scene = random_maps(2, 0)
    teachers = [FakeTeacher(scene + s * random_maps(2, s), str(s)) for s in range(3)]
    aligned = align_maps(torch.stack([teacher.maps for teacher in teachers])).maps
    mean, median = (
        EnsembleTeacher(teachers, rule=rule).predict(photographs(2)) for rule in ("mean", "confidence")
    )
    torch.testing.assert_close(mean.disparity, aligned.mean(0))
    torch.testing.assert_close(median.disparity, aligned.median(0).values)
    assert (mean.disparity - median.disparity).abs().mean() > 0.01


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("confidence", [False, True])
def test_an_image_fails_only_if_every_teacher_fails(rule: str, confidence: bool) -> None:
    a, b = FakeTeacher(random_maps(3, 0), "a", failed=[0, 1]), FakeTeacher(random_maps(3, 1), "b", failed=[1])
    result = EnsembleTeacher([a, b], rule=rule, confidence=confidence).predict(photographs(3))
    assert list(result.failed) == [1] and torch.equal(result.disparity[0], b.maps[0])


@pytest.mark.parametrize("confidence", [False, True])
@pytest.mark.parametrize("hole", [False, True])
def test_random_falls_back_to_the_other_teachers_in_their_order(confidence: bool, hole: bool) -> None:
    """Where the chosen teacher fails, or its map has a hole."""
    chosen = [choose_teacher(f"s/0/{i}", [1, 1, 1]) for i in range(12)]
    assert set(chosen) == {0, 1, 2}
    teachers = []
    for k in range(3):
        lost = [i for i in range(12) if chosen[i] == k]
        maps = random_maps(12, k)
        if hole:
            maps[lost, 3, 3] = torch.nan
        teachers.append(FakeTeacher(maps, str(k), failed=() if hole else lost))
    result = EnsembleTeacher(teachers, rule="random", confidence=confidence).predict(photographs(12))
    assert not result.failed
    for i, k in enumerate(chosen):
        assert torch.equal(result.disparity[i], teachers[1 if k == 0 else 0].maps[i])


def test_the_record_joins_the_facts_and_the_fingerprint_depends_on_the_rule() -> None:
    a = FakeTeacher(random_maps(1, 0), "a")
    b = FakeTeacher(
        random_maps(1, 1), "b", licence="CC-BY-NC-4.0", quantity="depth", unit="m", conversion="1 / depth"
    )
    record = EnsembleTeacher([a, b], rule="mean").describe()
    assert (
        record["licence"] == "CC-BY-NC-4.0 AND MIT" and record["file"] == "[a,b]" and record["rule"] == "mean"
    )
    assert (record["quantity"], record["unit"]) == ("disparity", "relative")
    assert record["conversion"] == "teacher 2: 1 / depth"
    assert record["teachers"] == [a.describe(), b.describe()]
    c = FakeTeacher(random_maps(1, 1), "c", licence=None)
    assert EnsembleTeacher([a, c]).describe()["licence"] == "MIT AND unknown"
    assert EnsembleTeacher([b, b]).describe()["unit"] == "m"
    others = [
        EnsembleTeacher([a, b], rule="mean"),
        EnsembleTeacher([b, a], rule="mean"),
        EnsembleTeacher([a, b], rule="first"),
        EnsembleTeacher([a, b], rule="mean", confidence=True),
        EnsembleTeacher([a, b], rule="mean", confidence=True, tolerance=1.0),
        EnsembleTeacher([a, b], rule="random"),
        EnsembleTeacher([a, b], rule="random", shares=[7, 3]),
        EnsembleTeacher([a, c], rule="mean"),
    ]
    assert len({each.facts.fingerprint for each in others}) == len(others)
    assert others[0].facts.fingerprint == record["fingerprint"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"teacher": "A", "label_confidence": True}, "label_confidence=true"),
        ({"teacher": ["A"], "teacher_rule": "confidence"}, "teacher_rule=confidence"),
        ({"teacher": ["A", "B"], "teacher_shares": [1, 2]}, "teacher_shares"),
        ({"teacher": ["A", "B"], "teacher_rule": "random", "teacher_shares": [1, 2, 3]}, "teacher_shares"),
    ],
)
def test_keys_that_the_teachers_do_not_use_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        validate_config(make_config("stage=pseudolabel", "encoder=vitn", **changes))


# --- Labels on disk, made by two networks ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write two networks and a set of photographs larger than their labels."""
    root = tmp_path_factory.mktemp("ensemble")
    for seed in range(2):
        torch.manual_seed(seed)
        model = DepthAnything("vitn")
        model.input_size, model.licence = SIZE, ("MIT", "Apache-2.0")[seed]
        save_model(model, root / f"{seed}.safetensors")
    infos = []
    for number, count in enumerate((3, 2)):
        records = []
        for i in range(count):
            rng = np.random.default_rng([number, i])
            pixels = rng.integers(0, 256, (60, 90 if i % 2 else 60, 3), np.uint8)
            frame = Frame(f"photos/{number}/{i}", pixels, {})
            records.append((frame.key, encode_frame(frame, codec="f32")))
        infos.append(write_shard(root / f"photos/{number}.tar", records))
    write_manifest(root / "photos", name="photos", shards=infos, meta={"licence": "CC0-1.0"})
    return root


def labeling(root: Path, labels: str, **changes: Any) -> RunConfig:
    settings = {
        "encoder": "vitg",  # not that of the networks
        "teacher": [str(root / "0.safetensors"), str(root / "1.safetensors")],
        "data__sets": {"photos": str(root / "photos")},
        "data__labels": str(root / labels),
        "data__codec": "f32",
        "image_size": SIZE,
    }
    settings |= {"data__image_size": SIZE, "batch_size": 2, "data__batch_size": 2}
    return make_config("stage=pseudolabel", **{**settings, **changes})


@torch.no_grad()
def label(config: RunConfig) -> tuple[Teacher, JoinedRecords]:
    """Label as the command does, in this process and without Lightning's Trainer."""
    teacher = open_run_teacher(config).eval()
    arguments = {key: value for key, value in config.data.as_dict().items() if key != "_target_"}
    arguments |= label_data_arguments(teacher, image_size=SIZE, precision="32-true")
    data = ShardData(**arguments)
    module = PseudoLabel(teacher.module_argument(), data)
    module._bar = ProgressLine("labeling", enabled=False)
    batches = ShardBatches(
        data.labels,
        image_size=SIZE,
        patch=teacher.multiple,
        batch_size=2,
        rank=0,
        world=1,
        resized=data.resized,
    )
    for number, batch in enumerate(batches):
        module.predict_step(batch, number)
    module.on_predict_end()
    images = open_set(data.labels["photos"].images.root)
    return teacher, JoinedRecords(images, open_labels(data.labels["photos"].root, images))


def records_of(joined: JoinedRecords) -> dict[str, dict[str, bytes]]:
    return dict(joined.read(shard, index) for shard, count in joined.shards for index in range(count))


def test_labels_of_two_networks_hold_their_agreement_and_their_facts(root: Path) -> None:
    teacher, joined = label(labeling(root, "confident", teacher_rule="confidence"))
    assert isinstance(teacher, EnsembleTeacher) and teacher.resized
    meta = joined.labels.meta
    assert meta["licence"] == "Apache-2.0 AND CC0-1.0 AND MIT"
    assert meta["teacher"]["rule"] == "confidence" and meta["teacher"]["confidence"] == {"tolerance": 0.5}
    assert [each["licence"] for each in meta["teacher"]["teachers"]] == ["MIT", "Apache-2.0"]
    assert len({each["fingerprint"] for each in meta["teacher"]["teachers"]}) == 2
    sidecar = json.loads((root / "confident/photos/0.json").read_text())
    assert sidecar["teacher"] == meta["teacher"]
    records, own = Records(joined.images), records_of(joined)
    assert len(own) == 5
    for shard, count in records.shards:
        for index in range(count):
            frame = decode_record(*records.read(shard, index))
            fields = own[frame.key]
            size = decode(fields["disparity.f32"]).shape
            shown = Photographs(torch.from_numpy(frame.image)[None], size, [frame.key], [{}])
            with torch.no_grad():
                maps = torch.stack([each.predict(shown).disparity for each in teacher.members])
            aligned = align_maps(maps)
            expected = aligned.maps.nanmean(0)[0]
            np.testing.assert_allclose(decode(fields["disparity.f32"]), expected, atol=1e-5)
            agreement = agreement_map(aligned)[0].numpy()
            np.testing.assert_allclose(decode(fields["confidence.u8"]), agreement, atol=1 / 500)
    model = DepthAnything("vitn")
    add_provenance(model, make_config("stage=student", "encoder=vitn"), [joined])
    assert model.licence == "Apache-2.0 AND CC0-1.0 AND MIT"
    assert model.origin["data"][0]["teacher"]["file"] == "[0.safetensors,1.safetensors]"


def test_another_rule_is_another_teacher(root: Path) -> None:
    label(labeling(root, "ruled", teacher_rule="mean"))
    label(labeling(root, "ruled", teacher_rule="mean"))  # the same again
    for changes in ({"teacher_rule": "random"}, {"teacher_rule": "mean", "label_crops": 1}):
        with pytest.raises(ShardError, match="labeled by|was made with"):
            label(labeling(root, "ruled", **changes))


def test_crops_are_what_the_teacher_predicts_for_them_alone(root: Path) -> None:
    teacher, joined = label(labeling(root, "cropped", teacher_rule="confidence", label_crops=2))
    _, plain = label(labeling(root, "uncropped", teacher_rule="confidence"))
    assert isinstance(teacher, CropTeacher) and not teacher.resized
    assert joined.labels.meta["teacher"]["crops"] == {"count": 2, "scale": 0.5, "size": [SIZE, SIZE]}
    whole, images = records_of(plain), Records(joined.images)
    for key, fields in records_of(joined).items():
        assert {"crops.json", "crop0.disparity.f32", "crop1.disparity.f32", "crop1.confidence.u8"} < set(
            fields
        )
        np.testing.assert_allclose(
            decode(fields["disparity.f32"]), decode(whole[key]["disparity.f32"]), atol=1e-5
        )
        shard, _, index = key.rpartition("/")
        image = decode_record(*images.read(shard, int(index))).image
        for number, box in enumerate(decode_boxes(fields, *image.shape[:2])):
            assert box[2:] == (30, 30)
            crop = torch.from_numpy(np.ascontiguousarray(box.cut(image)))[None]
            with torch.no_grad():
                expected = teacher.teacher.predict(Photographs(crop, (SIZE, SIZE), [key], [{}])).disparity[0]
            got = decode(fields[f"crop{number}.disparity.f32"])
            np.testing.assert_allclose(got, expected, atol=1e-5)
    dataset = StreamDataset(
        [joined], seed=0, streams=2, image_size=SIZE,
        label_options=LabelOptions("weight", crop_share=0.5, local=True),
    )  # fmt: skip
    batches = dataset.__getitems__(list(range(10)))
    assert not batches["failed"] and batches["local_valid"].flatten(1).any(1).any()


def test_a_single_network_may_label_crops(root: Path) -> None:
    config = labeling(root, "one", label_crops=1, teacher=str(root / "1.safetensors"), encoder="vitn")
    teacher, joined = label(config)
    assert isinstance(teacher, CropTeacher) and isinstance(teacher.teacher, NetworkTeacher)
    assert "crop0.disparity.f32" in records_of(joined)["photos/0/0"]
    assert joined.labels.meta["teacher"]["fingerprint"] == teacher.teacher.facts.fingerprint


def test_a_folder_of_maps_has_no_crops(tmp_path: Path) -> None:
    (tmp_path / "maps").mkdir()
    np.save(tmp_path / "maps/a.npy", np.ones((4, 4), np.float32))
    folder = FolderTeacher(tmp_path / "maps", spec="folder:maps", multiple=14, quantity="disparity")
    for teacher in (folder, EnsembleTeacher([FakeTeacher(random_maps(1, 0)), folder])):
        with pytest.raises(UserError, match=r"label_crops=2.*folder:maps"):
            CropTeacher(teacher, count=2, scale=0.5, image_size=SIZE)
