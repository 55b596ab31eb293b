"""How a key of a training config is declared: its rule, its stages, and what a resumed run may change."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from typing import Any

from depth_anything.training.value_rules import (
    ValueRule,
)

DEPTH_STAGES = ("teacher", "student", "metric")
"""Stages that train a depth network."""
ENCODER_FIT_STAGES = (*DEPTH_STAGES, "pretrain", "segmentation")
"""Stages that train one of this project's encoders; stage=controlnet trains another network."""
FIT_STAGES = (*ENCODER_FIT_STAGES, "controlnet")
LABEL_STAGES = (*DEPTH_STAGES, "pseudolabel")
STAGES = (*FIT_STAGES, "pseudolabel")
ENCODER_STAGES = (*ENCODER_FIT_STAGES, "pseudolabel")

# What a key may do when a run is resumed.
FREE = "free"
"""May differ at every start: where a run computes, what it prints, when it saves."""
CHANGE = "change"
"""May be changed on purpose: with resume_with= in the run's own folder, or with resume=CHECKPOINT in another."""
SAME = "same"
"""Never changes, neither in a run nor between a checkpoint and the run that resumes from it."""
START = "start"
"""Never changes in a run; does not matter to a run that resumes from the checkpoint of another run."""
ECHO = "echo"
"""Repeats another key, which is compared in its place."""


@dataclass(frozen=True)
class ConfigKey:
    """What the schema says about one key.

    Attributes:
        rule: Rule of the value; None for sections and mappings.
        stages: Stages that know the key.
        resume: FREE, CHANGE, SAME, START or ECHO.
        section: Dataclass of the keys below this one.
        entries: For a mapping whose names the user chooses: describes its values.
        names_sets: The names of the mapping are names of sets, which become folders of labels.
        is_open: The section takes more keys: the arguments of the class that its `_target_` names.
        holds_nodes: For a mapping {NAME: node} of objects that Hydra builds, as `callbacks`.
        replay_only: In stage=metric the key only matters with `replay`.
        repeats_run: A key of `data` that must equal the key of the run of the same name.
    """

    rule: ValueRule | None = None
    stages: tuple[str, ...] = STAGES
    resume: str = SAME
    section: "type[ConfigSection] | None" = None
    entries: "ConfigKey | None" = None
    names_sets: bool = False
    is_open: bool = False
    holds_nodes: bool = False
    replay_only: bool = False
    repeats_run: bool = False


def config_key(rule: ValueRule | None = None, *, default: Any = MISSING, **settings: Any) -> Any:
    """Declare a key of the schema. A key without a default must be in every config of a stage that knows it."""
    return field(default=default, metadata={"key": ConfigKey(rule, **settings)})


def keys_of(section: type) -> dict[str, ConfigKey]:
    """Return the keys of a dataclass of the schema by name."""
    fields: dict[str, Any] = vars(section)["__dataclass_fields__"]
    return {_key_name(name): item.metadata["key"] for name, item in fields.items() if "key" in item.metadata}


def default_value(section: type, name: str) -> Any:
    """Return the value that an absent key has; MISSING where it must be present."""
    item = vars(section)["__dataclass_fields__"].get(field_name(name))
    return MISSING if item is None else item.default


def field_name(key: str) -> str:
    """Return the name of the dataclass field that holds a key: `target` for `_target_`."""
    return "target" if key == "_target_" else key


def _key_name(field_name: str) -> str:
    return "_target_" if field_name == "target" else field_name


@dataclass(frozen=True, kw_only=True)
class ConfigSection:
    """A part of a config: a field for each key of the schema, and `arguments` for the other keys of an open section.

    A field whose key is neither in the config nor has a default is None, as `steps` of stage=pseudolabel.

    Attributes:
        arguments: Keys that are not in the schema, for the class that `_target_` names.
        composed_keys: The keys that the composed config has, in its order; () means all keys of the schema.
    """

    arguments: dict[str, Any] = field(default_factory=dict)
    composed_keys: tuple[str, ...] = field(default=(), repr=False, compare=False)

    def has(self, key: str) -> bool:
        """Return whether the composed config has the key."""
        return key in (self.composed_keys or keys_of(type(self)))

    def as_dict(self) -> dict[str, Any]:
        """Return the section as plain values, as YAML holds it and Hydra's `instantiate` takes it."""
        known = keys_of(type(self))
        names = self.composed_keys or (*known, *self.arguments)
        return {
            name: _as_plain(getattr(self, field_name(name)) if name in known else self.arguments[name])
            for name in names
        }


def _as_plain(value: Any) -> Any:
    if isinstance(value, ConfigSection):
        return value.as_dict()
    if isinstance(value, Mapping):
        return {name: _as_plain(item) for name, item in value.items()}
    return [_as_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
