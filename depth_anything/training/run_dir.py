"""The folder of a run: its lock, its files, and the checkpoint from which it continues (docs/contracts.md, runs)."""

import json
import os
import sys
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from depth_anything.data.address import redact_nested
from depth_anything.data.local_copy import local_path
from depth_anything.data.store import FolderStore, Store
from depth_anything.disk import (
    atomic_write,
    name_write_errors,
    parse_json_object,
    read_json_object,
    remove_stale,
)
from depth_anything.errors import UserError
from depth_anything.locks import FileLock, FileWatch, JobStart
from depth_anything.model.integrity import find_damage
from depth_anything.model.sharded_files import find_sharded_damage, is_sharded
from depth_anything.training.config import RunConfig
from depth_anything.training.loggers import read_metrics
from depth_anything.training.resume import (
    FlatConfig,
    check_resume_checkpoint,
    check_same_run,
    load_checkpoint,
    read_checkpoint_facts,
    read_config,
    read_config_or_empty,
)
from depth_anything.training.signals import slurm_job

RANK0_TIMEOUT_S = 120.0


class RunDir:
    """The folder of a run: config.yaml, checkpoints/, metrics.csv, pictures/, and model.safetensors at the end.

    model-ema.safetensors is the average of callbacks=ema. best.safetensors is the best model of its validations, and
    best.json names its step and metric.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        typed: Collection[str] = (),
        result: str = "model.safetensors",
    ) -> None:
        """Set the paths of a run folder; nothing is created yet.

        Args:
            path: Path of the folder.
            typed: Dotted keys that were typed on the command line.
            result: The file that a finished run has, relative to the folder.
        """
        self.path, self.typed = Path(path), typed
        self.config = self.path / "config.yaml"
        self.checkpoints = self.path / "checkpoints"
        self.pictures = self.path / "pictures"
        self.model = self.path / result
        first, *rest = Path(result).parts
        averaged = Path(first).with_stem(f"{Path(first).stem}-ema")
        self.average = self.path.joinpath(averaged, *rest)
        self.best, self.best_json = self.path / "best.safetensors", self.path / "best.json"
        self.saved, self.metrics = self.path / "saved.json", self.path / "metrics.csv"
        self.lock = self._new_lock()

    def _new_lock(self) -> FileLock:
        fix = "wait for it, stop it, or type name=ANOTHER_NAME"
        return FileLock(self.path / "lock.json", fix=fix, start=slurm_start())

    def begin(self, config: RunConfig, *, main: bool) -> Path | None:
        """Claim the folder on the main rank, and return on every rank the checkpoint from which the run continues.

        The first of these that exists is used:

        1. the newest undamaged checkpoint in the folder,
        2. the checkpoint of `resume=`,
        3. none: the function returns None, and the weights come from `init=`.

        Damaged checkpoints are renamed to *.damaged and reported on stderr.

        Raises:
            UserError: As `claim`; or if `resume=` is not a checkpoint or is damaged, or the main rank showed no sign
                of life for two minutes.
            OSError: If a checkpoint cannot be read now, which is not damage.
        """
        decision = self.path / "launch.json"
        if main:
            with name_write_errors(self.path, (OSError,)):
                decision.unlink(missing_ok=True)
            self.claim(config)
            checkpoint = self._choose_checkpoint(config)
            if checkpoint is not None and checkpoint.parent != self.checkpoints:
                self._record_changes(check_resume_checkpoint(checkpoint, config, typed=self.typed))
            content = {"launch": launch_id(main=True), "checkpoint": str(checkpoint or "")}
            atomic_write(decision, json.dumps(content).encode())
        else:
            self._wait_for_rank0(decision)
        chosen = json.loads(decision.read_text())["checkpoint"]
        return Path(chosen) if chosen else None

    def _wait_for_rank0(self, decision: Path) -> None:
        """Wait until rank 0 has decided; it reads large checkpoints for minutes, and writes its heartbeat meanwhile."""
        watch, since = FileWatch(), time.monotonic()
        while read_json_object(decision).get("launch") != launch_id(main=False):
            with suppress(FileNotFoundError):
                if watch.seconds_unchanged(self.lock.path) == 0.0:
                    since = time.monotonic()
            if time.monotonic() - since > RANK0_TIMEOUT_S:
                raise UserError(
                    f"rank 0 showed no sign of life in {self.path} for two minutes", "read its own message"
                )
            time.sleep(0.2)

    def finished(self, steps: int) -> bool:
        """Return whether the run has its model and needs no further step."""
        return is_finished(FolderStore(self.path), steps, result=self.model.relative_to(self.path).as_posix())

    def finish(self, steps: int) -> None:
        """Record that the model after `steps` steps is complete; from now on the checkpoints may be deleted."""
        atomic_write(self.path / "finished.json", json.dumps({"steps": steps}).encode())

    def read_best(self) -> dict[str, Any]:
        """Read best.json; {} if there is none.

        Returns:
            "step", "metric" and its "value", "images", "protocol", "judged", and the "weights" that were scored, "last"
            or "average"; files of older versions lack "weights".
        """
        best = read_json_object(self.best_json) if self.best.is_file() else {}
        return best if {"step", "metric", "value", "images", "protocol", "judged"} <= best.keys() else {}

    def delete_best(self) -> None:
        """Delete best.json and best.safetensors, for a run that starts from step 0."""
        for path in (self.best_json, self.best):
            path.unlink(missing_ok=True)

    def describe_best(self) -> str:
        """Return the path, step and metric of the best model as the end of a message; "" if there is none."""
        best = self.read_best()
        if not best:
            return ""
        value = f"{best['metric']} {best['value']:.4g}"
        value += " with averaged weights" if best.get("weights") == "average" else ""
        return f"; best on {best['images']}: {self.best} (step {best['step']}, {value})"

    def claim(self, config: RunConfig, *, exclusive: bool = True) -> None:
        """Lock the folder, compare its config.yaml with `config`, and write the new config.yaml.

        Args:
            config: The resolved config. overwrite=true first renames an existing folder to NAME.1, .2 …; it is
                ignored after a requeue.
            exclusive: Reject a second process and the config of another run. False for labeling, which any number of
                processes may do; its label sets check their settings themselves.

        Raises:
            UserError: If another process writes to the folder; if the saved config is another run's; or if the run
                was trained before, none of its checkpoints can be used, and `resume` names no other.
        """
        with name_write_errors(self.path, (OSError,)):
            self.path.mkdir(parents=True, exist_ok=True)
            if exclusive:
                self.lock.acquire()
        if exclusive:
            if config.overwrite and self.config.is_file() and not is_requeued():
                self._rename_existing()
                self.lock = self._new_lock()
                self.lock.acquire()
            self.compare(config)
            if config.resume is None and not self.finished(config.steps):
                self._check_progress_not_lost()
        for folder in (self.path, self.checkpoints, self.pictures):
            remove_stale(folder, exclusive=exclusive)
        text = yaml.safe_dump(redact_nested(config.as_dict()), sort_keys=False)
        atomic_write(self.config, text.encode())

    def _rename_existing(self) -> None:
        number = 1
        while (old := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        os.rename(self.path, old)
        self.lock.release()

    def compare(self, config: RunConfig, *, note: bool = True) -> list[str]:
        """Compare a config with the one of the run, if the run has trained any step.

        Args:
            config: The resolved config.
            note: Print what is changed on purpose and add it to changes.txt.

        Returns:
            A line for each value that is changed on purpose.

        Raises:
            UserError: If it is another run's.
        """
        newest = self.newest_checkpoint()
        if not self.config.is_file() or not (self.model.is_file() or any(self._all_checkpoints())):
            return []
        old, new = read_config_or_empty(self.config), FlatConfig.from_run(config)
        if not old.values:
            facts = read_checkpoint_facts(newest)[1] if newest is not None else {}
            old = FlatConfig({**facts, "steps": config.steps})
            new = new.only([*old.values, "resume_with"])
        step, finished = step_from_name(newest), self.finished(config.steps)
        changes = check_same_run(self.path, old, new, step=step, finished=finished, typed=self.typed)
        if note:
            self._record_changes(changes)
        return changes

    def _record_changes(self, changes: list[str]) -> None:
        """Print what changes from here on, and add it to changes.txt: config.yaml holds only the new values."""
        file = self.path / "changes.txt"
        known = file.read_text().splitlines() if file.is_file() else []
        new = [line for line in changes if line not in known]
        if new:
            atomic_write(file, ("\n".join([*known, *new]) + "\n").encode())
        for line in changes:
            print(f"continuing from {line}")

    def newest_checkpoint(self) -> Path | None:
        """Return the newest checkpoint that is complete and undamaged, or None."""
        return next((path for path in self._all_checkpoints() if not find_checkpoint_problem(path)), None)

    def _all_checkpoints(self) -> list[Path]:
        return sorted(self.checkpoints.glob("step-*.ckpt"), reverse=True)

    def _choose_checkpoint(self, config: RunConfig) -> Path | None:
        """Choose where the run continues, and rename damaged checkpoints, so that they are not counted as kept."""
        if self.finished(config.steps):
            return None
        checkpoint, given = self.newest_checkpoint(), config.resume
        if checkpoint is None and given is not None:
            checkpoint = local_path(given)
            if problem := find_checkpoint_problem(checkpoint):
                raise UserError(
                    f"resume={given} {problem}",
                    "type resume=RUN_FOLDER/checkpoints/step-….ckpt of an undamaged one",
                )
        for path in self._all_checkpoints():
            if path == checkpoint:
                break
            renamed = path.with_name(f"{path.name}.damaged")
            print(
                f"{path} {find_checkpoint_problem(path)}: renamed to {renamed.name}; continuing from {checkpoint}",
                file=sys.stderr,
            )
            os.replace(path, renamed)
        return checkpoint

    def _check_progress_not_lost(self) -> None:
        """Reject a start from step 0 if the run was trained before.

        A run that was killed before its first checkpoint has nothing to lose and may start again.

        Raises:
            UserError: Naming the file that shows the progress, and what to type.
        """
        if self.newest_checkpoint() is not None:
            return
        evidence, last = "", self._last_logged_step()
        saved = read_json_object(self.saved).get("step")
        if saved is not None:
            evidence = f"{self.saved.name} says that step {saved} was saved"
        if not evidence and last > self._checkpoint_interval():
            evidence = f"{self.metrics.name} goes to step {last}"
        if not evidence and (self.path / "finished.json").is_file():
            evidence = "finished.json says that it was finished"
        damaged = self._all_checkpoints()
        if damaged:
            others = "" if len(damaged) == 1 else ", and so are the others"
            evidence = f"{damaged[0]} {find_checkpoint_problem(damaged[0])}{others}"
        if evidence:
            missing = "" if damaged else f" and there is no checkpoint in {self.checkpoints}"
            raise UserError(
                f"{self.path} was trained before: {evidence}{missing}",
                "type resume=CHECKPOINT for a copy of one, overwrite=true to rename the folder and start from step 0, "
                "or name=ANOTHER_NAME for a new run",
            )
        if last:
            print(
                f"{self.path} starts again: it ended after step {last}, before its first checkpoint",
                file=sys.stderr,
            )

    def _last_logged_step(self) -> int:
        try:
            return max((int(row["step"]) for row in read_metrics(self.metrics).rows), default=0)
        except OSError:
            return 0

    def _checkpoint_interval(self) -> int:
        """Return the steps between checkpoints in the saved config; 0 if it has none."""
        try:
            return int(read_config(self.config)["checkpoint"]["every"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0


def is_finished(store: Store, steps: int, *, result: str = "model.safetensors") -> bool:
    """Return whether a run, in a folder or in an object store, has its model and needs no further step."""
    try:
        finished = parse_json_object(store.read("finished.json"))
    except FileNotFoundError:
        return False
    return bool(finished.get("steps", -1) >= steps) and store.exists(result)


def step_from_name(checkpoint: Path | None) -> int:
    """Parse the optimizer step from the name of a checkpoint; 0 for None and for other names."""
    number = checkpoint.stem.removeprefix("step-") if checkpoint is not None else ""
    return int(number) if number.isdecimal() else 0


def find_checkpoint_problem(path: Path) -> str:
    """Return why a run cannot continue from a file, as the end of a message; "" if it can.

    Raises:
        OSError: If the file exists and cannot be read now.
    """
    sharded = is_sharded(path)
    if not sharded and not path.is_file():
        return "is not a checkpoint of a run" if path.exists() else "does not exist"
    if damage := find_sharded_damage(path) if sharded else find_damage(path):
        return f"is damaged ({damage})"
    try:
        keys = load_checkpoint(path, tensors=False).keys()
    except Exception:  # torch raises many types for files that are not checkpoints
        return "is not a checkpoint of a run, or is truncated"
    return "" if {"global_step", "loops", "state_dict"} <= keys else "is not a checkpoint of a run"


def launch_id(*, main: bool) -> str:
    """Return an id of this start of the job, equal on all its ranks: of Slurm, torchrun, or the parent process."""
    torchrun = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT")
    for keys in (torchrun, ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")):
        if keys[0] in os.environ:
            return ":".join(os.environ.get(key, "0") for key in keys)
    return str(os.getpid() if main else os.getppid())


def is_requeued() -> bool:
    """Return whether a cluster has started this job again."""
    counts = (os.environ.get(key, "0") for key in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
    return any(int(count) > 0 for count in counts)


def slurm_start() -> JobStart:
    """Return the start of this Slurm job; outside Slurm one that no other follows."""
    return JobStart(slurm_job() or "", int(os.environ.get("SLURM_RESTART_COUNT", "0")))
