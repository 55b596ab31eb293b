"""Whether a run may continue from a checkpoint: which keys differ, which may, and the recipe from there on."""

import json
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import torch

from depth_anything.data.address import strip_credentials, with_addresses
from depth_anything.data.safe_yaml import load_yaml
from depth_anything.errors import UserError
from depth_anything.model.sharded_files import is_sharded, read_sharded, read_sharded_state
from depth_anything.training.batch_plan import format_override
from depth_anything.training.check_config import find_default, find_key
from depth_anything.training.config import RunConfig
from depth_anything.training.config_schema import CHANGE, ECHO, FREE, SAME, START
from depth_anything.training.value_rules import format_value

#: Keys whose value is a mapping that is compared as a whole.
COMPARED_WHOLE = frozenset(("sky", "repeat"))
#: Old `_target_` → today's, for configs that an older version wrote.
RENAMED_TARGETS = {"pytorch_lightning.callbacks.EMAWeightAveraging": "depth_anything.training.ema.EMA"}
#: Keys of older versions that decide nothing any more; their values live on in the keys that they were copied to.
REMOVED_KEYS = frozenset(("rates", "tiny"))


@dataclass(frozen=True)
class FlatConfig:
    """A config as dotted keys and plain values, the form in which the configs of two runs are compared.

    Attributes:
        values: Dotted key to value; addresses are reduced to what `strip_credentials` leaves of them.
    """

    values: dict[str, Any]

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> "FlatConfig":
        """Flatten nested mappings, as config.yaml holds them, and replace the names of older versions."""
        return cls(_flatten(tree, ""))

    @classmethod
    def from_run(cls, config: RunConfig) -> "FlatConfig":
        """Flatten today's config."""
        return cls.from_tree(config.as_dict())

    @classmethod
    def read(cls, path: Path) -> "FlatConfig":
        """Read a config.yaml; damage raises a ValueError, as `read_config`."""
        return cls.from_tree(read_config(path))

    def only(self, keys: Collection[str]) -> "FlatConfig":
        """Return the part with these keys."""
        return FlatConfig({key: value for key, value in self.values.items() if key in keys})

    def get(self, key: str) -> Any:
        """Return the value of a key; None where it is absent."""
        return self.values.get(key)


