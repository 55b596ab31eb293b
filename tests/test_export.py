"""Exported programs: the network's output at every size and batch, in other runtimes; wrong programs are removed."""

import copy
import functools
import json
import os
import re
import shutil
import sys
import zipfile
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from depth_anything import DepthAnything, Predictor, export, load_model, save_model
from depth_anything.cli import main
from depth_anything.export import ExportCheck, ExportModule, export_model, format_checks, to_half_precision
from depth_anything.model.weights import fingerprint

ONNX_NOISE = [
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:The given buffer is not writable",  # torch 2.11, reading its own archive
]
pytestmark = [pytest.mark.filterwarnings(line) for line in ONNX_NOISE]


def network(**settings):
    """A tiny network whose layers all differ from their initial, neutral values."""
    torch.manual_seed(0)
    model = DepthAnything("vitn", **settings).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.uniform_(0.05, 1)
            elif name.endswith(("bias", "pos_embed")):
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def image(batch, height, width, patch=7):
    draw = torch.Generator().manual_seed(5)
    return torch.randn(batch, 3, height * patch, width * patch, generator=draw)


@torch.no_grad()
def share(model, run, batch):
    """Maximum difference as a share of the range of the network's map."""
    want = model(batch).numpy()
    got = run(batch.numpy())
    assert got.shape == want.shape and got.dtype == np.float32
    return float(np.abs(got - want).max() / np.ptp(want))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module", autouse=True)
def equal_exports_are_made_once():
    """Trace equal networks once, and convert each program once for an opset: both take many seconds."""
    programs, converted = {}, {}
    trace_program, convert = export.trace_program, torch.onnx.export

    def trace_once(module):
        network = module.network
        key = (
            fingerprint(network), network.max_depth, module.calibration, module.dtype, module.position_rule
        )  # fmt: skip
        if key not in programs:
            programs[key] = trace_program(module)
        return programs[key]

    def convert_once(program, **settings):
        key = (id(program), *map(repr, settings.values()))
        if key not in converted:
            converted[key] = convert(program, **settings)
        return converted[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "trace_program", trace_once)
        patch.setattr(torch.onnx, "export", convert_once)
        yield


SIZES = [(1, 8, 6), (1, 6, 8), (3, 4, 4), (1, 10, 10), (1, 3, 25), (2, 3, 3)]


@pytest.fixture(scope="module")
def relative(tmp_path_factory):
    """A relative network as ONNX, through the command line."""
    folder = tmp_path_factory.mktemp("mes modèles – 深度")
    model = network()
    model.licence = "CC-BY-NC-4.0"
    save_model(model, folder / "model.safetensors")
    line = ["export", "--weights", str(folder / "model.safetensors"), "--to", "onnx", "--output"]
    assert main([*line, str(folder / "le modèle.onnx")]) == 0
    return model, folder / "le modèle.onnx"


def test_onnx_runs_at_any_size(relative):
    model, path = relative
    session = onnxruntime.InferenceSession(path)
    for size in SIZES:
        assert share(model, lambda x: session.run(None, {"image": x})[0], image(*size)) < 1e-5


def test_onnx_metadata(relative):
    _, path = relative
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    facts = {entry.key: entry.value for entry in proto.metadata_props}
    assert (facts["quantity"], facts["unit"], facts["max_depth"]) == ("disparity", "relative", "null")
    assert (facts["licence"], facts["patch"], facts["multiple"]) == ("CC-BY-NC-4.0", "7", "14")
    assert json.loads(facts["mean"]) == [0.485, 0.456, 0.406]
    session = onnxruntime.InferenceSession(path)
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, made.name, made.type) == (
        "image",
        "tensor(float)",
        "disparity",
        "tensor(float)",
    )
    assert [isinstance(side, str) for side in given.shape] == [True, False, True, True]
    assert not any(node.metadata_props for node in proto.graph.node)  # lines of code on this machine


