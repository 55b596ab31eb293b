"""Throughput of many readers on one store: where requests, bytes or the readers' own work are the limit.

A closed network with a delay (decoding and latency, which readers do not share) and one queue (the store, which they
do). Mean value analysis gives its exact throughput for exponential service times (Reiser and Lavenberg, JACM 27, 1980);
it approaches the two asymptotes min(readers ÷ (Z + S), 1 ÷ S).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Store:
    """What one store serves, over all its readers.

    Attributes:
        bytes_per_s: Bandwidth.
        requests_per_s: Requests that it answers, whatever their size.
        latency_s: Time to the first byte.
    """

    bytes_per_s: float
    requests_per_s: float
    latency_s: float


@dataclass(frozen=True)
class ReaderDemand:
    """What a reader (a loader process) does for one sample.

    Attributes:
        bytes: Bytes read.
        requests: Requests sent.
        cpu_s: Seconds of its core.
        in_flight: Requests that it has open at once, which divide the latency.
    """

    bytes: float
    requests: float
    cpu_s: float
    in_flight: int = 16


def service_s(store: Store, demand: ReaderDemand) -> float:
    """Return S, the seconds for which one sample occupies the store: the longer of its bytes and requests."""
    return max(demand.bytes / store.bytes_per_s, demand.requests / store.requests_per_s)


def reader_throughput(store: Store, demand: ReaderDemand, readers: int) -> float:
    """Return the samples per second that so many readers get from the store together, by mean value analysis.

    Example:
        >>> store = Store(bytes_per_s=1e9, requests_per_s=5500, latency_s=0.02)
        >>> demand = ReaderDemand(bytes=237e3, requests=2, cpu_s=0.003)
        >>> [round(reader_throughput(store, demand, readers)) for readers in (1, 8, 512)]
        [171, 1313, 2750]
    """
    think = demand.cpu_s + store.latency_s * demand.requests / demand.in_flight
    service = service_s(store, demand)
    queue = rate = 0.0
    for number in range(1, readers + 1):
        wait = service * (1 + queue)
        rate = number / (think + wait)
        queue = rate * wait
    return rate


def index_reads(shards: int, records_per_shard: float, readers: int) -> float:
    """Return how many indexes of shards the readers load in a pass, each reader that of every shard it reads from.

    The records of a shard go to readers at random, so the expected number of readers of a shard with n records is
    readers · (1 − (1 − 1/readers)ⁿ).

    Example:
        >>> round(index_reads(62_300, 1000, 8)), round(index_reads(62_300, 1000, 512))
        (498400, 27382190)
    """
    return shards * readers * (1 - (1 - 1 / readers) ** records_per_shard)