def _flatten(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if path in REMOVED_KEYS or (path == "callbacks" and not value):
            continue
        if isinstance(value, Mapping) and value and key not in COMPARED_WHOLE:
            flat.update(_flatten(value, f"{path}."))
        else:
            value = RENAMED_TARGETS.get(value, value) if key == "_target_" else value
            flat[path] = strip_credentials(value) if isinstance(value, str) else value
    return flat


def resume_policy(path: str) -> str:
    """Return whether a dotted key may differ between two starts: FREE, ECHO, CHANGE, SAME or START."""
    if path.startswith("sources.scenes.validation."):
        return FREE
    policies = []
    parts = path.split(".")
    for length in range(1, len(parts) + 1):
        known, is_open = find_key(".".join(parts[:length]))
        if known is None and parts[0] == "trainer":
            return FREE  # e.g. max_time and profiler
        if known is None:
            return START if is_open else SAME
        policies.append(known.resume)
        if known.resume in (FREE, ECHO) or known.holds_nodes:
            return known.resume
    if find_key(path)[0] is not None and policies[-1] != SAME:
        return policies[-1]
    return next((policy for policy in reversed(policies) if policy != SAME), SAME)  # that of the mapping


def config_differences(
    old: FlatConfig, new: FlatConfig, *, typed: Collection[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """List the dotted keys that make two configs different runs, each with its old and new value.

    A key that an older version did not have counts as unchanged if it was not typed, and else as the schema's default.

    Args:
        old: The run's saved config.
        new: Today's config.
        typed: Dotted keys that were typed on the command line.
    """
    before, after = dict(old.values), dict(new.values)
    if after.get("init") == "scratch" and "init" not in typed and before.get("init", "") is None:
        before["init"] = "scratch"  # size=tiny began with null; the run has its weights already
    if "optimizer._target_" in after:  # runs of versions without the key used the default
        before.setdefault("optimizer._target_", _default("optimizer._target_"))
    changed: dict[str, tuple[Any, Any]] = {}
    for key in sorted(before.keys() | after.keys()):
        known = find_key(key)[0] is not None
        values = before.get(key), after.get(key)
        if known and key not in before:
            values = (_default(key) if key in typed else values[1]), values[1]
        elif known and key not in after:
            values = values[0], _default(key)
        if values[0] != values[1] and resume_policy(key) not in (FREE, ECHO):
            changed[key] = values
    if before.get("stage") == "metric" and not (before.get("replay") or after.get("replay")):
        changed = {key: pair for key, pair in changed.items() if not _is_replay_only(key)}
    longer = "steps" in changed and (changed["steps"][1] or 0) > (changed["steps"][0] or 0)
    if longer and after.get("recipe.schedule") == "constant":
        del changed["steps"]
    return changed


def _default(key: str) -> Any:
    default = find_default(key)
    return None if default is MISSING else list(default) if isinstance(default, tuple) else default


def _is_replay_only(key: str) -> bool:
    known, _ = find_key(key)
    return known is not None and known.replay_only


def typed_keys(overrides: Sequence[str]) -> set[str]:
    """Return the dotted keys of the overrides that were typed on the command line."""
    return {override.partition("=")[0].lstrip("+~") for override in overrides if "=" in override}


def keys_to_change(config: FlatConfig) -> list[str]:
    """Return the keys that `resume_with` names."""
    named = config.get("resume_with") or []
    return [named] if isinstance(named, str) else list(named)


def check_same_run(
    folder: Path,
    old: FlatConfig,
    new: FlatConfig,
    *,
    step: int,
    finished: bool,
    typed: Collection[str] = (),
) -> list[str]:
    """Check that a run's saved config and today's describe the same run.

    Args:
        folder: Folder of the run.
        old: Its saved config.
        new: Today's config.
        step: Step of its newest checkpoint.
        finished: Whether the run has a model of at least as many steps as `new` asks for.
        typed: Dotted keys that were typed on the command line.

    Returns:
        A line for each value that resume_with changes.

    Raises:
        UserError: If a key differs that may not change, or that resume_with does not name; or no step is left to
            train.
    """
    changed = config_differences(old, new, typed=typed)
    changed = {
        key: changed[key] for key in sorted(changed, key=lambda key: key not in typed)
    }  # what others follow from
    named = keys_to_change(new)
    intended = [key for key in changed if any(key == name or key.startswith(f"{name}.") for name in named)]
    for key in changed:
        if key not in intended:
            raise UserError(_changed_key_message(folder, key, changed, intended))
    steps = new.get("steps")
    if steps is not None and steps < step:
        raise UserError(_too_few_steps_message(f"{folder} has a checkpoint", step, steps))
    if intended and finished:
        others = ",".join(key for key in intended if key != "steps")
        raise UserError(
            f"{folder} is finished, and no step is left to train with another {intended[0]}",
            f"type resume_with=[steps,{others}] steps=N with N above {step or steps}",
        )
    return [
        f"step {step}: {key} {format_value(changed[key][0])} -> {format_value(changed[key][1])}"
        for key in intended
    ]


def _too_few_steps_message(what: str, step: int, steps: int) -> str:
    return f"{what} of step {step}, but steps={steps} is less; type steps={step} or more"


def _changed_key_message(
    folder: Path, key: str, changed: Mapping[str, tuple[Any, Any]], intended: Sequence[str]
) -> str:
    before, after = changed[key]
    others = [other for other in changed if other != key and other not in intended]
    more = f" (and {', '.join(others[:3])})" if others else ""
    if find_key(key)[0] is None and after is None and resume_policy(key) != CHANGE:
        return (
            f"{folder} was started with {key}={before}, a key that this version does not have; continue it with the "
            "version that started it, or type name=ANOTHER_NAME"
        )
    names = [*intended, *(other for other in (key, *others) if resume_policy(other) == CHANGE)]
    change = f"resume_with=[{','.join(names)}] to change it, " if resume_policy(key) == CHANGE else ""
    return (
        f"{folder} was started with {key}={before}, now {key}={after}{more}; type {format_override(key, before)} to "
        f"continue it, {change}name=ANOTHER_NAME for a separate run, or overwrite=true to rename the old folder"
    )


def check_resume_checkpoint(path: Path, config: RunConfig, *, typed: Collection[str] = ()) -> list[str]:
    """Check the checkpoint of another run, which `resume` names, against today's config.

    The recipe, `steps` and other keys that may change apply from the checkpoint's step on. Keys that its weights or
    its position in the data depend on must be the same.

    Returns:
        A line for each value that changes.

    Raises:
        UserError: If the checkpoint has another network, data position or stage, or is from a later step.
    """
    step, facts = read_checkpoint_facts(path)
    file = next((p / "config.yaml" for p in path.parents[:2] if (p / "config.yaml").is_file()), None)
    saved = read_config_or_empty(file) if file is not None else FlatConfig({})
    new = FlatConfig.from_run(config)
    old = FlatConfig({**saved.values, **facts})
    changed = config_differences(old, new if saved.values else new.only(facts), typed=typed)
    for key, (before, after) in changed.items():
        if resume_policy(key) == SAME:
            restart = ""
            if key not in ("encoder", "stage", "lora"):
                restart = f", or init={path} in place of resume= to start again from its weights"
            raise UserError(
                f"resume={path} belongs to a run with {key}={before}, now {key}={after}",
                f"type {format_override(key, before)} to continue from it{restart}",
            )
    if config.steps < step:
        raise UserError(_too_few_steps_message(f"resume={path} is", step, config.steps))
    return [
        f"step {step} of {with_addresses(str(path))}: {key} {format_value(before)} -> {format_value(after)}"
        for key, (before, after) in changed.items()
        if resume_policy(key) == CHANGE
    ]


def read_config(path: Path) -> dict[str, Any]:
    """Read the config.yaml of a run.

    Raises:
        UserError: If it holds no config, for example after a power failure.
        OSError: If it cannot be read.
    """
    try:
        config = load_yaml(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error})") from error
    if not isinstance(config, dict) or "stage" not in config:
        raise UserError(f"{path} is damaged (it has no key named stage)")
    return config


def read_config_or_empty(path: Path) -> FlatConfig:
    """Read the config.yaml of a run; if it is damaged, print that and return an empty config."""
    try:
        return FlatConfig.read(path)
    except ValueError as error:
        print(f"{error}; only the values in the checkpoint itself are compared", file=sys.stderr)
        return FlatConfig({})


def load_checkpoint(path: Path, *, tensors: bool = True) -> dict[str, Any]:
    """Read a checkpoint of a run, a file or a folder of shards, without running code in it.

    Args:
        path: Its path.
        tensors: False: the tensors are not used, so those of the shards are left out and others are not read.

    Raises:
        Exception: torch.load raises many types for files of other formats.
    """
    if is_sharded(path):
        return read_sharded(path) if tensors else read_sharded_state(path)
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=not tensors)
    return checkpoint


def data_state(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the state of the DataModule in a checkpoint: position, seed and the digests of its sets; None without.

    Lightning stores it under the class name of the DataModule. Checkpoints of version 2 say which name that is; those
    of version 1 have no "run_format" and were written by TrainData.
    """
    return checkpoint.get(checkpoint.get("run_format", {}).get("data_state", "TrainData"))


def read_checkpoint_facts(path: Path) -> tuple[int, dict[str, Any]]:
    """Read the step of a checkpoint, and the config keys whose values it holds.

    Raises:
        UserError: If the file is no checkpoint of a run.
    """
    try:
        checkpoint = load_checkpoint(path, tensors=False)
        step, metadata = int(checkpoint["global_step"]), checkpoint.get("depth_anything", {})
        if not {"loops", "state_dict"} <= checkpoint.keys():
            raise KeyError("loops")
    except Exception as error:  # torch.load raises many types for files of other formats
        raise UserError(
            f"resume={path} is no checkpoint of a run", "type resume=RUN_FOLDER/checkpoints/step-….ckpt"
        ) from error
    data = data_state(checkpoint) or {}
    facts: dict[str, Any] = {key: data[key] for key in ("batch_size", "streams", "seed") if key in data}
    facts |= {key: metadata[key] for key in ("encoder",) if key in metadata}
    for key, name in (("max_depth", "max_depth"), ("image_size", "input_size")):
        if json.loads(metadata.get(name, "null")) is not None:
            facts[key] = json.loads(metadata[name])
    stage = json.loads(metadata.get("origin", "{}")).get("stage")
    return step, {**facts, **({"stage": stage} if stage else {})}


def apply_recipe(checkpoint: dict[str, Any], fresh: Any) -> None:
    """Replace the rates, betas and weight decay in a checkpoint's optimizer state by today's, before it is restored.

    With an unchanged recipe the state stays equal to the last bit.

    Args:
        checkpoint: The checkpoint as Lightning loaded it; changed in place.
        fresh: What the module's configure_optimizers returns today. Anything but one optimizer with a LambdaLR is a
            user's own, and not changed.
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
