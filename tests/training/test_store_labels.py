"""Labels in an object store: the same bytes as on a disk, each shard once, also when processes are killed."""

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from local_servers import FaultyServer
from made_labels import batches_of, dead_pid, files_of, label, make_data, make_teacher, write_images

from depth_anything.data.labels import open_labels
from depth_anything.data.shards import open_set, verify_set
from depth_anything.data.store import ObjectStore
from depth_anything.data.tars import ShardError
from depth_anything.errors import UserError
from depth_anything.progress import ProgressLine
from depth_anything.training import pseudolabel
from depth_anything.training.lease import shard_lease
from depth_anything.training.pseudolabel import PseudoLabel, ShardData
from depth_anything.training.work_share import choose_share

COUNTS = (3, 2, 2, 1)


TEACHER = make_teacher()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs, and labels of them on a disk."""
    root = tmp_path_factory.mktemp("labels")
    write_images(root / "photos", counts=COUNTS, broken=(1,))
    label(make_data(root, TEACHER, labels="local"), TEACHER)
    return root


@pytest.fixture
def place(s3_prefix: str) -> ObjectStore:
    return ObjectStore(f"{s3_prefix}/photos")


def data_of(root: Path, place: ObjectStore, **changes: Any) -> ShardData:
    return make_data(root, TEACHER, labels_at=place.root.rpartition("/")[0], **changes)


def objects(place: ObjectStore) -> dict[str, bytes]:
    return {name: place.read(name) for name in place.names()}


def label_once(data: ShardData) -> None:
    """Label what is free, in this process, as `label` does without its end."""
    module = PseudoLabel(TEACHER, data)
    module._bar = ProgressLine("labeling", enabled=False)
    with torch.no_grad():
        for number, batch in enumerate(batches_of(data, share=data.share)):
            module.predict_step(batch, number)
    module.on_predict_end()


def test_labels_have_the_bytes_of_a_disk(root: Path, place: ObjectStore, faulty_s3: FaultyServer) -> None:
    data = data_of(root, place)
    assert f"7 labels of photos in {place.root} (1 skipped)" in label(data, TEACHER)
    assert objects(place) == files_of(root / "local/photos")
    order = [path.rpartition("/")[2] for method, path in faulty_s3.writes if method == "PUT"]
    assert order.index("0.tar") < order.index("0.idx") < order.index("0.json") < order.index("manifest.json")
    images = open_set(root / "photos")
    assert verify_set(place.root, decode=True, images=root / "photos") == []
    assert open_labels(place.root, images).digest == open_labels(root / "local/photos", images).digest
    faulty_s3.writes.clear()
    again = data_of(root, place)
    assert again.finished() and not [path for _, path in faulty_s3.writes if ".probe" not in path]
    with pytest.raises(ShardError, match="labels of two teachers are not mixed"):
        make_data(root, make_teacher("metric80"), labels_at=place.root.rpartition("/")[0])


def test_many_shards_are_listed_and_few_are_asked_for(
    root: Path, place: ObjectStore, faulty_s3: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for most in (100, 3):
        monkeypatch.setattr(pseudolabel, "MAX_ASKED", most)
        batches = batches_of(data_of(root, place))
        faulty_s3.seen.clear()
        assert len(batches._unlabeled([("photos", name) for name in "0123"], {("photos", "2")})) == 3
        listed = [path for path, _ in faulty_s3.seen if "list-type" in path and ".json" not in path]
        assert (
            len(listed) == 0 if most == 100 else 1 <= len(listed) <= 2
        )  # s3fs asks twice if there is nothing


@pytest.mark.parametrize("lost", ["0.tar", "0.idx", "0.json"])
def test_a_process_that_dies_while_it_publishes_is_followed_by_another(
    root: Path, place: ObjectStore, faulty_s3: FaultyServer, lost: str
) -> None:
    """It dies before this object is there; its successor takes over its lease and makes the same bytes."""
    victim = data_of(root, place)
    labels = victim.labels["photos"]
    lease = shard_lease(labels, "0", pid=os.getppid())
    assert lease.acquire()
    for name in ("0.tar", "0.idx", "0.json"):
        if name == lost:
            break
        place.write(name, b"half of it" if name == "0.tar" else files_of(root / "local/photos")[name])
    lease.pid = dead_pid()
    place.write(".0.lease", json.dumps({**json.loads(place.read(".0.lease")), "pid": lease.pid}).encode())
    assert not labels.done("0")
    label(data_of(root, place), TEACHER)
    assert objects(place) == files_of(root / "local/photos")


def test_processes_at_the_same_time_label_each_shard_once(
    root: Path, place: ObjectStore, faulty_s3: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pseudolabel, "OBJECT_POLL_S", (0.01, 0.01))
    workers = [threading.Thread(target=label_once, args=(data_of(root, place),)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert objects(place) == files_of(root / "local/photos")
    tars = [path.rpartition("/")[2] for method, path in faulty_s3.writes if path.endswith(".tar")]
    assert sorted(tars) == ["0.tar", "1.tar", "2.tar", "3.tar"]


def test_shards_that_others_finish_meanwhile_are_not_labeled_again(
    root: Path, place: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leases of finished shards are free, and the listing of this process is older."""
    monkeypatch.setattr(pseudolabel, "OBJECT_POLL_S", (0.0, 0.0))
    module = PseudoLabel(TEACHER, data_of(root, place))
    module._bar = ProgressLine("labeling", enabled=False)
    taken = []
    with torch.no_grad():
        for number, batch in enumerate(batches_of(module._data[0])):
            if number == 0:
                for name, content in files_of(root / "local/photos").items():
                    if name[0] in "123":
                        place.write(name, content)
            module.predict_step(batch, number)
            taken += [batch.shard] if batch.records else []
    assert set(taken) == {"0"} and not place.names(".")


