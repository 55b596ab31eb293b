"""The documents are true: commands parse, links work, every module is listed, printed numbers are real."""

import argparse
import importlib.util
import math
import os
import re
import shlex
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from fork_server import ForkServer
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from depth_anything import DepthAnything, save_model
from depth_anything.cli import build_parser
from depth_anything.planning.pipeline import split_stages

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOLDERS = ("docs", "docs/pictures", "benchmarks", "benchmarks/results", "slurm", "containers")
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).glob("*.md"))]
)
OWN_TESTS = ("docs/own-data.md", "docs/extending.md")  # their commands run in tests of their own
MAX_PICTURE_BYTES = 300_000
MAX_LINE, MAX_README_WORDS = 120, 900


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", text)


def commands() -> list[str]:
    """Return every command of the documents: lines of shell blocks, and commands quoted in sentences."""
    found = []
    for page in DOCUMENTS:
        if page.relative_to(ROOT).as_posix() in OWN_TESTS:
            continue
        text = page.read_text(encoding="utf-8")
        lines = "".join(blocks(text, "sh")).replace("\\\n", " ").splitlines()
        found += [line for line in lines if shlex.split(line, comments=True)]
        prose = re.sub(r"(?ms)^```.*?^```$", "", text)
        found += re.findall(r"`((?:make|sbatch|python train\.py) [^`…]+)`", prose)
    return sorted({command for command in found if command.strip()})


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        name, equals, _ = word.partition("=")
        known = rf"(?m)^{name} \?=" if equals else rf"(?m)^{name}:.*##"
        assert re.search(known, makefile), f"the Makefile has no {name}"


def check_train(overrides: list[str]) -> None:
    if not any(word.startswith(("stage=", "experiment=claims/")) for word in overrides):
        assert overrides == ["--help"]
        return
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        OmegaConf.to_container(compose("train", overrides), resolve=True, throw_on_missing=True)


def check_cli(words: list[str]) -> None:
    try:
        build_parser().parse_args(words)
    except SystemExit:
        pytest.fail(f"depth-anything {shlex.join(words)} does not parse")


def check_script(script: str, flags: list[str], fork_server: ForkServer) -> None:
    """Run a script where there is nothing to read: it reports that, and does not print its usage."""
    typed = [sys.executable, str(ROOT / script), *flags]
    with tempfile.TemporaryDirectory() as empty:
        offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = fork_server.run(typed, cwd=Path(empty), env=offline)
    assert done.returncode == 2 and "usage" not in done.stderr, done.stderr


def check_sbatch(words: list[str]) -> None:
    words = [word for word in words if not word.startswith("--")]
    script, arguments = ROOT / words[0], words[1:]
    assert script.is_file()
    if script.name == "pipeline.sh":
        check_pipeline(arguments)
    else:
        check_submit([script.stem, *arguments])


def check_submit(words: list[str]) -> None:
    """Check the words of slurm/submit.sh: options of sbatch, a script, and its arguments."""
    while words[0].startswith("--"):
        words = words[1:]
    script, arguments = words[0], words[1:]
    assert (ROOT / "slurm" / f"{script}.sbatch").is_file()
    if script in ("evaluate", "shard"):
        check_cli([script, *arguments])
    else:
        check_train(arguments if script == "train" else ["stage=pseudolabel", *arguments])


def check_pipeline(words: list[str]) -> None:
    words = [word for word in words if word != "--dry-run"]
    split = words.index("--") if "--" in words else len(words)
    for overrides in split_stages(words[:split]):
        check_train(overrides)
    if words[split:]:
        check_cli(["evaluate", *words[split + 1 :]])


def check_pip(words: list[str]) -> None:
    """The extras that a command installs are those of pyproject.toml."""
    extras = re.findall(r"\[([\w,]+)\]", " ".join(words))
    known = (ROOT / "pyproject.toml").read_text()
    assert words[0] == "install" and extras
    for extra in extras[0].split(","):
        assert re.search(rf"(?m)^{extra} = \[", known), f"pyproject.toml has no extra {extra}"


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_documents_parses(command: str, fork_server: ForkServer) -> None:
    program, *words = shlex.split(command, comments=True)
    if program == "python":
        script = words.pop(0)
        assert (ROOT / script).is_file()
        if script == "train.py":
            check_train(words)
        elif "/" not in script:
            check_script(script, words, fork_server)
    else:
        check = {"make": check_make, "depth-anything": check_cli, "sbatch": check_sbatch, "pip": check_pip}
        check |= {"slurm/submit.sh": check_submit, "slurm/pipeline.sh": check_pipeline}
        check[program](words)


