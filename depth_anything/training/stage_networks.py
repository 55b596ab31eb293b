"""The networks of each stage that trains: built with their starting weights, described, and saved with provenance."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from depth_anything.classes import make_class_table
from depth_anything.data.address import redact_secrets
from depth_anything.data.reader import JoinedRecords, Records
from depth_anything.model.depth_anything import DepthAnything
from depth_anything.model.lora import add_adapters
from depth_anything.model.masked_autoencoder import MaskedAutoencoder
from depth_anything.model.segmentation import MASK_HEADS, SegmentationModel
from depth_anything.training import initialization, provenance
from depth_anything.training.batch_plan import extra_sets
from depth_anything.training.check_config import build_head
from depth_anything.training.config import RunConfig
from depth_anything.training.data import TrainData
from depth_anything.training.image_data import ImageData
from depth_anything.training.plan_text import (
    NOT_FOUND,
    PlanLine,
    count_parameters,
    describe_invariant_losses,
    is_local_set,
    is_there,
    optimizer_name,
    schedule_line,
)
from depth_anything.training.segmentation_data import SegmentationData, read_classes
from depth_anything.training.segmentation_setup import (
    open_segmentation_task,
    segmentation_validation_folder,
)
from depth_anything.training.validation import open_validation_task

Network = DepthAnything | MaskedAutoencoder | SegmentationModel


class StageNetworks(Protocol):
    """What a stage that trains knows about its networks. run.py trains them; dry_run.py describes them.

    Attributes:
        result: Main file of the result in the run folder.
        data_class: The stage's DataModule.
    """

    result: str
    data_class: type[TrainData]

    def prepare(self, folder: Path, *, main: bool) -> None:
        """Make what the run needs on the disk; called on every rank."""

    @property
    def multiple(self) -> int:
        """The number of pixels that image sides must be multiples of."""

    def build(self, sources: Sequence[Records | JoinedRecords]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Build the networks for data from `sources`; return the arguments of the stage's LightningModule."""

    def save(self, module: Any, path: Path, *, title: str, measured: Mapping[str, str]) -> None:
        """Write the network of a module and its card.

        Args:
            module: The stage's LightningModule.
            path: `result` in the run folder, or the file of the averaged weights.
            title: Title of the card.
            measured: Metric name to its value at the last validation; {} if other weights were validated.
        """

    @property
    def validation_folder(self) -> str | None:
        """The set of `sources` that a run is validated on; None for none."""

    def open_validation(self) -> None:
        """Open what a run is validated on, to raise the errors that it would raise."""

    def check(self) -> None:
        """Check the starting weights, as far as they are on this machine; nothing is downloaded."""

    @property
    def planned_multiple(self) -> int:
        """`multiple` as far as it is known without loading a network."""

    def describe_network(self) -> list[PlanLine]:
        """Describe the network and its size."""

    def describe_training(self) -> list[PlanLine]:
        """Describe what is trained and how, and the starting weights."""

    def describe_labels(self) -> str | None:
        """Describe the labels that are joined with images; None for none."""


