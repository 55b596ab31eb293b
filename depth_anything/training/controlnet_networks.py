"""The networks of stage=controlnet: the frozen pipeline, the ControlNet with its starting weights, and its card."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from depth_anything.data.address import redact_secrets
from depth_anything.data.reader import JoinedRecords, Records
from depth_anything.data.shards import open_set
from depth_anything.disk import atomic_folder
from depth_anything.errors import UserError
from depth_anything.licenses import card_license_fields, combine_licenses
from depth_anything.model.card import data_table, escape_markdown, markdown_code, seal_card, write_card
from depth_anything.model.tensor_files import WRITE_ERRORS
from depth_anything.training.config import RunConfig
from depth_anything.training.controlnet import ControlNetPair
from depth_anything.training.data import TrainData
from depth_anything.training.diffusion import (
    CONDITIONING_CHANNELS,
    DiffusionBase,
    check_base,
    import_diffusers,
    load_base,
    load_part,
    meta_controlnet,
    write_tiny_base,
)
from depth_anything.training.plan_text import PlanLine, count_parameters, optimizer_name, schedule_line
from depth_anything.training.provenance import set_provenance

BASE_FOLDER = "base"
"""Folder in the run folder of the tiny random pipeline that base=null trains on."""


class ControlNetNetworks:
    """The ControlNet of a run and the frozen pipeline under it."""

    result = "controlnet/diffusion_pytorch_model.safetensors"
    data_class: type[TrainData] = TrainData

    def __init__(self, config: RunConfig) -> None:
        """Store the config; nothing is loaded yet."""
        self.config = config
        self.source = config.base or ""
        self.data: list[dict[str, Any]] = []
        self._base: DiffusionBase | None = None

    def prepare(self, folder: Path, *, main: bool) -> None:
        """Write the tiny pipeline of base=null into the run folder, once."""
        if self.config.base is not None:
            return
        import_diffusers()
        self.source = str(folder / BASE_FOLDER)
        if main and not Path(self.source, "model_index.json").is_file():
            write_tiny_base(Path(self.source), self.config.seed)

    @property
    def base(self) -> DiffusionBase:
        """The frozen pipeline, loaded at the first use."""
        if self._base is None:
            self._base = load_base(self.source)
        return self._base

    @property
    def multiple(self) -> int:
        """The number of pixels that image sides must be multiples of.

        Raises:
            UserError: If image_size is not.
        """
        multiple, side = self.base.multiple, self.config.image_size
        if side % multiple or side < 2 * multiple:
            nearest = max(2, round(side / multiple)) * multiple
            raise UserError(
                f"image_size={side} is not a multiple of {multiple}, which the VAE of base={self.base.source} needs",
                f"type image_size={nearest}",
            )
        return multiple

    def build(self, sources: Sequence[Records | JoinedRecords]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Build the ControlNet: from `init`, or with the weights of the base's UNet and zero convolutions."""
        self.data = [set_provenance(source) for source in sources]
        return (ControlNetPair(build_controlnet(self.base, self.config), self.base),), {}

    @property
    def licence(self) -> str | None:
        """The combined license of the base, the images and the teachers of their labels."""
        licenses = [self.base.licence]
        for row in self.data:
            licenses += [row["licence"], *([row["teacher"]["licence"]] if row["teacher"] else [])]
        return combine_licenses(licenses)

    def save(self, module: Any, path: Path, *, title: str, measured: Mapping[str, str]) -> None:
        """Write the folder of `path`, which diffusers loads, with its card and depth_anything.json."""
        target = path.parent
        origin = {
            "stage": self.config.stage,
            "base": {
                "from": self.config.base or "random weights",
                "licence": self.base.licence,
                "fingerprint": self.base.fingerprint,
            },
            "init": self.config.init,
            "data": self.data,
            "licence": self.licence,
        }
        with atomic_folder(target, keep_others=True, also=WRITE_ERRORS) as temporary:
            module.model.save_pretrained(temporary, safe_serialization=True)
            (temporary / "depth_anything.json").write_text(
                json.dumps(origin, indent=1, sort_keys=True) + "\n"
            )
        write_card(self._card(path, title, measured), target, file=path.name)

    @property
    def validation_folder(self) -> str | None:
        """The validation set of `sources`."""
        return self.config.sources.validation

    def open_validation(self) -> None:
        """Open the validation set."""
        assert self.validation_folder is not None
        open_set(self.validation_folder)

    def check(self) -> None:
        """Check the base, if it is a folder on this machine."""
        if self.config.base is not None:
            check_base(self.config.base)

    @property
    def planned_multiple(self) -> int:
        """1: the VAE of the base, which is not loaded, knows its own."""
        return 1

    def describe_network(self) -> list[PlanLine]:
        """Describe the base; of a base on the hub nothing is read."""
        base, size = self.config.base, ""
        if base is not None:
            size = " (on the hub)"
            if Path(base).is_dir():
                size = f" (ControlNet of {count_parameters(meta_controlnet(base).parameters())} parameters)"
        return [("base", f"{base or 'random weights, written to the run folder'}{size}")]

    def describe_training(self) -> list[PlanLine]:
        """Describe the starting weights, the optimizer, the schedule and the loss."""
        config, recipe = self.config, self.config.recipe
        return [
            ("start", config.init or "the weights of the UNet, and zero convolutions"),
            ("group", f"controlnet: {optimizer_name(config)}, rate {recipe.lr:g}"),
            schedule_line(config),
            ("loss", f"noise or velocity; {recipe.caption_dropout:.0%} of the captions dropped"),
        ]

    def describe_labels(self) -> str | None:
        """Name the folder of the labels."""
        return f"{redact_secrets(str(self.config.data.labels))}, of the sets without depth"

    def _card(self, path: Path, title: str, measured: Mapping[str, str]) -> str:
        config, licence = self.config, self.licence
        base = config.base or str(path.parent.parent / BASE_FOLDER)
        front = {"library_name": "diffusers", "pipeline_tag": "text-to-image", **card_license_fields(licence)}
        if config.base is not None and not Path(config.base).exists():
            front["base_model"] = config.base
        start = f"the ControlNet {markdown_code(config.init)}" if config.init else "the weights of its UNet"
        rows = [f"| {name} | {float(value):.4g} |" for name, value in measured.items()]
        lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items())]
        lines += ["tags: [controlnet, depth-anything, stable-diffusion, diffusers]", "---", ""]
        lines += [f"# {escape_markdown(title)}", ""]
        lines += [
            "A ControlNet for Stable Diffusion, conditioned on the depth of an image: 8-bit RGB, near is white, far is",
            "black, over the range of each image, as `depth-anything predict --format controlnet` writes it.",
            "",
            "## How to use it",
            "",
            "```python",
            "from diffusers import ControlNetModel, StableDiffusionControlNetPipeline",
            "from diffusers.utils import load_image",
            "",
            f"controlnet = ControlNetModel.from_pretrained({json.dumps(path.parent.name)})",
            "pipeline = StableDiffusionControlNetPipeline.from_pretrained(",
            f"    {json.dumps(base)}, controlnet=controlnet, safety_checker=None",
            ")",
            'image = pipeline("a room", load_image("photo_controlnet.png")).images[0]',
            "```",
            "",
            "## Where it comes from",
            "",
            f"License of the weights: **{escape_markdown(licence or 'unknown')}**.",
            "",
            f"Base: {markdown_code(config.base or 'random weights')} (license: "
            f"{escape_markdown(self.base.licence or 'unknown')}). Started from {start}.",
            "",
            f"Trained by `train.py stage=controlnet` for {config.steps:,} steps of {config.batch_size} images on:",
            "",
            *data_table(self.data, stage="controlnet"),
        ]
        if rows:
            lines += ["", "## Evaluation", "", "On the images of the run's config.yaml, at fixed noise:", ""]
            lines += ["| metric | mean |", "|---|---|", *rows]
        return seal_card("\n".join(lines) + "\n", path.name)


