"""Readers of one store: alone bound by their own work, together by the store's bytes or requests."""

import random
from dataclasses import replace

import pytest

from depth_anything.planning.store import ReaderDemand, Store, index_reads, reader_throughput, service_s

STORE = Store(bytes_per_s=10e9, requests_per_s=5500.0, latency_s=0.02)
DEMAND = ReaderDemand(bytes=237e3, requests=2, cpu_s=0.003)


def test_one_reader_waits_for_its_own_work() -> None:
    alone = 1 / (0.003 + 0.02 * 2 / 16 + 2 / 5500)
    assert reader_throughput(STORE, DEMAND, 1) == pytest.approx(alone)


def test_many_readers_get_what_the_store_serves() -> None:
    assert reader_throughput(STORE, DEMAND, 512) == pytest.approx(5500 / 2, rel=1e-3)
    fast = replace(STORE, requests_per_s=1e9)
    assert reader_throughput(fast, DEMAND, 4096) == pytest.approx(10e9 / 237e3, rel=1e-3)
    assert service_s(fast, DEMAND) == pytest.approx(237e3 / 10e9)


def test_throughput_is_that_of_two_customers_by_hand() -> None:
    """With two customers the balance equations of the chain have a closed solution."""
    think, service = 0.003 + 0.02 * 2 / 16, service_s(STORE, DEMAND)
    r = service / think  # probabilities of 0, 1, 2 customers at the store: 1, 2r, 2r²
    busy = (2 * r + 2 * r * r) / (1 + 2 * r + 2 * r * r)
    assert reader_throughput(STORE, DEMAND, 2) == pytest.approx(busy / service)


@pytest.mark.parametrize("readers", [1, 3, 8, 64, 512])
def test_throughput_lies_below_both_asymptotes_and_grows(readers: int) -> None:
    think, service = 0.003 + 0.02 * 2 / 16, service_s(STORE, DEMAND)
    rate = reader_throughput(STORE, DEMAND, readers)
    assert rate <= min(readers / (think + service), 1 / service) * (1 + 1e-9)
    assert rate <= reader_throughput(STORE, DEMAND, readers + 1) * (1 + 1e-12)


@pytest.mark.parametrize("readers", [3, 40, 200])
def test_readers_of_a_shard_are_those_that_a_draw_finds(readers: int) -> None:
    draw, shards, records = random.Random(0), 400, 50
    drawn = sum(len({draw.randrange(readers) for _ in range(records)}) for _ in range(shards))
    assert index_reads(shards, records, readers) == pytest.approx(drawn, rel=0.03)
