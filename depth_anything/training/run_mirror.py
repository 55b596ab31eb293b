"""Keep a run in an object store: it works in a local folder, whose files are uploaded behind it.

The order makes the store a folder from which the run can continue at any moment: metrics and other files first, then
checkpoints up to the one that saved.json names as complete, then saved.json, and finished.json after everything else.
"""

import json
import os
import re
import secrets
import shutil
import signal
import sys
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from depth_anything.data.object_lease import LeaseHolder, ObjectLease, is_alive_here
from depth_anything.data.store import ObjectInfo, ObjectStore
from depth_anything.disk import atomic_write, parse_json_object, read_json_object
from depth_anything.errors import SAME_COMMAND, UserError, error_reason
from depth_anything.locks import LockHeldError
from depth_anything.training.run_dir import find_checkpoint_problem, slurm_start, step_from_name

LOCK_STALE_S = 60.0
LOCK_FILE, SESSION_FILE = "lock.json", "mirror.json"

_NOT_MIRRORED = (LOCK_FILE, SESSION_FILE, "launch.json")
_WRITTEN_LAST = ("saved.json", "finished.json", "best.safetensors", "best.json")
_PROGRESS = ("metrics.csv", "best.safetensors", "best.json")
_SMALL_BYTES = 32 << 20  # files that may grow while they are uploaded are copied to memory first
_CHECKPOINTS = "checkpoints/"
_FIRST_RETRY_S = 5.0


@dataclass(frozen=True)
class MirrorOptions:
    """How a run is mirrored.

    Attributes:
        every: Seconds between two looks for new files.
        patience: Seconds for which uploads may fail before the run stops.
        keep: How many of the newest checkpoints the store keeps.
        keep_every: Steps; checkpoints of its multiples are kept for good.
    """

    every: float
    patience: float
    keep: int
    keep_every: int | None = None