class DepthNetworks:
    """The network of a stage that trains a depth network of this project."""

    result: str = "model.safetensors"
    data_class: type[TrainData] = TrainData
    head_part = "head"
    """What the parameters outside of the encoder are."""

    def __init__(self, config: RunConfig) -> None:
        """Store the config."""
        self.config = config
        self._model: Any = None

    def prepare(self, folder: Path, *, main: bool) -> None:
        """Do nothing."""

    @property
    def multiple(self) -> int:
        """The patch size of the encoder, pixels."""
        return initialization.crop_multiple(self.config)

    def build(self, sources: Sequence[Records | JoinedRecords]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Build the network and, for feature alignment, the frozen encoder."""
        model = initialization.build_model(self.config)
        provenance.add_provenance(model, self.config, sources)
        return (model,), {"frozen": initialization.build_frozen_encoder(self.config)}

    def save(self, module: Any, path: Path, *, title: str, measured: Mapping[str, str]) -> None:
        """Write a .safetensors file and its card."""
        provenance.write_result(module.model, path, title=title, measured=measured)

    @property
    def validation_folder(self) -> str | None:
        """The validation set of `sources`."""
        return self.config.sources.validation

    def open_validation(self) -> None:
        """Open the benchmark or the set that a run is validated on."""
        open_validation_task(self.config)

    def check(self) -> None:
        """Check the starting weights of the network."""
        initialization.check_initial_weights(self.config)

    @property
    def planned_multiple(self) -> int:
        """The patch size of the encoder, pixels."""
        return self.multiple

    def describe_network(self) -> list[PlanLine]:
        """Describe the encoder and the head."""
        model = self.meta_network
        head = [
            parameter for name, parameter in model.named_parameters() if not name.startswith("pretrained.")
        ]
        encoder = count_parameters(model.pretrained.parameters())
        return [
            ("network", f"{self.config.encoder}: {count_parameters(model.parameters())} parameters"),
            ("", f"encoder {encoder}, {self.head_part} {count_parameters(head)}"),
        ]

    def describe_training(self) -> list[PlanLine]:
        """Describe the parameter groups, the schedule, the loss and the starting weights."""
        config, model, lines = self.config, self.meta_network, []
        if config.lora and isinstance(model, DepthAnything):
            with torch.device("meta"):
                add_adapters(model, config.lora)
            lines.append(("adapters", f"LoRA of rank {config.lora} in the frozen encoder"))
        groups = (
            ("encoder", model.encoder_parameters(), config.recipe.encoder_lr),
            (self.head_part, model.head_parameters(), config.recipe.head_lr),
        )
        for name, parameters, rate in groups:
            trained = f"{name}: {count_parameters(parameters)} trained"
            lines.append(("group", f"{trained}, {optimizer_name(config)}, rate {rate:g}"))
        copied = {"encoder": ", encoder only", "all": ", encoder and head"}.get(config.start or "", "")
        found = "" if config.init in (None, "hub", "scratch") or is_there(config.init) else NOT_FOUND
        start = f"{config.init or 'random weights'}{copied if config.init else ''}{found}"
        return [*lines, schedule_line(config), ("loss", self._describe_loss()), ("start", start)]

    def describe_labels(self) -> str | None:
        """Name the folder of the labels."""
        labels = self.config.data.labels
        return redact_secrets(str(labels)) if labels else None

    @property
    def meta_network(self) -> Any:
        """The network on the meta device, without weights."""
        if self._model is None:
            with torch.device("meta"):
                self._model = self._build_random()
                self._model.pretrained.requires_grad_(not self.config.freeze_encoder)
        return self._model

    def _build_random(self) -> Network:
        config = self.config
        return DepthAnything(config.encoder, max_depth=config.max_depth, head=build_head(config))

    def _describe_loss(self) -> str:
        return describe_invariant_losses(self.config.recipe)


class MetricNetworks(DepthNetworks):
    """The network of stage=metric, which predicts meters."""

    def describe_labels(self) -> str | None:
        """Name the folder of the labels of replayed photographs."""
        return super().describe_labels() if self.config.replay else None

    def _describe_loss(self) -> str:
        config, recipe = self.config, self.config.recipe
        silog = f"silog, variance focus {recipe.variance_focus:g}, for depth from {config.min_depth:g} to "
        silog += f"{config.max_depth:g} m"
        if config.canonical_focal is not None:
            silog += f" of a camera of {config.canonical_focal:g} px"
        return f"{silog}; replayed: {describe_invariant_losses(recipe)}" if config.replay else silog


class PretrainNetworks(DepthNetworks):
    """The masked autoencoder of stage=pretrain, which is not validated."""

    data_class = ImageData
    head_part = "decoder"

    @property
    def validation_folder(self) -> str | None:
        """None."""
        return None

    def open_validation(self) -> None:
        """Do nothing."""

    def _build_random(self) -> Network:
        return initialization.build_random_autoencoder(self.config)

    def _describe_loss(self) -> str:
        recipe = self.config.recipe
        target = "patches of mean 0 and deviation 1" if recipe.normalize_targets else "pixels"
        return f"squared error of the {recipe.mask_ratio:.0%} masked patches; targets: {target}"


class SegmentationNetworks(DepthNetworks):
    """The network of stage=segmentation, whose classes are those of the sets."""

    data_class = SegmentationData

    @property
    def validation_folder(self) -> str | None:
        """The set with class maps."""
        return segmentation_validation_folder(self.config)

    def open_validation(self) -> None:
        """Open the set with class maps."""
        open_segmentation_task(self.config)

    def describe_network(self) -> list[PlanLine]:
        """Describe the classes too, which are unknown until a set of the run exists."""
        found = len(self.meta_network.classes) if self._local_sets() else None
        number = "unknown until the sets exist (counted as one)" if found is None else found
        return [("classes", f"{number}, head={self.config.head}"), *super().describe_network()]

    def _local_sets(self) -> dict[str, str]:
        return {name: root for name, root in self.config.data.sets.items() if is_local_set(str(root))}

    def _build_random(self) -> Network:
        config, found = self.config, self._local_sets()
        return SegmentationModel(
            config.encoder,
            classes=read_classes(found) if found else make_class_table(["unknown"]),
            head=build_head(config) or config.head,
            head_options=config.head_options,
        )

    def _describe_loss(self) -> str:
        masks = self.config.head in MASK_HEADS and self.config.model.head is None
        return "classes, masks and dice of matched masks" if masks else "cross-entropy of pixels, per image"


def stage_networks(config: RunConfig) -> StageNetworks:
    """Return the networks of a stage; nothing is loaded yet."""
    if config.stage == "controlnet":
        from depth_anything.training.controlnet_networks import ControlNetNetworks

        return ControlNetNetworks(config)
    networks: dict[str, type[DepthNetworks]] = {
        "metric": MetricNetworks,
        "pretrain": PretrainNetworks,
        "segmentation": SegmentationNetworks,
    }
    return networks.get(config.stage, DepthNetworks)(config)


def required_folders(config: RunConfig) -> list[str]:
    """List the folders of all sets that a fitting run reads, including the validation set."""
    extra = [folder for sets in extra_sets(config).values() for folder in sets.values()]
    folders = [*config.data.sets.values(), *extra, stage_networks(config).validation_folder]
    return [str(folder) for folder in folders if folder is not None]
