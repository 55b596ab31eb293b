"""Messages about unknown facts name an argument in Python, and the flag of the command in a terminal."""

import argparse
import re
import warnings

import cv2
import numpy as np
import pytest
import torch
from made_configs import make_config

from depth_anything import DepthAnything, load_model, save_model
from depth_anything.cli import build_parser, main
from depth_anything.cli.predict_command import run_images
from depth_anything.errors import ArgumentWarning
from depth_anything.training.initialization import build_model, load_teacher

pytestmark = pytest.mark.usefixtures("small_official_encoders")

OF_LOAD_MODEL = ("encoder", "version", "max_depth")
RUNNING = ("predict", "video", "calibrate", "evaluate", "export", "demo")


def command(name):
    """Return the parser of one command."""
    (commands,) = [a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return commands.choices[name]


@pytest.mark.parametrize("name", RUNNING)
def test_flags_in_messages_exist(name):
    """Each command has the flags that its messages name."""
    parser = command(name)
    known = {option for action in parser._actions for option in action.option_strings}
    flags = parser.get_default("flags")
    assert {flags[argument].split()[0] for argument in OF_LOAD_MODEL} <= known
    for argument in ("input_size", "device", "precision", "resample"):
        if name != "export":
            assert flags[argument].split()[0] in known
    if name == "export":
        assert {flags["to"].split()[0], flags["opset"].split()[0], flags["precision"].split()[0]} <= known


@pytest.fixture
def unsaid(tmp_path, monkeypatch):
    """Weights whose file says neither version nor depth, a photograph, points in it, and a labeled set."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = DepthAnything("vits", taps=(2, 3, 4, 5), max_depth=20.0)
    torch.save(model.state_dict(), "plain.pth")
    cv2.imwrite("a.png", np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    assert main(["shard", "scenes", "set", "--count", "1", "--size", "40", "40"]) == 0
    return tmp_path


LINES = {
    "predict": ["predict", "a.png", "--outdir", "out", "--device", "cpu", "--input-size", "28"],
    "run.py": ["--img-path", "a.png", "--outdir", "out", "--device", "cpu", "--input-size", "28"],
    "export": ["export", "--to", "safetensors", "--output", "new.safetensors"],
    "evaluate": ["evaluate", "--data", "set", "--output", "out", "--device", "cpu", "--input-size", "28"],
}


def run(name, *more):
    line = [*LINES[name], "--weights", "plain.pth", *more]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        return run_images(line) if name == "run.py" else main(line)


@pytest.mark.parametrize("name", LINES)
def test_warnings_name_the_flags_that_remove_them(unsaid, capsys, name):
    """The flags that warnings name silence them and set the facts of the model."""
    depth = "--weights-max-depth 20" if name == "evaluate" else "--max-depth 20"
    assert run(name) == 0
    told = capsys.readouterr().err
    assert "--weights-version 1" in told and depth in told
    assert not re.search(r"\b(version|max_depth)=", told)
    assert run(name, "--weights-version", "1", *depth.split()) == 0
    assert "plain.pth" not in capsys.readouterr().err
    if name == "export":
        read = load_model("new.safetensors")
        assert (read.taps, read.max_depth) == ((2, 3, 4, 5), 20.0)


@pytest.mark.parametrize("name", LINES)
def test_impossible_values_name_the_flag(unsaid, capsys, name):
    flag = "--weights-max-depth" if name == "evaluate" else "--max-depth"
    assert run(name, flag, "-5") == 2
    told = capsys.readouterr().err
    assert flag in told and "-5" in told
    assert run(name, "--encoder", "vitx") == 2
    assert "--encoder vitx" in capsys.readouterr().err


def test_an_unknown_encoder_names_its_flag(unsaid, capsys):
    torch.save(DepthAnything("vit_tiny_patch16_224").state_dict(), "plain.pth")
    for name in LINES:
        assert run(name) == 2
        assert "--encoder vit_tiny_patch16_224" in capsys.readouterr().err


def test_flags_of_one_model_are_refused_for_several(unsaid, capsys):
    save_model(DepthAnything("vits"), "b.safetensors")
    for flag, value in (("--weights-max-depth", "20"), ("--weights-version", "1"), ("--encoder", "vits")):
        assert run("evaluate", "b.safetensors", flag, value) == 2
        assert f"{flag} {value}" in capsys.readouterr().err


def test_training_names_commands_instead_of_arguments(unsaid):
    config = make_config("stage=pseudolabel", "encoder=vits", "teacher=plain.pth", image_size=70)
    with pytest.warns(ArgumentWarning) as caught:
        load_teacher(config)
    told = [str(warning.message) for warning in caught]
    export = "depth-anything export --to safetensors --weights plain.pth --output NEW.safetensors"
    assert len(told) == 2 and all(export in sentence for sentence in told)
    assert "--weights-version 1" in told[0] and "--max-depth 20" in told[1]

    config = make_config("stage=teacher", "encoder=vits", init="plain.pth")
    with pytest.warns(ArgumentWarning, match=re.escape(export)):
        build_model(config)
