"""Model cards are correct, readable by the hub, and never overwrite a card that a user edited."""

import ast
import re
import shlex

import pytest
import yaml
from huggingface_hub import ModelCard

from depth_anything import DepthAnything, load_model, save_model
from depth_anything.model.card import build_card, is_replaceable_card, write_card


def network(**settings):
    return DepthAnything("vitn", **settings)


def front(text):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


def test_front_matter_is_read_by_the_hub():
    model = network(max_depth=80.0)
    model.licence = "CC-BY-NC-4.0"
    model.origin = {"start": {"from": "timm/x", "licence": "Apache-2.0", "base": "timm/x"}}
    text = build_card(model, file="hf", form="transformers", title="street depth")
    assert front(text) == {
        "license": "cc-by-nc-4.0",
        "library_name": "transformers",
        "pipeline_tag": "depth-estimation",
        "tags": ["depth-anything", "metric-depth", "dinov2"],
        "base_model": "timm/x",
    }
    assert ModelCard(text).data.pipeline_tag == "depth-estimation"  # the hub's own reader
    assert text.splitlines().count("# street depth") == 1


HOSTILE = "x\nlicense: mit\n---\n# fake | `a` <b> [c](d)\r\x1b[31m\u2028"


def test_untrusted_text_is_escaped():
    """No name becomes a key of the front matter, a heading, a table cell or a link."""
    model = network()
    model.licence = HOSTILE
    row = {"set": HOSTILE, "records": 5, "licence": HOSTILE, "teacher": {"file": HOSTILE, "licence": HOSTILE}}
    start = {"from": HOSTILE, "licence": HOSTILE, "base": HOSTILE}
    model.origin = {"start": start, "stage": HOSTILE, "data": [row]}
    for form in ("safetensors", "onnx", "transformers", "official", "torch"):
        text = build_card(model, file="m", form=form, title=HOSTILE)
        head = front(text)
        assert head["license"] == "other" and head["pipeline_tag"] == "depth-estimation"
        assert head["base_model"].startswith("x\\nlicense: mit")
        assert set(head) == {"license", "license_name", "library_name", "pipeline_tag", "tags", "base_model"}
        body = text.partition("\n---\n")[2]
        assert (
            not re.search(r"(?m)^(license|# fake|---)", body) and "\x1b" not in text and "\u2028" not in text
        )
        (cells,) = [line for line in body.splitlines() if "| 5 |" in line]
        assert len(re.findall(r"(?<!\\)\|", cells)) == 6
        assert "[c]" not in re.sub(r"`[^`]*`", "", body).replace("\\[", "\\")


def test_license_of_a_card_cannot_be_injected(tmp_path):
    model = network()
    model.licence = "CC-BY-NC-4.0"
    model.origin = {"start": {"from": "x", "licence": "MIT", "base": "x\nlicense: mit"}}
    save_model(model, tmp_path / "m.safetensors")
    save_model(load_model(tmp_path / "m.safetensors"), tmp_path / "hf", format="transformers")
    assert front((tmp_path / "hf" / "README.md").read_text())["license"] == "cc-by-nc-4.0"
    assert load_model(tmp_path / "hf").licence == "CC-BY-NC-4.0"


@pytest.mark.parametrize("file", ['a "b".onnx', "c\\d.onnx", "e $(f) 'g'.onnx", "h\ni.onnx"])
@pytest.mark.parametrize("form", ["safetensors", "transformers", "official", "onnx", "torch"])
def test_examples_quote_any_file_name(form, file):
    text = build_card(network(), file=file, form=form, title="m")
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        assert file in [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    for line in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        assert file in shlex.split(line)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (network(), "**Output: disparity** (inverse depth) up to an unknown scale and shift"),
        (network(max_depth=12.5), "**Output: depth in meters**, 0 to 12.5; larger is farther"),
    ],
)
def test_card_states_unit_and_direction(model, said):
    assert said in build_card(model, file="m.safetensors", form="safetensors", title="m")


def test_card_states_the_calibration():
    model = network()
    model.calibration = (0.5, 0.25)
    assert "1 / (0.5 · output + 0.25) is depth in meters" in build_card(
        model, file="m", form="safetensors", title="m"
    )


