"""Image and caption shards: from text files, tables and existing shards; nothing is paired wrongly."""

import json
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from depth_anything.data import codec
from depth_anything.data.captions import (
    CAPTION_BYTES,
    caption_texts,
    draw_caption,
    encode_captions,
    read_captions,
    write_caption,
)
from depth_anything.data.dataset import StreamDataset
from depth_anything.data.labels import LabelSetWriter
from depth_anything.data.reader import Records
from depth_anything.data.shards import open_set
from depth_anything.errors import UserError
from depth_anything.ingest.captions import (
    CaptionedPhotographs,
    CaptionSource,
    load_caption_table,
    write_captioned_set,
)
from depth_anything.ingest.photographs import write_images
from depth_anything.ingest.writer import write_source
from depth_anything.scenes.captions import describe_scene
from depth_anything.scenes.render import SceneSource, write_scenes
from depth_anything.scenes.scene_set import SceneSetSpec
from depth_anything.training.data import TrainData

SCENES = SceneSetSpec(look="synthetic", count=1, seed=1, height=28, width=28)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    for number, name in enumerate(("a.jpg", "sub/b.png", "c.jpg")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (30, 40, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "a.txt").write_text("\ufeff  a red\ncar ", encoding="utf-8")
    (folder / "sub" / "b.txt").write_text("zwei Kätzchen", encoding="utf-8")
    return folder


def captions_of(root):
    source = Records(open_set(root))
    found = {}
    for shard, count in source.shards:
        for index in range(count):
            _, fields = source.read(shard, index)
            found[json.loads(fields["json"])["name"]] = fields["txt"].decode()
    return found


def write(photos, captions, root):
    return write_source(CaptionedPhotographs(CaptionSource(captions), root), photos, root)


def test_text_files_next_to_the_images(tmp_path, photos):
    shard_set = write(photos, photos, tmp_path / "out")
    assert captions_of(tmp_path / "out") == {"a.jpg": "a red car", "sub/b.png": "zwei Kätzchen"}
    assert shard_set.meta["skipped"]["count"] == 1 and shard_set.meta["skipped"]["files"][0][0] == "c.jpg"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", 'file,caption\n./a.jpg,"one, two"\na.jpg,three\nsub/b.png,x\n'),
        ("t.tsv", "text\tfile_name\none, two\ta.jpg\nthree\ta.jpg\nx\tsub/b.png\n"),
        (
            "t.jsonl",
            '{"path": "a.jpg", "prompt": ["one, two", "three"]}\n\n{"path": "sub/b.png", "prompt": "x"}\n',
        ),
    ],
)
def test_tables_of_captions(tmp_path, photos, name, text):
    (tmp_path / name).write_text("\ufeff" + text, encoding="utf-8")
    write(photos, tmp_path / name, tmp_path / "out")
    assert captions_of(tmp_path / "out") == {"a.jpg": "one, two\nthree", "sub/b.png": "x"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "image_id,words\n1,x\n"),
        ("t.jsonl", '{"file": 1'),
        ("t.jsonl", "[1]"),
        ("t.xml", "<a/>"),
        ("no.csv", None),
    ],
)
def test_unusable_tables_are_refused(tmp_path, name, text):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=name):
        load_caption_table(tmp_path / name)


