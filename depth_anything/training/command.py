"""The command line of train.py: the help page, checks of what was typed, and Hydra's errors in one sentence each."""

import contextlib
import difflib
import io
import os
import re
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, InstantiationException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from depth_anything.data.address import redact_secrets
from depth_anything.errors import PSEUDOLABEL_COMMAND, SAME_COMMAND, UserMessage, format_error
from depth_anything.training.check_config import KEY_SYNONYMS, find_key, list_keys, unknown_key_message
from depth_anything.training.config import STAGES, format_value
from depth_anything.training.redact import install_redaction
from depth_anything.training.signals import signal_handler

CONFIG_GROUPS = ("stage", "sources", "trainer", "logger", "size", "experiment")
HELP = """python train.py stage=STAGE [GROUP=CHOICE ...] [KEY=VALUE ...]

Train a depth network, or label images with one. The same command goes on where a run stopped.

stages
  stage=teacher      a large network on sets with exact depth
  stage=pseudolabel  the teacher labels sets of images
  stage=student      a network of any size on these labels
  stage=metric       a relative network learns metres

groups (files of configs/)
{groups}

keys (value at stage={stage} size={size}; other stages have some of their own: add stage=STAGE before --help)
{keys}

examples
  python train.py stage=teacher                              any machine, no download, a minute or two
  python train.py stage=teacher size=paper dry_run=true      print the plan, touch no data
  python train.py stage=student encoder=vits steps=1000 recipe.head_lr=1e-4 name=second
  python train.py stage=teacher resume_with=[steps] steps=900    go on with a run, with more steps
  python train.py stage=metric sources=own photos=FOLDER max_depth=80

Lightning's Trainer takes its other arguments as +trainer.NAME=VALUE; sets of your own are
+sources.labelled.NAME=FOLDER. docs/recipe.md has the reason of every number, docs/own-data.md the way with your data.

flags
  --help, -h       this page          --version      versions
  --cfg job        the whole config   --hydra-help   Hydra's own flags
"""


def run_command(configs: Path) -> None:
    """Read the command line, and run what it asks for.

    Args:
        configs: The folder of the config files.
    """
    install_redaction()
    if "--version" in sys.argv[1:]:
        print(f"depth-anything-train {version('depth-anything-train')}, Hydra {hydra.__version__}")
        return
    flags, unknown = get_args_parser().parse_known_args()
    folders = [configs, *([Path(flags.config_dir)] if flags.config_dir else [])]
    of_hydra = (
        flags.hydra_help,
        flags.shell_completion,
        flags.info,
        flags.experimental_rerun,
        flags.config_path,
    )
    try:
        if flags.help:
            print(format_help(flags.overrides, configs))
            return
        if not any(of_hydra):
            check_overrides(flags.overrides, folders, dashed=unknown)
    except ValueError as error:
        sys.exit(f"error: {redact_secrets(str(error))}")
    from depth_anything.training.run import main  # imports torch, which a wrong key need not wait for

    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then raises, and does not print its own advice
    shown = io.StringIO()
    try:
        with contextlib.redirect_stdout(shown) if flags.cfg else contextlib.nullcontext():
            hydra.main(version_base="1.3", config_path=str(configs), config_name="train")(main)()
        print(redact_secrets(shown.getvalue()), end="")
    except (HydraException, OmegaConfBaseException) as error:
        signal_handler.raise_if_received()  # which one of Hydra's errors may have replaced
        sys.exit(f"error: {redact_secrets(explain_hydra_error(error, flags.overrides))}")


def check_overrides(overrides: Sequence[str], folders: Sequence[Path], *, dashed: Sequence[str] = ()) -> None:
    """Refuse overrides that cannot be read, choices that do not exist, and keys that the stage does not know.

    Args:
        overrides: As they were typed, without flags.
        folders: Of the config files.
        dashed: What was typed like a flag and is none.

    Raises:
        ValueError: Naming the override, and what to type.
    """
    if dashed:
        raise ValueError(_dashed_key_message([*dashed, *(one for one in overrides if "=" not in one)]))
    parsed = _parse_overrides(overrides)
    stage = next((_override_value(one) for one in reversed(parsed) if one.key_or_group == "stage"), None)
    if stage is None:
        raise ValueError(f"which stage? type stage={', stage='.join(_group_choices(folders, 'stage'))}")
    for one in parsed:
        if (
            one.key_or_group in CONFIG_GROUPS
            and one.is_delete()
            and one.key_or_group not in ("experiment", "logger")
        ):
            raise ValueError(f"{one.key_or_group} cannot be removed; leave out {one.input_line}")
        if one.key_or_group in CONFIG_GROUPS and not one.is_delete():
            _check_group_choice(one, folders)
    known_stage = stage if stage in STAGES else ""
    foreign = {
        one.key_or_group.partition(".")[0]
        for one in parsed
        if one.key_or_group.endswith("._target_") and not _override_value(one).startswith("depth_anything.")
    }
    for one in parsed:
        if one.key_or_group not in CONFIG_GROUPS and not one.key_or_group.startswith("hydra."):
            _check_override_key(one, known_stage, foreign)


