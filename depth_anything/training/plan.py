"""The arithmetic of a batch, and the plan that dry_run=true prints."""

import difflib
import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from depth_anything.data.address import told
from depth_anything.model.depth_anything import DepthAnything
from depth_anything.model.lora import add_adapters
from depth_anything.training.config import to_typed

#: Key that adds sets beside a stage's own → the group of sources that it chooses from.
GROUPS = {"mix": "labelled", "replay": "images"}
BESIDE = {"mix": "mixed in", "replay": "replayed"}


def one_sentence(error: BaseException) -> str:
    """Reduce an error to what it says: without Hydra's wrapping, a worker's traceback, or line breaks."""
    cause = error.__cause__ if type(error).__name__ == "InstantiationException" and error.__cause__ else error
    lines = [line for line in str(cause).splitlines() if line.strip()] or [type(cause).__name__]
    if getattr(cause, "full_key", None):  # OmegaConf's, which tells the key in a line of its own
        return f"{cause.full_key}: {lines[0].strip()}"  # type: ignore[attr-defined]
    said = lines[-1].partition(": ")[2] if any("Traceback" in line for line in lines) else " ".join(lines)
    return " ".join(said.split())


def as_typed(sentence: str, typed: Sequence[str]) -> str:
    """Complete the commands of a refusal by what the user typed, and leave the secrets of addresses out.

    Args:
        sentence: Of a refusal: the labelling command is told where things are, "the same command" is spelled out.
        typed: The overrides of this command.
    """
    where = ("sources", "size", "photos", "data_dir", "output_dir", "labels")
    kept = [shlex.quote(override) for override in typed if override.partition("=")[0] in where]
    command = "python train.py stage=pseudolabel"
    same = shlex.join(["python", "train.py", *typed])
    sentence = sentence.replace(command, " ".join([command, *kept]))
    return told(sentence.replace("start the same command again", f"type  {same}  again"))


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


def override(key: str, value: Any) -> str:
    """Write a key and its value as they are typed after train.py, quoted for a shell."""
    return shlex.quote(f"{key}={to_typed(value)}")


def chosen_sets(
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
    group = f"sources.{GROUPS[key]}"
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


def extra_sets(config: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Name the sets that a config's `mix` and `replay` add, each {set: folder}."""
    return {
        key: chosen_sets(config.get(key), config["sources"].get(group, {}), key=key)
        for key, group in GROUPS.items()
    }


def share_repeat(
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


def needed_sets(config: Mapping[str, Any]) -> list[str]:
    """List the folders of all sets that a fitting run reads, validation among them."""
    added = [folder for sets in extra_sets(config).values() for folder in sets.values()]
    folders = [*config["data"]["sets"].values(), *added, config["sources"]["validation"]]
    return [str(folder) for folder in folders if folder is not None]


def count(parameters: Any) -> str:
    """Print a number of values with commas."""
    return f"{sum(p.numel() for p in parameters):,}"


def print_plan(config: Mapping[str, Any]) -> None:
    """Build the network on the meta device and print what a run would do, touching neither data nor weights."""
    with torch.device("meta"):
        model = DepthAnything(config["encoder"], max_depth=config.get("max_depth"))
        model.pretrained.requires_grad_(not config.get("freeze_encoder"))
    head = list(model.depth_head.parameters())
    encoder = list(model.pretrained.parameters())
    print(f"run         {config['run_dir']} (stage={config['stage']}, size={config['size']})")
    print(f"network     {config['encoder']}: {count(model.parameters())} parameters")
    print(f"            encoder {count(encoder)}, head {count(head)}")
    if config["stage"] == "pseudolabel":
        print(f"teacher     {config['teacher']}")
        print(f"labels      {config['labels']}")
        _print_sets(config["sources"]["images"])
        print(
            f"batch       {config['batch_size']} images of one shape and shard, short side {config['image_size']}"
        )
        return
    recipe = config["recipe"]
    if config.get("lora"):
        with torch.device("meta"):
            add_adapters(model, config["lora"])
        print(f"adapters    LoRA of rank {config['lora']} beside the encoder's frozen layers")
    for name, parameters in (("encoder", model.encoder_parameters()), ("head", model.head_parameters())):
        print(f"group       {name}: {count(parameters)} trained, Adam, rate {recipe[f'{name}_lr']:g}")
    print(f"schedule    {recipe['schedule']}, warm-up {recipe['warmup']:.0%} of {config['steps']:,} steps")
    print(f"loss        {_loss(config)}")
    whole = {"encoder": ", its encoder alone", "all": ", encoder and head"}.get(config.get("start", ""), "")
    print(f"start       {config['init'] or 'random weights'}{whole if config['init'] else ''}")
    _print_sets(config["data"]["sets"])
    if config["data"]["labels"] and (config["stage"] != "metric" or config["replay"]):
        print(f"labels      {config['data']['labels']}")
    for key, sets in extra_sets(config).items():
        share = f" ({config['replay_share']:.0%})" if key == "replay" and sets else ""
        _print_sets(sets, what=f"{BESIDE[key]}{share}")
    batch, side = config["batch_size"], config["image_size"]
    print(f"batch       {batch} crops of {side}×{side}; {batch * config['steps']:,} samples in all")
    for devices in (1, 8, 64):
        try:
            micro, accumulation = split_batch(batch, devices, config["micro_batch"])
            split = f"{micro} a device × {accumulation} accumulated"
        except ValueError as error:
            split = str(error)
        print(f"            {devices:2d} device{'s' if devices > 1 else ' '}: {split}")


def _loss(config: Mapping[str, Any]) -> str:
    recipe = config["recipe"]
    if config["stage"] == "metric":
        silog = (
            f"silog, variance focus {recipe['variance_focus']:g}, over truth from {config['min_depth']:g} to "
        )
        silog += f"{config['max_depth']:g} m"
        if not config["replay"]:
            return silog
        return f"{silog}; replayed: {_invariant(recipe)}"
    return _invariant(recipe)


def _invariant(recipe: Mapping[str, Any]) -> str:
    terms = [f"ssi {recipe['ssi_weight']:g}", f"gm {recipe['gm_weight']:g}"]
    if recipe.get("alignment_weight"):
        terms.append(f"features {recipe['alignment_weight']:g} (tolerance {recipe['alignment_tolerance']:g})")
    return f"{' : '.join(terms)}; largest {recipe['trim']:.0%} of residuals left out"


def _print_sets(sets: Mapping[str, str], *, what: str = "set") -> None:
    for name, root in sets.items():
        there = "://" in root or (Path(root) / "manifest.json").is_file()
        print(f"{what:<11} {name}: {root}{'' if there else ' (not there yet)'}")
