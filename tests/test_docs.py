"""What the documents say is so: commands can be typed, links lead somewhere, files are all named, tensors are real."""

import argparse
import importlib.util
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from depth_anything import DepthAnything, save_model
from depth_anything.cli import build_parser

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks/README.md", ROOT / "slurm/README.md"]
)
MAX_PICTURE_BYTES = 300_000


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", text)


def commands() -> list[str]:
    """Every command of the README: lines of its shell blocks, and what its sentences show of make and the programs."""
    lines = [line for block in blocks(README, "sh") for line in block.splitlines() if line.strip()]
    prose = re.sub(r"(?ms)^```.*?^```$", "", README)
    spans = re.findall(r"`((?:make|sbatch|python train\.py) [^`]+)`", prose)
    return lines + spans


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        name, equals, _ = word.partition("=")
        known = rf"(?m)^{name} \?=" if equals else rf"(?m)^{name}:.*##"
        assert re.search(known, makefile), f"the Makefile has no {name}"


def check_train(overrides: list[str]) -> None:
    assert any(word.startswith("stage=") for word in overrides)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        OmegaConf.to_container(compose("train", overrides), resolve=True, throw_on_missing=True)


def check_cli(words: list[str]) -> None:
    try:
        build_parser().parse_args(words)
    except SystemExit:
        pytest.fail(f"depth-anything {shlex.join(words)} does not parse")


def check_script(script: str, flags: list[str]) -> None:
    """Type a root script's flags where there is nothing to read: it says so, and does not print its usage."""
    typed = [sys.executable, str(ROOT / script), *flags]
    with tempfile.TemporaryDirectory() as empty:
        offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(typed, cwd=empty, env=offline, capture_output=True, text=True)
    assert done.returncode == 2 and "usage" not in done.stderr, done.stderr


def check_sbatch(words: list[str]) -> None:
    words = [word for word in words if not word.startswith("--")]
    script, overrides = ROOT / words[0], words[1:]
    assert script.is_file()
    check_train(overrides if script.name == "train.sbatch" else ["stage=pseudolabel", *overrides])


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_readme_can_be_typed(command: str) -> None:
    program, *words = shlex.split(command)
    if program == "python":
        script = words.pop(0)
        {"train.py": check_train}.get(script, lambda flags: check_script(script, flags))(words)
    else:
        {"make": check_make, "depth-anything": check_cli, "sbatch": check_sbatch}[program](words)


def test_the_commands_are_found() -> None:
    found = commands()
    for command in ("make quickstart", "make test", "python train.py stage=teacher", "make claim"):
        assert command in found
    assert {shlex.split(command)[1] for command in found if command.startswith("depth-anything")} == set(
        subcommands(build_parser())
    )


def subcommands(parser: argparse.ArgumentParser) -> list[str]:
    (action,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return list(action.choices)


@pytest.mark.parametrize("key", sorted(set(re.findall(r"`([a-z_.]+)=[^`]*`", README))))
def test_a_key_of_the_readme_is_a_key(key: str) -> None:
    if key in ("stage", "size", "sources", "trainer", "logger"):
        return
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("train", ["stage=student", "size=paper"])
        known = OmegaConf.select(config, key, default="no such key") != "no such key"
        assert known or key in compose("train", ["stage=pseudolabel"]), f"{key} is no key of configs/"


def test_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(DepthAnything("vitn"), "outputs/student-vitn-tiny/model.safetensors")
    Image.new("RGB", (60, 40)).save("photo.jpg")
    (code,) = blocks(README, "python")
    names: dict[str, object] = {}
    exec(code, names)
    disparity = names["disparity"]
    assert isinstance(disparity, np.ndarray)
    assert (disparity.shape, disparity.dtype) == ((40, 60), np.float32)


def links() -> list[tuple[str, str]]:
    found = []
    for page in DOCUMENTS:
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                found.append((page.relative_to(ROOT).as_posix(), target))
    return sorted(set(found))


@pytest.mark.parametrize(("page", "target"), links())
def test_a_link_leads_somewhere(page: str, target: str) -> None:
    path, _, anchor = target.partition("#")
    found = (ROOT / page).parent / path if path else ROOT / page
    assert found.exists()
    if anchor:
        heads = re.findall(r"(?m)^#+ (.+)$", found.read_text(encoding="utf-8"))
        assert anchor in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
    if found.suffix in (".jpg", ".png"):
        assert found.stat().st_size < MAX_PICTURE_BYTES


def test_links_are_found() -> None:
    assert ("README.md", "docs/architecture.md") in links()
    assert ("docs/follow-a-sample.md", "../depth_anything/losses.py") in links()


def named_files() -> set[str]:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    return set(re.findall(r"`(depth_anything/[\w/]+\.py)`", text))


def test_the_architecture_names_every_file_and_no_other() -> None:
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "depth_anything").rglob("*.py")}
    assert named_files() == files


def test_the_architecture_names_tests_that_exist() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(tests/[\w/]+(?:\.py)?)`", text))
    assert len(named) > 15
    assert not [path for path in named if not (ROOT / path).exists()]


def test_no_document_names_a_machine() -> None:
    for page in DOCUMENTS:
        assert not re.search(r"(?<![\w.])/(?:work|tmp|home|root)/", page.read_text(encoding="utf-8")), page


# One sample's way

PAGE = (ROOT / "docs/follow-a-sample.md").read_text(encoding="utf-8")


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("follow_a_sample", ROOT / "docs/follow_a_sample.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def printed() -> str:
    return script().printed()


def alike(told: str, real: str) -> bool:
    """Numbers may differ by what another build of torch or of a codec rounds; words, shapes and dtypes may not."""
    try:
        return math.isclose(float(told), float(real), rel_tol=0.03, abs_tol=0.02)
    except ValueError:
        return told == real


def test_the_sample_is_what_the_document_prints(printed: str) -> None:
    told = "".join(blocks(PAGE, "text")).splitlines()
    real = printed.splitlines()
    again = "type  python docs/follow_a_sample.py --write  if the change is meant"
    for here, there in zip(told, real, strict=True):
        pairs = list(zip(here.split(), there.split(), strict=False))
        same = len(here.split()) == len(there.split()) and all(alike(*pair) for pair in pairs)
        assert same, f"docs/follow-a-sample.md says {here!r}, it is {there!r}: {again}"


def test_every_hop_is_there(printed: str) -> None:
    hops = [line[2:] for line in printed.splitlines() if line.startswith("# ")]
    assert [int(hop.split()[0]) for hop in hops] == list(range(1, 12))
    assert [int(n) for n in re.findall(r"(?m)^## (\d+)\. ", PAGE)] == list(range(1, 12))


@pytest.mark.parametrize(
    ("name", "file"), re.findall(r"\[`([\w.]+)`\]\(\.\./(depth_anything/[\w/]+\.py)\)", PAGE)
)
def test_a_function_that_the_sample_passes_is_in_its_file(name: str, file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    for part in name.removesuffix(".py").split("."):
        assert file.endswith(f"/{name}") or re.search(rf"(?m)^ *(?:def|class) {part}\b", text), (
            f"{name} is not in {file}"
        )
