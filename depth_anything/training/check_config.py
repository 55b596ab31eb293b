"""Validate a composed config against the schema of config.py, before any data is read."""

import difflib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import MISSING
from importlib import import_module
from typing import Any

from omegaconf import DictConfig, OmegaConf

from depth_anything.training.check_trainer import SET_BY_RUN, check_trainer
from depth_anything.training.config import (
    ANY,
    CHANGE,
    STAGES,
    ConfigKey,
    RunConfig,
    check_value,
    choice,
    default_value,
    format_value,
    keys_of,
)

#: What a key is called elsewhere, and here.
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
#: Keys of `data` that must repeat the run's key of the same name.
KEYS_REPEATED_IN_DATA = (
    "seed batch_size streams image_size workers perturb cutmix mix replay replay_share allow_partial min_depth "
    "max_depth run_dir"
).split()


def resolve_config(cfg: DictConfig) -> dict[str, Any]:
    """Fill in what follows from other keys, validate, and return the composed config as plain values.

    Raises:
        ValueError: As `validate_config`.
    """
    import torch  # check_overrides need not wait for it

    if cfg.get("streams") is None and type(cfg.get("batch_size")) is int and cfg.batch_size > 0:
        cfg.streams = 8 * cfg.batch_size
    if OmegaConf.select(cfg, "trainer.precision") == "auto":
        gpu = torch.cuda.is_available() and cfg.trainer.get("accelerator") != "cpu"
        cfg.trainer.precision = "bf16-mixed" if gpu else "32-true"
    config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    if config.get("stage") == "pseudolabel":  # size=tiny has them for the stages that train
        config = {key: value for key, value in config.items() if key not in ("steps", "recipe", "perturb")}
    config = numbers_to_text(config)
    validate_config(config)
    return dict(config)


def validate_config(config: Mapping[str, Any]) -> None:
    """Refuse unknown keys, missing keys, and values of a wrong type or out of range.

    Args:
        config: The composed config, plain values, interpolations resolved.

    Raises:
        ValueError: Naming the key, and what to type.
    """
    stage = config.get("stage")
    if isinstance(stage, str) and stage in STAGES:
        _check_section(config, RunConfig, "", stage, is_open=False)
    else:  # of a user's own stage file: every key of any stage is known
        check_value("stage", stage, keys_of(RunConfig)["stage"].rule)  # type: ignore[arg-type]
        _check_section(config, RunConfig, "", "", is_open=False)
    _check_repeated_keys(config)
    _check_encoder(config)
    check_trainer(config["trainer"])
    _check_validation(config["validation"])
    if "recipe" in config and stage != "pseudolabel":
        _check_recipe(config)
    if stage == "metric":
        _check_metric_stage(config)
    _check_resume_with(config.get("resume_with"))


