"""Batches in reused shared memory: batches in use are not overwritten, slots of deleted batches are reused."""

import gc
import itertools
import pickle
import sys

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from depth_anything.data.dataset import StreamDataset, return_batch
from depth_anything.data.loader import build_stream_loader
from depth_anything.data.reader import Records
from depth_anything.data.sample import Frame, encode_frame
from depth_anything.data.shards import write_manifest
from depth_anything.data.shared_batch import SharedBatch, SharedBatchPool, array_views, batch_layout
from depth_anything.data.stream import MicroBatchSampler
from depth_anything.data.tars import write_shard

SIDE, RECORDS = 28, 40


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    root = tmp_path_factory.mktemp("set")

    def record(i):
        rng = np.random.default_rng(i)
        image = cv2.resize(rng.integers(0, 256, (6, 6, 3), np.uint8), (56, 42))
        return f"a/0/{i}", encode_frame(Frame("", image, depth=rng.random((42, 56), np.float32)), codec="f32")

    info = write_shard(root / "0.tar", map(record, range(RECORDS)))
    return Records(write_manifest(root, name="a", shards=[info], meta={}))


def dataset(records, **options):
    return StreamDataset([records], seed=3, streams=4, image_size=SIDE, **options)


def same(batch, expected):
    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        assert batch[name] == value if name == "failed" else torch.equal(batch[name], value), name


@pytest.mark.parametrize(("workers", "pinned"), [(1, False), (2, False), (2, True)])
def test_batches_in_use_are_not_overwritten(records, workers, pinned, monkeypatch):
    pin = pinned and torch.cuda.is_available()
    data = dataset(records, perturb=True, cutmix=True)
    loader = build_stream_loader(data, micro_batch=3, workers=workers, start=2, pin_memory=pin)
    held = list(itertools.islice(loader, 24))  # many more than there are slots
    alone = dataset(records, perturb=True, cutmix=True)
    for q, batch in enumerate(held, 2):
        assert type(batch) is dict
        same(batch, alone.__getitems__(range(3 * q, 3 * q + 3)))


def test_slots_of_deleted_batches_are_reused(records):
    data = dataset(records)
    loader = iter(build_stream_loader(data, micro_batch=2, workers=1))
    starts, alone = set(), dataset(records)
    for q in range(30):
        batch = next(loader)
        same(batch, alone.__getitems__([2 * q, 2 * q + 1]))
        starts.add(batch["image"].data_ptr())
    assert len(starts) <= 4
    assert data.shared_batches._in_use.sum() <= 4
    del batch, loader


def test_slot_is_in_use_until_its_last_tensor_is_deleted():
    pool = SharedBatchPool(workers=2, slots=2, length=100)
    fields, length = batch_layout({"a": (np.float32, (3,)), "b": (np.uint8, (5,))})
    slot = pool.acquire(1, length)
    assert slot.number == 2
    array_views(slot.memory, fields)["a"][:] = [1, 2, 3]
    message = pickle.dumps(SharedBatch(slot, fields, {"failed": ["x"]}))
    assert len(message) < 500
    batch = pickle.loads(message)
    assert batch["a"].tolist() == [1, 2, 3] and batch["failed"] == ["x"]
    assert pool.acquire(1, length).number == 3 and pool.acquire(1, length) is None  # both are in use
    assert pool.acquire(0, length).number == 0  # the other worker has its own slots
    rest = batch["a"][1:].view(torch.int32)
    del batch
    gc.collect()
    assert pool.acquire(1, length) is None
    del rest
    gc.collect()
    assert pool.acquire(1, length).number == 2


def test_batches_that_do_not_fit_are_sent_by_pytorch(records):
    pool = SharedBatchPool(workers=1, slots=1, length=100)
    assert pool.acquire(0, pool.length + 1) is None
    assert pool.acquire(1, 1) is None  # the pool has no slots for this worker
    data = dataset(records)
    data.use_shared_memory(workers=1, micro_batch=1)
    data.shared_batches.length = 1
    batches = MicroBatchSampler(rank=0, world=1, size=2)
    loader = DataLoader(data, batch_sampler=batches, collate_fn=return_batch, num_workers=1)
    same(next(iter(loader)), dataset(records).__getitems__([0, 1]))


def test_pickled_dataset_has_no_shared_memory(records):
    data = dataset(records)
    data.use_shared_memory(workers=1, micro_batch=1)
    copy = pickle.loads(pickle.dumps(data))
    assert copy.shared_batches is None
    same(copy[5], data[5])
    data.use_shared_memory(workers=0, micro_batch=1)
    assert data.shared_batches is None


PROGRAM = """
import sys
from depth_anything.data.dataset import StreamDataset
from depth_anything.data.loader import build_stream_loader
from depth_anything.data.reader import Records
from depth_anything.data.shards import open_set
data = StreamDataset([Records(open_set(sys.argv[1]))], seed=0, streams=2, image_size=28)
batches = iter(build_stream_loader(data, micro_batch=2, workers=2))
first = next(batches)
print("read", flush=True)
raise SystemExit(3)
"""


def test_program_with_running_workers_exits(records, fork_server):
    """Workers ignore SIGTERM, and Python would wait for them forever."""
    command = [sys.executable, "-c", PROGRAM, records.set.root]
    done = fork_server.run(command)
    assert (done.returncode, done.stdout) == (3, "read\n"), done.stderr


def test_arrays_do_not_overlap():
    fields, length = batch_layout({"a": (np.uint8, (3, 5)), "b": (np.float32, (2, 2)), "c": (np.bool_, (7,))})
    memory = np.zeros(length, np.uint8)
    arrays = array_views(memory, fields)
    for number, array in enumerate(arrays.values(), 1):
        assert array.ctypes.data % array.dtype.itemsize == 0
        array[:] = number
    assert [array.sum() for array in arrays.values()] == [15, 8, 7]
