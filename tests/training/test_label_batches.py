"""stage=pseudolabel in one process: leases, batches, and continuing."""

import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from made_labels import (
    as_file,
    batches_of,
    dead_pid,
    files_of,
    label,
    make_data,
    make_teacher,
    write_images,
    write_lease,
)

from depth_anything import load_model
from depth_anything.data.shards import verify_set
from depth_anything.progress import ProgressLine
from depth_anything.training import pseudolabel
from depth_anything.training.lease import Lease, shard_lease
from depth_anything.training.pseudolabel import (
    PseudoLabel,
    ShardBatches,
)


def test_a_lease_is_held_by_one_process_until_released(tmp_path: Path) -> None:
    path = tmp_path / "labels" / ".0.lease"
    first, second = Lease(path, pid=os.getpid()), Lease(path, pid=os.getppid())
    assert first.acquire() and not second.acquire() and not first.acquire()
    assert json.loads(path.read_text()) == {"host": socket.gethostname(), "pid": os.getpid()}
    first.release()
    first.release()
    assert second.acquire() and json.loads(path.read_text())["pid"] == os.getppid()


# --- Batches --------------------------


def test_a_shard_is_split_into_batches_of_one_shape_in_a_fixed_order(tmp_path: Path) -> None:
    write_images(tmp_path / "photos", counts=(8, 1))
    data = make_data(tmp_path, make_teacher())
    split = list(batches_of(data).iter_shard("photos", "0"))
    assert [batch.indices for batch in split] == [[0, 1], [3, 4], [2, 5], [6, 7], []]
    assert [tuple(batch.image.shape) for batch in split[:-1]] == [
        (2, 28, width, 3) for width in (42, 42, 56, 42)
    ]
    assert all((batch.set, batch.shard, batch.records) == ("photos", "0", 8) for batch in split)
    again = list(batches_of(data, rank=3, world=5).iter_shard("photos", "0"))
    assert all(torch.equal(one.image, other.image) for one, other in zip(split, again, strict=True))
    single = list(batches_of(data).iter_shard("photos", "1"))
    assert [batch.indices for batch in single] == [[0], []]  # the last batch of a shape may be short


def test_waiting_images_of_many_shapes_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When more than MAX_WAITING_BATCHES batches would wait, the shape with most images is yielded."""
    monkeypatch.setattr(pseudolabel, "MAX_WAITING_BATCHES", 1)
    write_images(tmp_path / "photos", counts=(8,), wide=2)
    data = make_data(tmp_path, make_teacher())
    split = list(batches_of(data, batch_size=3).iter_shard("photos", "0"))
    assert [batch.indices for batch in split] == [[0, 2], [1, 3, 5], [4, 6], [7], []]


def test_unreadable_records_are_listed_in_the_last_batch(tmp_path: Path) -> None:
    write_images(tmp_path / "photos", broken=(1, 4))
    last = list(batches_of(make_data(tmp_path, make_teacher())).iter_shard("photos", "0"))[-1]
    assert [index for index, _ in last.failed] == [1, 4] and all(reason for _, reason in last.failed)


def shards_of(batches: ShardBatches) -> Iterator[str]:
    """Yield the shards in order, and publish each as the main process would."""
    for batch in batches:
        if batch.records and not batch.indices:
            labels = batches.labels["photos"]
            labels.publish(batch.shard, {}, [(i, "a test") for i in range(batch.records)])
            shard_lease(labels, batch.shard, pid=os.getpid()).release()
            yield batch.shard


def test_ranks_begin_at_different_shards_and_each_shard_is_taken_once(tmp_path: Path) -> None:
    write_images(tmp_path / "photos", counts=(1,) * 6)
    ranks = [
        shards_of(batches_of(make_data(tmp_path, make_teacher()), rank=rank, world=2)) for rank in (0, 1)
    ]
    taken = [next(ranks[0]), next(ranks[1])]
    assert taken == ["0", "1"]
    for rank in ranks:
        taken += list(rank)
    assert sorted(taken) == ["0", "1", "2", "3", "4", "5"]


def test_a_process_waits_for_leased_shards_and_takes_over_from_a_dead_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "photos", counts=(1, 1))
    data = make_data(tmp_path, make_teacher())
    labels = data.labels["photos"]
    (tmp_path / "labels/photos").mkdir(parents=True)
    write_lease(Path(labels.root, ".0.lease"), pid=os.getppid())
    sleeps: list[float] = []

    def sleep(seconds: float) -> None:
        sleeps.append(seconds)
        if len(sleeps) == 2:  # its holder dies
            write_lease(Path(labels.root, ".0.lease"), pid=dead_pid())

    monkeypatch.setattr(time, "sleep", sleep)
    taken = list(shards_of(batches_of(data)))
    assert taken == ["1", "0"] and len(sleeps) == 2


# --- Resuming --------------------------


def test_killed_labeling_continues_to_the_same_bytes(tmp_path: Path) -> None:
    """One shard is finished, one is leased by a dead process with a temporary file, one is not begun."""
    write_images(tmp_path / "photos", counts=(5, 3, 4), broken=(2,))
    teacher = make_teacher("metric80")
    label(make_data(tmp_path, teacher, labels="unbroken", codec="q12"), teacher)
    data = make_data(tmp_path, teacher, codec="q12")
    module = PseudoLabel(teacher, data)
    module._bar = ProgressLine("labeling", enabled=False)
    batches = batches_of(data)
    with torch.no_grad():
        for batch in [*batches.iter_shard("photos", "0"), next(batches.iter_shard("photos", "1"))]:
            module.predict_step(batch, 0)  # killed here
    root = tmp_path / "labels/photos"
    for shard in "01":  # a process may die between the labels of a shard and its lease
        write_lease(root / f".{shard}.lease", pid=dead_pid())
    (root / ".tmp.left").write_bytes(b"half a shard")
    done = (root / "0.tar").stat().st_mtime_ns
    assert "11 labels of photos" in label(make_data(tmp_path, teacher, codec="q12"), teacher)
    assert (root / "0.tar").stat().st_mtime_ns == done
    unbroken = files_of(tmp_path / "unbroken/photos")
    assert {name: data for name, data in files_of(root).items() if name in unbroken} == unbroken
    assert verify_set(str(root), decode=True) == [] and not list(root.glob(".*.lease"))


def test_a_finished_set_is_not_labelled_again(tmp_path: Path) -> None:
    write_images(tmp_path / "photos")
    teacher = make_teacher()
    label(make_data(tmp_path, teacher), teacher)
    before = files_of(tmp_path / "labels/photos")
    assert label(make_data(tmp_path, load_model(as_file(teacher, tmp_path))), teacher)
    assert files_of(tmp_path / "labels/photos") == before
