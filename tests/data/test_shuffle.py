"""The order compared with a perfect shuffle, and the memory of the loader over many samples."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from depth_anything.data import stream as stream_module
from depth_anything.data.sample import Frame, encode_frame
from depth_anything.data.shards import write_manifest
from depth_anything.data.tars import write_shard

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def script(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


shuffle, scale = script("shuffle"), script("bench_scale")


@pytest.mark.parametrize(("shards", "per_shard", "batch"), [(60, 200, 48), (200, 60, 16), (7, 500, 24)])
def test_order_is_close_to_a_perfect_shuffle(shards, per_shard, batch):
    found = shuffle.compare(shards=shards, per_shard=per_shard, batch=batch, passes=3, batches=0)
    ours, perfect = found["ours"], found["perfect"]
    assert ours["each_once"] and perfect["each_once"]
    assert ours["distinct_mean"] > 0.97 * perfect["distinct_mean"]
    assert ours["pairs_of_one_shard"] < 1.1 * perfect["pairs_of_one_shard"]
    assert abs(ours["moved_mean"] - 1 / 3) < 0.02 and abs(ours["correlation"]) < 0.06
    assert ours["met_again"] < 1.25 * perfect["met_again"]
    assert ours["neighbours_in_one_batch"] <= perfect["neighbours_in_one_batch"]


def test_measure_detects_unshuffled_streams(monkeypatch):
    """Without shuffled streams a batch reads neighboring parts of the line."""
    drawn = stream_module.permutation

    def permutation(length, seed, purpose, *place):
        still = purpose == stream_module._STREAMS
        return np.arange(length) if still else drawn(length, seed, purpose, *place)

    monkeypatch.setattr(stream_module, "permutation", permutation)
    found = shuffle.compare(shards=60, per_shard=200, batch=48, passes=2, batches=0)
    assert found["ours"]["distinct_mean"] < 0.5 * found["perfect"]["distinct_mean"]


def test_the_scripts_run(tmp_path, capsys):
    shuffle.main(["--small", "--json", str(tmp_path / "s.json"), "--picture", str(tmp_path / "s.png")])
    assert (
        len(json.loads((tmp_path / "s.json").read_text())) == 3 and (tmp_path / "s.png").stat().st_size > 5000
    )
    small = ["--shards", "24", "--batch", "16", "--batches", "8", "--repeats", "1"]
    made = scale.main([*small, "--json", str(tmp_path / "x.json")])
    assert made["starts"]["resumed"][0]["start"] == 24 * 1000 * 3 // 2 // 16 * 16
    assert "resumed ÷ cold" in capsys.readouterr().out


PROGRAM = """
import gc, json, multiprocessing, os, sys
sys.path.insert(0, sys.argv[2])
from bench_scale import resident_mb
from depth_anything.data.dataset import StreamDataset
from depth_anything.data.loader import build_stream_loader
from depth_anything.data.reader import Records
from depth_anything.data.shards import open_set
data = StreamDataset([Records(open_set(sys.argv[1]))], seed=0, streams=16, image_size=14, perturb=True)
batches = iter(build_stream_loader(data, micro_batch=100, workers=1))
(worker,) = multiprocessing.active_children()
held = []
for taken in range(1, 301):
    batch = next(batches)
    if taken in (100, 300):
        gc.collect()
        held.append((resident_mb(os.getpid()), resident_mb(worker.pid)))
assert batch["sample"][-1] == 29_999
print(json.dumps(held))
"""


@pytest.mark.heavy
def test_memory_does_not_grow(tmp_path):
    """Over 30,000 samples neither the worker nor the main process needs more memory."""
    image = np.random.default_rng(0).integers(0, 256, (14, 14, 3), np.uint8)
    fields = encode_frame(Frame("", image, disparity=np.ones((14, 14), np.float32)), codec="q12")
    infos = [
        write_shard(tmp_path / f"{s}.tar", ((f"a/{s}/{i}", fields) for i in range(100))) for s in range(5)
    ]
    made = write_manifest(tmp_path, name="a", shards=infos, meta={})
    command = [sys.executable, "-c", PROGRAM, made.root, str(BENCHMARKS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    early, late = json.loads(done.stdout)
    for before, after in zip(early, late, strict=True):
        assert after - before < 2, (early, late)  # megabytes over 20,000 samples: 100 bytes per sample