def test_card_lists_training_data_and_licenses():
    model = network()
    model.licence = "Apache-2.0 AND CC-BY-NC-4.0 AND unknown"
    model.origin = {
        "start": {"from": "timm/vit", "licence": "Apache-2.0", "base": "timm/vit"},
        "stage": "student",
        "data": [
            {
                "set": "photos",
                "records": 12345,
                "licence": None,
                "teacher": {"file": "depth_anything_v2_vitl.pth", "licence": "CC-BY-NC-4.0"},
            },
            {"set": "scenes", "records": 7, "licence": "Apache-2.0", "teacher": None},
        ],
    }
    text = build_card(model, file="m", form="safetensors", title="m", measured={"Evaluation": "| a |"})
    assert front(text)["license"] == "other"
    assert "License of the weights: **Apache-2.0 AND CC-BY-NC-4.0 AND unknown**." in text
    assert "Started from `timm/vit` (license: Apache-2.0)." in text
    assert "| photos | 12,345 | unknown | `depth_anything_v2_vitl.pth` | CC-BY-NC-4.0 |" in text
    assert "| scenes | 7 | Apache-2.0 | ground truth | – |" in text
    assert "\n## Evaluation\n\n| a |\n" in text


@pytest.mark.parametrize(
    ("form", "lines"),
    [
        ("safetensors", ["load_model(", "depth-anything predict", "depth-anything export"]),
        ("transformers", ["pipeline(", "load_model(", "depth-anything predict"]),
        ("official", ["DepthAnythingV2(", "load_model(", "depth-anything predict"]),
        ("onnx", ["onnxruntime.InferenceSession("]),
        ("torch", ["torch.export.load("]),
    ],
)
def test_card_shows_how_to_load_each_format(form, lines):
    text = build_card(network(max_depth=20.0), file="the file", form=form, title="m")
    for line in lines:
        assert line in text and '"the file"' in text
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(code, form, "exec")


def one_card(title, file="m"):
    return build_card(network(), file=file, form="safetensors", title=title)


def test_an_edited_card_is_kept(tmp_path):
    path = tmp_path / "README.md"
    assert write_card(one_card("one"), tmp_path, file="m") == path
    assert is_replaceable_card(path)
    assert write_card(one_card("two"), tmp_path, file="m") == path
    assert "# two" in path.read_text()
    path.write_text(path.read_text().replace("# two", "# mine"))
    assert write_card(one_card("three"), tmp_path, file="m") is None
    assert "# mine" in path.read_text()
    path.write_bytes(b"\xff\xfe")
    assert not is_replaceable_card(path)


def test_two_models_in_a_folder_have_two_cards(tmp_path):
    write_card(one_card("run", "model.safetensors"), tmp_path, file="model.safetensors")
    made = write_card(one_card("program", "le modèle.onnx"), tmp_path, file="le modèle.onnx")
    assert made == tmp_path / "le modèle.onnx.md"
    assert "# run" in (tmp_path / "README.md").read_text()
    made.write_text("mine")
    assert write_card(one_card("program", "le modèle.onnx"), tmp_path, file="le modèle.onnx") is None


def test_a_transformers_folder_has_a_card(tmp_path):
    model = network()
    model.licence = "Apache-2.0 AND CC-BY-NC-4.0"
    save_model(model, tmp_path / "hf", format="transformers")
    readme = tmp_path / "hf" / "README.md"
    assert front(readme.read_text())["license"] == "other"
    assert load_model(tmp_path / "hf").licence == "Apache-2.0 AND CC-BY-NC-4.0"
    readme.write_text("---\nlicense: mit\n---\nmine")
    save_model(model, tmp_path / "hf", format="transformers")
    assert readme.read_text().endswith("mine")


def test_license_of_a_folder_is_read_from_its_card(tmp_path):
    """As in the official -hf repositories, whose weight files have no license."""
    save_model(network(), tmp_path / "hf", format="transformers")
    assert load_model(tmp_path / "hf").licence is None
    (tmp_path / "hf" / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    assert load_model(tmp_path / "hf").licence == "CC-BY-NC-4.0"
