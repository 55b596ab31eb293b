"""The command line: its pinned flags, its messages and its exit codes."""

import argparse
import errno
import subprocess
import sys
import warnings

import pytest
from shard_builders import make
from typing_commands import complaint

from depth_anything import __version__
from depth_anything.cli import build_parser, main, run, shard_commands

# What any command that writes a set of raw data takes.
WRITING = {
    "--help": None,
    "source": None,
    "output": None,
    "--name": None,
    "--per-shard": 1000,
    "--short-side": None,
    "--part": (1, 1),
    "--workers": 0,
    "--licence": None,
}
# And if its records have labels.
LABELLED = {**WRITING, "--leave-out": None, "--sky": None}

# Command → what may follow it: option → default, positionals with None. Public: what is here stays or is renamed
# with a word in CHANGELOG.md.
SURFACE = {
    "plan": {
        "--help": None,
        "overrides": None,
        "--gpus": 8,
        "--device": "h100",
        "--peak-tflops": None,
        "--gpus-per-node": 8,
        "--mfu": None,
        "--images-per-core": None,
        "--price-per-gpu-hour": None,
        "--records": [],
        "--node-network": 400.0,
        "--write-speed": 1.0,
        "--read-speed": 1.0,
        "--restart": 10.0,
        "--time-limit": 24.0,
        "--gpu-hours-per-failure": None,
        "--json": False,
    },
    "export": {
        "--help": None,
        "--weights": None,
        "--encoder": None,
        "--dataset": None,
        "--max-depth": None,
        "--weights-version": None,
        "--to": None,
        "--output": None,
        "--precision": "fp32",
        "--opset": 18,
    },
    "": {"--help": None, "--version": None, "--traceback": False, "command": None},
    "shard": {"--help": None, "kind": None},
    "shard scenes": {
        "--help": None,
        "output": None,
        "--look": "synthetic",
        "--layout": "classic",
        "--fov": None,
        "--classes": False,
        "--count": 1024,
        "--seed": 0,
        "--size": (256, 256),
        "--per-shard": 128,
        "--images-only": False,
    },
    "shard images": WRITING,
    "shard captions": {**WRITING, "captions": None},
    "shard degraded": {"--help": None, "source": None, "output": None, "--name": None, "--seed": 0},
    "shard cityscapes": {**WRITING, "--leave-out": None, "--split": "train"},
    "shard ade20k": {**WRITING, "--leave-out": None, "--split": "training"},
    "shard custom-segmentation": WRITING,
    **{
        f"shard {name}": {**WRITING, "--leave-out": None}
        for name in (
            "bdd100k",
            "landmarks",
            "imagenet21k",
            "lsun",
            "objects365",
            "openimages",
            "places365",
            "sa1b",
        )
    },
    **{f"shard {name}": LABELLED for name in ("blendedmvs", "irs", "tartanair", "diml", "megadepth")},
    "shard hypersim": {**LABELLED, "--split": "train", "--images": "preview", "--cameras": None},
    "shard tartanair2": {**LABELLED, "--camera": "lcam_front"},
    "shard hrwsi": {**LABELLED, "--split": "train"},
    "shard vkitti2": {**LABELLED, "--camera": "0"},
    "shard custom": {**WRITING, "--sky": None, "--check-only": False},
    "shard index": {"--help": None, "source": None, "--name": None, "--licence": None},
    "merge": {"--help": None, "output": None, "folders": None},
    "stats": {"--help": None, "set": None, "--count": 500, "--output": "stats.png"},
    "verify": {"--help": None, "set": None, "--decode": False, "--images": None, "--workers": 1},
    "bench-data": {
        "--help": None,
        "set": None,
        "--labels": None,
        "--workers": None,
        "--image-size": 518,
        "--batch-size": 8,
        "--samples": 256,
        "--json": None,
    },
    "view": {"--help": None, "set": None, "--images": None, "--count": 16, "--output": "sheet.png"},
    "predict": {
        "--help": None,
        "--fov": None,
        "--multi-scale": False,
        "source": None,
        "--img-path": None,
        "--outdir": "./vis_depth",
        "--weights": None,
        "--encoder": None,
        "--dataset": None,
        "--max-depth": None,
        "--weights-version": None,
        "--pred-only": False,
        "--grayscale": False,
        "--colormap": None,
        "--format": ("png16",),
        "--save-numpy": False,
        "--focal": None,
        "--max-points": 1_000_000,
        "--batch-size": 1,
        "--input-size": None,
        "--device": "auto",
        "--precision": "fp32",
        "--resample": "official",
        "--tiles": None,
    },
    "video": {
        "--help": None,
        "--focal": None,
        "--fov": None,
        "source": None,
        "--output": None,
        "--weights": None,
        "--encoder": None,
        "--dataset": None,
        "--max-depth": None,
        "--weights-version": None,
        "--pred-only": False,
        "--grayscale": False,
        "--colormap": None,
        "--range": "clip",
        "--smooth": 0.0,
        "--format": ("mp4",),
        "--fps": "24",
        "--batch-size": 4,
        "--input-size": None,
        "--device": "auto",
        "--precision": "fp32",
        "--resample": "official",
        "--tiles": None,
    },
    "demo": {
        "--help": None,
        "--weights": None,
        "--encoder": None,
        "--max-depth": None,
        "--weights-version": None,
        "--host": "127.0.0.1",
        "--port": 7860,
        "--max-megapixels": 50.0,
        "--max-megabytes": 30.0,
        "--queue": 16,
        "--input-size": None,
        "--device": "auto",
        "--precision": "fp32",
        "--resample": "official",
    },
    "calibrate": {
        "--help": None,
        "--data": None,
        "--limit": 5,
        "--focal": None,
        "--fov": None,
        "images": None,
        "--points": (),
        "--point": [],
        "--output": None,
        "--threshold": 0.1,
        "--weights": None,
        "--encoder": None,
        "--dataset": None,
        "--max-depth": None,
        "--weights-version": None,
        "--input-size": None,
        "--device": "auto",
        "--precision": "fp32",
        "--resample": "official",
    },
    "evaluate": {
        "--help": None,
        "--focal": None,
        "--fov": None,
        "--multi-scale": False,
        "--weights": [],
        "--predictions": [],
        "--quantity": None,
        "--data": None,
        "--benchmarks": None,
        "--root": None,
        "--protocol": None,
        "--mean-map": None,
        "--output": None,
        "--limit": None,
        "--max-depth": None,
        "--compare": False,
        "--part": (1, 1),
        "--encoder": None,
        "--weights-version": None,
        "--weights-max-depth": None,
        "--input-size": None,
        "--device": "auto",
        "--precision": "fp32",
        "--resample": "official",
    },
}


