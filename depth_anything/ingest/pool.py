"""Processes that make shards, each whole shards alone.

A worker that dies, of memory perhaps, ends the work with a sentence; one whose parent dies ends by itself. Shards
are written whole or not at all, so that nothing needs to be cleaned up.
"""

import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import ModuleType
from typing import Any

from depth_anything.data.tars import ShardError
from depth_anything.ingest.shard_job import ShardJob, run_job

_REPORT_INTERVAL_S = 0.2  # between two words on how far a worker has come


def run_jobs(jobs: Iterator[ShardJob], *, workers: int, tick: Callable[[int], None]) -> None:
    """Make shards in other processes.

    Args:
        jobs: Taken when a worker is free.
        workers: Processes.
        tick: Is called with the number of lines that were gone through since.

    Raises:
        ShardError: A worker died.
        Exception: What a worker has raised; the others are stopped.
    """
    context = get_context("spawn")  # a fork would copy whatever threads and files this process has
    busy: dict[Connection, tuple[SpawnProcess, ShardJob]] = {}
    processes: list[SpawnProcess] = []
    try:
        for _, job in zip(range(workers), jobs, strict=False):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_run_worker, args=(theirs, _picklable_source(job.source)), daemon=True
            )
            process.start()
            theirs.close()
            processes.append(process)
            _send_job(ours, process, job, busy)
        while busy:
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                process, job = busy[connection]
                kind, content = _receive(connection, process, job)
                if kind == "failed":
                    raise content
                tick(content)
                if kind == "done":
                    del busy[connection]
                    following = next(jobs, None)
                    if following is None:
                        connection.close()
                    else:
                        _send_job(connection, process, following, busy)
    finally:
        for process in processes:
            if busy:
                process.terminate()
            process.join()


def _send_job(
    connection: Connection,
    process: SpawnProcess,
    job: ShardJob,
    busy: dict[Connection, tuple[SpawnProcess, ShardJob]],
) -> None:
    busy[connection] = process, job
    try:
        connection.send(replace(job, source=None))
    except OSError:
        raise _worker_died(process, job) from None


def _receive(connection: Connection, process: SpawnProcess, job: ShardJob) -> tuple[str, Any]:
    try:
        return connection.recv()
    except (EOFError, OSError):
        raise _worker_died(process, job) from None


def _worker_died(process: SpawnProcess, job: ShardJob) -> ShardError:
    process.join(1)
    return ShardError(
        f"a worker died (exit code {process.exitcode}) over {job.root}, of too little memory perhaps: "
        "type the same command, with fewer --workers, which goes on where it stopped"
    )


def _picklable_source(source: Any) -> Any:
    return source.__name__ if isinstance(source, ModuleType) else source


def _run_worker(connection: Connection, source: Any) -> None:
    """Make the shards that are sent until nobody sends any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which stops its workers
    _use_one_thread()
    source = import_module(source) if isinstance(source, str) else source
    count, told = 0, time.monotonic()

    def tick() -> None:
        nonlocal count, told
        count += 1
        if time.monotonic() - told > _REPORT_INTERVAL_S:
            connection.send(("on", count))
            count, told = 0, time.monotonic()

    try:
        while True:
            job = replace(connection.recv(), source=source)
            try:
                run_job(job, tick)
            except Exception as error:
                connection.send(("failed", _picklable_error(error)))
                return
            connection.send(("done", count))
            count = 0
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent has no more to do, or is dead


def _use_one_thread() -> None:
    import cv2

    cv2.setNumThreads(0)


def _picklable_error(error: Exception) -> Exception:
    if isinstance(error, ShardError | OSError):
        return error
    return RuntimeError(str(error))