def _check_resume_with(named: Any) -> None:
    for name in [named] if isinstance(named, str) else named or []:
        known, _ = find_key(name)
        if known is None or known.resume != CHANGE:
            can = [path for path in list_keys("") if getattr(find_key(path)[0], "resume", "") == CHANGE]
            near = difflib.get_close_matches(name, can, 1, 0.5) or ["recipe.head_lr"]
            raise ValueError(
                f"resume_with names {name}, which no run can change; type resume_with=[{near[0]}] "
                f"(these can change: {', '.join(can)})"
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
    """Look a dotted key up in the schema.

    Returns:
        The key, or None for an unknown one; and whether its section is open to arguments of a class.
    """
    known: ConfigKey | None = ConfigKey(section=RunConfig)
    is_open = False
    for name in path.split("."):
        assert known is not None
        if known.section is not None:
            is_open = known.open
            known = keys_of(known.section).get(name)
        else:
            known = None if known.names and name not in known.names else known.entries
        if known is None:
            break
    return known, is_open


def find_default(path: str) -> Any:
    """Look up the default of a dotted key: what its absence means; MISSING if it has none."""
    parent, _, name = path.rpartition(".")
    known = find_key(parent)[0] if parent else ConfigKey(section=RunConfig)
    if known is None or known.section is None:
        return MISSING
    return default_value(known.section, name)


def unknown_key_message(path: str, stage: str, *, value: str | None = None) -> str:
    """Say in a sentence that a key is unknown to a stage, and what to type in its place.

    Args:
        path: The dotted key.
        stage: That was asked for; "" if it is none of this project's.
        value: As it was typed behind the key; None where there is none.
    """
    known, _ = find_key(path)
    behind = f"={value}" if value is not None else ""
    for length in range(1, path.count(".") + 2):  # the first part that belongs to other stages
        part = ".".join(path.split(".")[:length])
        owner, _ = find_key(part)
        if owner is not None and stage and stage not in owner.stages:
            stages = " and ".join(f"stage={name}" for name in owner.stages)
            alone = " alone" if len(owner.stages) == 1 else ""
            return f"{path} is a key of {stages}{alone}; leave it out of stage={stage}"
    if known is not None:
        return f"there is no key {path} here; type +{path}{behind}"
    parts = path.split(".")
    length = next(n for n in range(1, len(parts) + 1) if find_key(".".join(parts[:n]))[0] is None)
    parent, last, rest = ".".join(parts[: length - 1]), parts[length - 1], parts[length:]
    beside = _names_in_section(parent, stage)
    near = [".".join(filter(None, (parent, name, *rest))) for name in _closest_name(last, beside)]
    if not near:
        keys = [name for name in list_keys(stage) if not name.startswith(("data.", "tiny."))]
        ends = {name.rpartition(".")[2]: name for name in reversed(keys)} | KEY_SYNONYMS
        near = [ends[name] for name in difflib.get_close_matches(last, list(ends), 1, 0.75)]
    if near:
        plus = "+" if find_key(near[0])[0] is None else ""
        return f"there is no key {path}; did you mean {near[0]}? Type {plus}{near[0]}{behind or '=VALUE'}"
    if parent and beside:
        return f"there is no key {path}; {parent} has {', '.join(beside)}; leave {path} out or type another"
    return f"there is no key {path}; leave it out, or type  python train.py --help  for the keys there are"


def _names_in_section(parent: str, stage: str) -> list[str]:
    """List the names that a section has at a stage, its class's arguments among them."""
    known = find_key(parent)[0] if parent else ConfigKey(section=RunConfig)
    assert known is not None
    if known.section is None:
        return list(known.names)
    names = [name for name, one in keys_of(known.section).items() if not stage or stage in one.stages]
    if parent == "trainer":
        arguments = _target_parameters("pytorch_lightning.Trainer", parent)
        names += [name for name in arguments if name not in SET_BY_RUN and name not in names]
    return [name for name in names if name != "_target_"]


def _closest_name(name: str, names: list[str]) -> list[str]:
    return difflib.get_close_matches(name, names, 1, 0.6)


def _check_section(node: Any, section: type, prefix: str, stage: str, *, is_open: bool) -> None:
    where = prefix.rstrip(".")
    if not isinstance(node, Mapping):
        example = next(iter(keys_of(section)))
        raise ValueError(
            f"{where}={format_value(node)} is no value: {where} holds keys; type them one by one, as "
            f"{prefix}{example}=…"
        )
    keys = keys_of(section)
    if isinstance(node.get("_target_"), str):
        _target_parameters(node["_target_"], where)  # so that a class that is not there is named first
    order = list(keys)
    for name, value in sorted(node.items(), key=lambda item: order.index(item[0]) if item[0] in keys else -1):
        known = keys.get(str(name))
        if known is None:
            if not (is_open and _takes_argument(node.get("_target_"), str(name), where)):
                raise ValueError(unknown_key_message(f"{prefix}{name}", stage, value=format_value(value)))
        elif stage and stage not in known.stages:
            unread = value == default_value(section, str(name))  # of size=tiny
            if not (unread and _takes_argument(node.get("_target_"), str(name), where)):
                raise ValueError(unknown_key_message(f"{prefix}{name}", stage, value=format_value(value)))
        else:
            _check_value(value, known, f"{prefix}{name}", stage)
    for name, known in keys.items():
        if (
            name not in node
            and default_value(section, name) is MISSING
            and (not stage or stage in known.stages)
        ):
            example = format_value(known.rule.example) if known.rule is not None else "VALUE"
            raise ValueError(f"the key {prefix}{name} is missing; type +{prefix}{name}={example}")


def _check_value(value: Any, known: ConfigKey, path: str, stage: str) -> None:
    if known.section is not None:
        if value is None or (known.open and value == {}):
            if path in ("logger", "tiny"):
                return
        _check_section(value, known.section, f"{path}.", stage, is_open=known.open)
    elif known.entries is not None:
        if not isinstance(value, Mapping):
            if value is None and path.startswith(("tiny.", "rates")):
                return
            raise ValueError(
                f"{path}={format_value(value)} must be {{NAME: VALUE}}; type '+{path}.NAME=VALUE'"
            )
        for name, item in value.items():
            if known.names and name not in known.names:
                raise ValueError(unknown_key_message(f"{path}.{name}", stage))
            _check_value(item, known.entries, f"{path}.{name}", stage)
    elif known.rule is not None:
        check_value(path, value, known.rule)


def numbers_to_text(config: Mapping[str, Any], section: type = RunConfig) -> dict[str, Any]:
    """Return a config in which a folder, file or name that was typed as a number is text."""
    keys = keys_of(section)

    def convert(value: Any, known: ConfigKey | None) -> Any:
        if known is None or isinstance(value, bool):
            return value
        if known.section is not None and isinstance(value, Mapping):
            return numbers_to_text(value, known.section)
        if known.entries is not None and isinstance(value, Mapping):
            return {name: convert(item, known.entries) for name, item in value.items()}
        is_text = known.rule is not None and known.rule.accepts("a") and known.rule.accepts(1)
        return str(value) if is_text and known.rule is not ANY and isinstance(value, (int, float)) else value

    return {name: convert(value, keys.get(name)) for name, value in config.items()}


def _takes_argument(target: Any, name: str, where: str) -> bool:
    """Tell whether the class that a section names takes an argument of this name."""
    if not isinstance(target, str):
        return False
    given = {"module": ("model", "frozen", "data"), "data": ("micro_batch", "patch", "teacher")}
    if name in given.get(where, ()) or (where == "trainer" and name in SET_BY_RUN):
        return where == "trainer"  # check_trainer has a sentence for it
    parameters = _target_parameters(target, where)
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _target_parameters(target: str, where: str) -> Mapping[str, inspect.Parameter]:
    """Import what `_target_` names and return its parameters.

    Raises:
        ValueError: If there is no such class.
    """
    module, _, name = target.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{where}._target_={target} cannot be imported ({error}); type {where}._target_=package.module.Class"
        ) from error
    return inspect.signature(found).parameters


