"""Modules import lower layers only, heavy libraries are imported in few places, functions and files are short."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import depth_anything

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "depth_anything"
SCRIPTS = ("train.py", "run.py", "run_video.py", "app.py")

# A top-level module or package may import itself and lower layers, but not others of its layer.
LAYERS = (
    {"errors"},
    {"classes", "devices", "disk", "geometry", "host_memory", "licenses", "preprocess"},
    {"locks"},
    {"data"},
    {"model", "losses", "metrics", "visualize"},
    {"progress"},
    {"ingest"},
    {"scenes"},
    {"inference"},
    {"evaluation", "export"},
    {"inspect", "teachers"},
    {"demo", "training"},
    {"planning"},
    {"cli"},
    {"__main__"},
    set(SCRIPTS),
)
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}

HYDRA = tuple(
    f"depth_anything/training/{name}.py" for name in ("command", "check_config", "optimizer", "redact", "run")
)
# Library → the only files that may import it.
ALLOWED_IN = {
    "pytorch_lightning": ("depth_anything/training/",),
    "lightning": ("depth_anything/training/",),
    "lightning_fabric": ("depth_anything/training/",),
    "wandb": ("depth_anything/training/",),
    "hydra": HYDRA,
    "omegaconf": HYDRA,
}


def sources() -> list[str]:
    files = [*PACKAGE.rglob("*.py"), *(ROOT / name for name in SCRIPTS)]
    return sorted(file.relative_to(ROOT).as_posix() for file in files if file.exists())


def imported(tree: ast.AST, path: str) -> Iterator[str]:
    """Yield every module a file imports, at its top or inside functions, by its full name."""
    package = path.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                public = depth_anything._PUBLIC.get(alias.name) if module == "depth_anything" else None
                yield public or f"{module}.{alias.name}"


def top_level_name(path: str) -> str:
    return path if path in SCRIPTS else path.split("/")[1].removesuffix(".py")


def forbidden_imports(tree: ast.AST, path: str) -> list[str]:
    """Describe the imports of a file from its own or higher layers, and of libraries that are not allowed there."""
    found = []
    here = top_level_name(path)
    for module in imported(tree, path):
        top, _, rest = module.partition(".")
        if top in ALLOWED_IN and not path.startswith(ALLOWED_IN[top]):
            found.append(f"{path} imports {top}, which is allowed in {' and '.join(ALLOWED_IN[top])}")
        name = rest.partition(".")[0]
        if top == "depth_anything" and here != "__init__" and name in LAYER and name != here:
            if LAYER[name] >= LAYER[here]:
                found.append(f"{path} imports {module}, which is not in a lower layer")
    return found


@pytest.mark.parametrize("path", sources())
def test_a_file_imports_lower_layers_and_is_short(path):
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert top_level_name(path) in {*LAYER, "__init__"}, f"{path} is in no layer"
    assert not forbidden_imports(tree, path)
    lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
    most = {"train.py": 14, "depth_anything/training/run.py": 100}.get(path, 500)
    assert lines <= most, f"{path} has {lines} lines, more than {most}"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 80, f"{path}: {node.name} has {length} lines, more than 80"


@pytest.mark.parametrize(
    ("path", "code", "fault"),
    [
        ("depth_anything/losses.py", "from depth_anything.geometry import masked_float", None),
        ("depth_anything/losses.py", "from depth_anything import __version__", None),
        ("depth_anything/losses.py", "from depth_anything.metrics import depth_metrics", "lower layer"),
        ("depth_anything/losses.py", "from . import metrics", "lower layer"),
        ("depth_anything/data/shards.py", "from ..model import dpt", "lower layer"),
        ("depth_anything/data/shards.py", "from . import codec\nfrom .codec import encode", None),
        ("depth_anything/model/dpt.py", "from depth_anything import Predictor", "lower layer"),
        ("depth_anything/model/dpt.py", "def f():\n    import depth_anything.training.run", "lower layer"),
        ("depth_anything/training/base.py", "from depth_anything.evaluation.evaluate import evaluate", None),
        ("depth_anything/training/base.py", "import pytorch_lightning as pl", None),
        ("depth_anything/training/base.py", "from omegaconf import DictConfig", "allowed in"),
        ("depth_anything/training/run.py", "import hydra.utils", None),
        (
            "depth_anything/inference/video.py",
            "def f():\n    from lightning.fabric import Fabric",
            "allowed in",
        ),
        ("depth_anything/cli/predict_command.py", "import depth_anything.training.run", None),
        ("run.py", "from depth_anything.cli import main", None),
        ("depth_anything/cli/predict_command.py", "import wandb", "allowed in"),
    ],
)
def test_forbidden_imports_are_found(path, code, fault):
    found = forbidden_imports(ast.parse(code), path)
    assert len(found) == (fault is not None)
    assert fault is None or fault in found[0]


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_importing_the_package_is_cheap():
    heavy = {
        "torch",
        "numpy",
        "cv2",
        "timm",
        "lightning",
        "pytorch_lightning",
        "hydra",
        "wandb",
        "matplotlib",
    }
    assert not modules_after("import depth_anything") & heavy
    assert "torch" in modules_after("import depth_anything.losses")


def test_public_names_are_listed_and_others_refused():
    assert sorted(depth_anything.__all__) == sorted(depth_anything._PUBLIC)
    with pytest.raises(AttributeError, match="has no attribute 'predictor'"):
        depth_anything.predictor  # noqa: B018
