"""Worker processes that write shards; each shard is written by one worker.

When the pool ends with an error, or its process dies, the workers stop after their current line and exit.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any

from depth_anything.data.tars import ShardError
from depth_anything.ingest.shard_job import ShardJob, run_job

_REPORT_INTERVAL_S = 0.2
_STOP_TIMEOUT_S = 5.0  # for the current line of a worker

# State of a worker process
_source: Any = None
_line_counts: Any = None  # shared with the parent
_job_running = threading.Lock()
_stopping = threading.Event()


def run_jobs(jobs: Iterator[ShardJob], *, workers: int, tick: Callable[[int], None]) -> None:
    """Write shards in worker processes.

    Args:
        jobs: The shards, all of one source. A job is taken when a worker is free.
        workers: Number of processes.
        tick: Called with the number of lines that were processed since the last call.

    Raises:
        ShardError: A worker died.
        Exception: What a worker raised.
    """
    first = next(jobs, None)
    if first is None:
        return
    context = get_context("spawn")  # a fork would copy the threads and open files of this process
    counts = context.RawArray("Q", workers)  # one counter per running job
    alive, alive_writer = context.Pipe(duplex=False)  # closed when this process ends, which ends the workers
    executor = ProcessPoolExecutor(
        workers, context, _start_worker, (_picklable_source(first.source), counts, alive)
    )
    running: dict[Future[None], int] = {}

    def submit(job: ShardJob, slot: int) -> None:
        running[executor.submit(_run_in_worker, replace(job, source=None), slot)] = slot

    reported = 0
    try:
        submit(first, 0)
        for slot, job in zip(range(1, workers), jobs, strict=False):
            submit(job, slot)
        executor.submit(
            os.getpid
        )  # the executor notices the death of a worker only if a task follows its start
        while running:
            done, _ = wait(running, _REPORT_INTERVAL_S, FIRST_COMPLETED)
            for future in done:
                slot = running.pop(future)
                future.result()
                if (job_or_none := next(jobs, None)) is not None:
                    submit(job_or_none, slot)
            total = sum(counts)
            tick(total - reported)
            reported = total
    except BrokenProcessPool:
        raise ShardError(
            f"a worker died while it wrote {first.store.root}, perhaps because the memory is too small",
            "type the same command with fewer --workers; it continues where it stopped",
        ) from None
    finally:
        if running:
            alive_writer.close()
        executor.shutdown(cancel_futures=True)
        alive_writer.close()
        alive.close()


def _picklable_source(source: Any) -> Any:
    return source.__name__ if isinstance(source, ModuleType) else source


def _start_worker(source: Any, counts: Any, alive: Connection) -> None:
    global _source, _line_counts
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the parent ends its workers
    import cv2

    cv2.setNumThreads(0)  # each worker uses one core
    _source = import_module(source) if isinstance(source, str) else source
    _line_counts = counts
    threading.Thread(target=_exit_with_parent, args=(alive,), daemon=True).start()


def _exit_with_parent(alive: Connection) -> None:
    """Wait until the parent closes its end of the pipe or dies, then stop the current job and end this process."""
    alive.poll(None)
    _stopping.set()
    _job_running.acquire(timeout=_STOP_TIMEOUT_S)  # the job removes its temporary file
    os._exit(1)


def _run_in_worker(job: ShardJob, slot: int) -> None:
    def tick() -> None:
        _line_counts[slot] += 1
        if _stopping.is_set():
            raise SystemExit

    with _job_running:
        try:
            run_job(replace(job, source=_source), tick)
        except (ShardError, OSError):
            raise
        except Exception as error:  # an exception with other arguments than its message cannot be unpickled
            raise RuntimeError(str(error)) from None