def _check_repeated_keys(config: Mapping[str, Any]) -> None:
    """Refuse a key of `data`, `module` or `recipe` that differs from the run's key, which it only repeats."""
    pairs = [
        (f"data.{name}", name, config["data"].get(name, config.get(name))) for name in KEYS_REPEATED_IN_DATA
    ]
    if "steps" in config and isinstance(config.get("recipe"), Mapping):
        pairs.append(("recipe.steps", "steps", config["recipe"].get("steps", config["steps"])))
    for path, name, value in pairs:
        if name in config and value != config[name]:
            raise ValueError(
                f"{path}={format_value(value)} repeats {name}={format_value(config[name])}; type "
                f"{name}={format_value(value)}"
            )
    module = config["module"]
    if module.get("recipe", config.get("recipe")) != config.get("recipe"):
        raise ValueError("module.recipe repeats recipe; type the keys of recipe, as recipe.head_lr=5e-5")


def _check_encoder(config: Mapping[str, Any]) -> None:
    from depth_anything.model.encoder import ENCODERS  # imports torch and timm
    from depth_anything.training.initialization import image_size_multiple

    name = config["encoder"]
    if name not in ENCODERS:
        import timm

        if not timm.is_model(str(name)):
            near = difflib.get_close_matches(str(name), [*ENCODERS, *timm.list_models("vit_*")], 1, 0.5)
            raise ValueError(
                f"encoder={name} is unknown; type encoder={near[0] if near else 'vits'} (there are "
                f"{', '.join(ENCODERS)}, and timm's ViTs by their names)"
            )
    side, patch = config["image_size"], image_size_multiple(name)
    if side % patch and config["stage"] != "pseudolabel" or side < patch:
        near_side = max(1, round(side / patch)) * patch
        raise ValueError(
            f"image_size={side} is no multiple of {patch}, as the encoder needs; type image_size={near_side}"
        )