def test_the_report_contains_the_checks(relative, capsys):
    _, path = relative
    report = json.loads((path.parent / f"{path.name}.json").read_text())
    assert report["made"]["encoder"] == "vitn" and report["made"]["precision"] == "fp32"
    shapes = [tuple(row["shape"]) for row in report["checks"]]
    assert len(shapes) == 6 and {shape[0] for shape in shapes} == {1, 2}
    assert {(1, 56, 42), (1, 42, 56)} < set(shapes)  # the example's number of tokens, turned round
    assert all(row["share"] <= report["tolerance"] == 1e-4 for row in report["checks"])
    assert {"le modèle.onnx", "le modèle.onnx.json", "model.safetensors"} <= set(names(path.parent))


def overflowing(**settings):
    """A network whose attention scores exceed 65504, the maximum of half precision."""
    model = network(**settings)
    with torch.no_grad():
        for block in model.pretrained.blocks:
            block.attn.qkv.weight[: 2 * 96] = 0
            block.attn.qkv.bias[: 2 * 96] = 150
    return model


@pytest.mark.heavy
def test_half_precision_of_a_metric_model(tmp_path):
    model = overflowing(max_depth=80.0)
    checks = export_model(model, tmp_path / "half.onnx", to="onnx", precision="fp16")
    assert all(row.share < 1e-2 for row in checks)
    session = onnxruntime.InferenceSession(tmp_path / "half.onnx")
    assert session.get_inputs()[0].type == session.get_outputs()[0].type == "tensor(float)"
    assert session.get_outputs()[0].name == "depth"
    found = session.run(None, {"image": image(1, 10, 12).numpy()})[0]
    assert np.isfinite(found).all() and found.min() > 0
    assert share(model, lambda x: session.run(None, {"image": x})[0], image(2, 10, 12)) < 1e-2
    kinds = {init.data_type for init in onnx.load(tmp_path / "half.onnx").graph.initializer if init.dims}
    assert onnx.TensorProto.FLOAT16 in kinds


def test_attention_scores_overflow_in_plain_half_precision():
    """This is why scores are computed in float32: plain half precision outputs NaN."""
    model, batch = overflowing(), image(1, 6, 6)
    plain = copy.deepcopy(model).half()
    for block in plain.pretrained.blocks:
        block.attn.fused_attn = False
    with torch.no_grad():
        assert plain(batch.half()).isnan().all()
        wide, want = to_half_precision(model)(batch.half()), model(batch)
    assert (wide.float() - want).abs().max() < 1e-2 * (want.max() - want.min())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_calibrated_program_outputs_meters(tmp_path, monkeypatch):
    model = network()
    model.input_size = 84
    model.calibration = (0.5, 0.01)
    export_model(model, tmp_path / "model.pt2", to="torch")
    assert run_card(tmp_path, monkeypatch)["output"].shape == (1, 84, 126)
    with zipfile.ZipFile(tmp_path / "model.pt2") as archive:  # no lines of code on this machine
        assert not any(b"stack_trace" in archive.read(name) for name in archive.namelist())
    with (tmp_path / "model.pt2").open("rb") as file:
        said = {"metadata.json": ""}
        run = torch.export.load(file, extra_files=said).module()
    facts = json.loads(said["metadata.json"])
    assert (facts["quantity"], facts["unit"], facts["calibration"]) == ("depth", "m", "[0.5, 0.01]")
    pixels = np.random.default_rng(0).integers(0, 256, (70, 84, 3), dtype=np.uint8)
    predictor = Predictor(model, device="cpu", input_size=70)
    prepared = torch.from_numpy(predictor.prepare(pixels))[None]
    assert prepared.shape[2:] == pixels.shape[:2]
    with torch.no_grad():
        np.testing.assert_allclose(run(prepared)[0].numpy(), predictor.predict(pixels), rtol=1e-4)
        for size in SIZES:
            torch.testing.assert_close(run(image(*size)), ExportModule(model, precision="fp32")(image(*size)))


def test_a_position_rule_is_exported():
    model = network()
    program = export.trace_program(
        ExportModule(model, precision="fp32", position_rule="transformers")
    ).module()
    theirs = functools.partial(model, position_rule="transformers")
    assert share(model, lambda x: program(torch.from_numpy(x)).detach().numpy(), image(1, 8, 6)) > 1e-4
    for size in SIZES:
        assert share(theirs, lambda x: program(torch.from_numpy(x)).detach().numpy(), image(*size)) < 1e-5


