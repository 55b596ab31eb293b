"""`depth-anything evaluate` on public benchmarks, from files of other programs, and by several processes."""

import csv
import json
import os
import socket
import sys

import numpy as np
import pytest
import torch
from benchmark_files import make_da2k, make_diode, make_kitti, make_nyu_bts, make_sintel
from typing_commands import complaint

from depth_anything.cli import main
from depth_anything.evaluation import runner


def evaluate(*arguments):
    return main(["evaluate", *map(str, arguments), "--device", "cpu"])


def report(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("benchmarks")
    make_nyu_bts(root / "nyu")
    make_kitti(root / "kitti")
    make_da2k(root / "da2k")
    return root


def test_benchmarks_are_evaluated_and_missing_ones_are_named(tmp_path, root, weights, capsys):
    names = ("nyu", "sintel", "kitti", "da2k")
    arguments = ("--weights", weights, "--benchmarks", *names, "--root", root, "--output", tmp_path)
    assert evaluate(*arguments, "--input-size", 28, "--compare") == 1
    out, err = capsys.readouterr()
    # The network is random and may be inverted, which is reported too.
    [line] = [line for line in err.splitlines() if "near and far are exchanged" not in line]
    assert line.startswith("depth-anything evaluate: sintel: ") and "http" in line
    assert "clipped to 0.001–10 m, compared in depth over pixels of the eigen_nyu crop" in out
    assert "MiDaS 3.1" in out and "Depth Anything V2 G" in out and "arXiv 2406.09414" in out
    assert "constant map has 50 %" in out
    assert "summary" not in out and out.count("report: ") == 3
    table, apart = out.partition("report: ")[0].split("By other rules")
    for line in (
        ["student-vitn-tiny", "da2", "measured here"],
        ["Depth Anything V2 L", "da2", "measured again"],
    ):
        assert any(all(word in text for word in line) for text in table.splitlines()), line
    assert "zoedepth" in apart and "zoedepth" not in table and "only 2 of 654 images are there" in apart
    overview = out.rpartition("report: ")[2]
    assert "nyu (da2)" in overview and "kitti (da2)" in overview and "0.053 / 0.973" in overview
    (ours,) = [line for line in overview.splitlines() if "measured here" in line]
    assert f"{100 * report(tmp_path / 'da2k')['models'][0]['accuracy']:.1f}" in ours
    assert "MiDaS 3.1" in (tmp_path / "summary.txt").read_text(encoding="utf-8")
    document = report(tmp_path / "nyu")
    assert document["protocol"]["crop"] == "eigen_nyu" and document["models"][0]["images"] == 2
    assert document["published"][0]["source"] and document["data"]["from"].startswith("https://")
    page = (tmp_path / "nyu/report.html").read_text(encoding="utf-8")
    assert "published, arXiv 2406.09414" in page and "By other rules" in page and "measured here" in page
    assert "97.1" in (tmp_path / "da2k/report.html").read_text(encoding="utf-8")
    summary = json.loads((tmp_path / "summary.json").read_text())["benchmarks"]
    assert list(summary) == ["nyu", "kitti"] and summary["kitti"]["protocol"]["crop"] == "garg"
    points = report(tmp_path / "da2k")["models"][0]
    assert 0 <= points["accuracy"] <= 1 and points["pairs"] == sum(row["pairs"] for row in points["rows"])
    with (tmp_path / "nyu/results.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 2


def test_a_set_with_a_benchmarks_name_is_not_compared_with_published_results(tmp_path, weights, capsys):
    set_ = tmp_path / "nyu"  # has a benchmark's name, but is another set
    assert main(["shard", "scenes", str(set_), "--count", "2", "--size", "42", "56"]) == 0
    capsys.readouterr()
    line = ("--weights", weights, "--data", set_, "--input-size", 28, "--output", tmp_path / "r", "--compare")
    assert evaluate(*line) == 0
    out = capsys.readouterr().out
    assert "nyu: no published result" in out
    assert report(tmp_path / "r")["published"] == [] and "Depth Anything V2" not in out


def test_shares_and_one_process_write_the_same_table(tmp_path, scenes, weights, capsys, monkeypatch):
    monkeypatch.setattr(runner, "BATCH_SIZE", 2)
    arguments = ("--weights", weights, "--data", scenes, "--input-size", 28, "--limit", 5)
    assert evaluate(*arguments, "--output", tmp_path / "one") == 0
    capsys.readouterr()
    assert evaluate(*arguments, "--output", tmp_path / "parts", "--part", "2/2") == 0
    assert "3 images of 5 not evaluated yet (this was share 2 of 2)" in capsys.readouterr().out
    assert not (tmp_path / "parts/results.json").exists()
    assert evaluate(*arguments, "--output", tmp_path / "parts", "--part", "1/2") == 0
    for name in ("table.txt", "results.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def run_two_processes(server, folder, *words):
    """Run a command in two processes with the environment of torchrun, with batches of two.

    Returns:
        Exit codes, and the output and errors of both.
    """
    code = (
        "import sys\n"
        "from depth_anything.cli import main\n"
        "from depth_anything.evaluation import runner\n"
        "runner.BATCH_SIZE = 2\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    (folder / "evaluate_in_pairs.py").write_text(code)
    command = [sys.executable, folder / "evaluate_in_pairs.py", *words]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    group |= {**os.environ, "MASTER_ADDR": "127.0.0.1"}
    files = {"stdout": folder / "stdout.txt", "stderr": folder / "stderr.txt"}
    processes = [
        server.start(command, env={**group, "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank}, **files)
        for rank in ("0", "1")
    ]
    codes = [process.wait(600) for process in processes]
    return codes, *(path.read_text() for path in files.values())


def test_a_file_that_the_second_process_cannot_read_gives_exit_code_1(tmp_path, weights, fork_server):
    make_sintel(tmp_path / "sintel")
    make_diode(tmp_path / "diode")
    (tmp_path / "sintel/training/final/market_5/frame_0001.png").unlink()  # the third of four
    line = ("--weights", weights, "--benchmarks", "sintel", "diode", "--root", tmp_path, "--device", "cpu")
    line = ("evaluate", *line, "--input-size", 28, "--output", tmp_path / "out")
    codes, output, errors = run_two_processes(fork_server, tmp_path, *line)
    assert 1 in codes
    assert "sintel: 2 images of 4 not evaluated yet (this was share 1 of 2)" in output
    assert errors.count("evaluate: sintel: sintel/final/market_5/frame_0001: its image is missing") == 1
    assert list(json.loads((tmp_path / "out/summary.json").read_text())["benchmarks"]) == ["diode"]


def test_torchrun_and_one_process_write_the_same_table(tmp_path, scenes, weights, monkeypatch, fork_server):
    monkeypatch.setattr(runner, "BATCH_SIZE", 2)
    arguments = ("--weights", weights, "--data", scenes, "--input-size", 28, "--device", "cpu", "--output")
    words = ["evaluate", *map(str, arguments)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun's processes have; another number may change the seventh digit
    assert main([*words, str(tmp_path / "one")]) == 0
    torch.set_num_threads(threads)
    codes, output, errors = run_two_processes(fork_server, tmp_path, *words, tmp_path / "two")
    assert codes == [0, 0], errors
    assert output.count("report: ") == 1
    assert [path.name[-10:] for path in sorted((tmp_path / "two/rows").iterdir())] == [
        "1of2.jsonl",
        "2of2.jsonl",
    ]
    for name in ("table.txt", "results.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_maps_of_predict_have_the_scores_of_the_model(tmp_path, root, weights, capsys):
    images = root / "nyu/official_splits/test"
    predict = ("predict", images, "--weights", weights, "--input-size", 28, "--output", tmp_path / "maps")
    assert main([*map(str, predict), "--format", "npy", "--device", "cpu"]) == 0
    both = ("--weights", f"a={weights}", "--predictions", f"b={tmp_path / 'maps'}")
    line = (*both, "--benchmarks", "nyu", "--root", root, "--output", tmp_path / "r", "--input-size", 28)
    assert evaluate(*line) == 0
    a, b = report(tmp_path / "r/nyu")["models"]
    assert a["means"] == pytest.approx(b["means"], rel=1e-5) and b["facts"]["quantity"] == "disparity"


def test_wrong_options_are_refused(tmp_path, root, weights, capsys):
    given = ("evaluate", "--weights", weights)
    assert "add --root DIR" in complaint(capsys, *given, "--benchmarks", "nyu")
    assert "'nyuu'" in complaint(capsys, *given, "--benchmarks", "nyuu", "--root", root)
    assert "--weights PATH" in complaint(capsys, "evaluate", "--data", root)
    line = (*given, "--benchmarks", "nyu", "--root", root, "--output", tmp_path, "--protocol")
    assert "'zoedepth'" in complaint(capsys, *line, "zoedepth")
    assert "'moge'" in complaint(capsys, *line, "moge")
    (tmp_path / "maps").mkdir()
    np.save(tmp_path / "maps/x.npy", np.ones((2, 2)))
    maps = ("evaluate", "--predictions", tmp_path / "maps", "--benchmarks", "nyu", "--root", root)
    said = complaint(capsys, *maps)
    assert "add --quantity disparity" in said and "--quantity depth" in said
    assert "'nyu/" in complaint(capsys, *maps, "--quantity", "depth", "--output", tmp_path)
    with pytest.raises(SystemExit):
        evaluate("--weights", weights, "--data", root, "--part", "3/2")
    assert "'3/2'" in capsys.readouterr().err