def _check_validation(validation: Mapping[str, Any]) -> None:
    from depth_anything.evaluation.benchmarks.catalog import BENCHMARKS
    from depth_anything.evaluation.protocols import PROTOCOLS

    name, root = validation.get("benchmark"), validation.get("root")
    if name is not None:
        check_value("validation.benchmark", name, choice(*BENCHMARKS))
    if validation.get("protocol") is not None:
        check_value("validation.protocol", validation["protocol"], choice(*PROTOCOLS))
    if name is not None and root is None:
        raise ValueError(
            f"where is the benchmark? type validation.root=FOLDER beside validation.benchmark={name}"
        )
    if root is not None and name is None:
        raise ValueError(
            f"validation.root={root} says where a benchmark lies, and none is asked for; type "
            "validation.benchmark=nyu, or for a labelled set sources.validation=FOLDER"
        )


def _check_recipe(config: Mapping[str, Any]) -> None:
    recipe = config["recipe"]
    weights: tuple[str, ...] = ("ssi_weight", "gm_weight")
    weights += ("alignment_weight",) if config["stage"] == "student" else ()
    weights = ("silog_weight",) if config["stage"] == "metric" else weights
    given = {name: recipe[name] for name in weights if name in recipe}
    if given and not any(given.values()):
        names = " and ".join(f"recipe.{name}" for name in given)
        raise ValueError(f"no loss is left: {names} are 0; type recipe.{next(iter(given))}=1.0")
    if recipe["encoder_lr"] == 0 and recipe["head_lr"] == 0:
        raise ValueError(
            "recipe.encoder_lr and recipe.head_lr are 0 and nothing learns; type recipe.head_lr=5e-5"
        )
    scales = recipe.get("gm_scales", 1)
    if 2 ** (scales - 1) >= config["image_size"]:
        raise ValueError(
            f"recipe.gm_scales={scales} strides farther than image_size={config['image_size']}; type recipe.gm_scales=4"
        )
    _check_set_names(config)


def _check_set_names(config: Mapping[str, Any]) -> None:
    """Hold the names in `sky` and `data.repeat` against the sets of the run."""
    from depth_anything.training.batch_plan import extra_sets

    sets = {
        **config["data"]["sets"],
        **{k: v for added in extra_sets(config).values() for k, v in added.items()},
    }
    for path, named in (
        ("data.sky", config["data"].get("sky")),
        ("data.repeat", config["data"].get("repeat")),
    ):
        for name in named if isinstance(named, Mapping) else ():
            if str(name).partition("/")[0] not in sets:
                near = difflib.get_close_matches(str(name), sets, 1, 0.0) or ["SET"]
                raise ValueError(
                    f"{path} names {name}, which is none of the sets {', '.join(sets) or '(none)'}; type {path}="
                    f"{format_value({near[0]: named[name]})}"
                )


def _check_metric_stage(config: Mapping[str, Any]) -> None:
    near, far, rank = config["min_depth"], config["max_depth"], config.get("lora")
    if near >= far:
        raise ValueError(f"min_depth={near} must be less than max_depth={far}; type min_depth=0.001")
    if config["data"].get("sky") not in ("invalid", None) and not isinstance(config["data"]["sky"], Mapping):
        raise ValueError(f"data.sky={config['data']['sky']}: the sky has no metres; type data.sky=invalid")
    if rank is None:
        return
    if config["freeze_encoder"]:
        raise ValueError(
            f"lora={rank} teaches the encoder and freeze_encoder=true forbids it; type freeze_encoder=false"
        )
    from depth_anything.model.lora import import_peft

    import_peft()