def test_weight_formats_can_be_loaded(tmp_path):
    model = network(max_depth=20.0)
    for to, name in (("safetensors", "m.safetensors"), ("transformers", "hf")):
        assert export_model(model, tmp_path / name, to=to) == []
        assert load_model(tmp_path / name).max_depth == 20.0
    with pytest.warns(UserWarning, match="max_depth=20"):
        export_model(model, tmp_path / "m.pth", to="official")


# Errors


class Wrong:
    """A program that differs from the network, fails, or has a fixed size."""

    def __init__(self, how):
        self.how = how

    def __call__(self, file):
        def run(batch):
            if self.how == "fails":
                raise RuntimeError("broadcast of 37 to 49\nand more")
            wrong = np.zeros(batch.shape[:1] + batch.shape[2:], np.float32)
            if self.how == "nan":
                wrong += np.nan
            return wrong.transpose(0, 2, 1) if self.how == "turned" else wrong

        return run


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("black", "model.pt2"),
        ("nan", "by inf"),
        ("fails", "56×42 .broadcast of 37 to 49.$"),
        ("turned", r"float32 \(1, 42, 56\).* float32 \(1, 56, 42\)"),
    ],
)
def test_a_program_that_differs_from_the_network_is_removed(tmp_path, monkeypatch, how, message):
    monkeypatch.setattr(export, "run_torch", Wrong(how))
    monkeypatch.setattr(export, "trace_program", lambda _: None)
    monkeypatch.setattr(export, "_write_torch", lambda program, file, facts, opset: file.write_bytes(b"x"))
    (tmp_path / "model.pt2").write_bytes(b"old")
    with pytest.raises(ValueError, match=message) as raised:
        export_model(network(), tmp_path / "model.pt2", to="torch")
    assert "\n" not in str(raised.value)
    assert names(tmp_path) == ["model.pt2"] and (tmp_path / "model.pt2").read_bytes() == b"old"


