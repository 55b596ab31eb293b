"""Run a stage: build the objects that a config names, then fit or predict."""

import sys

import pytorch_lightning as pl
from hydra.utils import instantiate
from omegaconf import DictConfig

from depth_anything.training import batch_plan, initialization, lightning
from depth_anything.training.check_config import USER_ERRORS, resolve_config
from depth_anything.training.command import format_failure
from depth_anything.training.config import RunConfig
from depth_anything.training.data import write_missing_scenes
from depth_anything.training.dry_run import print_plan
from depth_anything.training.optimizer import optimizer_factory
from depth_anything.training.pseudolabel import label_data_arguments
from depth_anything.training.redact import redact_hydra_files, redact_traceback
from depth_anything.training.resume import typed_keys
from depth_anything.training.run_dir import RunDir
from depth_anything.training.run_home import RunHome, open_home
from depth_anything.training.signals import signal_handler
from depth_anything.training.stage_networks import required_folders, stage_networks


def main(cfg: DictConfig) -> None:
    """Run the stage of a composed config; a user's mistake ends in one sentence and exit code 1."""
    signal_handler.install()
    redact_hydra_files()
    try:
        config = resolve_config(cfg)
        if config.dry_run:
            return print_plan(config, typed=typed_keys(sys.argv[1:]))
        with open_home(config) as home:
            message = predict(home) if config.stage == "pseudolabel" else fit(home)
        home.report(message)
    except Exception as error:
        signal_handler.raise_if_received()  # the error may be an effect of a signal
        error = lightning.explain_lost_rank(error)
        if isinstance(error, USER_ERRORS):
            sys.exit(f"error: {format_failure(error, sys.argv[1:])}")
        sys.exit(redact_traceback(error))  # a bug; Hydra would print the passwords that were typed


def build_trainer(config: RunConfig, callbacks: list[pl.Callback], *, max_steps: int = -1) -> pl.Trainer:
    """Build Lightning's Trainer from its config node."""
    arguments = lightning.trainer_arguments(
        callbacks=callbacks, max_steps=max_steps, run_dir=config.run_dir, log_every=config.logging.every
    )
    with lightning.translate_trainer_errors():
        return instantiate(config.trainer.as_dict(), _partial_=True, _convert_="all")(**arguments)


def fit(home: RunHome) -> str:
    """Train, or continue training, and write model.safetensors into the run folder; return what to print on rank 0."""
    config = home.config
    steps, typed, networks = config.steps, typed_keys(sys.argv[1:]), stage_networks(config)
    folder = RunDir(config.run_dir, typed=typed, result=networks.result)
    added = [instantiate(node, _convert_="all") for node in config.callbacks.values()]
    callbacks = lightning.build_callbacks(config, folder, added)
    trainer = build_trainer(config, callbacks, max_steps=steps)
    micro, accumulation = batch_plan.split_batch(config.batch_size, trainer.world_size, config.micro_batch)
    trainer.accumulate_grad_batches = accumulation
    checkpoint = home.local_checkpoint(lightning.start_run(trainer, folder, home.typed))
    if folder.finished(steps):
        return f"{folder.path} is finished; its model is {folder.model}{folder.describe_best()}"
    folders, scenes = required_folders(config), config.sources.scenes
    lightning.run_on_all_ranks(lambda: write_missing_scenes(scenes, folders))
    lightning.run_on_all_ranks(lambda: networks.prepare(folder.path, main=trainer.is_global_zero))
    staged = lightning.stage_on_all_ranks(config)
    data = instantiate(staged, micro_batch=micro, patch=networks.multiple, _convert_="all")
    lightning.run_on_all_ranks(lambda: data.setup("fit"))  # report a damaged set before building a network
    lightning.set_loggers(trainer, config, folder, checkpoint, build=instantiate)
    arguments, named = networks.build(data.open().sources)
    module = instantiate(config.module.as_dict(), *arguments, **named, _convert_="object")
    if config.has("optimizer"):
        module.build_optimizer = optimizer_factory(config.optimizer)
    lightning.run_fit(trainer, module, data, checkpoint)
    home.upload()
    lightning.raise_if_incomplete(trainer, callbacks)
    lightning.save_networks(trainer, module, networks, folder, title=config.name)
    if not trainer.is_global_zero:
        return ""
    folder.finish(steps)
    folder.lock.release()
    return f"finished: {folder.model}{folder.describe_best()}"


def predict(home: RunHome) -> str:
    """Label every image once; any number of processes may do so at the same time. Return what to print on rank 0."""
    config = home.config
    RunDir(config.run_dir).claim(home.typed, exclusive=False)
    write_missing_scenes(config.sources.scenes, list(config.data.sets.values()))
    teacher = initialization.open_run_teacher(config)
    arguments = label_data_arguments(teacher, image_size=config.image_size, precision=config.data.precision)
    data = instantiate(config.data.as_dict(), **arguments, _convert_="all")
    trainer = build_trainer(config, [])
    if trainer.world_size > 1 or not data.finished():  # several ranks must all enter the loop
        module = instantiate(config.module.as_dict(), teacher.module_argument(), data)
        lightning.run_predict(trainer, module, data)
    return data.summary() if trainer.is_global_zero else ""
