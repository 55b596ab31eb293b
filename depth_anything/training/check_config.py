"""Convert a composed config into a `RunConfig`: unknown keys and impossible values are refused before data is read."""

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from depth_anything.data.address import SET_NAME_RULE, is_set_name
from depth_anything.errors import UserError
from depth_anything.training.check_nodes import parse_nodes, takes_argument, target_parameters
from depth_anything.training.check_stage import (
    check_controlnet_stage,
    check_metric_stage,
    check_pretrain_stage,
    check_pseudolabel_stage,
    without_foreign_keys,
)
from depth_anything.training.check_trainer import SET_BY_RUN, check_trainer
from depth_anything.training.config import DataConfig, RunConfig, ValidationConfig
from depth_anything.training.config_schema import (
    CHANGE,
    STAGES,
    ConfigKey,
    ConfigSection,
    default_value,
    field_name,
    keys_of,
)
from depth_anything.training.value_rules import ANY, check_value, choice, format_value

#: Names that other programs give to a key → the key.
KEY_SYNONYMS = {
    "lr": "recipe.head_lr",
    "learning_rate": "recipe.head_lr",
    "epochs": "steps",
    "iterations": "steps",
    "max_steps": "steps",
    "gpus": "trainer.devices",
    "num_workers": "workers",
    "weights": "init",
    "pretrained": "init",
}
#: Errors that a user can fix; they are reported in one sentence.
USER_ERRORS = (ValueError, OSError, OmegaConfBaseException, InstantiationException)


def resolve_config(cfg: DictConfig) -> RunConfig:
    """Fill in the values that follow from other keys, validate the composed config, and convert it.

    Raises:
        UserError: As `parse_config`.
    """
    unresolved: Any = OmegaConf.to_container(cfg)
    for name, known in keys_of(RunConfig).items():  # before interpolations look into a section
        if known.section is not None and unresolved.get(name) is not None:
            _check_is_mapping(unresolved[name], known.section, name)
    fill_derived_values(cfg)
    values: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    return parse_config(without_foreign_keys(values))


def fill_derived_values(cfg: DictConfig) -> None:
    """Replace the values that depend on other keys or on the machine: `streams`, the precision, the encoder's rate."""
    import torch  # check_overrides does not need it

    if cfg.get("streams") is None and type(cfg.get("batch_size")) is int and cfg.batch_size > 0:
        cfg.streams = 8 * cfg.batch_size
    if OmegaConf.select(cfg, "trainer.precision") == "auto":
        gpu = torch.cuda.is_available() and cfg.trainer.get("accelerator") != "cpu"
        cfg.trainer.precision = "bf16-mixed" if gpu else "32-true"
    rates = OmegaConf.select(cfg, "recipe.encoder_lr")
    if isinstance(rates, DictConfig) and {"full", "lora"} == set(rates):
        cfg.recipe.encoder_lr = rates.full if cfg.get("lora") is None else rates.lora


def parse_config(values: Mapping[str, Any]) -> RunConfig:
    """Convert the plain values of a composed config, or of a config.yaml, into a `RunConfig`, and validate it.

    Raises:
        UserError: For an unknown or missing key, or a value of a wrong type or out of range; it names the key and
            what to type.
    """
    stage = values.get("stage")
    if not (isinstance(stage, str) and stage in STAGES):
        stage_rule = keys_of(RunConfig)["stage"].rule
        assert stage_rule is not None
        check_value("stage", stage, stage_rule)
        stage = ""  # a user's own stage file: every key of any stage is known
    config = _parse_section(values, RunConfig, "", stage, is_open=False)
    assert isinstance(config, RunConfig)
    validate_config(config)
    return config


def validate_config(config: RunConfig) -> None:
    """Check the keys of a config against each other, and against the encoders, benchmarks and classes they name.

    Raises:
        UserError: Naming the key, and what to type.
    """
    from depth_anything.training.check_places import check_places  # imports numpy

    _check_repeated_keys(config)
    check_places(config)
    if config.encoder is not None:
        _check_encoder(config)
    check_trainer(config.trainer, stage=config.stage, spike=config.guards.spike)
    _check_validation(config.validation)
    if config.stage == "controlnet":
        check_controlnet_stage(config)
        _check_set_names(config)
    elif config.recipe is not None:
        _check_recipe(config)
    if config.stage == "metric":
        check_metric_stage(config)
    if config.stage == "pretrain":
        check_pretrain_stage(config)
    if config.stage == "pseudolabel":
        check_pseudolabel_stage(config)
    if config.stage == "segmentation":
        from depth_anything.training.segmentation_setup import check_segmentation_config

        check_segmentation_config(config)
    _check_resume_with(config.resume_with)