def build_controlnet(base: DiffusionBase, config: RunConfig) -> Any:
    """Build diffusers' ControlNetModel with its starting weights, in float32.

    Raises:
        UserError: `init` cannot be loaded or does not fit the base, or the VAE has more levels than there are channels.
    """
    model = import_diffusers().ControlNetModel
    levels = len(base.vae.config.block_out_channels)
    if levels > len(CONDITIONING_CHANNELS):
        raise UserError(
            f"the VAE of base={base.source} has {levels} levels, more than {len(CONDITIONING_CHANNELS)}",
            "type another base",
        )
    if config.init is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            channels = CONDITIONING_CHANNELS[:levels]
            return model.from_unet(base.unet, conditioning_embedding_out_channels=channels).requires_grad_(
                True
            )
    controlnet = load_part(model, config.init, None)
    for key in ("cross_attention_dim", "block_out_channels", "in_channels"):
        theirs, ours = controlnet.config[key], base.unet.config[key]
        if theirs != ours and list(_as_list(theirs)) != list(_as_list(ours)):
            raise UserError(
                f"init={config.init} has {key}={theirs}, but the UNet of base={base.source} has {ours}",
                "type a ControlNet of this base, or init=null",
            )
    return controlnet.requires_grad_(True)


def _as_list(value: Any) -> Any:
    return value if isinstance(value, (list, tuple)) else [value]
