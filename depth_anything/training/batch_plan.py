"""Split a batch over devices, and select the data sets of a run and their repeats."""

import difflib
import shlex
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from depth_anything.errors import UserError
from depth_anything.training.config import RunConfig
from depth_anything.training.value_rules import format_value

SOURCE_GROUPS = {"mix": "labelled", "replay": "images"}
"""Config key that adds sets to a run → the group of `sources` from which it selects them."""


def split_batch(batch_size: int, devices: int, micro_batch: int | None) -> tuple[int, int]:
    """Split the global batch into micro-batches per device and gradient accumulation.

    Args:
        batch_size: Images per optimizer step, over all devices.
        devices: Devices over all nodes.
        micro_batch: Images per forward pass and device; None for the device's whole share.

    Returns:
        (micro_batch, accumulation) with micro_batch × accumulation × devices = batch_size.

    Raises:
        UserError: If the batch does not divide evenly, with the nearest values that do.
    """
    if batch_size % devices:
        below, above = batch_size // devices * devices, (batch_size // devices + 1) * devices
        fewer = max(d for d in range(1, devices) if batch_size % d == 0)
        nearest = f"{below} or {above}" if below else f"{above}"
        raise UserError(
            f"batch_size={batch_size} cannot be split evenly over {devices} devices",
            f"type trainer.devices={fewer}, or batch_size={nearest}, which changes the recipe",
        )
    share = batch_size // devices
    micro = share if micro_batch is None else micro_batch
    if micro < 1 or share % micro:
        divisors = [m for m in range(1, share + 1) if share % m == 0]
        below = max((m for m in divisors if m < micro), default=divisors[0])
        above = min((m for m in divisors if m > micro), default=divisors[-1])
        nearest = " or ".join(f"micro_batch={m}" for m in sorted({below, above}))
        raise UserError(
            f"micro_batch={micro} does not divide the {share} images of a device per step "
            f"(batch_size={batch_size} over {devices} devices)",
            f"type {nearest}",
        )
    return micro, share // micro


def format_override(key: str, value: Any) -> str:
    """Format a key and its value as they are typed after train.py, quoted for a shell."""
    return shlex.quote(f"{key}={format_value(value)}")


def select_sets(
    chosen: bool | str | Sequence[str] | None, sets: Mapping[str, str], *, key: str
) -> dict[str, str]:
    """Select the sets that are added to those of a stage.

    Args:
        chosen: None or False for none, True for all, or names of sets.
        sets: Set name to folder.
        key: Key of the config: "mix" or "replay".

    Raises:
        UserError: If there is no set of a name, or no set at all.
    """
    if chosen is None or chosen is False:
        return {}
    if not isinstance(chosen, (bool, str, Sequence)):
        raise UserError(f"{key}={chosen} is neither true nor names of sets", f"type {key}=true or {key}=null")
    names = list(sets) if isinstance(chosen, bool) else [chosen] if isinstance(chosen, str) else list(chosen)
    group = f"sources.{SOURCE_GROUPS[key]}"
    known = f"{group} has {', '.join(sets) or 'none'}"
    if chosen is True and not names:
        raise UserError(
            f"{key}=true, but there are no such sets: {known}", f"type {key}=null, or '+{group}.NAME=FOLDER'"
        )
    for name in names:
        if name not in sets:
            closest = difflib.get_close_matches(str(name), sets, 1) or list(sets)[:1]
            raise UserError(
                f"{key} names {name}, and {known}", f"type {key}={f'[{closest[0]}]' if closest else 'null'}"
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
    """Compute how often sets are repeated in a pass so that the replayed sets have a share of the samples.

    The replayed or the other sets are repeated, whichever have too few records. Repeats are whole numbers, so the share
    is approximate; no record is omitted.

    Args:
        shards: Number of records by shard, "set/name".
        replayed: Names of the sets that `replay` adds.
        share: Share of the samples that come from `replayed`, between 0 and 1.
        repeat: Set or shard name to configured repeats per pass; others are read once.

    Returns:
        `repeat` with one side multiplied.

    Raises:
        UserError: If a repeat is not a whole number above 0, or one side has no records.
    """
    for name, number in repeat.items():
        if type(number) is not int or number < 1:
            raise UserError(
                f"repeat of {name} must be a whole number above 0, not {number}", "leave the set out instead"
            )
    count = {True: 0, False: 0}
    for shard, records in shards.items():
        name = shard.partition("/")[0]
        count[name in replayed] += records * repeat.get(shard, repeat.get(name, 1))
    if not all(count.values()):
        raise UserError(
            f"either {', '.join(sorted(replayed))} or the sets in meters have no records", "type replay=null"
        )
    target = count[False] * share / (1 - share)  # number of replayed samples for the share
    repeat_replayed = count[True] < target
    factor = max(1, round(target / count[True] if repeat_replayed else count[True] / target))
    sets = {shard.partition("/")[0] for shard in shards}
    repeated = {key for key in {*sets, *repeat} if (key.partition("/")[0] in replayed) == repeat_replayed}
    return {
        key: repeat.get(key, 1) * (factor if key in repeated else 1) for key in sorted({*repeated, *repeat})
    }
