"""Progress of long passes: the rate, the rest, and few lines where there is no terminal."""

import pytest

from depth_anything import progress
from depth_anything.progress import ProgressLine, format_duration, track


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_has_rate_and_remaining_time() -> None:
    line = ProgressLine("writing data/x", total=7200, unit="record")
    line.done = 3600
    assert line.line(60.0) == "writing data/x: 3,600 of 7,200 records, 60.0 a second, 1 min 0 s to go"
    assert ProgressLine("listing").line(1.0) == "listing: 0, 0.0 a second"


def test_the_rate_leaves_out_what_was_done_before() -> None:
    line = ProgressLine("training", total=100, unit="step", initial=50, enabled=False)
    line.update(10, {"loss": "0.5"})
    assert line.line(5.0) == "training: 60 of 100 steps, 2.0 a second, 20 s to go, loss=0.5"


def test_lines_come_after_the_interval_only(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    line = ProgressLine("writing", total=100, unit="record", interval_s=30.0)
    line.update()
    assert not capsys.readouterr().err
    clock[0] += 31
    line.update(9)
    assert "10 of 100 records" in capsys.readouterr().err
    hidden = ProgressLine("writing", interval_s=0.0, enabled=False)
    clock[0] += 31
    hidden.update()
    assert not capsys.readouterr().err


def test_track_yields_all_items(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    seen = []
    for item in track(range(4), what="pass\x1b[2J", total=4, unit="image"):
        seen.append(item)
        clock[0] += 20
    assert seen == [0, 1, 2, 3]
    assert capsys.readouterr().err.splitlines() == [
        "pass\\x1b[2J: 2 of 4 images, 0.1 a second, 40 s to go",
        "pass\\x1b[2J: 4 of 4 images, 0.1 a second, 0 s to go",
    ]


def test_durations() -> None:
    assert [format_duration(s) for s in (59.6, 3600, 90000)] == ["1 min 0 s", "1 h 0 min", "1 d 1 h"]