def surface_of(parser, name=""):
    found = {name: {}}
    for action in parser._actions:
        title = next((o for o in action.option_strings if o.startswith("--")), action.dest)
        found[name][title] = None if action.default == argparse.SUPPRESS else action.default
        if isinstance(action, argparse._SubParsersAction):
            for child, sub in action.choices.items():
                found |= surface_of(sub, f"{name} {child}".strip())
    return found


def test_the_console_flags_are_pinned():
    assert surface_of(build_parser()) == SURFACE


def test_help_loads_nothing_heavy():
    code = (
        "import sys\nfrom depth_anything.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "heavy = {'torch', 'numpy', 'cv2', 'PIL', 'matplotlib', 'jinja2', 'tqdm', 'pytorch_lightning', 'hydra'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    for arguments in (["--help"], ["--version"], ["evaluate", "--help"], ["shard", "scenes", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "depth-anything" in done.stdout


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == f"depth-anything {__version__}"


def test_python_m_is_the_same_program():
    done = subprocess.run(
        [sys.executable, "-m", "depth_anything", "--version"], capture_output=True, text=True
    )
    assert done.stdout.strip() == f"depth-anything {__version__}"


def test_an_unknown_command_names_the_known_ones(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["evaluat"])
    assert stop.value.code == 2 and "'evaluate'" in capsys.readouterr().err


def test_warnings_are_one_line_without_the_code(capsys, monkeypatch):
    def warn(options):
        warnings.warn("the file does not say what it is", stacklevel=2)

    monkeypatch.setattr(shard_commands, "_run_verify", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["verify", "anything"]) == 0
    assert capsys.readouterr().err == "depth-anything: the file does not say what it is\n"


def test_an_error_shows_its_traceback_only_when_asked(tmp_path, capsys):
    complaint(capsys, "view", tmp_path / "none")
    with pytest.raises(ValueError):
        main(["--traceback", "view", str(tmp_path / "none")])


def test_ctrl_c_is_130(monkeypatch, capsys):
    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(shard_commands, "_run_verify", interrupt)
    assert main(["verify", "anything"]) == 130
    assert capsys.readouterr().err.strip() == "depth-anything: interrupted"


def test_a_closed_pipe_is_not_an_error(tmp_path):
    """As `depth-anything … | head -1`: no traceback, no message, the exit code of a closed pipe."""
    make(tmp_path, size=30)
    line = [sys.executable, "-u", "-m", "depth_anything", "verify", str(tmp_path)]
    verify = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    verify.stdout.close()
    assert verify.stderr.read() == "" and verify.wait() == 141
    verify.stderr.close()


def test_a_read_only_disk_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    def write(options: argparse.Namespace) -> None:
        raise OSError(errno.EROFS, "Read-only file system", "sets/own")

    parser = argparse.ArgumentParser(prog="x")
    parser.set_defaults(run=write)
    assert run(parser, []) == 2
    assert "make sets writable and start the same command again" in capsys.readouterr().err
