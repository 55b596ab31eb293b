"""Other files: damaged, hostile, of another kind; and that nothing is ever run."""

import os
import pickle
import re
import subprocess
import sys
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from depth_anything.model.depth_anything import DepthAnything
from depth_anything.model.weights import describe, fingerprint, load_encoder, load_model, save_model

pytestmark = pytest.mark.usefixtures("small_official_encoders")
RELATIVE = "depth_anything_v2_vits.pth"


def same(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def refusal(path, **arguments):
    with pytest.raises(ValueError) as raised:
        load_model(path, **arguments)
    message = str(raised.value)
    assert "\n" not in message
    return message


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_never_run(tmp_path, model, zipped):
    content = {**model.state_dict(), "extra": Hostile(tmp_path / "run")}
    torch.save(content, tmp_path / RELATIVE, _use_new_zipfile_serialization=zipped)
    message = refusal(tmp_path / RELATIVE)
    assert "holds code to run (posix.mkdir)" in message and "never unpickled" in message
    assert not (tmp_path / "run").exists()


def test_bare_pickles_are_never_run(tmp_path):
    for protocol in (2, 4):
        (tmp_path / "bare.pth").write_bytes(pickle.dumps(Hostile(tmp_path / "run"), protocol=protocol))
        refusal(tmp_path / "bare.pth")
        with pytest.raises(ValueError):
            load_encoder(DepthAnything("vits"), tmp_path / "bare.pth")
        with pytest.raises(ValueError):
            fingerprint(tmp_path / "bare.pth")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", [RELATIVE, "model.safetensors"])
@pytest.mark.parametrize("share", [0.001, 0.3, 0.9, 0.9999])
def test_truncated_files(tmp_path, model, name, share):
    path = tmp_path / name
    save_model(model, path, format="official" if name == RELATIVE else "safetensors")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert re.search(r"is damaged or cut short \(.+\); fetch it again", refusal(path))


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"\xff\xd8\xff\xe0" + bytes(100), "a JPEG picture"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "a PNG picture"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html>Not found</html>", "a web page"),
        (b"", "empty"),
        (bytes(1000), "no checkpoint"),
        (b"just words", "no checkpoint"),
    ],
)
def test_other_files_are_named(tmp_path, content, kind):
    (tmp_path / RELATIVE).write_bytes(content)
    message = refusal(tmp_path / RELATIVE)
    assert f"{RELATIVE} is {kind}" in message and "expected an official .pth" in message


class Doubling(torch.nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_programs_are_named(tmp_path):
    """What runs without this project looks like a checkpoint from outside: a zip archive, or protobuf."""
    torch.export.save(torch.export.export(Doubling(), (torch.ones(2),)), tmp_path / "model.pt2")
    assert "is a program of torch.export, which is for running only" in refusal(tmp_path / "model.pt2")
    torch.jit.save(torch.jit.script(Doubling()), tmp_path / "model.pt")
    assert "is an archive, but no checkpoint" in refusal(tmp_path / "model.pt")
    with zipfile.ZipFile(tmp_path / "photos.pth", "w") as archive:
        archive.writestr("photos/one.jpg", b"")
    assert "is an archive, but no checkpoint" in refusal(tmp_path / "photos.pth")
    (tmp_path / "model.onnx").write_bytes(b"\x08\x0a\x12\x07pytorch\x1a\x062.11.0:\x10")
    assert "is an ONNX file, which is for running only" in refusal(tmp_path / "model.onnx")


def test_missing_file_and_folder(tmp_path):
    assert "none.pth cannot be read (No such file or directory); expected" in refusal(tmp_path / "none.pth")
    assert "is a folder without a config.json; expected an official .pth" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.ones(3), "holds a Tensor, no state dict"),
        ([torch.ones(3)], "holds a list, no state dict"),
        ({"epoch": 3}, "holds no tensors"),
        ({"fc.weight": torch.ones(3), "fc.bias": torch.ones(1)}, "it has fc.weight and 1 more"),
        (
            {"blocks.0.x": torch.ones(1), "patch_embed.proj.weight": torch.ones(1)},
            "an encoder without a depth head",
        ),
        ({"backbone.embeddings.cls_token": torch.ones(1)}, "no Depth Anything model (it has pretrained.cls_"),
        (
            {"base_model.model.backbone.encoder.layer.0.attention.lora_A.weight": torch.ones(1)},
            "is a LoRA adapter",
        ),
        (
            {"encoder.patch_encoder.blocks.0.norm1.weight": torch.ones(1)},
            "no Depth Anything model (it has enc",
        ),
        ({"depth_head.x": torch.ones(1)}, "an encoder 0 wide and 0 deep, which is none of vits"),
    ],
)
def test_other_contents_are_named(tmp_path, content, message):
    torch.save(content, tmp_path / RELATIVE)
    assert message in refusal(tmp_path / RELATIVE)


