"""The commands of docs/own-data.md parse, and those before the training run; its tables list every key."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from depth_anything.cli import build_parser, main
from depth_anything.data.shards import open_set
from depth_anything.ingest import maps
from depth_anything.ingest.declaration import DECLARATION_KEYS, load_declaration

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/own-data.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"(?ms)^```sh\n(.*?)^```$", PAGE)
    for line in block.replace("\\\n", " ").splitlines()
    if line
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_parses(command):
    program, *words = shlex.split(command)
    if program == "depth-anything":
        build_parser().parse_args(words)
    elif words[0] == "train.py":
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            OmegaConf.to_container(compose("train", words[1:]), resolve=True, throw_on_missing=True)
    else:
        assert (ROOT / words[0]).is_file()


def test_the_commands_before_the_training_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = 0
    for command in COMMANDS:
        program, *words = shlex.split(command)
        if words[0] == "docs/make_own_data.py":
            monkeypatch.setattr(sys, "argv", words)
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        elif program == "depth-anything" and not {"outputs/", "labels"} & set(
            re.findall("outputs/|labels", command)
        ):
            assert main(words) == 0, command
            run += 1
    assert run == 6
    assert "look:" not in capsys.readouterr().err
    assert (open_set("data/photos").records, open_set("data/yard").records) == (32, 24)
    block = re.findall(r"(?ms)^```yaml\n(.*?)^```$", PAGE)[0]
    assert Path("try/set.yaml").read_text() == block
    assert load_declaration("try/set.yaml").sky == 65535


def table(heading):
    part = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"(?m)^\| (`[^|]*) \|", part)


def test_every_key_and_every_suffix_has_a_row():
    rows = [word for row in table("All keys") for word in re.findall("`([^`]+)`", row)]
    assert sorted(rows) == sorted([*DECLARATION_KEYS, *maps.MAP_SUFFIXES])
