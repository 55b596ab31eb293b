"""The command line of train.py: `--help`, checks of what was typed, and Hydra's errors in one sentence each."""

import contextlib
import difflib
import inspect
import io
import os
import re
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import hydra
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, InstantiationException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from depth_anything.data.address import redact_secrets, with_addresses
from depth_anything.disk import explain_write_error
from depth_anything.errors import PSEUDOLABEL_COMMAND, SAME_COMMAND, UserError, UserMessage, format_error
from depth_anything.training.check_config import (
    KEY_SYNONYMS,
    find_key,
    list_keys,
    resolve_config,
    unknown_key_message,
)
from depth_anything.training.config import RunConfig
from depth_anything.training.config_schema import STAGES
from depth_anything.training.redact import install_redaction
from depth_anything.training.signals import signal_handler
from depth_anything.training.value_rules import format_value

#: Groups of config files, chosen as GROUP=CHOICE → what a choice decides.
CONFIG_GROUPS = {
    "stage": "what to train or label",
    "sources": "the data sets",
    "optimizer": "the optimizer",
    "trainer": "the devices",
    "callbacks": "Lightning callbacks to add, one or [several]",
    "logger": "loggers besides metrics.csv, one or [several]",
    "size": "a quick test, or the numbers of the paper",
    "experiment": "settings of an experiment",
}
OPTIONAL_GROUPS = ("optimizer", "callbacks", "logger", "experiment")
LIST_GROUPS = ("callbacks", "logger")
HELP = """python train.py stage=STAGE [GROUP=CHOICE ...] [KEY=VALUE ...]

Train a depth network, or label images with one. Type the same command again to continue a run that was stopped.

stages
  stage=teacher      train a large network on sets with exact depth
  stage=pseudolabel  label sets of images with the teacher
  stage=student      train a network of any size on these labels
  stage=metric       fine-tune a relative network to depth in meters
  stage=pretrain     train an encoder on images alone, for init= of the other stages
  stage=segmentation carry an encoder on to semantic segmentation
  stage=controlnet   train a ControlNet for Stable Diffusion that is conditioned on depth

groups (files of configs/)
{groups}

keys (values at stage={stage} size={size}; for those of another stage add stage=STAGE before --help)
{keys}

examples
  python train.py stage=teacher                              any machine, no download, a minute or two
  python train.py stage=teacher size=paper dry_run=true      print the paper's plan without reading data
  python train.py stage=student encoder=vits steps=1000 recipe.head_lr=1e-4 name=second
  python train.py stage=teacher resume_with=[steps] steps=900    continue a run with more steps
  python train.py stage=metric sources=own photos=FOLDER max_depth=80
  python train.py stage=teacher '+callbacks.swa._target_=pytorch_lightning.callbacks.EMAWeightAveraging'

Other arguments of Lightning's Trainer are typed as +trainer.NAME=VALUE, data sets as +sources.labelled.NAME=FOLDER.
docs/recipe.md explains every number, docs/own-data.md how to train on your own data.

flags
  --help, -h       this page          --version      versions
  --cfg job        the whole config   --hydra-help   Hydra's own flags
"""


def run_command(configs: Path) -> None:
    """Read the command line and run what it asks for.

    Args:
        configs: Folder of the config files.
    """
    install_redaction()
    if "--version" in sys.argv[1:]:
        print(f"depth-anything-train {version('depth-anything-train')}, Hydra {hydra.__version__}")
        return
    sys.argv[1:] = translate_old_keys(sys.argv[1:])
    flags, unknown = get_args_parser().parse_known_args()
    folders = [configs, *([Path(flags.config_dir)] if flags.config_dir else [])]
    hydra_flags = (
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
        if not any(hydra_flags):
            check_overrides(flags.overrides, folders, dashed=unknown)
    except ValueError as error:
        sys.exit(f"error: {redact_secrets(str(error))}")
    from depth_anything.training.run import main  # imports torch, which a wrong key need not wait for

    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then raises instead of printing its own advice
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output) if flags.cfg else contextlib.nullcontext():
            hydra.main(version_base="1.3", config_path=str(configs), config_name="train")(main)()
        print(redact_secrets(output.getvalue()), end="")
    except (HydraException, OmegaConfBaseException) as error:
        signal_handler.raise_if_received()  # a signal may have caused one of Hydra's errors
        sys.exit(f"error: {redact_secrets(explain_hydra_error(error, flags.overrides))}")


def compose_config(overrides: Sequence[str], configs: Path) -> RunConfig:
    """Compose and validate the config that train.py would run, for programs that only read it.

    Args:
        overrides: As typed after train.py.
        configs: Folder of the config files.

    Raises:
        UserError: As train.py would say it.
    """
    typed = translate_old_keys(overrides)
    check_overrides(typed, [configs])
    try:
        with initialize_config_dir(str(configs), version_base="1.3"):
            return resolve_config(compose("train", typed))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain_hydra_error(error, typed)) from error


