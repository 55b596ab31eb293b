"""A run is a folder: who may write to it, what it holds, where it goes on (DESIGN.md §6)."""

import json
import os
import sys
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml

from depth_anything.data.address import redact_nested
from depth_anything.disk import (
    atomic_write,
    remove_stale,
)
from depth_anything.locks import FileLock, FileWatch
from depth_anything.model.integrity import find_damage
from depth_anything.training.loggers import read_metrics
from depth_anything.training.resume import (
    check_resume_checkpoint,
    check_same_run,
    config_differences,
    read_checkpoint_facts,
    read_config,
    read_config_or_empty,
)

__all__ = ["RunDir", "config_differences", "launch_id", "is_requeued", "step_from_name"]

RANK0_TIMEOUT_S = 120.0


class RunDir:
    """The folder of a run: config.yaml, checkpoints/, metrics.csv, pictures/, and model.safetensors at the end.

    Beside it best.safetensors, the best network of its validations, and best.json, which says how good and of when.
    """

    def __init__(self, path: str | os.PathLike[str], *, typed: Collection[str] = ()) -> None:
        """Name a folder; nothing is created yet.

        Args:
            path: Of the folder.
            typed: Dotted keys that were typed on the command line.
        """
        self.path, self.typed = Path(path), typed
        self.config = self.path / "config.yaml"
        self.checkpoints = self.path / "checkpoints"
        self.pictures = self.path / "pictures"
        self.model = self.path / "model.safetensors"
        self.best, self.best_json = self.path / "best.safetensors", self.path / "best.json"
        self.saved, self.metrics = self.path / "saved.json", self.path / "metrics.csv"
        self.lock = self._new_lock()

    def _new_lock(self) -> FileLock:
        return FileLock(self.path / "lock.json", fix="wait for it, stop it, or type name=ANOTHER_NAME")

    def begin(self, config: Mapping[str, Any], *, main: bool) -> Path | None:
        """Claim the folder on the main rank, and tell every rank which checkpoint the run goes on from.

        In this order: the folder's newest undamaged checkpoint, then `resume=`, then none, which leaves the
        weights to `init=`. Damaged checkpoints are renamed to *.damaged and named on standard error.

        Raises:
            ValueError: As `claim`; or if `resume=` is no checkpoint or damaged, or the main rank gave no sign for two
                minutes.
            OSError: If a checkpoint cannot be read now, which is no damage.
        """
        decision = self.path / "launch.json"
        if main:
            decision.unlink(missing_ok=True)
            self.claim(config)
            checkpoint = self._starting_checkpoint(config)
            if checkpoint is not None and checkpoint.parent != self.checkpoints:
                self._note(check_resume_checkpoint(checkpoint, config, typed=self.typed))
            atomic_write(
                decision,
                json.dumps({"launch": launch_id(main=True), "checkpoint": str(checkpoint or "")}).encode(),
            )
        else:
            self._wait_for(decision)
        chosen = json.loads(decision.read_text())["checkpoint"]
        return Path(chosen) if chosen else None

    def _wait_for(self, decision: Path) -> None:
        """Wait until the main rank has decided; a large checkpoint takes it minutes, while its lock shows its life."""
        watch, since = FileWatch(), time.monotonic()
        while _read_json(decision).get("launch") != launch_id(main=False):
            with suppress(FileNotFoundError):
                if watch.seconds_unchanged(self.lock.path) == 0.0:
                    since = time.monotonic()
            if time.monotonic() - since > RANK0_TIMEOUT_S:
                raise ValueError(f"rank 0 gave no sign in {self.path} for two minutes; see its own message")
            time.sleep(0.2)

    def finished(self, steps: int) -> bool:
        """Tell whether the run has its model and needs no further step."""
        return self.model.is_file() and _read_json(self.path / "finished.json").get("steps", -1) >= steps

    def finish(self, steps: int) -> None:
        """Note that the model of so many steps is there; the checkpoints may go."""
        atomic_write(self.path / "finished.json", json.dumps({"steps": steps}).encode())

    def read_best(self) -> dict[str, Any]:
        """Read best.json: "step", "metric" and its "value", "images", "protocol", "judged"; {} if none is kept."""
        note = _read_json(self.best_json) if self.best.is_file() else {}
        return note if {"step", "metric", "value", "images", "protocol", "judged"} <= note.keys() else {}

    def delete_best(self) -> None:
        """Remove the best network of a run that begins anew, and what is said of it."""
        for path in (self.best_json, self.best):
            path.unlink(missing_ok=True)

    def describe_best(self) -> str:
        """Name the best network of the validations, behind the last one; "" if there is none."""
        best = self.read_best()
        if not best:
            return ""
        figure = f"{best['metric']} {best['value']:.4g}"
        return f"; best on {best['images']}: {self.best} (step {best['step']}, {figure})"

    def claim(self, config: Mapping[str, Any], *, exclusive: bool = True) -> None:
        """Make the folder this run's: lock it, hold its config against `config`, write config.yaml.

        Args:
            config: The composed config, plain values. overwrite=true renames an existing folder to NAME.1, .2 …
                first; after a requeue it is ignored.
            exclusive: Refuse a second process and another run's config. Labelling, which any number of processes
                may do and whose label sets say themselves what made them, passes False.

        Raises:
            ValueError: If another process writes to it, the saved config is another run's, or the run was trained
                before and no checkpoint of it can be used, unless `resume` says where it goes on.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if exclusive:
            self.lock.acquire()
            if config["overwrite"] and self.config.is_file() and not is_requeued():
                self._move_away()
                self.lock = self._new_lock()
                self.lock.acquire()
            self.compare(config)
            if config["resume"] is None and not self.finished(config["steps"]):
                self._refuse_lost_progress()
        for folder in (self.path, self.checkpoints, self.pictures):
            remove_stale(folder, exclusive=exclusive)
        text = yaml.safe_dump(redact_nested(config), sort_keys=False)
        atomic_write(self.config, text.encode())

    def _move_away(self) -> None:
        number = 1
        while (old := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        os.rename(self.path, old)
        self.lock.release()

    def compare(self, config: Mapping[str, Any], *, note: bool = True) -> list[str]:
        """Hold a config against the one of the run, if the folder has trained any step.

        Args:
            config: The composed config, plain values.
            note: Write down and print what is changed on purpose.

        Returns:
            A line for each value that is changed on purpose.

        Raises:
            ValueError: If it is another run's.
        """
        newest = self.newest_checkpoint()
        if not self.config.is_file() or not (self.model.is_file() or any(self._all_checkpoints())):
            return []
        old, today, finished = read_config_or_empty(self.config), config, self.finished(config["steps"])
        if not old:
            old = read_checkpoint_facts(newest)[1] if newest is not None else {}
            today = {key: value for key, value in config.items() if key in old or key == "resume_with"}
            old, today = {**old, "steps": config["steps"]}, {**today, "steps": config["steps"]}
        changes = check_same_run(
            self.path, old, today, step=step_from_name(newest), finished=finished, typed=self.typed
        )
        if note:
            self._note(changes)
        return changes

    def _note(self, changes: list[str]) -> None:
        """Print what changes from here on, and keep it in changes.txt, since config.yaml has the new values alone."""
        file = self.path / "changes.txt"
        known = file.read_text().splitlines() if file.is_file() else []
        new = [line for line in changes if line not in known]
        if new:
            atomic_write(file, ("\n".join([*known, *new]) + "\n").encode())
        for line in changes:
            print(f"going on from {line}")

    def newest_checkpoint(self) -> Path | None:
        """Find the newest checkpoint that is whole and whose bytes are those that were written, or None."""
        return next((path for path in self._all_checkpoints() if not find_checkpoint_problem(path)), None)

    def _all_checkpoints(self) -> list[Path]:
        return sorted(self.checkpoints.glob("step-*.ckpt"), reverse=True)

    def _starting_checkpoint(self, config: Mapping[str, Any]) -> Path | None:
        """Choose where the run goes on, and set aside what is damaged: it would count among those that are kept."""
        if self.finished(config["steps"]):
            return None
        checkpoint, given = self.newest_checkpoint(), config["resume"]
        if checkpoint is None and given is not None:
            checkpoint = Path(given)
            if reason := find_checkpoint_problem(checkpoint):
                raise ValueError(
                    f"resume={given} {reason}; type resume=RUN_FOLDER/checkpoints/step-….ckpt of an undamaged one"
                )
        for path in self._all_checkpoints():
            if path == checkpoint:
                break
            aside = path.with_name(f"{path.name}.damaged")
            print(
                f"{path} {find_checkpoint_problem(path)}: renamed to {aside.name}; going on from {checkpoint}",
                file=sys.stderr,
            )
            os.replace(path, aside)
        return checkpoint

    def _refuse_lost_progress(self) -> None:
        """Refuse to begin anew where the run was trained before; a run that a kill ended before its first
        checkpoint has nothing to lose and may begin again.

        Raises:
            ValueError: Naming what shows the progress, and what to type.
        """
        if self.newest_checkpoint() is not None:
            return
        sign, last = "", self._last_step_logged()
        saved = _read_json(self.saved).get("step")
        if saved is not None:
            sign = f"{self.saved.name} says that step {saved} was saved"
        if not sign and last > self._checkpoint_interval():
            sign = f"{self.metrics.name} goes to step {last}"
        if not sign and (self.path / "finished.json").is_file():
            sign = "finished.json says that it was finished"
        damaged = self._all_checkpoints()
        if damaged:
            sign = f"{damaged[0]} {find_checkpoint_problem(damaged[0])}" + (
                "" if len(damaged) == 1 else ", and so are the others"
            )
        if sign:
            where = "" if damaged else f" and there is no checkpoint in {self.checkpoints}"
            raise ValueError(
                f"{self.path} was trained before: {sign}{where}; type resume=CHECKPOINT for a copy that you have, "
                "overwrite=true to set the folder aside and begin anew, or name=ANOTHER_NAME for a new run"
            )
        if last:
            print(
                f"{self.path} begins again: it ended after step {last}, before its first checkpoint",
                file=sys.stderr,
            )

    def _last_step_logged(self) -> int:
        try:
            return max((int(row["step"]) for row in read_metrics(self.metrics).rows), default=0)
        except OSError:
            return 0

    def _checkpoint_interval(self) -> int:
        """Steps between the checkpoints of the saved config; 0 if it does not say."""
        try:
            return int(read_config(self.config)["checkpoint"]["every"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0


def _read_json(path: Path) -> dict[str, Any]:
    """Read a note of the run; {} where it is not there, or damaged by a power cut."""
    try:
        note = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def step_from_name(checkpoint: Path | None) -> int:
    """Read the optimizer step from the name of a checkpoint of ours; 0 for none and for others' names."""
    number = checkpoint.stem.removeprefix("step-") if checkpoint is not None else ""
    return int(number) if number.isdecimal() else 0


def find_checkpoint_problem(path: Path) -> str:
    """Tell why a run cannot go on from a file, as the rest of a sentence; "" if it can.

    Raises:
        OSError: If it is there and cannot be read now.
    """
    if not path.is_file():
        return "is no checkpoint of a run"
    if damage := find_damage(path):
        return f"is damaged ({damage})"
    try:
        keys = torch.load(path, weights_only=True, mmap=True).keys()
    except Exception:  # whatever it is, it is not ours
        return "is no checkpoint of a run, or is cut short"
    return "" if {"global_step", "loops", "state_dict"} <= keys else "is no checkpoint of a run"


def launch_id(*, main: bool) -> str:
    """Name this start of the job, alike on all its ranks: by Slurm, torchrun, or the process that started them."""
    torchrun = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT")
    for keys in (torchrun, ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")):
        if keys[0] in os.environ:
            return ":".join(os.environ.get(key, "0") for key in keys)
    return str(os.getpid() if main else os.getppid())


def is_requeued() -> bool:
    """Tell whether a cluster has started this job again."""
    counts = (os.environ.get(key, "0") for key in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
    return any(int(count) > 0 for count in counts)
