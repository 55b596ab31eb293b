"""The defaults in docs/recipe.md are those of configs/, and no number of the recipe is missing."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from depth_anything.data import transforms

ROOT = Path(__file__).resolve().parent.parent
ENTRY = re.compile(r"^- `([^`]+)` = `([^`]+)` \(([^)]+)\)\. (.+)", re.M)


def rows() -> list[tuple[str, str, str, str]]:
    """Read (file, key, default, statement) of every entry, one for each file that an entry names."""
    text = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    return [
        (where.strip(), key, default, statement)
        for key, default, files, statement in ENTRY.findall(re.sub(r"\n  +", " ", text))
        for where in files.split(",")
    ]


def held(where: str, key: str) -> Any:
    """Look a dotted key up in configs/WHERE.yaml as it stands, not composed."""
    file = ROOT / "configs" / f"{where}.yaml"
    text = file.read_text(encoding="utf-8")
    value = yaml.safe_load(text)
    parts = key.split(".")
    if "@package _global_" not in text.splitlines()[0] and "/" in where:
        assert parts.pop(0) == where.split("/")[0]
    for part in parts:
        assert part in value, f"{key} is not in {file.relative_to(ROOT)}"
        value = value[part]
    return value


def number(value: Any) -> Any:
    """Read 5.0e-6, which YAML 1.1 leaves a string where it lacks the dot."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


@pytest.mark.parametrize(("where", "key", "default", "statement"), rows())
def test_the_default_is_the_configs(where: str, key: str, default: str, statement: str) -> None:
    assert number(yaml.safe_load(default)) == number(held(where, key))


def test_no_row_is_there_twice() -> None:
    named = [(where, key) for where, key, _, _ in rows()]
    assert len(named) == len(set(named)) > 40


@pytest.mark.parametrize("stage", ["teacher", "student", "metric", "pretrain"])
def test_every_number_of_the_recipe_has_a_row(stage: str) -> None:
    config = yaml.safe_load((ROOT / "configs" / "stage" / f"{stage}.yaml").read_text())
    keys = {"encoder", "batch_size", "steps", "image_size", "init"}
    keys |= {
        "perturb",
        "crop_area",
        "sky",
        "cutmix",
        "mix",
        "start",
        "freeze_encoder",
        "lora",
        "max_depth",
        "min_depth",
        "replay",
        "replay_share",
    } & config.keys()
    keys |= {f"recipe.{key}" for key in config["recipe"] if key not in ("_target_", "steps")}
    told = {key for where, key, _, _ in rows() if where == f"stage/{stage}"}
    assert keys <= told, f"docs/recipe.md does not tell of {sorted(keys - told)}"


def test_the_papers_numbers_are_the_papers() -> None:
    """Arithmetic on the doc's own words, so that a changed default changes the sentence beside it."""
    teacher, student = (
        yaml.safe_load((ROOT / f"configs/stage/{s}.yaml").read_text()) for s in ("teacher", "student")
    )
    assert round(teacher["batch_size"] * teacher["steps"] / 1e6, 1) == 10.2
    assert round(teacher["batch_size"] * teacher["steps"] / 595e3) == 17
    assert round(student["batch_size"] * student["steps"] / 1e6) == 92
    assert round(student["batch_size"] * student["steps"] / 62e6, 1) == 1.5
    metric, zoe = (
        yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text())
        for name in ("stage/metric", "experiment/zoedepth")
    )
    sources = {
        name: yaml.safe_load((ROOT / f"configs/sources/{name}.yaml").read_text())
        for name in ("hypersim", "vkitti2")
    }
    assert sources["hypersim"]["steps"] == 59_543 * 120 // metric["batch_size"]
    assert metric["steps"] == f"${{oc.select:sources.steps,{sources['hypersim']['steps']}}}"
    assert sources["vkitti2"]["steps"] == 19_559 * 120 // metric["batch_size"]
    assert zoe["steps"] == 24_231 * 5 // zoe["batch_size"] and 23_158 * 5 // zoe["batch_size"] == 7236


def test_the_perturbations_are_as_strong_as_told() -> None:
    assert transforms.BRIGHTNESS == transforms.CONTRAST == transforms.SATURATION == 0.5
    assert (transforms.HUE, transforms.BLUR_SIGMA) == (0.25, (0.1, 2.0))