def _check_resume_with(named: Any) -> None:
    for name in [named] if isinstance(named, str) else named or []:
        known, _ = find_key(name)
        if known is None or known.resume != CHANGE:
            changeable = [
                path for path in list_keys("") if getattr(find_key(path)[0], "resume", "") == CHANGE
            ]
            closest = difflib.get_close_matches(name, changeable, 1, 0.5) or ["recipe.head_lr"]
            raise UserError(
                f"resume_with names {name}, which no run can change",
                f"type resume_with=[{closest[0]}] (these can change: {', '.join(changeable)})",
            )


def list_keys(stage: str, section: type = RunConfig, prefix: str = "") -> Iterator[str]:
    """List the dotted keys that a stage knows; "" is any stage."""
    for name, known in keys_of(section).items():
        if not stage or stage in known.stages:
            if known.section is not None:
                yield from list_keys(stage, known.section, f"{prefix}{name}.")
            else:
                yield prefix + name


def find_key(path: str) -> tuple[ConfigKey | None, bool]:
    """Look up a dotted key in the schema.

    Returns:
        The key, or None for an unknown one; and whether its section also takes arguments of a class.
    """
    known: ConfigKey | None = ConfigKey(section=RunConfig)
    is_open = False
    for name in path.split("."):
        assert known is not None
        if known.section is not None:
            is_open = known.is_open
            known = keys_of(known.section).get(name)
        else:
            is_open = is_open or known.holds_nodes
            known = known.entries
        if known is None:
            break
    return known, is_open


def find_default(path: str) -> Any:
    """Return the value that the absence of a dotted key means; MISSING if the key has no default."""
    parent, _, name = path.rpartition(".")
    known = find_key(parent)[0] if parent else ConfigKey(section=RunConfig)
    if known is None or known.section is None:
        return MISSING
    return default_value(known.section, name)


def unknown_key_message(path: str, stage: str, *, value: str | None = None) -> str:
    """Explain in one sentence that a stage does not know a key, and what to type instead.

    Args:
        path: The dotted key.
        stage: The stage of the command; "" for a user's own stage.
        value: The value typed after the key; None if there is none.
    """
    known, _ = find_key(path)
    typed_value = f"={value}" if value is not None else ""
    for length in range(1, path.count(".") + 2):  # find the first part that belongs to other stages
        owner, _ = find_key(".".join(path.split(".")[:length]))
        if owner is not None and stage and stage not in owner.stages:
            stages = " and ".join(f"stage={name}" for name in owner.stages)
            only = " only" if len(owner.stages) == 1 else ""
            return f"{path} is a key of {stages}{only}; leave it out of stage={stage}"
    if known is not None or path.startswith(("model.head.", "callbacks.")):
        return f"the key {path} is not in this config; type +{path}{typed_value}"
    parts = path.split(".")
    length = next(n for n in range(1, len(parts) + 1) if find_key(".".join(parts[:n]))[0] is None)
    parent, last, rest = ".".join(parts[: length - 1]), parts[length - 1], parts[length:]
    siblings = _names_in_section(parent, stage)
    closest = [".".join(filter(None, (parent, name, *rest))) for name in _closest_name(last, siblings)]
    if not closest:
        keys = [name for name in list_keys(stage) if not name.startswith(("data.", "tiny."))]
        synonyms = {
            name: key for name, key in KEY_SYNONYMS.items() if key in list_keys(stage) or "." not in key
        }
        ends = {name.rpartition(".")[2]: name for name in reversed(keys)} | synonyms
        closest = [ends[name] for name in difflib.get_close_matches(last, list(ends), 1, 0.75)]
    if closest:
        plus = "+" if find_key(closest[0])[0] is None else ""
        return (
            f"there is no key {path}; did you mean {closest[0]}? "
            f"Type {plus}{closest[0]}{typed_value or '=VALUE'}"
        )
    if parent and siblings:
        return f"there is no key {path}; {parent} has {', '.join(siblings)}; leave {path} out or type another"
    return f"there is no key {path}; leave it out, or type  python train.py --help  for the list of keys"