def test_invalid_exports_are_refused(tmp_path, monkeypatch, capsys):
    model = network()
    for arguments, message in (
        (
            {"to": "coreml"},
            "to='coreml'.* onnx, torch, transformers, official, safetensors",
        ),
        ({"to": "onnx", "precision": "int8"}, "precision='int8'.* fp32, fp16"),
        (
            {"to": "official", "precision": "fp16"},
            "precision=fp16 .*official",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            export_model(model, tmp_path / "m", **arguments)
    with pytest.raises(ValueError, match=r"model\.onnx"):
        export_model(model, tmp_path, to="onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"onnxscript: type pip install 'depth-anything-train\[export\]'"):
        export_model(model, tmp_path / "m.onnx", to="onnx")
    assert not list(tmp_path.iterdir())
    assert (
        main(["export", "--weights", str(tmp_path / "none.pth"), "--to", "onnx", "--output", "m.onnx"]) == 2
    )
    assert "no weights at" in capsys.readouterr().err


@pytest.mark.parametrize("opset", [11, 17, 99, 0, -1, 18.0, True])
def test_unsupported_opsets_are_refused(tmp_path, monkeypatch, opset):
    monkeypatch.setattr(export, "trace_program", lambda _: pytest.fail("refused before anything is traced"))
    with pytest.raises(ValueError, match=f"opset={opset} "):
        export_model(network(), tmp_path / "m.onnx", to="onnx", opset=opset)
    assert not list(tmp_path.iterdir())


def test_opset_is_refused_for_other_formats(tmp_path):
    for to in ("torch", "transformers", "official", "safetensors"):
        with pytest.raises(ValueError, match=f"opset=20 .*{to}"):
            export_model(network(), tmp_path / "m", to=to, opset=20)
    assert not list(tmp_path.iterdir())


def test_the_file_has_the_requested_opset(tmp_path):
    export_model(network(), tmp_path / "m.onnx", to="onnx", opset=23)
    said = {item.domain: item.version for item in onnx.load(tmp_path / "m.onnx").opset_import}
    assert said[""] == 23


def test_errors_of_exporter_and_runtime_name_a_supported_opset(tmp_path, monkeypatch, capsys):
    """It may raise, silently keep another version, or write a file that the runtime cannot open."""
    model, made = network(), torch.onnx.export

    def other_version(*arguments, **settings):
        return made(*arguments, **{**settings, "opset_version": 18})

    def broken(*_, **__):
        raise RuntimeError("no such operator\nand more")

    def unknown(*_, **__):
        raise RuntimeError("[ONNXRuntimeError] INVALID_GRAPH\nand more")

    for owner, name, stand_in, words in (
        (torch.onnx, "export", broken, "no such operator"),
        (torch.onnx, "export", other_version, "version 18 in place of opset=23"),
        (onnxruntime, "InferenceSession", unknown, "INVALID_GRAPH"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, stand_in)
            with pytest.raises(ValueError, match=words) as raised:
                export_model(model, tmp_path / "m.onnx", to="onnx", opset=23)
        assert "\n" not in str(raised.value) and "opset=18" in str(raised.value)
        assert not list(tmp_path.iterdir())
    save_model(model, tmp_path / "m.safetensors")
    line = ["export", "--weights", str(tmp_path / "m.safetensors"), "--to", "onnx", "--output", "m.onnx"]
    assert main([*line, "--opset", "11"]) == 2
    assert "--opset 11 " in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder(tmp_path):
    (tmp_path / "shut").mkdir(mode=0o500)
    with pytest.raises(OSError, match="m.safetensors cannot be written .Permission denied"):
        export_model(network(), tmp_path / "shut" / "m.safetensors", to="safetensors")


def test_the_model_card_is_written_and_its_code_runs(relative, monkeypatch):
    _, path = relative
    text = (path.parent / "README.md").read_text()
    front = text.split("---\n")[1].splitlines()
    assert {"license: cc-by-nc-4.0", "library_name: onnx"} <= set(front)
    assert "batch × height × width" in text and str(path.parent) not in text
    assert run_card(path.parent, monkeypatch)["output"].shape == (1, 70, 112)


def run_card(folder, monkeypatch):
    """Run the Python code of a model card next to its program and an image; return its variables."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    cv2.imwrite("photo.jpg", np.zeros((40, 60, 3), np.uint8))
    names = {}
    exec(code, names)
    Path("photo.jpg").unlink()
    return names


def test_the_code_of_the_docs_runs(relative, tmp_path, monkeypatch, capsys):
    page = Path(__file__).resolve().parents[1] / "docs" / "weights-and-export.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    shutil.copy(relative[1], "model.onnx")
    cv2.imwrite("photo.jpg", np.zeros((40, 60, 3), np.uint8))
    exec(code, {})
    assert capsys.readouterr().out == "disparity (70, 112) (40, 60) float32\n"


def test_half_precision_is_refused_for_other_encoders():
    with pytest.raises(ValueError, match="vit_tiny_patch16_224"):
        to_half_precision(DepthAnything("vit_tiny_patch16_224"))


def test_a_model_above_the_protobuf_limit_has_a_second_file(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "MAX_ONNX_BYTES", 1000)
    export_model(network(), tmp_path / "model.onnx", to="onnx")
    assert names(tmp_path) == ["README.md", "model.onnx", "model.onnx.data", "model.onnx.json"]
    assert (
        (tmp_path / "model.onnx").stat().st_size < 2_000_000 < (tmp_path / "model.onnx.data").stat().st_size
    )
    (tmp_path / "moved").mkdir()
    for name in ("model.onnx", "model.onnx.data"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    onnxruntime.InferenceSession(tmp_path / "moved" / "model.onnx")


def test_the_table_of_checks():
    rows = [ExportCheck((1, 518, 686), 1.5e-6, 3e-7, 2e-7), ExportCheck((2, 70, 70), 0.25, 1e-2, 3e-3)]
    assert format_checks(rows).splitlines() == [
        "batch × height × width  largest difference  of the range  mean relative",
        "1 × 518 × 686           1.5e-06             3.0e-07       2.0e-07",
        "2 × 70 × 70             2.5e-01             1.0e-02       3.0e-03",
    ]