def test_the_documents_have_every_command() -> None:
    found = commands()
    for command in ("make quickstart", "make test", "python train.py stage=teacher", "make claims"):
        assert command in found
    shown = {
        shlex.split(command, comments=True)[1] for command in found if command.startswith("depth-anything")
    }
    assert shown == set(subcommands(build_parser()))


def subcommands(parser: argparse.ArgumentParser) -> list[str]:
    (action,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return list(action.choices)


@pytest.mark.parametrize("key", sorted(set(re.findall(r"`([a-z_.]+)=[^`]*`", README))))
def test_a_config_key_of_the_readme_exists(key: str) -> None:
    if key in ("stage", "size", "sources", "trainer", "logger"):
        return
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("train", ["stage=student", "size=paper"])
        known = OmegaConf.select(config, key, default="no such key") != "no such key"
        assert known or key in compose("train", ["stage=pseudolabel"]), f"configs/ has no key {key}"


def test_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(DepthAnything("vits"), "checkpoints/depth_anything_v2_vits.pth", format="official")
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
def test_a_link_works(page: str, target: str) -> None:
    path, _, anchor = target.partition("#")
    found = (ROOT / page).parent / path if path else ROOT / page
    assert found.exists()
    if anchor:
        heads = re.findall(r"(?m)^#+ (.+)$", found.read_text(encoding="utf-8"))
        assert anchor in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
    if found.suffix in (".jpg", ".png"):
        assert found.stat().st_size < MAX_PICTURE_BYTES


def test_links_are_collected() -> None:
    assert ("README.md", "docs/architecture.md") in links()
    assert ("docs/follow-a-sample.md", "../depth_anything/losses.py") in links()


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_architecture_lists_every_module() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    script = load_script("list_modules")
    assert page == script.replace_list(page, script.list_modules()), (
        "docs/architecture.md is out of date; type  python docs/list_modules.py --write"
    )


def test_the_architecture_names_paths_that_exist() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    tests = set(re.findall(r"`(tests/[\w/]+(?:\.py)?)`", text))
    assert len(tests) > 15
    paths = tests | set(re.findall(r"`((?:depth_anything|configs)/[\w/.]+)`", text))
    assert not [path for path in paths if not (ROOT / path).exists()]
    contracts = text.split("## Contracts and their tests")[1].split("\n## ")[0]
    for where in re.findall(r"In (.*?); tested", re.sub(r"\s+", " ", contracts)):
        for path in re.findall(r"`([\w/]+(?:\.py)?)`", where):
            assert (ROOT / path).exists() or (ROOT / "depth_anything" / path).exists(), path


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_a_document_has_short_lines_and_names_no_machine(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not [line for line in text.splitlines() if len(line) > MAX_LINE]
    assert not re.search(r"(?<![\w.])/(?:work|tmp|home|root)/", text)


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= MAX_README_WORDS


# docs/follow-a-sample.md

PAGE = (ROOT / "docs/follow-a-sample.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def printed() -> str:
    return load_script("follow_a_sample").printed()


def close(documented: str, actual: str) -> bool:
    """Numbers may differ by rounding of another build of torch or of a codec; words, shapes and dtypes may not."""
    try:
        return math.isclose(float(documented), float(actual), rel_tol=0.03, abs_tol=0.02)
    except ValueError:
        return documented == actual


def test_the_document_has_the_numbers_that_the_script_prints(printed: str) -> None:
    documented = "".join(blocks(PAGE, "text")).splitlines()
    for here, there in zip(documented, printed.splitlines(), strict=True):
        pairs = list(zip(here.split(), there.split(), strict=False))
        same = len(here.split()) == len(there.split()) and all(close(*pair) for pair in pairs)
        assert same, (
            f"{here!r} is now {there!r}; after a change on purpose: python docs/follow_a_sample.py --write"
        )


def test_every_step_of_the_script_has_a_section(printed: str) -> None:
    steps = [line[2:] for line in printed.splitlines() if line.startswith("# ")]
    assert [int(step.split()[0]) for step in steps] == list(range(1, 12))
    assert [int(n) for n in re.findall(r"(?m)^## (\d+)\. ", PAGE)] == list(range(1, 12))


@pytest.mark.parametrize(
    ("name", "file"), re.findall(r"\[`([\w.]+)`\]\(\.\./(depth_anything/[\w/]+\.py)\)", PAGE)
)
def test_a_function_of_the_document_is_in_its_file(name: str, file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    for part in name.removesuffix(".py").split("."):
        assert file.endswith(f"/{name}") or re.search(rf"(?m)^ *(?:def|class) {part}\b", text), (
            f"{name} is not in {file}"
        )