def _names_in_section(parent: str, stage: str) -> list[str]:
    """List the names in a section at a stage; for the trainer also the arguments of Lightning's class."""
    known = find_key(parent)[0] if parent else ConfigKey(section=RunConfig)
    assert known is not None
    if known.section is None:
        return []
    names = [name for name, key in keys_of(known.section).items() if not stage or stage in key.stages]
    if parent == "trainer":
        arguments = target_parameters("pytorch_lightning.Trainer", parent)
        names += [name for name in arguments if name not in SET_BY_RUN and name not in names]
    return [name for name in names if name != "_target_"]


def _closest_name(name: str, names: list[str]) -> list[str]:
    return difflib.get_close_matches(name, names, 1, 0.6)


def _check_is_mapping(node: Any, section: type, where: str) -> None:
    if not isinstance(node, Mapping):
        raise UserError(
            f"{where}={format_value(node)} is not allowed: {where} holds keys",
            f"type them one by one, as {where}.{next(iter(keys_of(section)))}=VALUE",
        )


def _parse_section(node: Any, section: type, prefix: str, stage: str, *, is_open: bool) -> ConfigSection:
    """Validate the keys below a section and build its dataclass."""
    where, known_keys = prefix.rstrip("."), keys_of(section)
    _check_is_mapping(node, section, where)
    if isinstance(node.get("_target_"), str):
        target_parameters(node["_target_"], where)  # name a missing class before its arguments
    fields: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    order = list(known_keys)
    for name, value in sorted(
        node.items(), key=lambda item: order.index(item[0]) if item[0] in known_keys else -1
    ):
        name, known = str(name), known_keys.get(str(name))
        takes = is_open and takes_argument(node.get("_target_"), name, where)
        if known is None:
            if not takes:
                raise UserError(unknown_key_message(f"{prefix}{name}", stage, value=format_value(value)))
            arguments[name] = value
        elif stage and stage not in known.stages:
            if not takes or value != default_value(section, name):  # size=tiny sets some for every stage
                raise UserError(unknown_key_message(f"{prefix}{name}", stage, value=format_value(value)))
            fields[field_name(name)] = value
        else:
            fields[field_name(name)] = _parse_value(value, known, f"{prefix}{name}", stage)
    for name, known in known_keys.items():
        if name in node:
            continue
        default = default_value(section, name)
        if default is MISSING and (not stage or stage in known.stages):
            example = format_value(known.rule.example) if known.rule is not None else "VALUE"
            raise UserError(f"the key {prefix}{name} is missing", f"type +{prefix}{name}={example}")
        if default is MISSING:
            fields[field_name(name)] = None
    parsed: ConfigSection = section(**fields, arguments=arguments, composed_keys=tuple(map(str, node)))
    return parsed


def _parse_value(value: Any, known: ConfigKey, path: str, stage: str) -> Any:
    """Validate the value of a known key and convert it to the type of its field."""
    if known.holds_nodes:
        return parse_nodes(value, path)
    if known.section is not None:
        if path == "tiny" and not value:
            return None
        return _parse_section(value, known.section, f"{path}.", stage, is_open=known.is_open)
    if known.entries is not None:
        if value is None and find_default(path) is None:
            return None
        if not isinstance(value, Mapping):
            raise UserError(
                f"{path}={format_value(value)} must be {{NAME: VALUE}}", f"type '+{path}.NAME=VALUE'"
            )
        for name in value:
            if known.names_sets and not is_set_name(str(name)):
                raise UserError(
                    f'{path} has the set "{name}", which is not a valid name: {SET_NAME_RULE}',
                    f"type '+{path}.NAME=FOLDER'",
                )
        return {
            name: _parse_value(item, known.entries, f"{path}.{name}", stage) for name, item in value.items()
        }
    if known.rule is None or known.rule is ANY:
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if known.rule.accepts("a") and known.rule.accepts(1):  # a name or folder that was typed as a number
            value = str(value)
    check_value(path, value, known.rule)
    return value


def _check_repeated_keys(config: RunConfig) -> None:
    """Refuse a key of `data`, `module` or `recipe` that differs from the key of the run that it repeats."""
    data = config.data
    pairs = [
        (f"data.{name}", name, getattr(data, name))
        for name, known in keys_of(DataConfig).items()
        if known.repeats_run and data.has(name) and config.has(name)
    ]
    if config.recipe is not None and config.has("steps"):
        pairs.append(("recipe.steps", "steps", config.recipe.steps))
    for path, name, value in pairs:
        expected = getattr(config, name)
        if value != expected:
            raise UserError(
                f"{path}={format_value(value)} repeats {name}={format_value(expected)}",
                f"type {name}={format_value(value)}",
            )
    recipe = config.recipe.as_dict() if config.recipe is not None else None
    if config.module.has("recipe") and config.module.recipe != recipe:
        raise UserError("module.recipe repeats recipe", "type the keys of recipe, as recipe.head_lr=5e-5")


