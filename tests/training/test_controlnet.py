"""stage=controlnet: the loss of diffusers' example, noise by the number of the sample, resume, EMA, and the result."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from depth_anything.data.stream import DIFFUSION, random_uint64
from depth_anything.errors import UserError
from depth_anything.training import run
from depth_anything.training.check_config import resolve_config
from depth_anything.training.controlnet import ControlNetModule, ControlNetPair, draw_diffusion
from depth_anything.training.dry_run import print_plan
from depth_anything.training.loggers import read_metrics
from depth_anything.training.recipes import ControlNetRecipe
from depth_anything.training.run_home import RunHome

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning:diffusers", "ignore::DeprecationWarning:diffusers"
)

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = [
    "stage=controlnet", "trainer=cpu", "workers=0", "batch_size=4", "image_size=16", "steps=4", "checkpoint.every=2",
    "logging.every=1", "validation.every=2", "validation.limit=3", "validation.sampling_steps=1",
    "sources.scenes.captioned.count=8", "sources.scenes.validation.count=3",
    *(f"++sources.scenes.{name}.{side}" for name in ("captioned", "validation") for side in ("height=16", "width=20")),
]  # fmt: skip

Train = Callable[..., Path]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Return a function that runs the stage and returns its run folder; all runs read the same scenes."""
    folder = tmp_path_factory.mktemp("controlnet")

    def start(*typed: str, name: str) -> Path:
        places = [f"data_dir={folder / 'data'}", f"output_dir={folder / 'outputs'}", f"name={name}"]
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            config = resolve_config(compose("train", [*SMALL, *places, *typed]))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="(diffusers|transformers|pytorch_lightning)")
            run.fit(RunHome(config, config))
        return Path(config.run_dir)

    return start


@pytest.fixture(scope="module")
def whole(train: Train) -> Path:
    return train(name="whole")


def weights_of(folder: Path, name: str = "controlnet") -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / name / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def module(whole: Path) -> ControlNetModule:
    """A new ControlNet over the tiny base of a run."""
    from depth_anything.training.diffusion import load_base

    base = load_base(str(whole / "base"))
    torch.manual_seed(1)
    controlnet = diffusers.ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(16, 32))
    return ControlNetModule(ControlNetPair(controlnet, base), ControlNetRecipe(steps=10), seed=0)


def make_batch(size: int = 3, side: int = 16) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    return {
        "image": torch.randint(0, 256, (size, side, side, 3), dtype=torch.uint8, generator=generator),
        "target": torch.rand(size, side, side, generator=generator),
        "valid": torch.ones(size, side, side, dtype=torch.bool),
        "sample": torch.arange(5, 5 + size),
    }


def test_a_run_writes_a_controlnet_its_card_and_pictures(whole: Path) -> None:
    files = {path.relative_to(whole).as_posix() for path in whole.rglob("*") if path.is_file()}
    assert {"controlnet/config.json", "controlnet/diffusion_pytorch_model.safetensors"} <= files
    assert {"pictures/step-000000002.jpg", "pictures/step-000000004.jpg", "base/model_index.json"} <= files
    card = (whole / "controlnet" / "README.md").read_text()
    assert "Apache-2.0" in card and "scenes-captioned" in card and "library_name" in card
    origin = json.loads((whole / "controlnet" / "depth_anything.json").read_text())
    assert origin["licence"] == "Apache-2.0" and origin["base"]["fingerprint"].startswith("sha256:")
    rows = read_metrics(whole / "metrics.csv").rows
    assert [row["step"] for row in rows if row["val_loss"]] == ["2", "4"]
    assert all(np.isfinite(float(row["loss"])) for row in rows) and float(rows[0]["lr_controlnet"]) > 0