def translate_old_keys(arguments: Sequence[str]) -> list[str]:
    """Replace keys that earlier versions had, so that old commands keep working.

    `tiny.encoder.STAGE`, `tiny.init.STAGE`, `tiny.perturb.STAGE`, `tiny.max_depth` and `tiny.steps.STAGE.ENCODER` set
    what size=tiny changes of a stage, `rates.RANK` the encoder's rate at lora=RANK. Of another stage, size or rank they
    change nothing, and are left out.

    >>> translate_old_keys(["stage=teacher", "tiny.steps.teacher.vitt=5", "tiny.encoder.student=vitt"])
    ['tiny.steps.vitt=5', 'stage=teacher']
    """
    typed = {
        name.lstrip("+"): value for name, mark, value in (one.partition("=") for one in arguments) if mark
    }
    stage, rank = typed.get("stage", ""), typed.get("lora", "null").replace("null", "None")
    tiny = typed.get("size", "tiny") == "tiny"
    renamed = {f"tiny.{key}.{stage}": (key, tiny) for key in ("encoder", "init", "perturb")}
    renamed |= {"tiny.max_depth": ("max_depth", tiny and stage == "metric")}
    renamed |= {f"rates.{rank}": ("recipe.encoder_lr", stage == "metric" and not tiny)}
    translated: list[str] = []
    kept: list[str] = []
    for one in arguments:
        name, mark, value = one.partition("=")
        name = name.lstrip("+")
        section, _, rest = name.partition(".")
        old_steps = re.fullmatch(rf"tiny\.steps\.({'|'.join(STAGES)})\.(\w+)", name)
        if old_steps and old_steps[1] == stage:
            translated.append(f"tiny.steps.{old_steps[2]}={value}")
        elif name in renamed:
            new_name, applies = renamed[name]
            translated += [f"{new_name}={value}"] if applies and new_name not in typed else []
        elif not (
            old_steps or section == "rates" or re.match(r"tiny\.(encoder|init|perturb|max_depth)\b", name)
        ):
            kept.append(one)
    return [*translated, *kept]


def check_overrides(overrides: Sequence[str], folders: Sequence[Path], *, dashed: Sequence[str] = ()) -> None:
    """Refuse overrides that cannot be parsed, choices that do not exist, and keys that the stage does not know.

    Args:
        overrides: The overrides as they were typed, without flags.
        folders: Folders of config files.
        dashed: Words that begin with a dash and are no flag of Hydra.

    Raises:
        UserError: Naming the override, and what to type.
    """
    if dashed:
        raise UserError(_dashed_key_message([*dashed, *(one for one in overrides if "=" not in one)]))
    parsed = _parse_overrides(overrides)
    stage = next((_override_value(one) for one in reversed(parsed) if one.key_or_group == "stage"), None)
    if stage is None:
        stage = _stage_of_experiment(parsed, folders)
    if stage is None:
        raise UserError(
            "no stage is given", f"type stage={', stage='.join(_group_choices(folders, 'stage'))}"
        )
    for one in parsed:
        group = one.key_or_group
        if group in CONFIG_GROUPS and one.is_delete() and group not in OPTIONAL_GROUPS:
            raise UserError(f"{group} cannot be removed", f"leave out {one.input_line}")
        if group in CONFIG_GROUPS and not one.is_delete():
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


def _stage_of_experiment(parsed: Sequence[Override], folders: Sequence[Path]) -> str | None:
    """Return the stage that the file of the chosen experiment, or one that it includes, chooses; None if none does."""
    chosen = [_override_value(one) for one in parsed if one.key_or_group == "experiment"]
    names, seen = chosen[-1:], set()
    while names:
        name = names.pop()
        if name in seen:
            continue
        seen.add(name)
        path = next((path for f in folders if (path := f / "experiment" / f"{name}.yaml").is_file()), None)
        content = OmegaConf.to_container(OmegaConf.load(path)) if path is not None else None
        for entry in content.get("defaults", []) if isinstance(content, dict) else []:
            if isinstance(entry, dict):
                if "override /stage" in entry:
                    return str(entry["override /stage"])
            elif isinstance(entry, str) and entry.startswith("/experiment/"):
                names.append(entry.removeprefix("/experiment/"))
    return None


def _parse_overrides(overrides: Sequence[str]) -> list[Override]:
    parser, parsed = OverridesParser.create(), []
    for number, typed in enumerate(overrides):
        try:
            parsed += parser.parse_overrides([typed])
        except (OverrideParseException, HydraException) as error:
            following = overrides[number + 1 :]
            after = "".join(following[: 2 if following[:1] == ["="] else 1])
            before = overrides[number - 1] if number else ""
            raise UserError(_syntax_error_message(typed, before, after)) from error
    return parsed


