"""What a run goes on from: whether two configs are one run, and which changes of the recipe are applied."""

import json
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any

import torch

from depth_anything.data.address import strip_credentials
from depth_anything.data.safe_yaml import load_yaml
from depth_anything.training.batch_plan import format_override
from depth_anything.training.check_config import find_default, find_key
from depth_anything.training.config import CHANGE, ECHO, FREE, SAME, START, format_value

#: Keys whose value is the user's own mapping, compared as a whole.
COMPARED_WHOLE = frozenset(("sky", "repeat"))
#: Keys that a checkpoint's weights and position depend on, and that it tells itself.
KEYS_IN_CHECKPOINT = ("stage", "encoder", "max_depth", "image_size", "batch_size", "streams", "seed")


def flatten_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested mappings into dotted keys, and addresses into what `same_place` leaves of them."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value and key not in COMPARED_WHOLE:
            flat.update(flatten_config(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = strip_credentials(value) if isinstance(value, str) else value
    return flat


def resume_policy(path: str) -> str:
    """Look up whether a dotted key may differ between two starts: FREE, ECHO, CHANGE, SAME or START."""
    if path.startswith("sources.scenes.validation."):
        return FREE
    kinds = []
    parts = path.split(".")
    for length in range(1, len(parts) + 1):
        known, is_open = find_key(".".join(parts[:length]))
        if known is None and parts[0] == "trainer":
            return FREE  # as max_time and profiler
        if known is None:
            return START if is_open else SAME
        kinds.append(known.resume)
        if known.resume in (FREE, ECHO):
            return known.resume
    return kinds[-1] if find_key(path)[0] is not None and kinds[-1] != SAME else _inherited_policy(kinds)


def _inherited_policy(kinds: Sequence[str]) -> str:
    """A name of the user's, as a set's, has the kind of the mapping it is in."""
    return next((kind for kind in reversed(kinds) if kind != SAME), SAME)


def config_differences(
    old: Mapping[str, Any], new: Mapping[str, Any], *, typed: Collection[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """List the dotted keys that make two configs different runs, each with its old and new value.

    A key of today's schema that an older config lacks counts as its default of then: as unchanged if it was not
    typed, else as the default of the schema.

    Args:
        old: Of the run's config.yaml.
        new: Of today's command.
        typed: Dotted keys that were typed on the command line.
    """
    before, after = flatten_config(old), flatten_config(new)
    changed: dict[str, tuple[Any, Any]] = {}
    for key in sorted(before.keys() | after.keys()):
        known = find_key(key)[0] is not None
        values = before.get(key), after.get(key)
        if known and key not in before:
            values = (_default_value(key) if key in typed else values[1]), values[1]
        elif known and key not in after:
            values = values[0], _default_value(key)
        if values[0] != values[1] and resume_policy(key) not in (FREE, ECHO):
            changed[key] = values
    if before.get("stage") == "metric" and not (before.get("replay") or after.get("replay")):
        changed = {key: pair for key, pair in changed.items() if not _is_replay_only(key)}
    longer = "steps" in changed and (changed["steps"][1] or 0) > (changed["steps"][0] or 0)
    if longer and after.get("recipe.schedule") == "constant":
        del changed["steps"]
    return changed


def _default_value(key: str) -> Any:
    default = find_default(key)
    return None if default is MISSING else list(default) if isinstance(default, tuple) else default


def _is_replay_only(key: str) -> bool:
    known, _ = find_key(key)
    return known is not None and known.replay_only


def typed_keys(overrides: Sequence[str]) -> set[str]:
    """List the dotted keys of overrides, as they were typed on the command line."""
    return {override.partition("=")[0].lstrip("+~") for override in overrides if "=" in override}


def keys_to_change(config: Mapping[str, Any]) -> list[str]:
    """List the keys that `resume_with` names."""
    named = config.get("resume_with") or []
    return [named] if isinstance(named, str) else list(named)


def check_same_run(
    folder: Path,
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    *,
    step: int,
    finished: bool,
    typed: Collection[str] = (),
) -> list[str]:
    """Hold a run's saved config against today's.

    Args:
        folder: Of the run.
        old: Its config.yaml.
        new: Today's config.
        step: Of its newest checkpoint.
        finished: Whether the run has its model of at least as many steps as `new` asks for.
        typed: Dotted keys that were typed on the command line.

    Returns:
        A line for each value that is changed on purpose.

    Raises:
        ValueError: If a key differs that may not, or that resume_with does not name; or nothing is left to train.
    """
    changed = config_differences(old, new, typed=typed)
    on_purpose = [key for key in keys_to_change(new) if key in changed]
    for key in (key for key in changed if key not in on_purpose):
        raise ValueError(_changed_key_message(folder, key, changed, on_purpose))
    if new.get("steps") is not None and new["steps"] < step:
        raise ValueError(_too_few_steps_message(f"{folder} has a checkpoint", step, new["steps"]))
    if on_purpose and finished:
        raise ValueError(
            f"{folder} is finished, and no step is left for another {on_purpose[0]}; type resume_with=[steps,"
            f"{','.join(key for key in on_purpose if key != 'steps')}] steps=N with N above {step or new.get('steps')}"
        )
    return [
        f"step {step}: {key} {format_value(changed[key][0])} -> {format_value(changed[key][1])}"
        for key in on_purpose
    ]


def _too_few_steps_message(what: str, step: int, steps: int) -> str:
    return f"{what} of step {step}, and steps={steps} are fewer; type steps={step} or more"


def _changed_key_message(
    folder: Path, key: str, changed: Mapping[str, tuple[Any, Any]], on_purpose: Sequence[str]
) -> str:
    before, after = changed[key]
    others = [other for other in changed if other != key and other not in on_purpose]
    more = f" (and {', '.join(others[:3])})" if others else ""
    if find_key(key)[0] is None and after is None:
        return (
            f"{folder} was begun with {key}={before}, a key that this version does not have; go on with the version "
            "that began it, or type name=ANOTHER_NAME"
        )
    names = [*on_purpose, *(other for other in (key, *others) if resume_policy(other) == CHANGE)]
    purpose = (
        f"resume_with=[{','.join(names)}] to change it on purpose, " if resume_policy(key) == CHANGE else ""
    )
    return (
        f"{folder} was begun with {key}={before}, now {key}={after}{more}; type {format_override(key, before)} to "
        f"continue it, {purpose}name=ANOTHER_NAME for a run beside it, or overwrite=true to set it aside"
    )


def check_resume_checkpoint(path: Path, new: Mapping[str, Any], *, typed: Collection[str] = ()) -> list[str]:
    """Hold the checkpoint of another folder, which resume= names, against today's config.

    The recipe, `steps` and what else may change on purpose apply from the checkpoint's step on. What its weights or
    its position in the data depend on must be as it was.

    Returns:
        A line for each value that differs.

    Raises:
        ValueError: If the checkpoint is of another network, data position or stage, or of a later step.
    """
    step, facts = read_checkpoint_facts(path)
    file = next((p / "config.yaml" for p in path.parents[:2] if (p / "config.yaml").is_file()), None)
    saved = read_config_or_empty(file) if file is not None else {}
    old = {**saved, **facts}
    same = {key: value for key, value in new.items() if saved or key in facts}
    changed = config_differences(old, same, typed=typed)
    for key, (before, after) in changed.items():
        if resume_policy(key) == SAME:
            begin = (
                ""
                if key in ("encoder", "stage", "lora")
                else f", or init={path} in place of resume= to begin anew"
            )
            raise ValueError(
                f"resume={path} is of a run with {key}={before}, now {key}={after}; type "
                f"{format_override(key, before)} to go "
                f"on from it{begin}"
            )
    if new["steps"] < step:
        raise ValueError(_too_few_steps_message(f"resume={path} is", step, new["steps"]))
    kept = {key: pair for key, pair in changed.items() if resume_policy(key) == CHANGE}
    return [
        f"step {step} of {path}: {key} {format_value(before)} -> {format_value(after)}"
        for key, (before, after) in kept.items()
    ]


def read_config(path: Path) -> dict[str, Any]:
    """Read the config.yaml of a run.

    Raises:
        ValueError: If it holds no config, as after a power cut.
        OSError: If it cannot be read.
    """
    try:
        config = load_yaml(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    if not isinstance(config, dict) or "stage" not in config:
        raise ValueError(f"{path} is damaged (it has no key named stage)")
    return config


def read_config_or_empty(path: Path) -> dict[str, Any]:
    """Read the config.yaml of a run; {} with a note on standard error where it is damaged."""
    try:
        return read_config(path)
    except ValueError as error:
        print(f"{error}; only what the checkpoint itself tells is compared", file=sys.stderr)
        return {}


def read_checkpoint_facts(path: Path) -> tuple[int, dict[str, Any]]:
    """Read the step of a checkpoint, and what it tells of its run, by the keys of a config.

    Raises:
        ValueError: If the file is no checkpoint of a run.
    """
    try:
        checkpoint = torch.load(path, weights_only=True, mmap=True)
        step, said = int(checkpoint["global_step"]), checkpoint.get("depth_anything", {})
        if not {"loops", "state_dict"} <= checkpoint.keys():
            raise KeyError("loops")
    except Exception as error:  # whatever it is, it is not ours
        raise ValueError(
            f"resume={path} is no checkpoint of a run; type resume=RUN_FOLDER/checkpoints/step-….ckpt"
        ) from error
    data = checkpoint.get("TrainData", {})
    facts = {key: data[key] for key in ("batch_size", "streams", "seed") if key in data}
    facts |= {key: said[key] for key in ("encoder",) if key in said}
    for key, name in (("max_depth", "max_depth"), ("image_size", "input_size")):
        if json.loads(said.get(name, "null")) is not None:
            facts[key] = json.loads(said[name])
    stage = json.loads(said.get("origin", "{}")).get("stage")
    return step, {**facts, **({"stage": stage} if stage else {})}


def apply_recipe(checkpoint: dict[str, Any], fresh: Any) -> None:
    """Put today's rates, betas and weight decay into a checkpoint's optimizer state, before it is restored.

    With an unchanged recipe the state stays as it is, to the last bit.

    Args:
        checkpoint: As Lightning loaded it; changed in place.
        fresh: What the module's configure_optimizers returns today; anything but one optimizer with a LambdaLR is
            a user's own and left alone.
    """
    scheduler = fresh.get("lr_scheduler", {}).get("scheduler") if isinstance(fresh, Mapping) else None
    if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        return
    state = checkpoint["lr_schedulers"][0]
    done = state["last_epoch"]
    rates = [
        rate * factor(done) for rate, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    state.update(base_lrs=list(scheduler.base_lrs), _last_lr=list(rates))
    groups = checkpoint["optimizer_states"][0]["param_groups"]
    for saved, group, rate in zip(groups, fresh["optimizer"].param_groups, rates, strict=True):
        saved.update({name: value for name, value in group.items() if name != "params"}, lr=rate)
