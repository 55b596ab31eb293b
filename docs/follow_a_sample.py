"""Follow one sample from its source to the optimizer and print it at every step.

python docs/follow_a_sample.py prints the blocks of docs/follow-a-sample.md, which tests/test_docs.py compares;
with --write it updates them.
"""

import io
import re
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from depth_anything import DepthAnything
from depth_anything.data.dataset import StreamDataset
from depth_anything.data.reader import Records
from depth_anything.data.sample import Frame, decode_record, make_disparity_target
from depth_anything.data.tars import ShardSet
from depth_anything.data.transforms import crop_image, crop_map, draw_crop, draw_perturbation, normalize
from depth_anything.losses import invariant_losses
from depth_anything.preprocess import resize_shape
from depth_anything.scenes.render import render_scene, write_scenes
from depth_anything.scenes.scene_set import SceneSetSpec
from depth_anything.training.recipes import Recipe
from depth_anything.training.teacher import Teacher

SEED, IMAGE_SIZE, STREAMS, BATCH = 0, 70, 8, 4


def show(name: str, values: np.ndarray | Tensor) -> None:
    """Print a line: name, dtype, shape, and the range of the finite values."""
    array = values.detach().numpy() if isinstance(values, Tensor) else values
    known = array[np.isfinite(array)]
    dtype, shape = str(array.dtype), str(tuple(array.shape))
    low, high = f"{known.min():.4g}", f"{known.max():.4g}"
    print(f"{name:<16} {dtype:<8} {shape:<15} {low if array.ndim == 0 else f'{low} to {high}'}")


def source() -> None:
    frame = render_scene(10_000_000, look="synthetic", height=112, width=144)  # the first scene of seed 1
    show("image", frame.image)
    assert frame.depth is not None
    show("depth", frame.depth)
    print(f"sky {np.isinf(frame.depth).mean():.1%}, unknown {np.isnan(frame.depth).mean():.1%}")


def shard(root: Path) -> ShardSet:
    spec = SceneSetSpec(look="synthetic", count=32, seed=1, height=112, width=144)
    made = write_scenes(root / "scenes-synthetic", spec, per_shard=8)
    for row in made.shards:
        print(f"{row.name}.tar, {row.records} records")
    index = (root / "scenes-synthetic" / f"{made.shards[0].name}.idx").read_text().splitlines()
    for line in index[1:4]:
        key, extension, offset, size, crc = line.split("\t")
        print(f"{key}  .{extension}")
    return made


def stream(dataset: StreamDataset) -> None:
    print(f"{dataset.stream.records} records a pass, {dataset.stream.streams} streams")
    for n in (*range(BATCH), dataset.stream.records):
        number, name, index = dataset.stream.locate(n)
        print(f"sample {n}: pass {number}, {name}[{index}]")


def decode(dataset: StreamDataset) -> Frame:
    _, name, index = dataset.stream.locate(0)
    key, fields = dataset.sources[0].read(name, index)
    print(f"{key}: {', '.join(sorted(fields))}")
    frame = decode_record(key, fields)
    show("image", frame.image)
    assert frame.depth is not None
    show("depth", frame.depth)
    return frame


