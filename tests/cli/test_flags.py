"""Numbers that cannot be: one sentence that names the flag, before anything is read."""

import argparse

import numpy as np
import pytest
from PIL import Image
from typing_commands import complaint

from depth_anything.cli import build_parser
from depth_anything.cli.predict_command import run_images

NEEDED = {
    "predict": ["a.jpg"],
    "video": ["a.mp4", "--output", "out"],
    "calibrate": ["a.jpg", "--output", "m.safetensors"],
    "evaluate": ["--data", "set"],
    "shard images": ["photos", "out"],
    "shard scenes": ["out"],
    "shard sa1b": ["raw", "out"],
    "shard custom": ["a.yaml", "out"],
    "verify": ["set"],
    "view": ["set"],
    "stats": ["set"],
    "bench-data": ["set"],
    "plan": ["size=paper"],
    "demo": [],
}
IMPOSSIBLE = ("-5", "0", "nan", "inf", "1e99", "1.5e400", "x", "")
MAY_BE_ZERO = {("shard images", "--workers"), ("shard sa1b", "--workers"), ("shard custom", "--workers")}
MAY_BE_ZERO |= {("shard scenes", "--seed"), ("video", "--smooth"), ("demo", "--port")}


def numbers(parser, name=""):
    """Every flag of every command that takes a number: (command, flag)."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child, sub in action.choices.items():
                yield from numbers(sub, f"{name} {child}".strip())
        elif action.metavar in ("N", "M", "METRES", "PX", "S", "T", "N|RxC", ("H", "W")):
            yield name, next(option for option in action.option_strings if option.startswith("--"))


FLAGS = [
    (command, flag) for command, flag in numbers(build_parser()) if command in NEEDED and flag != "--opset"
]


def test_the_commands_have_numbers():
    assert {command for command, _ in FLAGS} == set(NEEDED)
    assert ("predict", "--input-size") in FLAGS and ("demo", "--max-megabytes") in FLAGS


@pytest.mark.parametrize(("command", "flag"), FLAGS)
def test_an_impossible_number_names_its_flag(command, flag, capsys):
    for value in IMPOSSIBLE:
        if value == "0" and (command, flag) in MAY_BE_ZERO:
            continue
        values = [value, value] if flag == "--size" else [value]
        said = complaint(capsys, *command.split(), *NEEDED[command], flag, *values)
        assert flag in said and repr(value) in said


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--port", "99999"), ("--port", "65536"), ("--queue", "1.5"), ("--input-size", "16385")],
)
def test_what_is_too_large_names_its_flag(flag, value, capsys):
    assert flag in complaint(capsys, "demo", flag, value)


def test_the_authors_program_says_the_same(capsys):
    assert run_images(["--img-path", "a.jpg", "--batch-size", "0"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("run.py: --batch-size ") and err.count("\n") == 1


def test_rates_and_colormaps_name_what_was_typed(tmp_path, weights, capsys):
    said = complaint(capsys, "video", "a.mp4", "--output", "out", "--fps", "0")
    assert "--fps" in said and "'0'" in said
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "a.png")
    line = ("predict", tmp_path / "a.png", "--weights", weights, "--output", tmp_path / "out")
    assert "'spektral'" in complaint(capsys, *line, "--colormap", "spektral")
    assert not (tmp_path / "out").exists()


def test_numbers_that_are_fine_are_taken():
    parse = build_parser().parse_args
    assert parse(["predict", "a", "--tiles", "2x3"]).tiles == (2, 3)
    assert parse(["predict", "a", "--tiles", "64"]).tiles == 64
    assert parse(["predict", "a", "--focal", "0.5", "--max-points", "1"]).focal == 0.5
    assert parse(["demo", "--port", "65535"]).port == 65535
