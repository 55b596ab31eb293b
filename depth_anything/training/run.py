"""From a composed config to objects, and from objects to a fit or a prediction."""

import sys
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from depth_anything.model.weights import save_model
from depth_anything.training import batch_plan, lightning
from depth_anything.training.check_config import resolve_config
from depth_anything.training.command import format_failure
from depth_anything.training.data import write_missing_scenes
from depth_anything.training.dry_run import print_plan
from depth_anything.training.initialization import (
    add_provenance,
    build_frozen_encoder,
    build_model,
    image_size_multiple,
    load_teacher,
    write_run_card,
)
from depth_anything.training.loggers import MetricsCSV, SafeLogger
from depth_anything.training.pseudolabel import describe_teacher
from depth_anything.training.redact import redact_hydra_files, redact_traceback
from depth_anything.training.resume import typed_keys
from depth_anything.training.run_dir import RunDir, step_from_name
from depth_anything.training.signals import signal_handler


def main(cfg: DictConfig) -> None:
    """Run a stage; what the user can mend ends in one sentence and exit code 1."""
    signal_handler.install()
    redact_hydra_files()
    try:
        config = resolve_config(cfg)
        if config["dry_run"]:
            print_plan(config, typed=typed_keys(sys.argv[1:]))
        elif config["stage"] == "pseudolabel":
            predict(config)
        else:
            fit(config)
    except Exception as error:
        signal_handler.raise_if_received()  # what a signal interrupts may raise an error of its own
        if isinstance(error, (ValueError, OSError, OmegaConfBaseException, InstantiationException)):
            sys.exit(f"error: {format_failure(error, sys.argv[1:])}")
        sys.exit(redact_traceback(error))  # a fault of ours; Hydra would print the passwords typed


def build_trainer(
    config: Mapping[str, Any], callbacks: list[pl.Callback], *, max_steps: int = -1
) -> pl.Trainer:
    """Build Lightning's Trainer from its config node."""
    given = lightning.trainer_arguments(callbacks=callbacks, max_steps=max_steps, run_dir=config["run_dir"])
    with lightning.translate_trainer_errors():
        return instantiate(config["trainer"], _partial_=True, _convert_="all")(**given)


def fit(config: dict[str, Any]) -> None:
    """Train, or go on training, and leave model.safetensors in the run folder."""
    folder, steps = RunDir(config["run_dir"], typed=typed_keys(sys.argv[1:])), config["steps"]
    callbacks = lightning.build_callbacks(config, folder)
    trainer = build_trainer(config, callbacks, max_steps=steps)
    micro, accumulation = batch_plan.split_batch(
        config["batch_size"], trainer.world_size, config["micro_batch"]
    )
    trainer.accumulate_grad_batches = accumulation
    checkpoint = lightning.start_run(trainer, folder, config)
    if folder.finished(steps):
        print(f"{folder.path} is finished; its model is {folder.model}{folder.describe_best()}")
        return
    lightning.run_on_all_ranks(
        lambda: write_missing_scenes(config["sources"]["scenes"], batch_plan.required_folders(config))
    )
    data = instantiate(
        config["data"], micro_batch=micro, patch=image_size_multiple(config["encoder"]), _convert_="all"
    )
    lightning.run_on_all_ranks(lambda: data.setup("fit"))  # a damaged set is named before a network is built
    if trainer.is_global_zero:
        numbers = MetricsCSV(folder.path / "metrics.csv")
        numbers.rewind(step_from_name(checkpoint))
        logger = [SafeLogger(instantiate(config["logger"]))] if config.get("logger") else []
        trainer.loggers = [numbers, *logger]
    model = add_provenance(build_model(config), config, data.open().sources)
    module = instantiate(config["module"], model, frozen=build_frozen_encoder(config), _convert_="object")
    lightning.run_fit(trainer, module, data, checkpoint)
    lightning.raise_if_incomplete(trainer, callbacks)
    if trainer.is_global_zero:
        save_model(module.model, folder.model)
        write_run_card(module.model, folder.path, title=config["name"], measured=numbers.last("val_"))
        folder.finish(steps)
        folder.lock.release()
        print(f"finished: {folder.model}{folder.describe_best()}")


def predict(config: dict[str, Any]) -> None:
    """Label every photograph once, beside any number of other processes that do the same."""
    folder = RunDir(config["run_dir"])
    folder.claim(config, exclusive=False)
    write_missing_scenes(config["sources"]["scenes"], list(config["data"]["sets"].values()))
    teacher = load_teacher(config)
    made_by = describe_teacher(teacher, config["teacher"])
    data = instantiate(config["data"], patch=teacher.multiple, teacher=made_by, _convert_="all")
    trainer = build_trainer(config, [])
    if trainer.world_size > 1 or not data.finished():  # ranks that meet must all come
        lightning.run_predict(trainer, instantiate(config["module"], teacher, data), data)
    if trainer.is_global_zero:
        print(data.summary())
