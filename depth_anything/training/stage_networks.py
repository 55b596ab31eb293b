"""The networks of each stage that trains: built with their starting weights, and saved with their provenance."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from depth_anything.data.reader import JoinedRecords, Records
from depth_anything.training import initialization, loggers, provenance
from depth_anything.training.config import RunConfig
from depth_anything.training.run_dir import RunDir

RESULTS = {"controlnet": "controlnet/diffusion_pytorch_model.safetensors"}
"""Stage to the main file of its result in the run folder; of other stages it is model.safetensors."""


class StageNetworks(Protocol):
    """What run.py asks of the networks of a stage, in this order."""

    def prepare(self, folder: Path, *, main: bool) -> None:
        """Make what the run needs on the disk; called on every rank."""

    @property
    def multiple(self) -> int:
        """The number of pixels that image sides must be multiples of."""

    def build(self, sources: Sequence[Records | JoinedRecords]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Build the networks for data from `sources`; return the arguments of the stage's LightningModule."""

    def save(self, module: Any, folder: RunDir) -> None:
        """Write the result and its card into the run folder."""


class DepthNetworks:
    """The network of a stage that trains an encoder of this project: all but stage=controlnet."""

    def __init__(self, config: RunConfig) -> None:
        """Store the config."""
        self.config = config

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

    def save(self, module: Any, folder: RunDir) -> None:
        """Write model.safetensors and README.md."""
        measured = loggers.read_latest(folder.metrics, "val_")
        provenance.write_result(module.model, folder.model, title=self.config.name, measured=measured)


def stage_networks(config: RunConfig) -> StageNetworks:
    """Return the networks of a stage; nothing is loaded yet."""
    if config.stage == "controlnet":
        from depth_anything.training.controlnet_networks import ControlNetNetworks

        return ControlNetNetworks(config)
    return DepthNetworks(config)


def result_file(config: RunConfig) -> str:
    """Return the main file of a run's result, relative to its folder."""
    return RESULTS.get(config.stage, "model.safetensors")