def _syntax_error_message(typed: str, before: str, after: str) -> str:
    """Explain why an override cannot be parsed, given the words before and after it."""
    name, mark, value = typed.partition("=")
    if mark:
        quoted = shlex.quote(f"{name}='{value}'") if "'" not in value else shlex.quote(f'{name}="{value}"')
        return f"the value of {typed} cannot be parsed; put it into quotes within quotes: type {quoted}"
    if before.endswith("="):
        return f"remove the space after {before}: type {before}{typed}"
    colon = re.fullmatch(r"([+~]*[A-Za-z_][\w.]*)\s*[: ]\s*(\S.*)", typed)
    if colon:
        return f"{typed} has no =; type {colon[1]}={colon[2]}"
    if after.startswith("="):
        return f"remove the space after {typed}: type {typed}={after.removeprefix('=') or 'VALUE'}"
    return f"{typed} has no value; type {typed}={after if after and '=' not in after else 'VALUE'}"


def _dashed_key_message(dashed: Sequence[str]) -> str:
    """Explain that keys have no dashes, with the key that was probably meant."""
    name, mark, value = dashed[0].lstrip("-").partition("=")
    if not mark:
        value = dashed[1] if len(dashed) > 1 else "VALUE"
    name = name.replace("-", "_")
    if find_key(name)[0] is None and name not in CONFIG_GROUPS:
        names = {path.rpartition(".")[2]: path for path in (*list_keys(""), *CONFIG_GROUPS)} | KEY_SYNONYMS
        name = next((names[closest] for closest in difflib.get_close_matches(name, list(names), 1)), name)
    return f"{dashed[0]}: keys are typed without dashes; type {name}={value}"


def _override_value(one: Override) -> str:
    value = one.value()
    if isinstance(value, str):
        return value
    return format_value(value) if isinstance(value, (int, float, bool)) else ""


def _override_text(one: Override) -> str | None:
    """Return what was typed after the `=`; None if there is none."""
    typed = one.input_line or ""
    return typed.partition("=")[2] if "=" in typed else None


def _group_choices(folders: Sequence[Path], group: str) -> list[str]:
    files = {
        path.relative_to(folder / group) for folder in folders for path in (folder / group).rglob("*.yaml")
    }
    return sorted(path.with_suffix("").as_posix() for path in files)


def _fold_folders(choices: Sequence[str]) -> list[str]:
    """Shorten a list of choices: those of a folder are written once, as claims/NAME."""
    folders = dict.fromkeys(name.partition("/")[0] for name in choices if "/" in name)
    return [*(name for name in choices if "/" not in name), *(f"{folder}/NAME" for folder in folders)]


def _check_group_choice(one: Override, folders: Sequence[Path]) -> None:
    """Check that the chosen file of a group exists."""
    group, chosen = one.key_or_group, one.value()
    choices = _group_choices(folders, group)
    if one.is_sweep_override() or (chosen is None and group in OPTIONAL_GROUPS):
        return
    for name in chosen if isinstance(chosen, list) and group in LIST_GROUPS else [chosen]:
        if str(name) not in choices:
            closest = difflib.get_close_matches(str(name), choices, 1, 0.5)
            hint = " or ".join(f"{group}={other}" for other in choices)
            if closest:
                hint = f"{group}={closest[0]} (the choices are {', '.join(choices)})"
            raise UserError(f"{group}={format_value(chosen)} is unknown", f"type {hint}")
    if one.is_add():
        raise UserError(f"{group} is set already", f"type {group}={format_value(chosen)}, without the +")


def _check_override_key(one: Override, stage: str, foreign: set[str]) -> None:
    """Check that a stage knows the key of an override.

    Args:
        one: The override.
        stage: Stage of the command; "" for a user's own stage.
        foreign: Sections whose class is not this project's and may take any argument.
    """
    path = one.key_or_group
    known, is_open = find_key(path)
    section = path.partition(".")[0]
    if known is None:
        added = one.is_add() or one.is_force_add()
        if path.startswith("model.head."):
            if not added:
                raise UserError(unknown_key_message(path, stage, value=_override_text(one)))
            return
        nodes = (*foreign, "logger", "callbacks", "optimizer")
        if section in nodes or path.startswith("trainer.strategy."):
            return  # resolve_config checks the arguments of the class
        if is_open and section == "trainer" and _is_trainer_argument(path.partition(".")[2]):
            if added:
                return
            raise UserError(
                f"{path} is an argument of Lightning's Trainer, not a key of this project",
                f"type +{path}={_override_text(one)}",
            )
        raise UserError(unknown_key_message(path, stage, value=_override_text(one)))
    parts = path.split(".")
    for length in range(1, len(parts) + 1):
        part, _ = find_key(".".join(parts[:length]))
        if part is not None and stage and stage not in part.stages and section not in foreign:
            raise UserError(unknown_key_message(path, stage, value=_override_text(one)))
    value = None if one.is_delete() or one.is_sweep_override() else one.value()
    if known.section is not None and isinstance(value, dict):  # recipe={head_lr: 1e-4}
        for name, item in value.items():
            if section not in foreign and find_key(f"{path}.{name}")[0] is None:
                raise UserError(unknown_key_message(f"{path}.{name}", stage, value=format_value(item)))
    removable = (
        "sources.labelled.",
        "sources.images.",
        "sources.scenes.",
        "optimizer.",
        "callbacks",
        "logger",
    )
    if one.is_delete() and not path.startswith(removable):
        raise UserError(f"{path} cannot be removed", f"leave out {one.input_line}, or type {path}=VALUE")


