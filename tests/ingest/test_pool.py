"""Worker processes that write shards."""

import time
from pathlib import Path

import made_source
import pytest

from depth_anything.data.store import FolderStore
from depth_anything.data.tars import ShardError
from depth_anything.ingest.pool import run_jobs
from depth_anything.ingest.shard_job import ShardJob


def jobs(tmp_path, *lines):
    (tmp_path / "raw").mkdir(exist_ok=True)
    (tmp_path / "set").mkdir(exist_ok=True)
    for shard, line in enumerate(lines):
        yield ShardJob(
            made_source,
            tmp_path / "raw",
            FolderStore(tmp_path / "set"),
            "toy",
            None,
            shard,
            range(shard, shard + 1),
            [line],
        )


def test_every_line_is_reported_once(tmp_path):
    ticks = []
    run_jobs(jobs(tmp_path, *(f"a/{k}\t0" for k in range(5))), workers=2, tick=ticks.append)
    assert sum(ticks) == 5 and len(list((tmp_path / "set").glob("*.tar"))) == 5


def test_no_jobs_start_no_workers(tmp_path):
    run_jobs(jobs(tmp_path), workers=2, tick=lambda count: pytest.fail("nothing to report"))


@pytest.mark.parametrize(
    ("line", "error", "named"),
    [("a/1-bug\t0", RuntimeError, "a/1-bug"), ("a/1-dies\t0", ShardError, "--workers")],
)
def test_an_error_of_a_worker_is_raised_and_the_other_workers_end(tmp_path, line, error, named):
    start = time.monotonic()
    with pytest.raises(error, match=named):
        run_jobs(jobs(tmp_path, line, "a/2\t600"), workers=2, tick=lambda count: None)
    assert time.monotonic() - start < 300
    assert not list(Path(tmp_path / "set").glob("0*.tar"))