class RunMirror:
    """Mirrors one local run folder to an object store; used by the main rank only."""

    def __init__(self, folder: Path, store: ObjectStore, options: MirrorOptions) -> None:
        """Name both places; nothing is read or written."""
        self.folder, self.store, self.options = folder, store, options
        self._lease = ObjectLease(store, LOCK_FILE, stale_s=LOCK_STALE_S, start=slurm_start())
        self._uploaded: dict[str, tuple[int, int]] = {}  # name → time and size of the file that was uploaded
        self._remote: dict[str, ObjectInfo] = {}
        self._stop, self._wake, self._closed = threading.Event(), threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []
        self._problem = ""
        self._reported = False

    # start

    def open(self, *, overwrite: bool = False) -> None:
        """Lock the run in the store, bring the local folder up to date, and begin to upload.

        Args:
            overwrite: The user has typed overwrite=true.

        Raises:
            LockHeldError: Another process works on the run.
            UserError: The local folder holds another run; or `overwrite` would replace one.
            StorageUnavailable: The store does not answer.
        """
        self._lock()
        try:
            self._remote = self.store.list()
            if overwrite and "config.yaml" in self._remote:
                raise UserError(
                    f"{self.store.root} holds a run, and overwrite=true renames only local folders",
                    f"type name=ANOTHER_NAME, or remove it with  {self.store.remove_command}",
                )
            self._update_folder()
            self._begin_session()
        except BaseException:
            self._lease.release()
            raise
        for target in (self._run_heartbeat, self._run_uploads):
            self._threads.append(threading.Thread(target=target, daemon=True))
            self._threads[-1].start()

    def _lock(self) -> None:
        before, deadline = self._lease.read(), time.monotonic() + 2 * LOCK_STALE_S
        waiting = False
        while not self._lease.acquire():
            holder, now = self._lease.holder(), self._lease.read()
            changed = now is not None and before is not None and now != before
            if holder is not None and (is_alive_here(holder) or changed or time.monotonic() > deadline):
                if self._lease.start.follows(holder.start):
                    return self._take_over(holder)
                raise self._held_error(holder)
            if not waiting and holder is not None:
                waiting = True
                print(
                    f"waiting {LOCK_STALE_S:.0f} s to see whether process {holder.pid} on {holder.host} still writes "
                    f"to {self.store.root}",
                    file=sys.stderr,
                )
            time.sleep(LOCK_STALE_S / 30)

    def _take_over(self, holder: LeaseHolder) -> None:
        """Take the lock from an earlier start of this job, on a node that Slurm has lost, and wait until it notices.

        It then uploads nothing more, and stops (`_run_heartbeat`).
        """
        print(
            f"{self.store.root} is written by an earlier start of job {holder.start.job}, process {holder.pid} on "
            f"{holder.host}, which is stopped",
            file=sys.stderr,
        )
        held = False
        while not held:  # a renewal at the same moment may replace the lock
            self._lease.take_over()
            time.sleep(LOCK_STALE_S / 2)
            held = self._lease.renew(force=True)

    def _held_error(self, holder: LeaseHolder) -> LockHeldError:
        return LockHeldError(
            f"{self.store.root} is being written by process {holder.pid} on {holder.host}",
            "wait for it, stop it, or type name=ANOTHER_NAME",
        )

    def _update_folder(self) -> None:
        """Fetch the run unless the local folder continues what the store has."""
        ours = read_json_object(self.folder / SESSION_FILE)
        session = self._remote_session()
        local = (self.folder / "config.yaml").exists() or (self.folder / "checkpoints").is_dir()
        if session is None and not ours:
            return  # a new run, or a local run that is uploaded from now on
        if session is not None and session in (ours.get("session"), ours.get("previous")):
            return
        if local and not ours:
            raise UserError(
                f"{self.folder} holds a run that is not the one in {self.store.root}",
                "type mirror.folder=FOLDER for another local folder, or name=ANOTHER_NAME",
            )
        if self.folder.exists():
            print(f"{self.folder} is out of date: removed", file=sys.stderr)
            shutil.rmtree(self.folder)
        self._fetch()

    def _remote_session(self) -> str | None:
        if SESSION_FILE not in self._remote:
            return None
        try:
            return str(json.loads(self.store.read(SESSION_FILE))["session"])
        except (ValueError, KeyError, TypeError):
            return ""

    def _fetch(self) -> None:
        """Download the files of the run and its newest undamaged checkpoint."""
        names = [name for name in self._remote if name not in _NOT_MIRRORED and not name.startswith(".")]
        if not names:
            return
        print(f"fetching the run from {self.store.root} to {self.folder}", file=sys.stderr)
        atomic_write_new_folder(self.folder / SESSION_FILE, {"session": "incomplete"})
        checkpoints = sorted({_checkpoint_of(name) for name in names} - {""}, reverse=True)
        if not checkpoints and "finished.json" not in names:
            print("it has no checkpoint there, and starts again", file=sys.stderr)
            names = [
                name for name in names if name not in _PROGRESS
            ]  # they would show that something is missing
        for name in names:
            if not name.startswith(_CHECKPOINTS):
                self._download(name)
        saved = read_json_object(self.folder / "saved.json").get("step", -1)
        for name in checkpoints:
            if name not in self._remote and step_from_name(Path(name)) > saved:
                continue  # a folder of files that are not all there
            for file in checkpoint_files(self._remote, name):
                self._download(file)
            problem = find_checkpoint_problem(self.folder / name)
            if not problem:
                return
            print(f"{self.store.address(name)} {problem}: an older one is used", file=sys.stderr)
            for file in checkpoint_files(self._remote, name):
                (self.folder / file).unlink()
                self._uploaded.pop(file)

    def _download(self, name: str) -> None:
        path = self.folder / name
        self.store.download(name, path)
        self._uploaded[name] = _state(path)

    def _begin_session(self) -> None:
        """Mark folder and store as one; a folder with an older mark is of a start that another one has followed."""
        session, previous = secrets.token_hex(8), self._remote_session()
        atomic_write_new_folder(self.folder / SESSION_FILE, {"session": session, "previous": previous})
        self.store.write(SESSION_FILE, json.dumps({"session": session}).encode())

    # uploading

    def wake(self) -> None:
        """Upload now instead of at the next interval, as after a checkpoint."""
        self._wake.set()

    def _run_heartbeat(self) -> None:
        while not self._closed.wait(LOCK_STALE_S / 4):
            try:
                held = self._lease.renew(force=True)
            except Exception:  # the store does not answer; the uploads report it
                continue
            if not held:
                self._give_up("another process has taken over the run")
                return

    def _run_uploads(self) -> None:
        since = time.monotonic()
        while not self._stop.is_set():
            self._wake.wait(self.options.every)
            self._wake.clear()
            if self._stop.is_set() or self._problem:
                return
            try:
                self.sync()
                since = time.monotonic()
            except Exception as error:
                self._report(error)
                if time.monotonic() - since > self.options.patience:
                    self._give_up(f"uploads have failed for {time.monotonic() - since:.0f} s")

    def _report(self, error: Exception) -> None:
        if not self._reported:
            self._reported = True
            print(
                f"{self.store.root} cannot be written ({error_reason(error)}); the run continues in {self.folder}, and "
                "uploads are tried again",
                file=sys.stderr,
            )

    def _give_up(self, problem: str) -> None:
        """Stop the run at the next step as a signal does, after a checkpoint in the local folder."""
        if not self._problem:
            self._problem = problem
            print(f"{self.store.root}: {problem}; the run is stopped", file=sys.stderr)
            os.kill(os.getpid(), signal.SIGTERM)

    def sync(self) -> None:
        """Upload what is new, in the order of the module's docstring.

        Raises:
            StorageUnavailable: The store does not answer.
            ShardError: It refuses.
        """
        marks = {name: _read(self.folder / name) for name in ("saved.json", "finished.json")}
        files = self._local_files()
        for name in sorted(files):
            if name not in _WRITTEN_LAST:
                self._put(name)
        self._put_best()
        saved = parse_json_object(marks["saved.json"]).get("step", -1)
        for path in sorted((self.folder / _CHECKPOINTS).glob("step-*.ckpt"), reverse=True):
            if step_from_name(path) <= saved:
                for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                    if file.is_file():
                        self._put(file.relative_to(self.folder).as_posix())
        for name, data in marks.items():
            if data is not None:
                self._put_data(name, data)
        self._delete_vanished(files)
        self._delete_old_checkpoints()
        if self._reported:
            self._reported = False
            print(f"{self.store.root} is up to date again", file=sys.stderr)

    def _local_files(self) -> set[str]:
        names = set()
        for parent, folders, files in os.walk(self.folder):
            folders[:] = [each for each in folders if not each.startswith(".")]
            for file in files:
                path = Path(parent, file)
                name = path.relative_to(self.folder).as_posix()
                hidden = file.startswith(".") or file.endswith(".damaged") or path.is_symlink()
                if not hidden and not name.startswith(_CHECKPOINTS) and name not in _NOT_MIRRORED:
                    names.add(name)
        return names

    def _put(self, name: str) -> None:
        """Upload a file if it has changed; one that is gone meanwhile is left out."""
        path = self.folder / name
        try:
            state = _state(path)
            if self._uploaded.get(name) == state:
                return
            known = self._remote.get(name)
            if name not in self._uploaded and known is not None and known.size == state[1]:
                if self.store.holds(name, path):
                    self._uploaded[name] = state
                    return
            self._check_held()
            if state[1] <= _SMALL_BYTES:
                self.store.write(name, path.read_bytes())
            else:
                self.store.upload(path, name)
        except FileNotFoundError:
            return
        self._uploaded[name] = state

    def _put_data(self, name: str, data: bytes) -> None:
        state = (hash(data), len(data))
        if self._uploaded.get(name) != state:
            self._check_held()
            self.store.write(name, data)
            self._uploaded[name] = state

    def _put_best(self) -> None:
        """Upload the best model between deleting and writing best.json, which then never describes other weights."""
        for _ in range(3):
            note, path = _read(self.folder / "best.json"), self.folder / "best.safetensors"
            if path.is_file() and self._uploaded.get(path.name) != _state(path):
                self.store.delete("best.json")
                self._uploaded.pop("best.json", None)
                self._put(path.name)
            if note is None:
                return
            if note == _read(self.folder / "best.json") and path.is_file():
                self._put_data("best.json", note)
                return

    def _check_held(self) -> None:
        if self._problem:
            raise UserError(f"{self.store.root}: {self._problem}")

    def _delete_vanished(self, files: set[str]) -> None:
        for name in [name for name in self._uploaded if not name.startswith(_CHECKPOINTS)]:
            if name not in files and not (self.folder / name).exists():
                self.store.delete(name)
                del self._uploaded[name]

    def _delete_old_checkpoints(self) -> None:
        files, every = {*self._remote, *self._uploaded}, self.options.keep_every
        present = sorted({_checkpoint_of(name) for name in files} - {""}, reverse=True)
        for name in present[self.options.keep :]:
            for file in checkpoint_files(files, name):
                if not every or step_from_name(Path(name)) % every:
                    self.store.delete(file)
                    self._remote.pop(file, None)
                    self._uploaded.pop(file, None)

    # end

    def close(self, *, complete: bool) -> None:
        """Upload the rest, stop uploading and release the lock.

        Args:
            complete: The run has ended as it should: upload until everything is there. Otherwise try once.

        Raises:
            UserError: The run has ended as it should, and the store does not have all of it.
        """
        self._stop.set()
        self._wake.set()
        for thread in self._threads[1:]:
            thread.join()
        try:
            error = self._upload_rest(self.options.patience if complete else 0.0)
        finally:
            self._closed.set()
            self._threads[0].join()
            if not self._problem.startswith("another"):
                self._release()
        if error and complete:
            raise UserError(
                f"the run is complete in {self.folder}, but not in {self.store.root} ({error})",
                [SAME_COMMAND, " on this machine to upload the rest"],
            )
        if error:
            print(f"{self.store.root} lacks the newest files of {self.folder} ({error})", file=sys.stderr)

    def _upload_rest(self, patience_s: float) -> str:
        """Upload until everything is there; return why it is not."""
        deadline, wait = time.monotonic() + patience_s, _FIRST_RETRY_S
        while True:
            if self._problem.startswith("another"):
                return self._problem
            self._problem = ""
            try:
                self.sync()
                return ""
            except Exception as error:
                if time.monotonic() + wait > deadline:
                    return error_reason(error)
                self._report(error)
            time.sleep(wait)
            wait = min(2 * wait, 60.0)

    def _release(self) -> None:
        try:
            self._lease.release()
        except Exception as error:
            print(f"{self.store.root}: the lock is not released ({error_reason(error)})", file=sys.stderr)


def atomic_write_new_folder(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically into a folder that may not exist yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(content).encode())


def _checkpoint_of(name: str) -> str:
    """Return the checkpoint that a file belongs to, a file or a folder; "" if it is no part of one."""
    match = re.match(rf"{_CHECKPOINTS}step-\d+\.ckpt(?=/|$)", name)
    return match[0] if match else ""


def checkpoint_files(names: Collection[str], checkpoint: str) -> list[str]:
    """Return the names of the files of a checkpoint, which is a file or a folder."""
    return sorted(name for name in names if _checkpoint_of(name) == checkpoint)


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
