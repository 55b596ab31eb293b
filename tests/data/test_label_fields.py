"""Optional fields of labels: boxes from the key, confidence and local labels as a sample gets them."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from depth_anything.data.codec import decode, encode
from depth_anything.data.dataset import StreamDataset
from depth_anything.data.label_fields import (
    LABEL_WEIGHTS,
    LabelOptions,
    check_label_fields,
    decode_boxes,
    draw_boxes,
    encode_boxes,
    is_label_field,
)
from depth_anything.data.reader import JoinedRecords, Records
from depth_anything.data.sample import Frame, encode_frame
from depth_anything.data.shards import write_manifest
from depth_anything.data.stream import LABEL_CROP, random_uniform
from depth_anything.data.tars import write_shard
from depth_anything.data.transforms import draw_crop
from depth_anything.training import config

SIDE, COUNT, IMAGE, LABEL = 28, 6, (60, 84), (28, 42)
OPTIONS: dict[str, Any] = {"seed": 5, "streams": 3, "image_size": SIDE}


def picture(number: int) -> np.ndarray:
    """Make an image whose pixels tell their position."""
    rows, columns = np.mgrid[0 : IMAGE[0], 0 : IMAGE[1]]
    return np.stack([rows * 4, columns * 3, np.full(IMAGE, number * 20)], 2).astype(np.uint8)


def labels_of(number: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(number)
    return {
        "disparity": rng.random(LABEL, np.float32),
        "confidence": rng.integers(0, 256, LABEL).astype(np.float32) / np.float32(255),
        "crop0.disparity": rng.random((SIDE, SIDE), np.float32),
        "crop0.confidence": rng.integers(0, 256, (SIDE, SIDE)).astype(np.float32) / np.float32(255),
        "crop1.disparity": rng.random((SIDE, SIDE), np.float32),
        "crop1.confidence": rng.integers(0, 256, (SIDE, SIDE)).astype(np.float32) / np.float32(255),
    }


def boxes_of(number: int) -> list[Any]:
    return draw_boxes(f"s/0/{number}", *IMAGE, count=2, scale=0.5)


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> JoinedRecords:
    root = tmp_path_factory.mktemp("sets")
    images, labels = [], []
    for i in range(COUNT):
        png = cv2.imencode(".png", picture(i)[..., ::-1])[1].tobytes()
        key = f"s/0/{i}"
        fields = encode_frame(Frame(key, picture(i), {}), codec="f32", original=png)
        images.append((key, {**fields, "confidence.u8": b"not that of the label"}))
        extra = {
            f"{name}.{'u8' if name.endswith('confidence') else 'f32'}": encode(
                values, codec="u8" if name.endswith("confidence") else "f32"
            )
            for name, values in labels_of(i).items()
        }
        if i:  # the first record is as older versions wrote it
            extra["crops.json"] = encode_boxes(*IMAGE, boxes_of(i))
        else:
            extra = {"disparity.f32": extra["disparity.f32"]}
        labels.append((key, extra))
    made = write_manifest(root / "s", name="s", shards=[write_shard(root / "s/0.tar", images)], meta={})
    meta = {"images": {"hashes": {shard.name: shard.hash for shard in made.shards}}}
    rows = [write_shard(root / "l/0.tar", labels)]
    return JoinedRecords(made, write_manifest(root / "l", name="s", shards=rows, meta=meta))


def test_confidence_codec_keeps_every_255th_and_refuses_other_values() -> None:
    values = np.random.default_rng(0).random((37, 23)).astype(np.float32)
    values[0, :2] = 0, 1
    data = encode(values, codec="u8")
    assert np.abs(decode(data) - values).max() <= 1 / 510 + 1e-7 and decode(data)[0, :2].tolist() == [0, 1]
    exact = np.round(values * 255).astype(np.float32) / np.float32(255)
    assert np.array_equal(decode(encode(exact, codec="u8")), exact)
    assert np.array_equal(decode(data, rows=slice(3, 9), columns=slice(5, 7)), decode(data)[3:9, 5:7])
    smooth = encode(np.tile(np.linspace(0, 1, 300, dtype=np.float32), (300, 1)), codec="u8")
    assert len(smooth) < 300 * 300 / 50
    for bad in (np.nan, -0.01, 1.01, np.inf):
        with pytest.raises(ValueError, match="from 0 to 1"):
            encode(np.full((2, 2), bad, np.float32), codec="u8")


def test_boxes_depend_on_the_key_and_lie_in_the_image() -> None:
    boxes = [draw_boxes(f"s/{i}", 100, 61, count=3, scale=0.5) for i in range(200)]
    assert boxes == [draw_boxes(f"s/{i}", 100, 61, count=3, scale=0.5) for i in range(200)]
    assert draw_boxes("s/0", 100, 61, count=1, scale=0.5) == boxes[0][:1]
    tops, lefts = ([box[axis] for of_image in boxes for box in of_image] for axis in (0, 1))
    assert {box[2:] for of_image in boxes for box in of_image} == {(30, 30)}
    assert min(tops) < 3 and max(tops) > 67 and max(tops) <= 70
    assert min(lefts) == 0 and max(lefts) == 31
    assert draw_boxes("s", 5, 5, count=1, scale=0.01)[0][2:] == (1, 1)
    assert draw_boxes("s", 7, 5, count=1, scale=1.0)[0].left == 0


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b'{"image": [60, 84], "boxes": [[0, 0, 5]]}',
        b'{"image": [84, 60], "boxes": []}',
        b'{"image": [60, 84], "boxes": [[0, 0, 61, 5]]}',
        b'{"image": [60, 84], "boxes": [[-1, 0, 5, 5]]}',
        b'{"image": [60, 84], "boxes": [[0, 0, 0, 5]]}',
        b'{"image": [60, 84], "boxes": [[0, null, 5, 5]]}',
    ],
)
def test_damaged_boxes_are_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"crops\.json"):
        decode_boxes({"crops.json": content}, *IMAGE)


def test_verify_finds_a_box_without_a_label_and_a_damaged_field() -> None:
    boxes = {"crops.json": encode_boxes(*IMAGE, boxes_of(1))}
    label = encode(np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4), codec="q12")
    check_label_fields({**boxes, "crop0.disparity.q12": label, "crop1.disparity.q12": label}, IMAGE)
    with pytest.raises(ValueError, match=r"crop1\.disparity is missing"):
        check_label_fields({**boxes, "crop0.disparity.q12": label}, IMAGE)
    with pytest.raises(ValueError, match=r"confidence\.u8"):
        check_label_fields({"confidence.u8": b"?"}, IMAGE)


def test_boxes_survive_and_are_readable_json() -> None:
    data = encode_boxes(*IMAGE, boxes_of(1))
    assert decode_boxes({"crops.json": data}, *IMAGE) == boxes_of(1)
    assert json.loads(data) == {"image": [60, 84], "boxes": [list(box) for box in boxes_of(1)]}


def test_fields_of_labels_are_told_from_those_of_images() -> None:
    for name in ("disparity.q12", "depth.f32", "confidence.u8", "crops.json", "crop12.disparity.q12"):
        assert is_label_field(name)
    for name in ("jpg", "json", "cropped.jpg", "crop.txt", "caption.txt"):
        assert not is_label_field(name)


def reference_local(values: np.ndarray, box: Any, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Place the map of a box pixel by pixel: the value under the center of each pixel of sample n."""
    crop = draw_crop(*LABEL, SIDE, seed=5, n=n)
    out, inside = np.zeros((SIDE, SIDE), np.float32), np.zeros((SIDE, SIDE), bool)
    for y, x in np.ndindex(SIDE, SIDE):
        column = crop.side - 1 - x if crop.flip else x
        down = Fraction(2 * (crop.top + y) + 1, 2) * IMAGE[0] / LABEL[0] - box.top
        across = Fraction(2 * (crop.left + column) + 1, 2) * IMAGE[1] / LABEL[1] - box.left
        if 0 <= down < box.height and 0 <= across < box.width:
            inside[y, x] = True
            out[y, x] = values[int(down / box.height * SIDE), int(across / box.width * SIDE)]
    return out, inside


