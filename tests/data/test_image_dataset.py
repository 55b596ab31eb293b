"""Crops and patch orders of pretraining: drawn from (seed, n), within the image, without labels."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.transforms import RandomResizedCrop

from depth_anything.data.image_dataset import ImageDataset
from depth_anything.data.reader import Records
from depth_anything.data.sample import Frame, decode_record, encode_frame
from depth_anything.data.shards import open_set, write_manifest
from depth_anything.data.stream import MicroBatchSampler
from depth_anything.data.tars import write_shard
from depth_anything.data.transforms import crop_and_resize, draw_patch_order, draw_resized_crop

AREA = (0.2, 1.0)
GOLDEN_ORDER = [8, 7, 4, 6, 0, 2, 5, 3, 1]  # drawn by the first version


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Records:
    """Write 6 images, half of them with depth, and one damaged image."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    rows = []
    for i in range(6):
        image = rng.integers(0, 256, (40 + i, 60 - 3 * i, 3), dtype=np.uint8)
        depth = np.ones((40, 60), np.float32) if i % 2 else None
        rows.append((f"set/0/{i}", encode_frame(Frame("", image, {}, depth=depth), codec="f32")))
    rows.append(("set/0/6", {"jpg": b"\xff\xd8\xff no image", "json": b"{}"}))
    write_manifest(root, name="set", shards=[write_shard(root / "0.tar", rows)], meta={})
    return Records(open_set(str(root), name="set"))


def dataset(records: Records, seed: int = 5) -> ImageDataset:
    return ImageDataset([records], seed=seed, streams=3, image_size=28, patch=7, crop_area=AREA)


def test_crops_are_inside_and_cover_the_wanted_area() -> None:
    shares, flips, aspects = [], [], []
    for n in range(2000):
        top, left, rows, columns, flip = draw_resized_crop(120, 160, area=AREA, seed=1, n=n)
        assert 0 <= top <= 120 - rows and 0 <= left <= 160 - columns and rows > 0 and columns > 0
        shares.append(rows * columns / (120 * 160))
        aspects.append(columns / rows)
        flips.append(flip)
    assert 0.19 < min(shares) < 0.22 and max(shares) > 0.95
    assert 0.72 < min(aspects) < 0.80 and 1.25 < max(aspects) < 1.36
    torch.manual_seed(0)
    drawn = (
        RandomResizedCrop.get_params(torch.empty(3, 120, 160), AREA, (3 / 4, 4 / 3)) for _ in range(2000)
    )
    theirs = np.mean([rows * columns for _, _, rows, columns in drawn]) / (120 * 160)
    assert np.mean(shares) == pytest.approx(theirs, abs=0.03)
    assert np.mean(flips) == pytest.approx(0.5, abs=0.04)
    assert draw_resized_crop(10, 1000, area=AREA, seed=1, n=0)[:4] == (0, 493, 10, 13)  # the middle, 4 : 3


def test_draws_are_fixed_by_seed_and_number() -> None:
    assert draw_resized_crop(100, 150, area=AREA, seed=0, n=7) == draw_resized_crop(
        100, 150, area=AREA, seed=0, n=7
    )
    assert draw_patch_order(9, seed=0, n=0).tolist() == GOLDEN_ORDER
    orders = {tuple(draw_patch_order(16, seed=s, n=n)) for s in range(3) for n in range(40)}
    assert len(orders) == 120 and all(sorted(order) == list(range(16)) for order in orders)


def test_a_crop_is_the_rectangle_resized_and_mirrored() -> None:
    rows, columns = np.mgrid[:50, :70]
    image = np.stack([40 + 2 * rows, 220 - 2 * columns, rows + columns + 60], 2).astype(np.uint8)
    out = np.empty((28, 28, 3), np.uint8)
    crop_and_resize(image, (5, 9, 30, 40, True), 28, out=out)
    pixels = torch.from_numpy(image[5:35, 9:49]).permute(2, 0, 1)[None].float()
    wanted = F.interpolate(pixels, (28, 28), mode="bicubic", antialias=True).round().clamp(0, 255)
    wanted = wanted[0].permute(1, 2, 0).numpy()[:, ::-1]
    assert np.abs(out.astype(int) - wanted).max() <= 1
    crop_and_resize(image, (5, 9, 28, 28, False), 28, out=out)
    assert np.array_equal(out, image[5:33, 9:37])


def test_batches_hold_the_drawn_crops_and_name_damaged_records(records: Records) -> None:
    data = dataset(records)
    batch = data.__getitems__(range(14))  # two passes
    assert set(batch) == {"image", "sample", "patch_order", "failed"}
    assert batch["image"].shape == (14, 28, 28, 3) and batch["patch_order"].shape == (14, 16)
    assert len(batch["failed"]) == 2 and all("set/0/6" in failure for failure in batch["failed"])
    for n in range(14):
        assert batch["patch_order"][n].tolist() == draw_patch_order(16, seed=5, n=n).tolist()
        _, shard, index = data.stream.locate(n)
        if index == 6:
            continue
        key, fields = records.read(shard, index)
        image, out = decode_record(key, fields).image, np.empty((28, 28, 3), np.uint8)
        crop = draw_resized_crop(*image.shape[:2], area=AREA, seed=5, n=n)
        crop_and_resize(image, crop, 28, out=out)
        assert np.array_equal(batch["image"][n].numpy(), out)


def test_samples_do_not_depend_on_the_split_of_a_batch(records: Records) -> None:
    whole = dataset(records).__getitems__(range(8))
    for world in (1, 2):
        for rank in range(world):
            sampler = MicroBatchSampler(rank=rank, world=world, size=2, start=0)
            loader = DataLoader(dataset(records), batch_sampler=sampler, collate_fn=lambda batch: batch)
            for part, _ in zip(loader, range(8 // (2 * world)), strict=False):
                numbers = part["sample"]
                for name in ("image", "patch_order"):
                    assert torch.equal(part[name], whole[name][numbers])


def test_sets_of_one_name_raise(records: Records, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two sets have the name set"):
        ImageDataset([records, records], seed=0, streams=1, image_size=28, patch=7, crop_area=AREA)