def _parse_overrides(overrides: Sequence[str]) -> list[Override]:
    parser, parsed = OverridesParser.create(), []
    for number, typed in enumerate(overrides):
        try:
            parsed += parser.parse_overrides([typed])
        except (OverrideParseException, HydraException) as error:
            after = "".join(
                overrides[number + 1 : number + 3 if overrides[number + 1 :][:1] == ["="] else number + 2]
            )
            before = overrides[number - 1] if number else ""
            raise ValueError(_syntax_error_message(typed, before, after)) from error
    return parsed


def _syntax_error_message(typed: str, before: str, after: str) -> str:
    name, mark, value = typed.partition("=")
    if mark:
        quoted = shlex.quote(f"{name}='{value}'") if "'" not in value else shlex.quote(f'{name}="{value}"')
        return f"the value of {typed} cannot be read; put it into quotes within quotes: type {quoted}"
    if before.endswith("="):
        return f"leave out the space behind {before}: type {before}{typed}"
    colon = re.fullmatch(r"([+~]*[A-Za-z_][\w.]*)\s*[: ]\s*(\S.*)", typed)
    if colon:
        return f"{typed} lacks its =; type {colon[1]}={colon[2]}"
    if after.startswith("="):
        return f"leave out the space behind {typed}: type {typed}={after.removeprefix('=') or 'VALUE'}"
    return f"{typed} lacks its value; type {typed}={after if after and '=' not in after else 'VALUE'}"


def _dashed_key_message(dashed: Sequence[str]) -> str:
    name, mark, value = dashed[0].lstrip("-").partition("=")
    if not mark:
        value = dashed[1] if len(dashed) > 1 else "VALUE"
    name = name.replace("-", "_")
    if find_key(name)[0] is None and name not in CONFIG_GROUPS:
        names = {path.rpartition(".")[2]: path for path in (*list_keys(""), *CONFIG_GROUPS)} | KEY_SYNONYMS
        name = next((names[near] for near in difflib.get_close_matches(name, list(names), 1)), name)
    return f"{dashed[0]}: keys are typed without dashes; type {name}={value}"


def _override_value(one: Override) -> str:
    value = one.value()
    return (
        value
        if isinstance(value, str)
        else format_value(value)
        if isinstance(value, (int, float, bool))
        else ""
    )


def _override_text(one: Override) -> str | None:
    typed = one.input_line or ""
    return typed.partition("=")[2] if "=" in typed else None


def _group_choices(folders: Sequence[Path], group: str) -> list[str]:
    files = {
        path.relative_to(folder / group) for folder in folders for path in (folder / group).rglob("*.yaml")
    }
    return sorted(path.with_suffix("").as_posix() for path in files)


def _check_group_choice(one: Override, folders: Sequence[Path]) -> None:
    group, chosen = one.key_or_group, one.value()
    choices = _group_choices(folders, group)
    if one.is_sweep_override() or (chosen is None and group in ("experiment", "logger")):
        return
    if str(chosen) not in choices:
        near = difflib.get_close_matches(str(chosen), choices, 1, 0.5)
        there = (
            f"{group}={near[0]} (there are {', '.join(choices)})"
            if near
            else " or ".join(f"{group}={name}" for name in choices)
        )
        raise ValueError(f"{group}={format_value(chosen)} is unknown; type {there}")
    if one.is_add():
        raise ValueError(f"{group} is there already; type {group}={chosen}, without the +")


def _check_override_key(one: Override, stage: str, foreign: set[str]) -> None:
    path = one.key_or_group
    known, is_open = find_key(path)
    section = path.partition(".")[0]
    if known is None:
        if section in foreign or section == "logger" or path.startswith("trainer.strategy."):
            return  # run.complete looks at the class that takes it
        if is_open and section == "trainer" and _is_trainer_argument(path.partition(".")[2]):
            if one.is_add() or one.is_force_add():
                return
            raise ValueError(
                f"trainer.{path.partition('.')[2]} is not among this project's keys but Lightning's; "
                f"type +{path}={_override_text(one)}"
            )
        raise ValueError(unknown_key_message(path, stage, value=_override_text(one)))
    parts = path.split(".")
    for length in range(1, len(parts) + 1):
        part, _ = find_key(".".join(parts[:length]))
        if part is not None and stage and stage not in part.stages and section not in foreign:
            raise ValueError(unknown_key_message(path, stage, value=_override_text(one)))
    value = None if one.is_delete() or one.is_sweep_override() else one.value()
    if known.section is not None and isinstance(value, dict):  # recipe={head_lr: 1e-4}
        for name, item in value.items():
            if section not in foreign and find_key(f"{path}.{name}")[0] is None:
                raise ValueError(unknown_key_message(f"{path}.{name}", stage, value=format_value(item)))
    if one.is_delete() and not path.startswith(("sources.labelled.", "sources.images.", "sources.scenes.")):
        raise ValueError(f"{path} cannot be removed; leave out {one.input_line}, or type {path}=VALUE")