def cut(values: np.ndarray, n: int) -> np.ndarray:
    crop = draw_crop(*values.shape, SIDE, seed=5, n=n)
    square = values[crop.top : crop.top + SIDE, crop.left : crop.left + SIDE]
    return square[:, ::-1] if crop.flip else square


def sample(joined: JoinedRecords, n: int, **options: Any) -> tuple[int, dict[str, np.ndarray]]:
    """Return the number of sample n's record, and the sample."""
    dataset = StreamDataset([joined], **OPTIONS, label_options=LabelOptions(**options))
    [record] = [index for _, _, index in [dataset.stream.locate(n)]]
    batch = dataset[n]
    assert not batch.pop("failed")
    return record, {name: values[0].numpy() for name, values in batch.items()}


def test_confidence_follows_crop_and_flip_of_the_label(joined: JoinedRecords) -> None:
    for n in range(2 * COUNT):
        number, got = sample(joined, n, weight="weight")
        made = labels_of(number)
        np.testing.assert_array_equal(got["target"], cut(made["disparity"], n))
        expected = cut(made["confidence"], n) if number else np.ones((SIDE, SIDE))
        np.testing.assert_array_equal(got["confidence"], expected)
        number, masked = sample(joined, n, weight="mask", threshold=0.4)
        np.testing.assert_array_equal(masked["valid"], expected >= 0.4)
        np.testing.assert_array_equal(masked["target"], np.where(expected >= 0.4, got["target"], 0))
        assert "confidence" not in masked


