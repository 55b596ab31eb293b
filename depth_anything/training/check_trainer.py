"""Validate the arguments of Lightning's Trainer in a config. Lightning is imported late, as it takes seconds."""

import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from depth_anything.errors import UserError
from depth_anything.training.config import TrainerConfig
from depth_anything.training.value_rules import check_value, choice, format_value

#: Arguments of Lightning's Trainer that a run sets itself, and the key to type in their place.
SET_BY_RUN = {
    "max_steps": "steps=N",
    "accumulate_grad_batches": "micro_batch=N, from which accumulation follows",
    "gradient_clip_val": "recipe.clip_norm=1.0",
    "gradient_clip_algorithm": "recipe.clip_norm=1.0",
    "logger": "logger=wandb or logger=none",
    "default_root_dir": "output_dir=FOLDER",
    "max_epochs": "steps=N",
    "min_epochs": "steps=N",
    "min_steps": "steps=N",
    "fast_dev_run": "steps=1 name=trial",
    "limit_train_batches": "steps=N",
    "overfit_batches": "steps=N",
    "reload_dataloaders_every_n_epochs": "",
    "barebones": "",
    "val_check_interval": "validation.every=N",
    "check_val_every_n_epoch": "validation.every=N",
    "limit_val_batches": "validation.limit=N",
    "num_sanity_val_steps": "validation.every=N",
    "log_every_n_steps": "logging.every=N",
    "enable_checkpointing": "checkpoint.every=N",
    "callbacks": "",
    "plugins": "",
    "use_distributed_sampler": "",
    "enable_progress_bar": "",
    "enable_model_summary": "",
}


SHARDED_STRATEGY = "depth_anything.training.fsdp.ShardedStrategy"
SHARDED_STAGES = ("teacher", "student", "metric", "pretrain")
SHARDED_PRECISIONS = ("auto", "32-true", "bf16-mixed")


def check_trainer(trainer: TrainerConfig, *, stage: str, spike: str = "warn") -> None:
    """Refuse arguments of the Trainer that the run sets itself, and values that Lightning does not accept.

    Raises:
        UserError: Naming the key, and what to type.
    """
    from pytorch_lightning import Trainer
    from pytorch_lightning.accelerators import AcceleratorRegistry
    from pytorch_lightning.strategies import StrategyRegistry

    for name in trainer.arguments.keys() & SET_BY_RUN.keys():
        instead = f"type {SET_BY_RUN[name]}" if SET_BY_RUN[name] else f"leave trainer.{name} out"
        raise UserError(f"trainer.{name} is set by the run itself", instead)
    hints = get_type_hints(Trainer.__init__)
    precisions = sorted({str(name) for name in _literal_values(hints["precision"])})
    accelerators = sorted(AcceleratorRegistry.available_accelerators())
    check_value("trainer.precision", str(trainer.precision), choice("auto", *precisions))
    check_value("trainer.accelerator", trainer.accelerator, choice("auto", "gpu", *accelerators))
    if isinstance(trainer.strategy, str):
        if re.match("fsdp|model_parallel", trainer.strategy):  # they do not shard this project's networks
            raise UserError(f"trainer.strategy={trainer.strategy} is Lightning's own", "type trainer=fsdp")
        strategies = [
            name
            for name in sorted(StrategyRegistry.available_strategies())
            if not re.search("spawn|fork|notebook", name)  # their processes lack our signal handlers
            and not re.match("fsdp|model_parallel", name)
        ]
        check_value("trainer.strategy", trainer.strategy, choice("auto", *strategies))
    elif trainer.strategy.get("_target_") == SHARDED_STRATEGY:
        if stage not in SHARDED_STAGES:
            raise UserError(f"stage={stage} cannot shard its network", "type trainer=ddp")
        check_value("trainer.precision", str(trainer.precision), choice(*SHARDED_PRECISIONS))
        if spike == "rewind":
            raise UserError("guards.spike=rewind does not work with trainer=fsdp", "type guards.spike=skip")
    if trainer.target == "pytorch_lightning.Trainer":
        for name, value in trainer.as_dict().items():
            if name in hints and name != "precision" and not _matches_hint(value, hints[name]):
                raise UserError(
                    f"trainer.{name}={format_value(value)} does not have the type that Lightning's Trainer takes, "
                    f"{_format_hint(hints[name])}",
                    f"leave trainer.{name} out or type another value",
                )
        for name, value in trainer.arguments.items():
            if not isinstance(value, Mapping):  # a node with a _target_ is built later
                _try_trainer_argument(name, value)


def _try_trainer_argument(name: str, value: Any) -> None:
    """Build a Trainer with one argument that is not among this project's keys, to see whether Lightning accepts it."""
    from lightning_fabric.utilities.exceptions import MisconfigurationException
    from pytorch_lightning import Trainer

    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # hides what it says of the machine
    try:
        Trainer(accelerator="cpu", devices=1, **quiet, **{name: value})
    except (MisconfigurationException, ImportError, ValueError, TypeError) as error:
        raise UserError(
            f"trainer.{name}={format_value(value)}: {error}",
            f"leave trainer.{name} out or type another value",
        ) from error


def _matches_hint(value: Any, hint: Any) -> bool:
    """Return whether a plain value has the type of a hint; hints of classes take nodes with a `_target_`."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Union or str(origin) == "<class 'types.UnionType'>":
        return any(_matches_hint(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if origin in (list, tuple):
        return isinstance(value, (list, tuple)) and (
            not inner or all(_matches_hint(v, inner[0]) for v in value)
        )
    if origin is dict:
        return isinstance(value, Mapping)
    if hint is Any:
        return True
    if hint in (int, float):
        return type(value) is int or (hint is float and type(value) is float)
    if hint in (bool, str, type(None)):
        return type(value) is hint
    return isinstance(value, Mapping) and "_target_" in value


def _literal_values(hint: Any) -> Iterator[Any]:
    if get_origin(hint) is Literal:
        yield from get_args(hint)
    else:
        for inner in get_args(hint):
            yield from _literal_values(inner)


def _format_hint(hint: Any) -> str:
    return str(hint).replace("typing.", "") if get_origin(hint) else getattr(hint, "__name__", str(hint))