def _is_trainer_argument(name: str) -> bool:
    """Tell whether Lightning's Trainer has an argument of this name."""
    import inspect

    from pytorch_lightning import Trainer

    return name in inspect.signature(Trainer.__init__).parameters


def explain_hydra_error(error: BaseException, typed: Sequence[str]) -> str:
    """Turn an error of Hydra's or OmegaConf's into one sentence, without its advice.

    Args:
        error: As it was raised.
        typed: The overrides of this command.
    """
    said = str(error)
    values = {one.partition("=")[0].lstrip("+~"): one.partition("=")[2] for one in typed if "=" in one}
    here = re.search(r"already at '([^']+)'", said)
    if here:
        return f"{here[1]} is there already; type {here[1]}={values.get(here[1], 'VALUE')}, without the +"
    named = re.search(r"Could not (?:override|delete)[^']*'([^']+)'", said)
    if named:
        path = next(iter(re.findall(r"full_key: (\S+)", said)), named[1])
        if find_key(path)[0] is not None:
            return f"the key {path} is not in this config; type +{path}={values.get(path, 'VALUE')}"
        stage = values.get("stage", "")
        return unknown_key_message(path, stage if stage in STAGES else "", value=values.get(path))
    return _error_text(error, lines=1)


def format_failure(error: BaseException, typed: Sequence[str]) -> str:
    """Format an error of a run without secrets, its commands completed by what was typed.

    Args:
        error: As it was raised, perhaps wrapped by Hydra.
        typed: The overrides of this command. "Start the same command again" is spelled out, and the labeling command
            is given the places of the user's files.
    """
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    if not isinstance(error, UserMessage):
        return redact_secrets(" ".join(_error_text(error).split()))
    same = shlex.join(["python", "train.py", *typed])
    places = ("sources", "size", "photos", "data_dir", "output_dir", "labels")
    kept = [shlex.quote(override) for override in typed if override.partition("=")[0] in places]
    commands = {
        SAME_COMMAND: f"type  {same}  again",
        PSEUDOLABEL_COMMAND: " ".join([PSEUDOLABEL_COMMAND.text, *kept]),
    }
    return redact_secrets(format_error(error, commands=commands))


def _error_text(error: BaseException, *, lines: int | None = None) -> str:
    """Return so many lines of an error in one; of OmegaConf's errors the key and the first line."""
    full_key = getattr(error, "full_key", None)
    text = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"{full_key}: {text[0]}" if full_key else " ".join(text[:lines])


def format_help(overrides: Sequence[str], configs: Path) -> str:
    """Write the page of --help for the stage and size that were typed, teacher and paper by default."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    typed = [one for one in overrides if one.partition("=")[0] in CONFIG_GROUPS]
    given = {one.partition("=")[0]: one.partition("=")[2] for one in typed}
    typed += [
        f"{group}={value}" for group, value in (("stage", "teacher"), ("size", "paper")) if group not in given
    ]
    check_overrides(typed, [configs])
    with initialize_config_dir(str(configs), version_base="1.3"):
        config = OmegaConf.to_container(compose("train", typed), resolve=False)
    stage, size = given.get("stage", "teacher"), given.get("size", "paper")
    lines = []
    for path in list_keys(stage if stage in STAGES else ""):
        if path.startswith(("data.", "module.", "tiny.", "sources.", "logger.")) or path.endswith("_target_"):
            continue
        node = config
        for name in path.split("."):
            node = node.get(name) if isinstance(node, dict) else None
        known, _ = find_key(path)
        rule = known.rule.text if known is not None and known.rule is not None else ""
        lines.append(f"  {path}={format_value(node)}".ljust(46) + rule)
    groups = "\n".join(
        f"  {group + '=':<13}{', '.join(_group_choices([configs], group))}" for group in CONFIG_GROUPS
    )
    return HELP.format(groups=groups, keys="\n".join(lines), stage=stage, size=size)