def test_a_local_label_lies_where_its_box_is(joined: JoinedRecords) -> None:
    used = set()
    for n in range(4 * COUNT):
        number, got = sample(joined, n, local=True, weight="weight")
        if not number:
            assert not got["local_valid"].any() and not got["local"].any()
            continue
        which = int(random_uniform(5, n, 2, purpose=LABEL_CROP)[1] * 2)
        used.add(which)
        box, made = boxes_of(number)[which], labels_of(number)
        values, inside = reference_local(made[f"crop{which}.disparity"], box, n)
        np.testing.assert_array_equal(got["local_valid"], inside)
        np.testing.assert_array_equal(got["local"], values)
        confidence, _ = reference_local(made[f"crop{which}.confidence"], box, n)
        np.testing.assert_array_equal(got["local_confidence"], confidence)
        _, masked = sample(joined, n, local=True, weight="mask", threshold=0.4)
        np.testing.assert_array_equal(masked["local_valid"], inside & (confidence >= 0.4))
        np.testing.assert_array_equal(masked["local"], np.where(confidence >= 0.4, values, 0))
    assert used == {0, 1}


def test_a_share_of_the_samples_sees_a_crop_alone(joined: JoinedRecords) -> None:
    crops = 0
    for n in range(8 * COUNT):
        number, got = sample(joined, n, crop_share=0.4, local=True)
        share, which = random_uniform(5, n, 2, purpose=LABEL_CROP)
        if share >= 0.4 or not number:
            np.testing.assert_array_equal(got["target"], cut(labels_of(number)["disparity"], n))
            continue
        crops, which = crops + 1, int(which * 2)
        assert not got["local_valid"].any()
        np.testing.assert_array_equal(got["target"], cut(labels_of(number)[f"crop{which}.disparity"], n))
        box = boxes_of(number)[which]
        shown = picture(number)[box.top : box.top + box.height, box.left : box.left + box.width]
        expected = cv2.resize(shown, (SIDE, SIDE), interpolation=cv2.INTER_AREA).astype(int)
        expected = expected[:, ::-1] if draw_crop(SIDE, SIDE, SIDE, seed=5, n=n).flip else expected
        assert np.abs(got["image"].astype(int) - expected).max() <= 8
    assert 10 < crops < 30


def test_without_options_a_sample_is_as_before(joined: JoinedRecords) -> None:
    plain = StreamDataset([joined], **OPTIONS)[3]
    assert set(plain) == {"image", "target", "valid", "sample", "failed"}


def test_damaged_extras_replace_the_record_and_name_it(tmp_path: Path) -> None:
    key, png = "s/0/0", cv2.imencode(".png", picture(0))[1].tobytes()
    label = encode(labels_of(0)["disparity"], codec="f32")
    records = []
    for i in range(2):
        fields = {"png": png, "json": b"{}", "disparity.f32": label, "confidence.u8": label if i else b"x"}
        records.append((f"s/0/{i}", fields))
    made = write_manifest(tmp_path, name="s", shards=[write_shard(tmp_path / "0.tar", records)], meta={})
    dataset = StreamDataset([Records(made)], **OPTIONS, label_options=LabelOptions(weight="weight"))
    failed = [failure for n in range(2) for failure in dataset[n]["failed"]]
    assert len(failed) == 1 and key in failed[0]


def test_the_config_knows_the_label_weights() -> None:
    assert config.LABEL_WEIGHTS == LABEL_WEIGHTS
