"""Maps that no working model gives: named in table, page, JSON and on stderr, and never stretched to fit."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from depth_anything import DepthAnything, save_model
from depth_anything.cli import main
from depth_anything.data.address import escape_unprintable
from depth_anything.data.sample import Frame, encode_frame
from depth_anything.data.shards import write_manifest
from depth_anything.data.tars import write_shard
from depth_anything.evaluation.benchmarks.da2k import PointPairImage
from depth_anything.evaluation.depth_task import DepthTask
from depth_anything.evaluation.evaluate import DepthResult, evaluate
from depth_anything.evaluation.pairs_task import PairResult, PairsTask, evaluate_pairs
from depth_anything.evaluation.protocols import PROTOCOLS
from depth_anything.evaluation.report import write_report
from depth_anything.evaluation.table import build_table, format_table

SHAPE = (24, 36)


def make_frames(count: int = 4) -> list[Frame]:
    frames = []
    for number in range(count):
        depth = np.linspace(1, 9, SHAPE[0] * SHAPE[1], dtype=np.float32).reshape(SHAPE)
        depth = depth + np.sin(np.arange(SHAPE[1], dtype=np.float32) + number)
        depth[0, :number] = np.nan
        frames.append(Frame(f"rooms/0/{number}", np.full((*SHAPE, 3), number, np.uint8), {}, depth=depth + 1))
    return frames


class Maps:
    """Gives for each image what a function makes of its depth."""

    def __init__(self, frames: list[Frame], make: Any, *, quantity: str = "disparity") -> None:
        self.frames, self.make, self.quantity = frames, make, quantity

    def predict_batch(self, images: list[np.ndarray]) -> list[np.ndarray]:
        return [self.make(np.nan_to_num(self.frames[image[0, 0, 0]].depth, nan=3.0)) for image in images]


def evaluate_maps(make: Any, *, protocol: str = "da2", quantity: str = "disparity") -> DepthResult:
    frames = make_frames()
    return evaluate(Maps(frames, make, quantity=quantity), frames, protocol=protocol)


def task_of(result: DepthResult) -> DepthTask:
    return DepthTask("rooms", [], lambda line: None, {}, protocol=result.protocol)


def text_of(result: DepthResult) -> str:
    task = task_of(result)
    return format_table(build_table(task, [result]), task.notes([result]))


@pytest.mark.parametrize(
    ("protocol", "quantity", "good", "bad"),
    [
        ("da2", "disparity", lambda d: 1 / d, lambda d: -1 / d),
        ("da2", "disparity", lambda d: 5 - 1 / d * -2, lambda d: d),  # depth taken for disparity
        ("marigold", "depth", lambda d: 3 * d + 1, lambda d: 1 / d),  # disparity taken for depth
        ("marigold", "disparity", lambda d: 1 / d, lambda d: 9 - 1 / d),
        ("moge", "disparity", lambda d: 1 / d, lambda d: d),
        ("zoedepth", "depth", lambda d: d, lambda d: 20 - d),  # nothing is fitted, and yet
        ("da2", "depth", lambda d: d, lambda d: 1 / d),
    ],
)
def test_an_inverted_map_is_named(protocol: str, quantity: str, good: Any, bad: Any) -> None:
    fine, wrong = (evaluate_maps(make, protocol=protocol, quantity=quantity) for make in (good, bad))
    assert not fine.warnings and not fine.inverted
    assert wrong.inverted == [f"rooms/0/{number}" for number in range(4)] and len(wrong.warnings) == 1
    assert wrong.warnings[0] in text_of(wrong) and "rooms/0/0" in wrong.warnings[0]


def test_one_inverted_map_of_four_gives_no_warning() -> None:
    frames = make_frames()
    turns = iter([1, -1, 1, 1])
    result = evaluate(Maps(frames, lambda depth: next(turns) / depth), frames)
    assert result.inverted == ["rooms/0/1"] and not result.warnings


@pytest.mark.parametrize("value", [0.0, 3.0])
@pytest.mark.parametrize(
    ("protocol", "quantity"), [("da2", "disparity"), ("zoedepth", "depth"), ("marigold", "depth")]
)
def test_a_constant_map_is_named(protocol: str, quantity: str, value: float) -> None:
    result = evaluate_maps(lambda d: np.full_like(d, value), protocol=protocol, quantity=quantity)
    assert len(result.constant) == 4 and not result.inverted and not result.non_finite
    assert len(result.warnings) == 1 and result.warnings[0] in text_of(result)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("protocol", "quantity"), [("da2", "disparity"), ("zoedepth", "depth"), ("marigold", "depth")]
)
def test_nan_and_infinity_are_listed_and_make_the_mean_nan(
    protocol: str, quantity: str, value: float
) -> None:
    """Of a network infinite depth is no sky: a sigmoid never gives it."""
    frames = make_frames()

    def make(depth: np.ndarray) -> np.ndarray:
        map_ = (1 / depth if quantity == "disparity" else depth).astype(np.float32)
        if depth is not None and math.isclose(depth[5, 5], frames[2].depth[5, 5]):  # type: ignore[index]
            map_[5, 5] = value
        return map_

    result = evaluate(Maps(frames, make, quantity=quantity), frames, protocol=protocol)
    assert result.non_finite == ["rooms/0/2"] and math.isnan(result.means["abs_rel"])
    assert len(result.warnings) == 1 and "rooms/0/2" in result.warnings[0]


def test_nan_where_nothing_is_compared_is_ignored() -> None:
    frames = make_frames()
    result = evaluate(
        Maps(frames, lambda d: np.where(np.indices(d.shape)[0] == 0, np.nan, 1 / d)), [frames[0], *frames[1:]]
    )
    assert len(result.non_finite) == 4  # the first row is compared …
    for frame in frames:
        assert frame.depth is not None
        frame.depth[0] = np.nan
    result = evaluate(Maps(frames, lambda d: np.where(np.indices(d.shape)[0] == 0, np.nan, 1 / d)), frames)
    assert (
        not result.non_finite and not result.warnings and result.means["abs_rel"] < 1e-5
    )  # … and now is not


def test_rows_of_earlier_versions_give_no_warning() -> None:
    row = {"key": "a", "valid": 9, **dict.fromkeys(("abs_rel", "d1"), 0.5)}
    result = DepthResult("old", (row,), protocol=PROTOCOLS["da2"])
    assert not (result.warnings or result.inverted or result.constant)


def test_pairs_of_points_show_inverted_maps_and_nan() -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    pairs = np.array([[[r, 7], [r, 0]] for r in range(8)])
    images = [PointPairImage("da2k/a", image, scene="indoor", pairs=pairs)]
    ramp = np.tile(np.arange(8, dtype=np.float32), (8, 1))

    class Given:
        def __init__(self, map_: np.ndarray, quantity: str = "disparity") -> None:
            self.map, self.quantity = map_, quantity

        def predict_batch(self, images: list[np.ndarray]) -> list[np.ndarray]:
            return [self.map for _ in images]

    def warned(map_: np.ndarray, quantity: str = "disparity") -> list[str]:
        result = evaluate_pairs(Given(map_, quantity), images, name="m")
        text = "\n".join(PairsTask("da2k", [], None, {}).notes([result]))
        assert all(sentence in text for sentence in result.warnings)
        return result.warnings

    assert not warned(ramp) and not warned(7 - ramp, "depth") and not warned(np.zeros_like(ramp))
    assert warned(7 - ramp) and warned(ramp, "depth")
    for value in (np.nan, np.inf):
        assert "da2k/a" in warned(np.where(ramp == 7, value, ramp))[0]
        assert not warned(np.where(ramp == 3, value, ramp))  # nobody asks there
    assert not warned(np.where(ramp == 0, np.inf, 7 - ramp), "depth")  # sky
    assert not PairResult("m", ({"key": "a", "scene": "indoor", "pairs": 2, "right": 1.0},)).warnings


# --- The command ----------------------------------------------------------------------------------------


@pytest.fixture
def rooms(tmp_path: Path) -> Path:
    frames = make_frames()
    records = [(frame.key, encode_frame(frame, codec="f32")) for frame in frames]
    meta = {"quantity": "depth", "unit": "m"}
    shard = write_shard(tmp_path / "rooms/0.tar", records)
    write_manifest(tmp_path / "rooms", name="rooms", shards=[shard], meta=meta)
    return tmp_path / "rooms"


def write_maps(folder: Path, make: Any, *, ending: str = "_disparity") -> Path:
    folder.mkdir(parents=True)
    for number, frame in enumerate(make_frames()):
        np.save(
            folder / f"{number}{ending}.npy", make(np.nan_to_num(frame.depth, nan=3.0)).astype(np.float32)
        )
    return folder


def run(rooms: Path, *words: Any) -> tuple[int, dict[str, Any]]:
    output = rooms.parent / "report"
    code = main(["evaluate", "--data", str(rooms), "--output", str(output), *map(str, words)])
    results = output / "results.json"
    return code, json.loads(results.read_text()) if results.exists() else {}


def test_inverted_maps_are_named_in_table_page_json_and_stderr(
    tmp_path: Path, rooms: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    maps = write_maps(tmp_path / "maps", lambda depth: depth)
    code, document = run(rooms, "--predictions", f"<b>m</b>={maps}")
    out, err = capsys.readouterr()
    [model] = document["models"]
    page = (tmp_path / "report/report.html").read_text()
    assert code == 0 and len(model["inverted"]) == 4 and len(model["warnings"]) == 1
    [warning] = model["warnings"]
    assert all(warning.removeprefix("<b>m</b>") in text for text in (out, err, page))
    assert "<b>m</b>" not in page and "&lt;b&gt;m&lt;/b&gt;" in page
    assert (tmp_path / "report/table.txt").read_text().count(warning) == 1


@pytest.mark.parametrize("share", ["one", "all"])
def test_maps_with_nan_give_exit_code_1(
    tmp_path: Path, rooms: Path, capsys: pytest.CaptureFixture[str], share: str
) -> None:
    def make(depth: np.ndarray) -> np.ndarray:
        first = np.isclose(depth[5, 5], np.nan_to_num(make_frames()[0].depth)[5, 5])  # type: ignore[call-overload]
        return (
            np.where(np.indices(depth.shape)[0] == 5, np.nan, 1 / depth)
            if share == "all" or first
            else 1 / depth
        )

    code, document = run(rooms, "--predictions", write_maps(tmp_path / "maps", make))
    assert code == 1 and len(document["models"][0]["broken"]) == (4 if share == "all" else 1)
    err = capsys.readouterr().err
    assert "rooms/0/0" in err
    assert document["models"][0]["means"]["abs_rel"] is None


def test_a_network_with_nan_gives_a_failing_exit_code(
    tmp_path: Path, rooms: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = DepthAnything("vitn")
    with torch.no_grad():
        model.depth_head.scratch.output_conv2[2].bias.fill_(torch.nan)
    save_model(model, tmp_path / "model.safetensors")
    code, _ = run(rooms, "--weights", tmp_path / "model.safetensors", "--input-size", 28, "--device", "cpu")
    assert code != 0 and "rooms/0/0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        lambda map_: map_.T,
        lambda map_: map_[:, :30],
        lambda map_: map_[:20],
        lambda map_: np.zeros((24, 24)),
    ],
)
def test_maps_of_another_aspect_ratio_are_refused(
    tmp_path: Path, rooms: Path, capsys: pytest.CaptureFixture[str], change: Any
) -> None:
    maps = write_maps(tmp_path / "maps", lambda depth: change(1 / depth))
    code, document = run(rooms, "--predictions", maps)
    assert code == 2 and not document
    assert "rooms/0/0" in (err := capsys.readouterr().err) and "36x24" in err


def test_maps_of_another_size_and_the_same_aspect_ratio_are_resized(tmp_path: Path, rooms: Path) -> None:
    maps = write_maps(tmp_path / "maps", lambda depth: (1 / depth)[::2, ::2])
    code, document = run(rooms, "--predictions", maps)
    assert code == 0 and document["models"][0]["means"]["abs_rel"] < 0.2


# --- Names that others chose ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["=HYPERLINK(1)", "+1", "-2+3", "@SUM(A1)", "\t=1", "a\nb", "a\x1b[2Jb", "<i>x</i>", "\u202eabc"]
)
def test_names_are_escaped_in_csv_html_and_terminal(tmp_path: Path, name: str) -> None:
    frames = make_frames()
    frames[1].key = name
    result = evaluate(Maps(frames, lambda d: d * 0), frames, name=name)
    page = write_report(task_of(result), [result], tmp_path)
    table = (tmp_path / "table.txt").read_text(encoding="utf-8")
    assert all(line.isprintable() for line in table.splitlines()) and escape_unprintable(name) in table
    with (tmp_path / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for text in (rows[0]["model"], rows[1]["key"]):
        assert text.removeprefix("'") == name and not text.startswith(("=", "+", "-", "@", "\t"))
    assert "<i>x" not in page.read_text(encoding="utf-8")
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["models"][0]["name"] == name
