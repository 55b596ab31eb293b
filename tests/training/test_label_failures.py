"""stage=pseudolabel: images without a label, by NaN or damage, and when they stop the run."""

from pathlib import Path

import numpy as np
import pytest
import torch
from made_labels import label, labels_of, make_data, make_teacher, write_images

from depth_anything import DepthAnything
from depth_anything.data.labels import open_labels, read_label_sidecar
from depth_anything.data.tars import ShardError
from depth_anything.training import pseudolabel
from depth_anything.training.pseudolabel import (
    ImageBatch,
    PseudoLabel,
)


def make_non_finite_teacher(
    *, value: float, keys: set[int] | None = None, max_depth: float | None = None
) -> DepthAnything:
    """Build a teacher that outputs a pixel of `value` for images of these numbers, in the order seen; None: all."""
    model = DepthAnything("vitn", max_depth=max_depth).eval()
    count = [0]
    original = model.forward

    def forward(image: torch.Tensor) -> torch.Tensor:
        output = original(image).clone()  # type: ignore[union-attr]
        for row in output:
            if keys is None or count[0] in keys:
                row[0, 0] = value
            count[0] += 1
        return output

    model.forward = forward  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize(
    ("value", "max_depth"),
    [(np.nan, None), (np.inf, None), (-np.inf, None), (np.nan, 80.0), (np.inf, 80.0)],
)
def test_one_image_with_nan_is_skipped_and_reported(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], value: float, max_depth: float | None
) -> None:
    images = write_images(tmp_path / "photos", counts=(5, 3))
    teacher = make_non_finite_teacher(
        value=value, keys={2}, max_depth=max_depth
    )  # the third image seen is record 3, in the second batch
    assert "7 labels of photos" in label(make_data(tmp_path, teacher), teacher)
    sidecar = read_label_sidecar(tmp_path / "labels/photos", "0")
    assert sidecar is not None and list(sidecar.skipped) == ["photos/0/3"]
    assert "no numbers" in sidecar.skipped["photos/0/3"]
    assert "'photos/0/3'" in capfd.readouterr().err
    assert set(labels_of(tmp_path, images)) == {
        f"photos/{n}/{i}" for n, c in ((0, 5), (1, 3)) for i in range(c)
    } - {"photos/0/3"}


@pytest.mark.parametrize("keys", [None, {0, 1, 2}])
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-true", "32-true"])
def test_a_teacher_that_outputs_nan_stops_the_run_without_a_shard(
    tmp_path: Path, keys: set[int] | None, precision: str
) -> None:
    write_images(tmp_path / "photos", counts=(5, 3))
    teacher = make_non_finite_teacher(value=np.nan, keys=keys)
    data = make_data(tmp_path, teacher, precision=precision)
    with pytest.raises(ValueError, match="photos/0/") as caught:
        label(data, teacher)
    assert "trainer.precision=32-true" in str(caught.value)
    assert ("teacher=FILE" in str(caught.value)) == (precision == "32-true")
    assert not list((tmp_path / "labels").rglob("*.tar")) and not list((tmp_path / "labels").rglob("*.json"))


def test_more_than_1_percent_of_images_with_nan_stop_the_run(tmp_path: Path) -> None:
    """Over 1 % of 1000 images; before that a shard may have NaN in up to half of its images."""
    teacher = make_teacher()
    write_images(tmp_path / "photos", counts=(5,))
    module = PseudoLabel(teacher, make_data(tmp_path, teacher))
    keys = [f"k{i}" for i in range(100)]
    non_finite = [(0, "no numbers"), (1, "no numbers")]
    for _ in range(9):
        module._check_failures(ImageBatch("photos", "0", 100, [], torch.empty(0)), non_finite, keys)
    with pytest.raises(ValueError, match="k0"):
        module._check_failures(ImageBatch("photos", "0", 100, [], torch.empty(0)), non_finite, keys)


def test_a_set_without_any_label_names_the_reason(tmp_path: Path) -> None:
    """An older version left such sets: each shard finished, each image skipped."""
    images, teacher = write_images(tmp_path / "photos"), make_teacher()
    data = make_data(tmp_path, teacher)
    for shard in images.shards:
        data.labels["photos"].publish(
            shard.name, {}, [(i, "the teacher's output is not finite") for i in range(shard.records)]
        )
    for call in (data.finished, data.summary, lambda: open_labels(tmp_path / "labels/photos", images)):
        with pytest.raises(
            ShardError, match="photos.* 8 of 8 .*the teacher's output is not finite|2 of 2 shards"
        ):
            call()


def test_a_shard_with_only_unreadable_images_stops_the_run(tmp_path: Path) -> None:
    write_images(tmp_path / "photos", counts=(3, 2), broken=(0, 1, 2))
    teacher = make_teacher()
    with pytest.raises(ValueError, match="3 of 3 .*depth-anything verify"):
        label(make_data(tmp_path, teacher), teacher)
    assert not list((tmp_path / "labels").rglob("0.tar"))


def test_more_than_1_percent_unreadable_images_stop_the_run(tmp_path: Path) -> None:
    """Counted across shards, from 1000 images on: 10 of 1000 pass, 11 do not."""
    teacher = make_teacher()
    write_images(tmp_path / "photos", counts=(5,))
    keys = [f"k{i}" for i in range(500)]

    def shard(failed: int) -> ImageBatch:
        return ImageBatch("photos", "0", 500, [], torch.empty(0), [(i, "cut short") for i in range(failed)])

    good, bad = (PseudoLabel(teacher, make_data(tmp_path, teacher)) for _ in range(2))
    for count in (4, 6):
        good._check_failures(shard(count), [], keys)
    bad._check_failures(shard(5), [], keys)
    with pytest.raises(ValueError, match="11 of 1000 .*cut short"):
        bad._check_failures(shard(6), [], keys)


def test_only_the_first_skipped_images_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = make_teacher()
    write_images(tmp_path / "photos", counts=(5,))
    module = PseudoLabel(teacher, make_data(tmp_path, teacher))
    batch = ImageBatch("photos", "0", 90, [], torch.empty(0), [(i, "cut short") for i in range(15)])
    for _ in range(2):
        module._check_failures(batch, [(89, "no numbers")], [f"k{i}\x1b[2J" for i in range(90)])
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == pseudolabel.MAX_REPORTED_IMAGES and "\x1b" not in "".join(printed)
    assert "k0" in printed[0] and "k89" in printed[15] and "cut short" in printed[16]


def test_a_skipped_image_keeps_its_reason(tmp_path: Path) -> None:
    images, teacher = write_images(tmp_path / "photos", broken=(1, 4)), make_teacher()
    summary = label(make_data(tmp_path, teacher), teacher)
    assert "6 labels of photos" in summary and "2 skipped" in summary
    sidecar = read_label_sidecar(tmp_path / "labels/photos", "0")
    assert sidecar is not None and list(sidecar.skipped) == ["photos/0/1", "photos/0/4"]
    assert set(labels_of(tmp_path, images)).isdisjoint(sidecar.skipped)