def crop(frame: Frame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    height, width = resize_shape(*frame.image.shape[:2], IMAGE_SIZE, 14)
    view = draw_crop(height, width, IMAGE_SIZE, seed=SEED, n=0)
    print(f"resized to {height} x {width}; cut at row {view.top}, column {view.left}; flipped: {view.flip}")
    image = crop_image(frame.image, view)
    assert frame.depth is not None
    target, valid = make_disparity_target(
        Frame(frame.key, image, depth=crop_map(frame.depth, view)), sky="far"
    )
    show("image", image)
    show("target", target)
    show("valid", valid)
    return image, target, valid


def batch(dataset: StreamDataset, first: tuple[np.ndarray, ...]) -> dict[str, Any]:
    made = dataset.__getitems__(range(BATCH))
    for name, mine in zip(("image", "target", "valid"), first, strict=True):
        assert np.array_equal(
            made[name][0].numpy(), mine
        )  # the steps above, by hand, equal what a worker does
        show(name, made[name])
    show("sample", made["sample"])
    return made


def device(made: dict[str, Any]) -> Tensor:
    image = normalize(made["image"])
    show("network's input", image)
    rows = torch.from_numpy(np.stack([draw_perturbation(SEED, n) for n in range(BATCH)]))
    show("perturbation", rows)
    show("perturbed input", normalize(made["image"], rows))
    return image


def encoder(model: DepthAnything, image: Tensor) -> list[Tensor]:
    tokens = model.pretrained.forward_intermediates(
        image, indices=list(model.taps), norm=True, output_fmt="NLC", intermediates_only=True
    )
    for tap, level in zip(model.taps, tokens, strict=True):
        show(f"tap {tap}", level)
    return tokens


def head(model: DepthAnything, tokens: list[Tensor]) -> Tensor:
    side = IMAGE_SIZE // model.patch_size
    disparity = model.depth_head(tokens, (side, side), (IMAGE_SIZE, IMAGE_SIZE))
    show("disparity", disparity)
    return disparity


def losses(disparity: Tensor, made: dict[str, Any]) -> Tensor:
    ssi, gm = invariant_losses(disparity, made["target"], made["valid"])
    loss = ssi + 2 * gm
    for name, value in (("ssi", ssi), ("gm", gm), ("ssi + 2 gm", loss)):
        show(name, value)
    return loss


def step(model: DepthAnything, made: dict[str, Any], loss: Tensor) -> None:
    module = Teacher(model, Recipe(steps=100, encoder_lr=5e-6, head_lr=5e-5, clip_norm=1.0))
    again = module.losses(made)["loss"]
    assert torch.equal(again, loss)  # the stage computes the same as the steps above
    optimizer = module.configure_optimizers()["optimizer"]
    again.backward()
    module.configure_gradient_clipping(optimizer)
    assert module.grad_norm is not None
    show("gradient's norm", module.grad_norm)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    for group in optimizer.param_groups:
        count = sum(p.numel() for p in group["params"])
        print(
            f"group {group['name']}: {len(group['params'])} tensors, {count:,} values, rate {group['lr']:g}"
        )
    moved = max(float((p - q).detach().abs().max()) for p, q in zip(model.parameters(), before, strict=True))
    print(f"the farthest value moved by {moved:.1e}")


def follow(root: Path) -> None:
    """Print every step; files go into `root`."""
    print("# 1 source")
    source()
    print("# 2 shard")
    made = shard(root)
    dataset = StreamDataset([Records(made)], seed=SEED, streams=STREAMS, image_size=IMAGE_SIZE)
    print("# 3 stream")
    stream(dataset)
    print("# 4 decode")
    frame = decode(dataset)
    print("# 5 crop and flip")
    first = crop(frame)
    print("# 6 batch")
    samples = batch(dataset, first)
    print("# 7 device")
    image = device(samples)
    torch.manual_seed(SEED)
    model = DepthAnything("vitn")
    print("# 8 encoder")
    tokens = encoder(model, image)
    print("# 9 head")
    disparity = head(model, tokens)
    print("# 10 losses")
    loss = losses(disparity, samples)
    print("# 11 step")
    step(model, samples, loss)


def printed() -> str:
    """Return what `follow` prints."""
    text = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(text):
        follow(Path(folder))
    return text.getvalue()


def write(text: str) -> None:
    """Put the lines of each step into the block of the document that begins with its title."""
    page = Path(__file__).with_name("follow-a-sample.md")
    blocks = {block.partition("\n")[0]: block for block in re.split(r"(?m)^(?=# )", text) if block}
    old = page.read_text(encoding="utf-8")
    new = re.sub(r"(?ms)^```text\n(# [^\n]*)\n.*?```", lambda found: f"```text\n{blocks[found[1]]}```", old)
    page.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    result = printed()
    print(result, end="")
    if "--write" in sys.argv[1:]:
        write(result)
