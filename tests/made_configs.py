"""Run configs for tests: composed from configs/ and resolved as train.py does."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from depth_anything.training.check_config import resolve_config
from depth_anything.training.config import RunConfig
from depth_anything.training.resume import FlatConfig

CONFIGS = Path(__file__).parents[1] / "configs"


@cache
def _resolve(typed: tuple[str, ...]) -> RunConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return resolve_config(compose("train", list(typed)))


def make_config(*typed: str, **changes: Any) -> RunConfig:
    """Resolve a command, and replace fields of the result; SECTION__KEY is a field of a section.

    A key that the composed config lacks is added to it, also one that the schema does not have.
    """
    config = _resolve(typed)
    for path, value in changes.items():
        section, _, key = path.partition("__")
        if key:
            value = replace(getattr(config, section), **{key: value})
        elif section not in type(config).__dataclass_fields__:
            config = replace(config, arguments={**config.arguments, section: value})
        if section in type(config).__dataclass_fields__:
            config = replace(config, **{section: value})
        if section not in config.composed_keys:
            config = replace(config, composed_keys=(*config.composed_keys, section))
    return config


def flatten(config: RunConfig) -> FlatConfig:
    """Return a config as a run's config.yaml is compared."""
    return FlatConfig.from_run(config)
