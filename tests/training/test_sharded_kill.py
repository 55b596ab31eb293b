"""SIGKILL of one rank and of all ranks while trainer=fsdp writes a checkpoint: the run continues, with equal bytes."""

import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from fork_server import ForkServer
from made_configs import make_config
from saved_runs import AtStep
from sharded_runs import STEPS, assert_same_files, connect, step_path, train

from depth_anything import disk
from depth_anything.training import sharded_writer
from depth_anything.training.fsdp import ShardedStrategy
from depth_anything.training.run_dir import RunDir

pytestmark = [pytest.mark.heavy, pytest.mark.usefixtures("one_thread")]
EVERY, KEEP = 2, 1
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Kill:
    """Where the second save, of step 4, is interrupted.

    Attributes:
        place: "shard": rank 1 has written half of its shard. Rank 0 has written all files but not renamed the folder
            ("unnamed"), has renamed it ("named"), or has begun to delete the older one ("deleting").
        killed: Which ranks are killed there.
        step: Of the checkpoint from which the run continues.
        asynchronous: The write goes on in the background, and the kill is after the next step.
    """

    place: str
    killed: Sequence[int]
    step: int
    asynchronous: bool = False

    @property
    def name(self) -> str:
        how = "background" if self.asynchronous else "foreground"
        return "-".join([self.place, how, *map(str, self.killed)])


KILLS = [
    Kill("shard", [0, 1], 2),
    Kill("shard", [1], 2),
    Kill("shard", [0, 1], 2, asynchronous=True),
    Kill("shard", [1], 2, asynchronous=True),
    Kill("unnamed", [0], 2),
    Kill("named", [0, 1], 4),
    Kill("deleting", [0, 1], 4),
]


def pause(folder: Path) -> None:
    """Tell the test that this rank is where it is to be killed, and wait for that."""
    (folder / "reached").write_text("here")
    threading.Event().wait()


def nothing(*_: Any) -> None:
    pass


def at_second_call(
    module: Any, name: str, *, before: Callable[..., None] = nothing, after: Callable[..., None] = nothing
) -> None:
    """Replace a function of a module by one that calls `before` and `after` around its second call."""
    original, calls = getattr(module, name), []

    def replacement(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) != 2:
            return original(*arguments)
        before(*arguments)
        result = original(*arguments)
        after(*arguments)
        return result

    setattr(module, name, replacement)