def test_plain_diffusers_loads_the_result_and_makes_an_image(whole: Path) -> None:
    controlnet = diffusers.ControlNetModel.from_pretrained(whole / "controlnet")
    pipeline = diffusers.StableDiffusionControlNetPipeline.from_pretrained(
        whole / "base", controlnet=controlnet, safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    condition = Image.fromarray(np.full((32, 32, 3), 128, np.uint8))
    image = pipeline("a room", condition, num_inference_steps=2).images[0]
    assert image.size == (32, 32) and np.asarray(image).std() > 0


def test_a_broken_run_resumes_to_the_same_bytes(
    train: Train, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = ControlNetModule.training_step

    def fail_at_step_3(self: Any, batch: Any, index: int) -> Any:
        if self.trainer.global_step == 3:
            raise RuntimeError("pulled the plug")
        return step(self, batch, index)

    monkeypatch.setattr(ControlNetModule, "training_step", fail_at_step_3)
    with pytest.raises(RuntimeError, match="plug"):
        train(name="broken")
    monkeypatch.setattr(ControlNetModule, "training_step", step)
    broken = train(name="broken")
    for name, expected in weights_of(whole).items():
        assert torch.equal(weights_of(broken)[name], expected), name


def test_micro_batches_change_rounding_only_and_the_average_is_saved(train: Train, whole: Path) -> None:
    typed = (
        "micro_batch=2",
        "workers=1",
        "callbacks=ema",
        "callbacks.ema.decay=0.5",
        "sources.validation=null",
    )
    split = train(*typed, name="split")
    current, last = weights_of(split), weights_of(whole)
    saved = weights_of(split, "controlnet-ema")
    checkpoint = torch.load(split / "checkpoints" / "step-000000004.ckpt", weights_only=True)
    for name, average in saved.items():
        assert torch.equal(average, checkpoint["average"]["weights"][f"model.{name}"])
        assert torch.equal(current[name], checkpoint["state_dict"][f"model.{name}"])
    assert (split / "pictures" / "step-000000004.jpg").exists()  # of training images
    assert "val_loss" not in read_metrics(split / "metrics.csv").columns
    assert any(not torch.equal(average, current[name]) for name, average in saved.items())
    assert 'from_pretrained("controlnet-ema")' in (split / "controlnet-ema" / "README.md").read_text()
    for name, expected in last.items():
        torch.testing.assert_close(current[name], expected, atol=2e-3, rtol=0)


def test_the_loss_is_that_of_the_example_of_diffusers(module: ControlNetModule) -> None:
    """The arithmetic of examples/controlnet/train_controlnet.py, written with diffusers' own calls."""
    base, batch = module.base, make_batch()
    given = {**batch, **module.prepare(batch, ["a", "b", "c"], caption_dropout=0.0)}
    for name, parameter in module.model.named_parameters():  # zero convolutions hide the conditioning image
        if "controlnet_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    with torch.no_grad():
        losses = module.image_losses(given)
        pixels = batch["image"].permute(0, 3, 1, 2).float() / 127.5 - 1
        posterior = base.vae.encode(pixels).latent_dist
        latents = (posterior.mean + posterior.std * given["noise"][:, 0]) * base.vae.config.scaling_factor
        noise, steps = given["noise"][:, 1], given["timestep"]
        share = torch.cumprod(1 - base.scheduler.betas, 0)[steps].view(-1, 1, 1, 1)
        noisy = share.sqrt() * latents + (1 - share).sqrt() * noise
        ids = base.tokenizer(
            ["a", "b", "c"], padding="max_length", max_length=77, return_tensors="pt"
        ).input_ids
        text = base.text_encoder(ids)[0]
        target = batch["target"].numpy()
        low, high = target.min((1, 2), keepdims=True), target.max((1, 2), keepdims=True)
        levels = ((target - low) / (high - low) * np.float32(255)).astype(np.uint8)
        condition = torch.from_numpy(levels).float()[:, None].repeat(1, 3, 1, 1) / 255
        down, middle = module.model(noisy, steps, text, condition, return_dict=False)
        made = base.unet(
            noisy, steps, text, down_block_additional_residuals=down, mid_block_additional_residual=middle
        ).sample
    torch.testing.assert_close(losses, ((made - noise) ** 2).mean((1, 2, 3)))


def test_velocity_is_predicted_if_the_scheduler_says_so(module: ControlNetModule) -> None:
    scheduler = diffusers.DDPMScheduler.from_config(
        module.base.scheduler.config, prediction_type="v_prediction"
    )
    latents, noise, steps = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3), torch.tensor([10, 900])
    share = torch.cumprod(1 - scheduler.betas, 0)[steps].view(-1, 1, 1, 1)
    before, module.base.scheduler = module.base.scheduler, scheduler
    velocity = module.base.target(latents, noise, steps)
    module.base.scheduler = before
    torch.testing.assert_close(velocity, share.sqrt() * noise - (1 - share).sqrt() * latents)
    assert torch.equal(module.base.target(latents, noise, steps), noise)


def test_the_loss_falls_at_fixed_noise(module: ControlNetModule) -> None:
    batch = make_batch()
    given = {**batch, **module.prepare(batch, ["a room", "a street", ""], caption_dropout=0.0)}
    optimizer = torch.optim.AdamW(module.model.parameters(), lr=2e-3)
    losses = []
    for _ in range(12):
        loss = module.image_losses(given).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    assert all(
        parameter.grad is None for network in module.base.networks for parameter in network.parameters()
    )


def test_noise_timestep_and_dropped_captions_follow_from_the_number() -> None:
    draws = [draw_diffusion(7, n, (4, 2, 2), timesteps=1000, caption_dropout=0.5) for n in range(400)]
    again = draw_diffusion(7, 123, (4, 2, 2), timesteps=1000, caption_dropout=0.5)
    assert torch.equal(draws[123].noise, again.noise) and draws[123][1:] == again[1:]
    words = random_uint64(7, 123, 3, purpose=DIFFUSION)
    assert again.timestep == int(words[1]) % 1000
    noise = torch.stack([draw.noise for draw in draws])
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert 0.4 < np.mean([draw.drop_caption for draw in draws]) < 0.6
    assert 420 < np.mean([draw.timestep for draw in draws]) < 580
    other = draw_diffusion(8, 123, (4, 2, 2), timesteps=1000, caption_dropout=0.5)
    assert not torch.equal(other.noise, again.noise)


def test_other_weights_under_a_checkpoint_are_refused(module: ControlNetModule) -> None:
    with pytest.raises(UserError, match="base"):
        module.on_load_checkpoint({"diffusion_base": "sha256:other"})


def test_weights_are_read_from_safetensors_only_of_any_precision(whole: Path, tmp_path: Path) -> None:
    from depth_anything.training.diffusion import load_base, load_part

    base = shutil.copytree(whole / "base", tmp_path / "base")
    file = base / "unet" / "diffusion_pytorch_model.safetensors"
    unet = load_part(diffusers.UNet2DConditionModel, str(base), "unet")
    half = file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    again = load_part(diffusers.UNet2DConditionModel, str(base), "unet")
    assert again.dtype == torch.float32
    assert all(map(torch.equal, unet.state_dict().values(), again.state_dict().values()))
    half.unlink()
    torch.save(unet.state_dict(), base / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="unet .*base cannot be loaded"):
        load_base(str(base))


def test_dry_run_prints_the_plan_and_writes_nothing(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [
        f"data_dir={whole.parents[1] / 'data'}",
        f"output_dir={tmp_path / 'out'}",
        f"base={whole / 'base'}",
    ]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        for typed in ([*SMALL, *places], ["stage=controlnet", "size=paper"]):
            print_plan(resolve_config(compose("train", [*typed, "dry_run=true"])))
    printed = capsys.readouterr().out
    assert "133,280 parameters" in printed and "over 8 records" in printed and "(on the hub)" in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("base=nowhere/", ["base=nowhere/"]),
        ("image_size=17", ["image_size=17", "image_size=16"]),
        ("init=nowhere/", ["nowhere/"]),
        ("data.repeat={other: 2}", ["other", "scenes-captioned"]),
        ("recipe.lr=0", ["recipe.lr"]),
        ("validation.protocol=da2", ["validation.protocol"]),
    ],
)
def test_mistakes_are_one_sentence(typed: str, words: list[str], train: Train, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError) as error:
        train(typed, name="mistake-" + typed.partition("=")[0].replace(".", "-"))
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("part", "found"), [("unet", "FluxTransformer2DModel"), ("text_encoder", "T5EncoderModel"), ("vae", None)]
)
def test_pipelines_of_another_kind_are_refused(part: str, found: str | None) -> None:
    from depth_anything.training.diffusion import PARTS, check_base_index

    index = {name: ["library", kind] for name, kind in PARTS.items()}
    check_base_index("one", index)
    with pytest.raises(UserError, match=part):
        check_base_index("one", {**index, part: ["diffusers", found] if found else None})