def _is_trainer_argument(name: str) -> bool:
    from pytorch_lightning import Trainer

    return name in inspect.signature(Trainer.__init__).parameters


def explain_hydra_error(error: BaseException, typed: Sequence[str]) -> str:
    """Turn an error of Hydra or OmegaConf into one sentence, without its multi-line advice.

    Args:
        error: The error.
        typed: The overrides of this command.
    """
    message = str(error)
    values = {one.partition("=")[0].lstrip("+~"): one.partition("=")[2] for one in typed if "=" in one}
    if several := re.search(r"Ambiguous value for argument '([^']+)'", message):
        key, _, value = several[1].partition("=")
        return f"{several[1]} has several values; type one, as {key}={value.split(',')[0]}"
    existing = re.search(r"already at '([^']+)'", message)
    if existing:
        key = existing[1]
        return f"{key} is set already; type {key}={values.get(key, 'VALUE')}, without the +"
    named = re.search(r"Could not (?:override|delete)[^']*'([^']+)'", message)
    if named:
        path = next(iter(re.findall(r"full_key: (\S+)", message)), named[1])
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
    error = explain_write_error(error)
    if not isinstance(error, UserMessage):
        return redact_secrets(with_addresses(" ".join(_error_text(error).split())))
    same = shlex.join(["python", "train.py", *typed])
    places = ("sources", "size", "photos", "data_dir", "output_dir", "labels")
    kept = [shlex.quote(override) for override in typed if override.partition("=")[0] in places]
    commands = {
        SAME_COMMAND: f"type  {same}  again",
        PSEUDOLABEL_COMMAND: " ".join([PSEUDOLABEL_COMMAND.text, *kept]),
    }
    return redact_secrets(with_addresses(format_error(error, commands=commands)))


def _error_text(error: BaseException, *, lines: int | None = None) -> str:
    """Return so many lines of an error in one; of OmegaConf's errors the key and the first line."""
    full_key = getattr(error, "full_key", None)
    if missing := re.search(r"Environment variable '(\w+)' not found", str(error)):
        return f"{full_key or 'a key'} needs the environment variable {missing[1]}, which is not set; export it first"
    if missing := re.search(r"Interpolation key '([A-Z_]+)' not found", str(error)):
        return f"{full_key}: there is no key {missing[1]}; for the environment variable type ${{oc.env:{missing[1]}}}"
    text = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"{full_key}: {text[0]}" if full_key else " ".join(text[:lines])


def format_help(overrides: Sequence[str], configs: Path) -> str:
    """Format the page of --help for the stage and size that were typed, by default teacher and paper.

    Args:
        overrides: As typed; only choices of groups matter.
        configs: Folder of the config files.
    """
    typed = [one for one in overrides if one.partition("=")[0] in CONFIG_GROUPS]
    choices = {"stage": "teacher", "size": "paper"} | dict(one.split("=", 1) for one in typed)
    typed = [f"{group}={choice}" for group, choice in choices.items()]
    check_overrides(typed, [configs])
    with initialize_config_dir(str(configs), version_base="1.3"):
        config = OmegaConf.to_container(compose("train", typed), resolve=False)
    stage, lines = choices["stage"], []
    hidden = ("data.", "module.", "tiny.", "sources.", "logger", "callbacks", "model.")
    for path in list_keys(stage if stage in STAGES else ""):
        if path.startswith(hidden) or path.endswith("_target_"):
            continue
        node = config
        for name in path.split("."):
            node = node.get(name) if isinstance(node, dict) else None
        known, _ = find_key(path)
        rule = known.rule.text if known is not None and known.rule is not None else ""
        lines.append(f"  {path}={format_value(node)}".ljust(46) + rule)
    groups = "\n".join(
        f"  {group + '=' + ', '.join(_fold_folders(_group_choices([configs], group))):<68}{text}"
        for group, text in CONFIG_GROUPS.items()
    )
    return HELP.format(groups=groups, keys="\n".join(lines), stage=stage, size=choices["size"])
