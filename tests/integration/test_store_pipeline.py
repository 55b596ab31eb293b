"""The tiny pipeline with sets, labels and runs on an S3 server, killed on the way: the bytes equal the disk's."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from fork_server import ForkedCommand, ForkServer
from local_servers import FaultyServer

from depth_anything.data.shards import verify_set
from depth_anything.data.store import ObjectStore

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "store_pipeline.py"


@pytest.fixture(scope="module")
def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("store_pipeline", BENCHMARK)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.heavy
def test_killed_stages_on_a_store_write_the_same_bytes_as_on_a_disk(
    tmp_path: Path, benchmark: Any, faulty_s3: FaultyServer, fork_server: ForkServer
) -> None:
    def start(command: list[str], environment: dict[str, str], errors: Path) -> ForkedCommand:
        return fork_server.start(command, cwd=tmp_path, env=environment, stderr=errors)

    for name in ObjectStore("s3://bucket").names():  # of other tests, which share the server
        ObjectStore("s3://bucket").delete(name)
    pipeline = benchmark.Pipeline(tmp_path, faulty_s3, steps=6, start=start)
    pipeline.run(
        pipeline.command("teacher", str(tmp_path / "disk"))
    )  # benchmarks/store_pipeline.py moves it, too
    model = "runs/teacher-vitt-tiny/model.safetensors"
    assert ObjectStore("s3://bucket").upload(tmp_path / "disk" / model, model)
    for stage, kills in (("pseudolabel", [7]), ("student", [12])):
        outcome = pipeline.run_stage(stage, kills)
        assert not outcome.differing and outcome.files > 5, outcome
        assert outcome.kills == len(kills), outcome
    images = "s3://bucket/data/scenes-photographic"
    assert verify_set("s3://bucket/data/labels-tiny/scenes-photographic", images=images) == []
    names = ObjectStore("s3://bucket/data/labels-tiny/scenes-photographic").names()
    assert not [name for name in names if name.startswith(".")]  # no lease is left
    runs = ObjectStore("s3://bucket/runs/student-vitn-tiny").names()
    assert {"config.yaml", "metrics.csv", "model.safetensors", "finished.json", "best.safetensors"} <= runs
    assert "lock.json" not in runs and len([name for name in runs if name.endswith(".ckpt")]) == 2
    again = fork_server.run(
        pipeline.command("student", "s3://bucket"), cwd=tmp_path, env=pipeline.environment
    )
    assert again.returncode == 0 and "s3://bucket/runs/student-vitn-tiny is finished" in again.stdout, (
        again.stderr
    )
    written = [path for method, path in faulty_s3.writes if method == "PUT"]
    assert not any(path.endswith("model.safetensors") for path in written[-4:])