def test_captions_of_other_images_are_refused_and_nothing_is_written(tmp_path, photos):
    (tmp_path / "t.csv").write_text("file,caption\nb.png,x\n")  # the image is sub/b.png
    with pytest.raises(UserError, match="a.jpg"):
        write(photos, tmp_path / "t.csv", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tar_cannot_name_a_text_outside_the_folder(tmp_path, photos):
    (tmp_path / "secret.txt").write_text("secret")
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(photos / "a.jpg", "../secret.jpg")
        tar.add(photos / "a.jpg", "a.jpg")
    write(tmp_path / "photos.tar", photos, tmp_path / "out")
    assert captions_of(tmp_path / "out") == {"a.jpg": "a red car"}


def test_existing_shards_are_copied_with_their_labels_and_continued(tmp_path, photos):
    scenes = write_scenes(tmp_path / "s", replace(SCENES, count=4), per_shard=2)
    keys = [f"s/0000{n // 2}/000000{n}" for n in range(4)]
    (tmp_path / "t.csv").write_text("key,caption\n" + "".join(f"{key},scene {key}\n" for key in keys[:3]))
    arguments = (str(scenes.root), tmp_path / "t.csv", tmp_path / "out")
    first = write_captioned_set(*arguments, licence="CC0-1.0")
    assert first.records == 3 and first.meta["quantity"] == "depth" and first.meta["licence"] == "CC0-1.0"
    old, new = Records(scenes), Records(first)
    for number, key in enumerate(keys[:3]):
        _, fields = old.read(f"s/0000{number // 2}", number % 2)
        found, copied = new.read(f"out/0000{number // 2}", number % 2)
        assert found == key and copied.pop("txt") == f"scene {key}".encode() and copied == fields
    digest = first.digest
    (tmp_path / "out" / "00000.tar").unlink()
    (tmp_path / "out" / "manifest.json").unlink()
    assert write_captioned_set(*arguments).digest == digest


def test_plain_photographs_as_shards_are_found_by_their_file_name(tmp_path, photos):
    write_images(photos, tmp_path / "plain")
    write_captioned_set(str(tmp_path / "plain"), photos, tmp_path / "out")
    assert captions_of(tmp_path / "out") == {"a.jpg": "a red car", "sub/b.png": "zwei Kätzchen"}


def test_captions_of_a_record():
    assert read_captions({"txt": b"one\n\n two  x \n"}, {"caption": "no"}) == ["one", "two x"]
    assert read_captions({}, {"caption": "from img2dataset"}) == ["from img2dataset"]
    for fields, meta in (
        ({}, {}),
        ({"txt": b" \n"}, {}),
        ({"txt": b"\xff\xfe\x00"}, {}),
        ({}, {"caption": 3}),
    ):
        with pytest.raises(ValueError):
            read_captions(fields, meta)
    assert encode_captions(["a\tb\n c", " ", "d"]) == b"a b c\nd"


def test_a_caption_in_a_batch_is_cut_between_characters():
    out = np.empty((2, CAPTION_BYTES), np.uint8)
    write_caption("ä" * CAPTION_BYTES, out[0])
    write_caption("short", out[1])
    assert caption_texts(out) == ["ä" * (CAPTION_BYTES // 2), "short"]


def test_a_sample_draws_one_of_its_captions_by_its_number():
    drawn = [draw_caption(["a", "b", "c"], seed=1, n=n) for n in range(300)]
    assert drawn == [draw_caption(["a", "b", "c"], seed=1, n=n) for n in range(300)]
    assert all(70 < drawn.count(caption) < 130 for caption in "abc")


def test_batches_have_the_caption_and_the_square_of_the_same_record_unflipped(tmp_path):
    scenes = write_scenes(tmp_path / "s", replace(SCENES, count=6, width=40, captioned=True))
    options = {"seed": 0, "streams": 2, "image_size": 28, "patch": 2}
    data = StreamDataset([Records(scenes)], captions=True, flip=False, **options)
    batch = data[3]
    _, shard, index = data.stream.locate(3)
    key, fields = data.sources[0].read(shard, index)
    seed = json.loads(fields["json"])["seed"]
    assert caption_texts(batch["caption"].numpy()) == [describe_scene(seed)] == [fields["txt"].decode()]
    flipped = [StreamDataset([Records(scenes)], **options)[n] for n in range(12)]
    plain = [data[n] for n in range(12)]
    same = [torch_equal(a["image"], b["image"]) for a, b in zip(flipped, plain, strict=True)]
    mirrored = [torch_equal(a["image"].flip(2), b["image"]) for a, b in zip(flipped, plain, strict=True)]
    assert all(a or b for a, b in zip(same, mirrored, strict=True)) and any(same) and any(mirrored)
    targets = [
        torch_equal(a["target"].flip(2) if m else a["target"], b["target"])
        for a, b, m in zip(flipped, plain, mirrored, strict=True)
    ]
    assert all(targets)


def test_captioned_images_are_joined_with_their_labels_by_key(tmp_path):
    """Without depth of their own they need labels; sets with depth do not."""
    plain = write_scenes(tmp_path / "plain", replace(SCENES, count=4, labelled=False, captioned=True))
    deep = write_scenes(tmp_path / "deep", replace(SCENES, count=3, seed=2, captioned=True))
    teacher = {"fingerprint": "sha256:0", "file": "t.pth", "licence": "CC-BY-NC-4.0", "quantity": "disparity"}
    labels = LabelSetWriter(
        tmp_path / "labels" / "plain", plain, teacher=teacher, preprocessing="x", codec="f32"
    )
    maps = {
        n: codec.encode(np.full((28, 28), n, np.float32) + np.eye(28, dtype=np.float32), codec="f32")
        for n in range(4)
    }
    labels.publish("00000", maps, [])
    assert labels.finish()

    def open_data(**sets):
        return TrainData(
            sets={name: str(path) for name, path in sets.items()}, labels=str(tmp_path / "labels"), seed=0,
            batch_size=1, micro_batch=1, patch=2, streams=1, image_size=28, workers=0, sky="far", perturb=False,
            captions=True, flip=False, run_dir=str(tmp_path),
        ).open()  # fmt: skip

    data = open_data(plain=tmp_path / "plain", deep=tmp_path / "deep")
    assert [type(source).__name__ for source in data.sources] == ["JoinedRecords", "Records"]
    for n in range(7):
        _, shard, index = data.stream.locate(n)
        batch = data[n]
        _, fields = Records(plain if shard == "plain/00000" else deep).read(shard, index)
        assert caption_texts(batch["caption"].numpy()) == [fields["txt"].decode()]
        if shard == "plain/00000":
            assert batch["target"][0, 0, 1] == index and batch["target"][0, 0, 0] == index + 1
    write_scenes(tmp_path / "mute", replace(SCENES, count=2, seed=3))
    with pytest.raises(UserError, match="shard captions"):
        open_data(mute=tmp_path / "mute")
    with pytest.raises(UserError, match="pseudolabel"):
        open_data(other=tmp_path / "plain")


def torch_equal(one, other):
    return bool((one == other).all())


def test_scenes_without_captions_keep_their_settings():
    assert "captioned" not in SceneSource(SCENES).settings
    assert "captioned" in SceneSource(replace(SCENES, captioned=True)).settings
    assert describe_scene(0) == describe_scene(0) and describe_scene(0).startswith(("a room", "a street"))