def _interrupted(rank: int, folder: str, name: str) -> None:
    """Train until the test kills ranks of this run."""
    kill, root = next(kill for kill in KILLS if kill.name == name), Path(folder)
    later = threading.Event()

    def reach(*_: Any) -> None:
        assert not kill.asynchronous or later.wait(TIMEOUT_S)
        pause(root)

    def cut_shard(pieces: Any, temporary: Path, *_: Any) -> None:
        (shard,) = temporary.glob("shard-00002-*")
        os.truncate(shard, shard.stat().st_size // 2)
        reach()

    def remove_half(path: Path) -> None:
        if path.is_dir():
            next(path.glob("shard-*")).unlink()
            reach()

    if rank == 1 and kill.place == "shard":
        at_second_call(sharded_writer, "write_shard", after=cut_shard)
    if rank == 0 and kill.place == "unnamed":
        at_second_call(sharded_writer, "publish_folder", before=reach)
    if rank == 0 and kill.place == "named":
        at_second_call(sharded_writer, "publish_folder", after=reach)
    if rank == 0 and kill.place == "deleting":
        disk._remove = remove_half
    connect(rank, 2, root)
    own: dict[str, Any] = {"rank": rank, "ranks": 2, "every": EVERY, "keep": KEEP}
    train(root, ShardedStrategy(), AtStep(later.set, 5), asynchronous=kill.asynchronous, **own)


def interrupt(fork_server: ForkServer, kill: Kill, folder: Path) -> None:
    """Run two ranks until one reaches the place, kill, and wait until both have ended."""
    os.mkfifo(folder / "reached")
    reader = os.open(folder / "reached", os.O_RDONLY | os.O_NONBLOCK)
    code = "import runpy, sys; runpy.run_path(sys.argv[1])['_interrupted'](int(sys.argv[2]), *sys.argv[3:])"
    command = [sys.executable, "-c", code, __file__]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    errors = folder / "stderr"
    ranks = [
        fork_server.start([*command, str(rank), str(folder), kill.name], env=environment, stderr=errors)
        for rank in range(2)
    ]
    try:
        assert select.select([reader], [], [], TIMEOUT_S)[0], errors.read_text()
        for rank in kill.killed:
            os.kill(ranks[rank].pid, signal.SIGKILL)
        codes = [rank.wait(TIMEOUT_S) for rank in ranks]
    finally:
        os.close(reader)
        for process in ranks:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
    expected = [-signal.SIGKILL if rank in kill.killed else 1 for rank in range(2)]
    assert codes == expected, errors.read_text()


def _after(rank: int, folder: str) -> None:
    """An unbroken run, and all interrupted ones continued."""
    root = Path(folder)
    connect(rank, 2, root)
    own: dict[str, Any] = {"rank": rank, "ranks": 2, "every": EVERY}
    train(root / "unbroken", ShardedStrategy(), keep=STEPS, **own)
    for kill in KILLS:
        checkpoint = step_path(root / kill.name, kill.step)
        train(root / kill.name, ShardedStrategy(), checkpoint=checkpoint, keep=KEEP, **own)
    dist.destroy_process_group()


@dataclass(frozen=True)
class Outcome:
    """What the next start of a killed run finds.

    Attributes:
        temporary: Whether the folder of checkpoints had temporary files before.
        chosen: The checkpoint from which it continues.
        files: The names in the folder after.
    """

    temporary: bool
    chosen: Path | None
    files: list[str]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def outcomes(root: Path, fork_server: ForkServer) -> dict[str, Outcome]:
    """Kill every run, start it as train.py does, and then train it to its end."""
    config, found = make_config("stage=teacher", steps=30, checkpoint__every=EVERY), {}
    for kill in KILLS:
        folder = RunDir(root / kill.name)
        folder.claim(config)
        folder.lock.release()
        interrupt(fork_server, kill, folder.path)
        temporary = any(folder.checkpoints.glob(".*"))
        chosen = folder.begin(config, main=True)
        folder.lock.release()
        names = sorted(path.name for path in folder.checkpoints.iterdir())
        found[kill.name] = Outcome(temporary, chosen, names)
    fork_server.run_ranks(__file__, "_after", str(root), timeout=600)
    return found


@pytest.mark.parametrize("kill", KILLS, ids=lambda kill: kill.name)
def test_the_newest_complete_checkpoint_is_found_and_nothing_half_written_left(
    root: Path, outcomes: dict[str, Outcome], kill: Kill
) -> None:
    """A rank that survives removes the unfinished folder itself; else the next start does."""
    outcome, folder = outcomes[kill.name], root / kill.name
    steps = [2, 4] if kill.place == "named" else [kill.step]
    assert outcome.files == [step_path(folder, step).name for step in steps]
    assert outcome.chosen == step_path(folder, kill.step)
    assert outcome.temporary == (kill.place != "named" and 0 in kill.killed)


@pytest.mark.parametrize("kill", KILLS, ids=lambda kill: kill.name)
def test_the_continued_run_equals_the_unbroken_one_in_every_byte(
    root: Path, outcomes: dict[str, Outcome], kill: Kill
) -> None:
    assert [path.name for path in (root / kill.name / "checkpoints").iterdir()] == [
        step_path(root, STEPS).name
    ]
    assert_same_files(step_path(root / kill.name, STEPS), step_path(root / "unbroken", STEPS))