def _check_encoder(config: RunConfig) -> None:
    from depth_anything.model.encoder import ENCODERS  # imports torch and timm
    from depth_anything.training.initialization import (
        image_size_multiple,
    )

    name = config.encoder
    if name not in ENCODERS:
        import timm

        if not timm.is_model(name):
            closest = difflib.get_close_matches(name, [*ENCODERS, *timm.list_models("vit_*")], 1, 0.5)
            raise UserError(
                f"encoder={name} is unknown",
                f"type encoder={closest[0] if closest else 'vits'} (the encoders are "
                f"{', '.join(ENCODERS)}, and the ViTs of timm by their names)",
            )
    side, patch = config.image_size, image_size_multiple(name)
    if side % patch and config.stage != "pseudolabel" or side < patch:
        nearest = max(1, round(side / patch)) * patch
        raise UserError(
            f"image_size={side} is not a multiple of {patch}, which the encoder needs",
            f"type image_size={nearest}",
        )


def _check_validation(validation: ValidationConfig) -> None:
    from depth_anything.evaluation.benchmarks.benchmark_catalog import BENCHMARKS
    from depth_anything.evaluation.protocols import PROTOCOLS

    name, root = validation.benchmark, validation.root
    if name is not None:
        check_value("validation.benchmark", name, choice(*BENCHMARKS))
    if validation.protocol is not None:
        check_value("validation.protocol", validation.protocol, choice(*PROTOCOLS))
    if name is not None and root is None:
        raise UserError(
            f"validation.benchmark={name} needs the folder of the benchmark", "type validation.root=FOLDER"
        )
    if root is not None and name is None:
        raise UserError(
            f"validation.root={root} is the folder of a benchmark, but none is chosen",
            "type validation.benchmark=nyu, or for a labeled set sources.validation=FOLDER",
        )


def _check_recipe(config: RunConfig) -> None:
    recipe = config.recipe
    weights: tuple[str, ...] = ("ssi_weight", "gm_weight") if config.stage != "pretrain" else ()
    weights += ("alignment_weight", "local_weight") if config.stage == "student" else ()
    weights = ("silog_weight",) if config.stage == "metric" else weights
    present = [name for name in weights if recipe.has(name)]
    if present and not any(getattr(recipe, name) for name in present):
        names = " and ".join(f"recipe.{name}" for name in present)
        raise UserError(f"no loss is left: {names} are 0", f"type recipe.{present[0]}=1.0")
    if recipe.encoder_lr == 0 and recipe.head_lr == 0:
        raise UserError(
            "recipe.encoder_lr and recipe.head_lr are 0, so nothing is trained", "type recipe.head_lr=5e-5"
        )
    scales = recipe.gm_scales if recipe.has("gm_scales") else 1
    if 2 ** (scales - 1) >= config.image_size:
        raise UserError(
            f"recipe.gm_scales={scales} has a stride larger than image_size={config.image_size}",
            "type recipe.gm_scales=4",
        )
    _check_set_names(config)


def _check_set_names(config: RunConfig) -> None:
    """Check that `sky` and `data.repeat` name sets of the run."""
    from depth_anything.training.batch_plan import extra_sets

    sets = dict(config.data.sets)
    for added in extra_sets(config).values():
        sets.update(added)
    for path, named in (("data.sky", config.data.sky), ("data.repeat", config.data.repeat)):
        for name, value in named.items() if isinstance(named, Mapping) else ():
            if str(name).partition("/")[0] not in sets:
                closest = difflib.get_close_matches(str(name), sets, 1, 0.0) or ["SET"]
                raise UserError(
                    f"{path} names {name}, but the sets are {', '.join(sets) or '(none)'}",
                    f"type {path}={format_value({closest[0]: value})}",
                )


def build_head(config: RunConfig) -> Callable[..., Any] | None:
    """Return the builder of the decoder that the node `model.head` names; None for the DPT head."""
    node = config.model.head
    return None if node is None else instantiate(node, _partial_=True, _convert_="all")