def test_a_process_that_slept_through_its_lease_does_not_publish(root: Path, place: ObjectStore) -> None:
    data = data_of(root, place)
    module = PseudoLabel(TEACHER, data)
    module._bar = ProgressLine("labeling", enabled=False)
    labels = data.labels["photos"]
    assert shard_lease(labels, "0", pid=os.getpid()).acquire()
    place.write(".0.lease", json.dumps({"host": "far", "pid": 7, "process": "far/b/n/7.1"}).encode())
    with torch.no_grad():
        for batch in batches_of(data).iter_shard("photos", "0"):
            module.predict_step(batch, 0)
    assert place.names() == {".0.lease"}


def test_a_shard_that_another_process_has_finished_is_left_alone(root: Path, place: ObjectStore) -> None:
    label(data_of(root, place), TEACHER)
    before = objects(place)
    labels = data_of(root, place).labels["photos"]
    labels.publish("1", {}, [(index, "other") for index in range(COUNTS[1])])
    assert objects(place) == before


def test_a_shard_that_does_not_match_its_note_is_labeled_again(
    root: Path, place: ObjectStore, capfd: pytest.CaptureFixture[str]
) -> None:
    label(data_of(root, place), TEACHER)
    place.delete("manifest.json")
    place.write("2.tar", b"another process's")
    with pytest.raises(UserError, match="not every shard has its labels"):
        data_of(root, place).summary()
    assert "2.json does not match the tar" in capfd.readouterr().err and "2.json" not in place.names()
    label(data_of(root, place), TEACHER)
    assert objects(place) == files_of(root / "local/photos")


def test_unfinished_labels_are_refused_or_used_in_part(root: Path, place: ObjectStore) -> None:
    images, local = open_set(root / "photos"), files_of(root / "local/photos")
    for name in ("0.tar", "0.idx", "0.json"):
        place.write(name, local[name])
    with pytest.raises(ShardError, match="1 of 4 shards are done"):
        open_labels(place.root, images)
    assert [shard.name for shard in open_labels(place.root, images, allow_partial=True).shards] == ["0"]


@pytest.fixture
def without_conditions(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ObjectStore, "conditional", property(lambda self: False))
    yield


def test_without_conditional_writes_work_is_divided_by_index(
    root: Path, place: ObjectStore, without_conditions: None, faulty_s3: FaultyServer
) -> None:
    first, second = (data_of(root, place, share=f"{k}/2") for k in (1, 2))
    label_once(second)
    assert {name for name in place.names() if name.endswith(".json")} == {"1.json", "3.json"}
    assert second.summary() == "share 2/2 is labeled; the last share to end finishes the sets"
    with pytest.raises(UserError, match="not every shard"):
        first.summary()
    label_once(first)
    assert "7 labels" in first.summary() and "7 labels" in second.summary()
    assert objects(place) == files_of(root / "local/photos")
    assert not [path for _, path in faulty_s3.writes if path.endswith(".lease")]


def test_the_share_is_typed_or_that_of_an_array(
    monkeypatch: pytest.MonkeyPatch, place: ObjectStore, without_conditions: None
) -> None:
    for variable, value in {"ID": "7", "MIN": "3", "STEP": "2", "COUNT": "4"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{variable}", value)
    assert str(choose_share(None, [place])) == "3/4" and not choose_share(None, [place]).leases
    monkeypatch.setenv("SLURM_ARRAY_TASK_MAX", "9")
    assert str(choose_share(None, [place])) == "3/4"
    monkeypatch.setenv("SLURM_ARRAY_TASK_MAX", "15")  # --array=3,5,7,15
    with pytest.raises(UserError, match="--array"):
        choose_share(None, [place])
    assert str(choose_share("2/3", [place])) == "2/3"
    assert choose_share("2/2", []).select("abcde") == ["b", "d"]
    assert str(choose_share(None, [])) == "1/1" and choose_share(None, []).leases
    for typed in ("0/2", "3/2", "2", "a/b"):
        with pytest.raises(UserError, match="share=3/8"):
            choose_share(typed, [])
