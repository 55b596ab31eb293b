"""From a composed config to objects, and from objects to a fit or a prediction. The only importer of Hydra."""

import sys
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from depth_anything.model.weights import save_model
from depth_anything.training import plan
from depth_anything.training.data import make_scenes
from depth_anything.training.engine import fit_callbacks, stop_if_signalled, trainer_arguments
from depth_anything.training.folder import RunFolder, step_of
from depth_anything.training.loggers import MetricsCSV
from depth_anything.training.pseudolabel import describe_teacher
from depth_anything.training.start import credited, load_teacher, multiple_of, network, twin, write_run_card


def main(cfg: DictConfig) -> None:
    """Run a stage; what the user can mend ends in one sentence and exit code 1."""
    try:
        config = complete(cfg)
        if config["dry_run"]:
            plan.print_plan(config)
        elif config["stage"] == "pseudolabel":
            predict(cfg, config)
        else:
            fit(cfg, config)
    except (ValueError, OSError, OmegaConfBaseException, InstantiationException) as error:
        sys.exit(f"error: {plan.as_typed(plan.one_sentence(error), sys.argv[1:])}")


def complete(cfg: DictConfig) -> dict[str, Any]:
    """Fill in what follows from other keys, and return the config as plain values."""
    if cfg.streams is None and isinstance(cfg.batch_size, int):
        cfg.streams = 8 * cfg.batch_size
    if cfg.trainer.precision == "auto":
        gpu = torch.cuda.is_available() and cfg.trainer.accelerator != "cpu"
        cfg.trainer.precision = "bf16-mixed" if gpu else "32-true"
    config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    plan.refuse_nonsense(config)
    return config


def build_trainer(cfg: DictConfig, callbacks: list[pl.Callback], *, max_steps: int = -1) -> pl.Trainer:
    """Build Lightning's Trainer from its config node."""
    given = trainer_arguments(callbacks=callbacks, max_steps=max_steps, run_dir=cfg.run_dir)
    return instantiate(cfg.trainer, _partial_=True, _convert_="all")(**given)


def fit(cfg: DictConfig, config: dict[str, Any]) -> None:
    """Train, or go on training, and leave model.safetensors in the run folder."""
    folder, steps = RunFolder(config["run_dir"]), config["steps"]
    callbacks = fit_callbacks(config, folder)
    trainer = build_trainer(cfg, callbacks, max_steps=steps)
    micro, accumulation = plan.split_batch(config["batch_size"], trainer.world_size, config["micro_batch"])
    trainer.accumulate_grad_batches = accumulation
    checkpoint = folder.begin(config, main=trainer.is_global_zero)
    if folder.finished(steps):
        print(f"{folder.path} is finished; its model is {folder.model}{folder.told_best()}")
        return
    make_scenes(config["sources"]["scenes"], plan.needed_sets(config))
    data = instantiate(cfg.data, micro_batch=micro, patch=multiple_of(config["encoder"]), _convert_="all")
    data.open()  # a set that is missing or damaged is named before a network is built
    if trainer.is_global_zero:
        numbers = MetricsCSV(folder.path / "metrics.csv")
        numbers.rewind(step_of(checkpoint))
        trainer.loggers = [numbers, *([instantiate(cfg.logger)] if cfg.logger else [])]
    model = credited(network(config), config, data.open().sources)
    module = instantiate(cfg.module, model, frozen=twin(config), _convert_="object")
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    stop_if_signalled(trainer, callbacks)
    if trainer.is_global_zero:
        save_model(module.model, folder.model)
        write_run_card(module.model, folder.path, title=config["name"], measured=numbers.last("val_"))
        folder.finish(steps)
        folder.lock.release()
        print(f"finished: {folder.model}{folder.told_best()}")


def predict(cfg: DictConfig, config: dict[str, Any]) -> None:
    """Label every photograph once, beside any number of other processes that do the same."""
    folder = RunFolder(config["run_dir"])
    folder.claim(config, exclusive=False)
    make_scenes(config["sources"]["scenes"], list(config["data"]["sets"].values()))
    teacher = load_teacher(config)
    made_by = describe_teacher(teacher, config["teacher"])
    data = instantiate(cfg.data, patch=teacher.multiple, teacher=made_by, _convert_="all")
    trainer = build_trainer(cfg, [])
    if trainer.world_size > 1 or not data.finished():  # ranks that meet must all come
        trainer.predict(instantiate(cfg.module, teacher, data), datamodule=data, return_predictions=False)
    if trainer.is_global_zero:
        print(data.summary())
