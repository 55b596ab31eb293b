"""stage=pretrain: the loss, the run folder, exact resume, and what its encoder file starts."""

import csv
import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from depth_anything.data.sample import Frame, encode_frame
from depth_anything.data.shards import write_manifest
from depth_anything.data.tars import write_shard
from depth_anything.data.transforms import normalize
from depth_anything.model.masked_autoencoder import MaskedAutoencoder, normalize_patches, split_patches
from depth_anything.model.tensor_files import read_tensors
from depth_anything.training import run
from depth_anything.training.check_config import resolve_config
from depth_anything.training.config import RunConfig
from depth_anything.training.dry_run import print_plan
from depth_anything.training.initialization import build_frozen_encoder, build_model
from depth_anything.training.optimizer import parameter_groups
from depth_anything.training.pretrain import Pretrain, count_visible
from depth_anything.training.recipes import PretrainRecipe
from depth_anything.training.run_home import RunHome
from depth_anything.training.signals import HANDLED_SIGNALS

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = ["encoder=vitn", "batch_size=4", "image_size=28", "workers=0", "trainer=cpu", "steps=6",
         "recipe.decoder_width=16", "checkpoint.every=3", "logging.every=1", "sources=own"]  # fmt: skip


def fit(config: RunConfig) -> None:
    """Run a stage in a folder on a disk."""
    run.fit(RunHome(config, config))


def resolved(*typed: str) -> RunConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return resolve_config(compose("train", list(typed)))


