"""The simulation of failures agrees with the closed forms of Young and Daly, and with what was published."""

import math
import random

import pytest

from depth_anything.planning.goodput import (
    Checkpoints,
    Interruptions,
    daly_interval,
    expected_goodput,
    first_order_goodput,
    job_mtbf_s,
    simulate_goodput,
    young_interval,
)

HOUR = 3600.0
CASES = [  # M, R, T, D: rare failures, Llama 3's rate, and so many that a cycle rarely ends
    (100 * HOUR, 600.0, 0.5 * HOUR, 15.0),
    (3.09 * HOUR, 300.0, 800.0, 30.0),
    (0.5 * HOUR, 300.0, 1200.0, 60.0),
]


@pytest.mark.parametrize(("mtbf", "restart", "interval", "write"), CASES)
def test_the_simulation_agrees_with_daly(mtbf: float, restart: float, interval: float, write: float) -> None:
    stops, checkpoints = Interruptions(mtbf, restart), Checkpoints(interval, write)
    exact = expected_goodput(stops, checkpoints)
    simulated = simulate_goodput(stops, checkpoints, starts=40_000, seed=1).share
    # 40,000 exponential times have a relative error of half a percent in what they cost.
    assert 1 / simulated - 1 == pytest.approx(1 / exact - 1, rel=0.02)
    assert simulated == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize(("mtbf", "restart", "interval", "write"), CASES)
@pytest.mark.parametrize("behind", [60.0, 700.0])
def test_a_checkpoint_that_is_complete_later_is_lost_more_often(
    mtbf: float, restart: float, interval: float, write: float, behind: float
) -> None:
    stops, late = Interruptions(mtbf, restart), Checkpoints(interval, write, behind)
    exact = expected_goodput(stops, late)
    assert simulate_goodput(stops, late, starts=40_000, seed=1).share == pytest.approx(exact, rel=0.01)
    assert exact < expected_goodput(stops, Checkpoints(interval, write))
    # Step by step: the checkpoint of a cycle counts once the job has run on for `behind` seconds.
    draw, kept, total = random.Random(5), 0, 0.0
    for _ in range(20_000):
        end = draw.expovariate(1 / mtbf)
        total, time = total + end, restart + interval + write
        while time + behind < end:
            kept, time = kept + 1, time + interval + write
    assert kept * interval / total == pytest.approx(exact, rel=0.03)
    if mtbf > 10 * HOUR:
        assert first_order_goodput(stops, late) == pytest.approx(exact, rel=2e-4)


def test_a_time_limit_waits_for_the_last_checkpoint() -> None:
    never = Interruptions(1e18, 600.0, time_limit_s=24 * HOUR)
    found = simulate_goodput(never, Checkpoints(HOUR, 1.0, 30.0), starts=10)
    assert found.lost_s == 0.0 and found.wall_s == pytest.approx(10 * 24 * HOUR)
    assert found.writing_s == pytest.approx(10 * (24 * 1 + 30))


def test_the_first_order_holds_where_failures_are_rare() -> None:
    stops, checkpoints = Interruptions(100 * HOUR, 600.0), Checkpoints(0.5 * HOUR, 15.0)
    by_hand = 1 / (1 + 15 / 1800 + (900 + 600) / 360_000)
    assert first_order_goodput(stops, checkpoints) == pytest.approx(by_hand, rel=1e-12)
    assert first_order_goodput(stops, checkpoints) == pytest.approx(
        expected_goodput(stops, checkpoints), rel=2e-4
    )


@pytest.mark.parametrize(("mtbf", "write"), [(100 * HOUR, 15.0), (3.09 * HOUR, 30.0), (0.5 * HOUR, 60.0)])
def test_no_other_interval_is_better(mtbf: float, write: float) -> None:
    stops, best = Interruptions(mtbf, 300.0), daly_interval(write, mtbf)

    def goodput(interval: float) -> float:
        return expected_goodput(stops, Checkpoints(interval, write))

    others = [best * 1.02**step for step in range(-60, 61)]
    highest = max(others, key=goodput)
    assert highest == pytest.approx(best, rel=0.021)
    simulated = [
        simulate_goodput(stops, Checkpoints(best * factor, write), starts=40_000, seed=2).share
        for factor in (1 / 3, 1, 3)
    ]
    assert max(simulated) == simulated[1]


def test_intervals_by_hand() -> None:
    assert young_interval(15.0, 360_000.0) == pytest.approx(math.sqrt(2 * 15 * 360_000))
    x = math.sqrt(60 / (2 * 1800))
    assert daly_interval(60.0, 1800.0) == pytest.approx(
        math.sqrt(2 * 60 * 1800) * (1 + x / 3 + x * x / 9) - 60
    )
    assert daly_interval(4000.0, 1800.0) == 1800.0


def test_the_rate_is_that_of_llama_3() -> None:
    assert 54 * 86_400 / job_mtbf_s(16_384) == pytest.approx(419)
    assert job_mtbf_s(512) == 32 * job_mtbf_s(16_384)


@pytest.mark.parametrize(("restart", "low", "high"), [(600.0, 0.89, 0.91), (240.0, 0.92, 0.94)])
def test_the_published_share_of_llama_3_is_met(restart: float, low: float, high: float) -> None:
    """Its effective time was above 90 %; the report states neither the restart nor the interval."""
    mtbf = job_mtbf_s(16_384)
    checkpoints = Checkpoints(daly_interval(15.0, mtbf), 15.0)
    assert low < simulate_goodput(Interruptions(mtbf, restart), checkpoints, starts=20_000).share < high


def test_equal_seeds_give_equal_results_and_all_time_is_accounted_for() -> None:
    stops, checkpoints = Interruptions(HOUR, 60.0), Checkpoints(600.0, 5.0)
    first = simulate_goodput(stops, checkpoints, starts=1000, seed=3)
    assert first == simulate_goodput(stops, checkpoints, starts=1000, seed=3)
    assert first != simulate_goodput(stops, checkpoints, starts=1000, seed=4)
    assert first.failures == 1000
    assert first.wall_s == pytest.approx(1000 * HOUR, rel=0.1)


def test_a_time_limit_costs_a_checkpoint_and_a_restart_and_no_step() -> None:
    day = 24 * HOUR
    never = Interruptions(1e18, 600.0, time_limit_s=day)
    found = simulate_goodput(never, Checkpoints(HOUR, 30.0), starts=10)
    assert (found.failures, found.lost_s) == (0, 0.0)
    assert found.wall_s == pytest.approx(10 * day)
    assert found.restarting_s == pytest.approx(10 * 600)
    # 23 h 50 min hold 23 whole cycles of an hour and 30 s; the rest ends with the checkpoint at the limit.
    assert found.writing_s == pytest.approx(10 * 24 * 30)
    assert found.useful_s == pytest.approx(10 * (day - 600 - 24 * 30))


def test_a_failure_during_a_restart_or_a_checkpoint_loses_it() -> None:
    stops = Interruptions(HOUR, 600.0)
    never_saved = simulate_goodput(stops, Checkpoints(1e9, 1.0), starts=2000)
    assert never_saved.useful_s == never_saved.writing_s == 0.0
    assert never_saved.restarting_s < 2000 * 600  # some restarts were cut short
    cut = HOUR * (1 - math.exp(-600 / HOUR))  # mean of an exponential time, cut at R
    assert never_saved.restarting_s == pytest.approx(2000 * cut, rel=0.02)
