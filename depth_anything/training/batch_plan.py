"""The arithmetic of a batch, and which sets a run reads."""

import difflib
import shlex
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from depth_anything.training.config import RunConfig
from depth_anything.training.value_rules import format_value

#: Key that adds sets beside a stage's own → the group of sources that it chooses from.
SOURCE_GROUPS = {"mix": "labelled", "replay": "images"}


def split_batch(batch_size: int, devices: int, micro_batch: int | None) -> tuple[int, int]:
    """Split the global batch into what a device takes at once and how often it does so a step.

    Args:
        batch_size: Images an optimizer step sees; the recipe's.
        devices: Over all nodes.
        micro_batch: Images a device takes at once; None: all of its share.

    Returns:
        (micro_batch, accumulation) with micro_batch × accumulation × devices = batch_size.

    Raises:
        ValueError: If that does not come out even, with the nearest values that do.
    """
    if batch_size % devices:
        below, above = batch_size // devices * devices, (batch_size // devices + 1) * devices
        fewer = max(d for d in range(1, devices) if batch_size % d == 0)
        nearest = f"{below} or {above}" if below else f"{above}"
        raise ValueError(
            f"batch_size={batch_size} does not divide over {devices} devices; type trainer.devices={fewer}, "
            f"or batch_size={nearest} and know that the recipe is another"
        )
    share = batch_size // devices
    micro = share if micro_batch is None else micro_batch
    if micro < 1 or share % micro:
        workable = [m for m in range(1, share + 1) if share % m == 0]
        below = max((m for m in workable if m < micro), default=workable[0])
        above = min((m for m in workable if m > micro), default=workable[-1])
        nearest = " or ".join(f"micro_batch={m}" for m in sorted({below, above}))
        raise ValueError(
            f"micro_batch={micro} does not divide the {share} images a device sees in a step "
            f"(batch_size={batch_size} over {devices} devices); type {nearest}"
        )
    return micro, share // micro


def format_override(key: str, value: Any) -> str:
    """Write a key and its value as they are typed after train.py, quoted for a shell."""
    return shlex.quote(f"{key}={format_value(value)}")


def select_sets(
    chosen: bool | str | Sequence[str] | None, sets: Mapping[str, str], *, key: str
) -> dict[str, str]:
    """Choose the sets that are seen beside a stage's own.

    Args:
        chosen: None or False: none; True: all; or some by their names.
        sets: Set name to folder, as `GROUPS` of sources has them.
        key: Of the config: "mix" or "replay".

    Raises:
        ValueError: If there is no set of such a name, or none at all.
    """
    if chosen is None or chosen is False:
        return {}
    if not isinstance(chosen, (bool, str, Sequence)):
        raise ValueError(f"{key}={chosen} is neither true nor names of sets; type {key}=true or {key}=null")
    names = list(sets) if isinstance(chosen, bool) else [chosen] if isinstance(chosen, str) else list(chosen)
    group = f"sources.{SOURCE_GROUPS[key]}"
    known = f"{group} has {', '.join(sets) or 'none'}"
    if chosen is True and not names:
        raise ValueError(
            f"{key}=true and there are no such sets: {known}; type {key}=null, or '+{group}.NAME=FOLDER'"
        )
    for name in names:
        if name not in sets:
            near = difflib.get_close_matches(str(name), sets, 1) or list(sets)[:1]
            raise ValueError(
                f"{key} names {name}, and {known}; type " + (f"{key}=[{near[0]}]" if near else f"{key}=null")
            )
    return {name: sets[name] for name in dict.fromkeys(names)}


def extra_sets(config: RunConfig) -> dict[str, dict[str, str]]:
    """Return the sets that `mix` and `replay` add to a run, each {set: folder}."""
    return {
        key: select_sets(getattr(config, key), getattr(config.sources, group), key=key)
        for key, group in SOURCE_GROUPS.items()
    }


def repeat_for_share(
    shards: Mapping[str, int], replayed: Collection[str], *, share: float, repeat: Mapping[str, int]
) -> dict[str, int]:
    """Find how often sets come in a pass, so that some of them have a share of the samples.

    Whichever side is too small comes several times, so that the share is met as nearly as whole numbers allow; no
    record is left out.

    Args:
        shards: Records of each shard, "set/name".
        replayed: The sets that have the share together.
        share: Theirs, between 0 and 1.
        repeat: Times a pass that a set or a shard comes already.

    Returns:
        `repeat` with one side multiplied.
    """
    for name, number in repeat.items():
        if type(number) is not int or number < 1:
            raise ValueError(
                f"repeat of {name} is a whole number from 1 up, not {number}; leave the set out instead"
            )
    count = {True: 0, False: 0}
    for shard, records in shards.items():
        name = shard.partition("/")[0]
        count[name in replayed] += records * repeat.get(shard, repeat.get(name, 1))
    if not all(count.values()):
        raise ValueError(
            f"of {', '.join(sorted(replayed))} and the sets in metres, one side has no records; type replay=null"
        )
    wanted = count[False] * share / (1 - share)  # of the replayed
    rare = count[True] < wanted
    times = max(1, round(wanted / count[True] if rare else count[True] / wanted))
    sets = {shard.partition("/")[0] for shard in shards}
    grown = {key for key in {*sets, *repeat} if (key.partition("/")[0] in replayed) == rare}
    return {key: repeat.get(key, 1) * (times if key in grown else 1) for key in sorted({*grown, *repeat})}


def required_folders(config: RunConfig) -> list[str]:
    """List the folders of all sets that a fitting run reads, including its validation set."""
    extra = [folder for sets in extra_sets(config).values() for folder in sets.values()]
    folders = [*config.data.sets.values(), *extra, config.sources.validation]
    return [str(folder) for folder in folders if folder is not None]