def test_wrong_sizes_are_named(tmp_path, model):
    torch.save(model.state_dict(), tmp_path / RELATIVE)
    message = refusal(tmp_path / RELATIVE, encoder="vitb")
    assert "is not vitb: its " in message and ", expected (" in message
    torch.save({n: t for n, t in model.state_dict().items() if "projects" not in n}, tmp_path / RELATIVE)
    assert "is not vits: it lacks depth_head.projects.0.weight and 7 more" in refusal(tmp_path / RELATIVE)
    torch.save({**model.state_dict(), "depth_head.extra": torch.ones(1)}, tmp_path / RELATIVE)
    assert "is not vits: it also has depth_head.extra" in refusal(tmp_path / RELATIVE)


def test_unknown_sizes_are_named(tmp_path):
    other = DepthAnything("vit_tiny_patch16_224")
    torch.save(other.state_dict(), tmp_path / "model.pth")
    assert "192 wide and 12 deep, which is none of vits" in refusal(tmp_path / "model.pth")
    with pytest.warns(UserWarning, match="disparity or depth"):
        assert same(load_model(tmp_path / "model.pth", encoder="vit_tiny_patch16_224"), other)


@pytest.mark.parametrize(
    ("fact", "message"),
    [
        ({"taps": "x"}, "has metadata that make no sense"),
        ({"taps": '["a"]'}, "has metadata that make no sense"),
        ({"taps": "[0, 1]"}, "taps=[0, 1] must be four ascending blocks"),
        ({"max_depth": "[]"}, "has metadata that make no sense"),
        ({"max_depth": "-1"}, "max_depth=-1.0 must be a number of metres above 0"),
        ({"input_size": "{}"}, "has metadata that make no sense"),
        ({"encoder": "vitx"}, "encoder=vitx is unknown"),
        ({"calibration": "[1]"}, "has metadata that make no sense"),
        ({"calibration": "3"}, "has metadata that make no sense"),
        ({"calibration": '[1, "a"]'}, "has metadata that make no sense"),
        ({"calibration": "[1, NaN]"}, "must be two finite numbers"),
    ],
)
def test_nonsense_metadata_is_named(tmp_path, model, fact, message):
    save_file(dict(model.state_dict()), tmp_path / "m.safetensors", metadata={**describe(model), **fact})
    assert message in refusal(tmp_path / "m.safetensors")


def test_a_dictionary_that_holds_itself_ends(tmp_path, model):
    content = {"depth_anything": torch.ones(1), **model.state_dict()}
    content["model"] = content
    torch.save(content, tmp_path / RELATIVE)
    assert same(load_model(tmp_path / RELATIVE), model)


def test_version_is_one_or_two(tmp_path, model):
    save_model(model, tmp_path / "m.safetensors")
    assert "version=3 must be 1 or 2" in refusal(tmp_path / "m.safetensors", version=3)


def test_flipped_header_bytes_never_crash(tmp_path, model):
    """Whatever a byte of the header becomes, the file is read or refused."""
    save_model(model, tmp_path / "good.safetensors")
    good = (tmp_path / "good.safetensors").read_bytes()
    path = tmp_path / "bad.safetensors"
    outcomes = set()
    for at in [*range(12), *range(12, 2000, 131)]:
        path.write_bytes(good[:at] + bytes([good[at] ^ 0x15]) + good[at + 1 :])
        try:
            outcomes.add(type(load_model(path)))
        except ValueError as error:
            assert "\n" not in str(error)
            outcomes.add(ValueError)
    assert ValueError in outcomes


def test_loading_draws_no_random_numbers(tmp_path, model):
    timms = DepthAnything("vit_tiny_patch16_224")
    save_model(model, tmp_path / "ours.safetensors")
    save_model(timms, tmp_path / "timms.safetensors")
    before = torch.random.get_rng_state()
    load_model(tmp_path / "ours.safetensors")
    load_model(tmp_path / "timms.safetensors")
    assert torch.equal(torch.random.get_rng_state(), before)


# --- what is written -------------------------------------------------------------------------------------------


def test_names_may_hold_anything(tmp_path, model):
    path = tmp_path / "mes poids – 深度" / "modèle 1.safetensors"
    save_model(model, path)
    assert same(load_model(path), model)


@pytest.mark.parametrize("format", ["safetensors", "official", "transformers"])
def test_what_cannot_be_written_is_said_of_the_path_itself(tmp_path, model, format):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError) as raised:
        save_model(model, tmp_path / "file" / RELATIVE, format=format)
    assert str(raised.value).startswith(f"{tmp_path / 'file' / RELATIVE} cannot be written (")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_leaves_nothing(tmp_path):
    """A limit on the size of files ends a write halfway, as a full disk does."""
    code = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from depth_anything import DepthAnything, save_model
model = DepthAnything("vitn")
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
for format in ("safetensors", "official", "transformers"):
    try:
        save_model(model, sys.argv[1] + "/depth_anything_v2_vits.pth", format=format)
    except OSError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    said = done.stdout.splitlines()
    assert len(said) == 3
    for line in said:
        assert line.startswith(f"{tmp_path / RELATIVE} cannot be written (") and "File too large" in line
    assert not list(tmp_path.iterdir())