@pytest.fixture(autouse=True)
def same_signals() -> Iterator[None]:
    """Restore the handlers that a run installs."""
    before = {number: signal.getsignal(number) for number in HANDLED_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("sets") / "photos", np.random.default_rng(0)
    records = []
    for i in range(10):
        coarse = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        image = np.asarray(Image.fromarray(coarse).resize((56, 42)))
        records.append((f"photos/0/{i}", encode_frame(Frame("", image, {}), codec="f32")))
    write_manifest(
        root, name="photos", shards=[write_shard(root / "0.tar", records)], meta={"licence": "CC-BY-4.0"}
    )
    return root


@pytest.fixture(scope="module")
def finished(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run six steps without interruption."""
    folder = tmp_path_factory.mktemp("outputs")
    before = {number: signal.getsignal(number) for number in HANDLED_SIGNALS}
    fit(resolved("stage=pretrain", *SMALL, f"photos={photos}", f"output_dir={folder}"))
    for number, handler in before.items():
        signal.signal(number, handler)
    return folder / "pretrain-vitn-tiny"


def batch(count: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "image": torch.randint(0, 256, (count, 28, 28, 3), dtype=torch.uint8, generator=generator),
        "patch_order": torch.rand(count, 16, generator=generator).argsort(1),
    }


def module(**changes: Any) -> Pretrain:
    torch.manual_seed(0)
    numbers = {"steps": 30, "encoder_lr": 1e-3, "head_lr": 1e-3, **changes}
    return Pretrain(MaskedAutoencoder("vitn", width=16, depth=1, heads=4), PretrainRecipe(**numbers))


@pytest.mark.parametrize("normalized", [True, False])
def test_the_loss_is_over_masked_patches_of_the_normalized_image(normalized: bool) -> None:
    made, given = module(normalize_targets=normalized, mask_ratio=0.5), batch()
    image = normalize(given["image"])
    patches = split_patches(image, 7)
    target = normalize_patches(patches)[0] if normalized else patches
    with torch.no_grad():
        predicted = made.model(image, given["patch_order"], 8)
        errors = [
            (predicted[i, j] - target[i, j]).square().mean()
            for i in (0, 1)
            for j in given["patch_order"][i, 8:]
        ]
        assert made.losses(given)["loss"].item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)


def test_the_loss_falls() -> None:
    made, given = module(), batch(4)
    optimizer = made.configure_optimizers()["optimizer"]
    losses = []
    for _ in range(25):
        loss = made.training_step(given, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    seen, masked, painted = made.reconstruct(given)
    assert np.array_equal(seen, given["image"].numpy())
    first = given["patch_order"][0]
    shown = sorted(int(patch) for patch in first[: count_visible(16, 0.75)])
    same = [j for j in range(16) if np.array_equal(masked[0][tile(j)], seen[0][tile(j)])]
    assert same == shown and np.array_equal(painted[0][tile(shown[0])], seen[0][tile(shown[0])])


def tile(patch: int) -> tuple[slice, slice]:
    row, column = 7 * (patch // 4), 7 * (patch % 4)
    return slice(row, row + 7), slice(column, column + 7)


def test_only_matrices_decay() -> None:
    model = module().model
    groups = {group["name"]: group for group in parameter_groups(model, encoder_lr=1.0, head_lr=2.0)}
    assert [group["lr"] for group in groups.values()] == [1.0, 1.0, 2.0, 2.0]
    names = {id(p): name for name, p in model.named_parameters()}
    for name, group in groups.items():
        listed = [names[id(p)] for p in group["params"]]
        assert all(listed) and listed
        flat = [n for n in listed if n.endswith(("bias", "gamma", "token")) or ".norm" in n]
        assert (flat == listed) if name.endswith("no_decay") else not flat
        assert ("weight_decay" in group) == name.endswith("no_decay")


def test_a_run_writes_an_encoder_file_a_card_and_pictures(finished: Path, photos: Path) -> None:
    tensors, metadata = read_tensors(finished / "model.safetensors")
    assert set(tensors) == set(MaskedAutoencoder("vitn", width=16, depth=1, heads=4).pretrained.state_dict())
    assert (metadata["encoder"], metadata["input_size"], metadata["licence"]) == ("vitn", "28", "CC-BY-4.0")
    row = {"set": "own", "records": 10, "licence": "CC-BY-4.0", "teacher": None}
    assert json.loads(metadata["origin"]) == {"stage": "pretrain", "data": [row]}
    card = (finished / "README.md").read_text()
    assert "\nlicense: cc-by-4.0\n" in card and "| own | 10 | CC-BY-4.0 |" in card
    assert (finished / "pictures" / "step-000000006.jpg").is_file() and not (
        finished / "best.safetensors"
    ).exists()
    with open(finished / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, 7))
    assert all(np.isfinite(float(row["loss"])) for row in rows)


def test_an_interrupted_run_ends_with_the_same_bytes(finished: Path, photos: Path, tmp_path: Path) -> None:
    again = tmp_path / "pretrain-vitn-tiny"
    shutil.copytree(finished, again)
    for name in ("model.safetensors", "finished.json", "checkpoints/step-000000006.ckpt"):
        (again / name).unlink()
    typed = ["stage=pretrain", *SMALL, f"photos={photos}", f"output_dir={tmp_path}"]
    with pytest.raises(ValueError, match="recipe.mask_ratio"):
        fit(resolved(*typed, "recipe.mask_ratio=0.5"))
    with pytest.raises(ValueError, match="crop_area"):
        fit(resolved(*typed, "crop_area=[0.5,1.0]"))
    fit(resolved(*typed, "micro_batch=4"))
    assert (again / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    assert (again / "metrics.csv").read_text().splitlines()[-1].split(",")[1] == (
        (finished / "metrics.csv").read_text().splitlines()[-1].split(",")[1]
    )


@pytest.mark.parametrize(
    ("file", "stage"),
    [("model.safetensors", "teacher"), ("", "student"), ("checkpoints/step-000000006.ckpt", "pretrain")],
)
def test_the_encoder_starts_other_stages_and_their_alignment(finished: Path, file: str, stage: str) -> None:
    tensors, _ = read_tensors(finished / "model.safetensors")
    alignment = ["recipe.alignment_weight=1"] if stage == "student" else []
    config = resolved(
        f"stage={stage}", "encoder=vitn", f"init={finished / file}", "image_size=28", *alignment
    )
    model = build_model(config)
    assert all(torch.equal(model.pretrained.state_dict()[name], t) for name, t in tensors.items())
    assert model.origin["start"]["licence"] == "CC-BY-4.0"
    if stage == "student":
        frozen = build_frozen_encoder(config)
        assert frozen is not None
        assert all(torch.equal(frozen.pretrained.state_dict()[name], t) for name, t in tensors.items())


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["recipe.decoder_width=30"], "recipe.decoder_width=32"),
        (["validation.benchmark=nyu", "validation.root=x"], "validation.benchmark=null"),
        (["+model.head._target_=torch.nn.Linear"], "model.head"),
        (["recipe.mask_ratio=1.0"], "recipe.mask_ratio=1.0"),
        (["crop_area=[0.9,0.2]"], "crop_area"),
        (["sources=hypersim"], "sources.images.NAME=FOLDER"),
        (["image_size=30"], "image_size=28"),
    ],
)
def test_impossible_settings_raise(typed: list[str], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        resolved("stage=pretrain", *typed)
    assert message in str(caught.value)


def test_the_plan_names_the_decoder_and_counts_passes(photos: Path, tmp_path: Path, capsys: Any) -> None:
    print_plan(resolved("stage=pretrain", *SMALL, f"photos={photos}", f"output_dir={tmp_path}"))
    shown = capsys.readouterr().out
    assert "decoder" in shown and "75%" in shown and "passes      2.4 over 10 records" in shown
    assert not list(tmp_path.iterdir())
