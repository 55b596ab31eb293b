"""Files that are damaged, hostile or of another kind are named, and code in them is never executed."""

import bz2
import gzip
import lzma
import os
import pickle
import re
import sys
import tarfile
import warnings
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from depth_anything.model.depth_anything import DepthAnything
from depth_anything.model.metadata import build_metadata
from depth_anything.model.weights import fingerprint, load_encoder, load_model, save_model

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
def test_code_is_never_executed(tmp_path, model, zipped):
    content = {**model.state_dict(), "extra": Hostile(tmp_path / "run")}
    torch.save(content, tmp_path / RELATIVE, _use_new_zipfile_serialization=zipped)
    message = refusal(tmp_path / RELATIVE)
    assert "(posix.mkdir)" in message
    assert not (tmp_path / "run").exists()


def test_bare_pickles_are_never_executed(tmp_path):
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
        (bytes(1000), "zeros"),
        (bytes(20) + b"\x07\xff\xfe", "not a checkpoint"),
        (b"Entry not found\n", "a text, which begins with 'Entry not found'"),
        ("Zugriff verweigert für ".encode() * 50, "a text"),
        (b'{"error": "gated"}', "a JSON text"),
        (b'{"a": {"b": 1}}' + bytes(100), "not a checkpoint"),
        (b"\xef\xbb\xbf\n  <!DOCTYPE html>\n<html></html>", "a web page"),
        (b"\r\n<HTML lang='x'>", "a web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "an XML text"),
        (gzip.compress(b"PK" * 50, mtime=0), "a gzip archive (unpack it first)"),
        (lzma.compress(b"PK" * 50), "an xz archive (unpack it first)"),
        (bz2.compress(b"PK" * 50), "a bzip2 archive (unpack it first)"),
        (b"PK\x05\x06" + bytes(18), "not a checkpoint"),
        (b"GGUF" + bytes(100), "a GGUF file"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "an HDF5 file"),
        (b"RIFF\x24\0\0\0WEBPVP8 " + bytes(100), "a WebP picture"),
        (b"\0\0\0\x20ftypisom" + bytes(100), "a video"),
        (b"\x93NUMPY\x01\0" + bytes(100), "a NumPy array"),
        (b"\x08\x0a\x12\x07pytorch\x1a\x062.11.0:\x10", "an ONNX file"),
    ],
)
@pytest.mark.parametrize("name", [RELATIVE, "model.safetensors", "last.ckpt", "model"])
def test_other_files_are_named(tmp_path, content, kind, name):
    (tmp_path / name).write_bytes(content)
    message = refusal(tmp_path / name)
    assert f"{name} is {kind}" in message and "expected an official .pth" in message
    assert "damaged" not in message


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model.ckpt", "model.pth", "model.bin", "model.onnx", "m"]
)
@pytest.mark.parametrize("kind", ["safetensors", "zip", "old", "ckpt"])
def test_a_checkpoint_is_read_under_any_name(tmp_path, model, name, kind):
    path = tmp_path / name
    if kind == "safetensors":
        save_model(model, path)
    else:
        content = {"state_dict": model.state_dict(), "depth_anything": build_metadata(model)}
        with path.open("wb") as file:
            torch.save(
                content if kind == "ckpt" else model.state_dict(),
                file,
                _use_new_zipfile_serialization=kind != "old",
            )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what a plain state dict does not say
        assert same(load_model(path), model)
        assert fingerprint(path) == fingerprint(model)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_code_is_never_executed_under_any_name(tmp_path, model, name):
    with (tmp_path / name).open("wb") as file:
        torch.save({**model.state_dict(), "extra": Hostile(tmp_path / "run")}, file)
    assert "holds code to run (posix.mkdir)" in refusal(tmp_path / name)
    assert not (tmp_path / "run").exists()


def test_archives_of_checkpoints_are_named(tmp_path, model):
    save_model(model, tmp_path / "inside.safetensors")
    for name in ("a.pth", "a.safetensors"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.write(tmp_path / "inside.safetensors", "folder/inside.safetensors")
        assert f"{name} is a zip archive of folder/inside.safetensors (unpack it" in refusal(tmp_path / name)
    with tarfile.open(tmp_path / "b.pth", "w") as archive:
        archive.add(tmp_path / "inside.safetensors", "inside.safetensors")
    assert "b.pth is a tar archive (unpack it first)" in refusal(tmp_path / "b.pth")
    np.savez(tmp_path / "c.npz", a=np.ones(3))
    assert "c.npz is an archive of NumPy arrays" in refusal(tmp_path / "c.npz")


def test_a_part_of_a_folder_asks_for_the_folder(tmp_path, model):
    save_model(model, tmp_path / "hf", format="transformers")
    assert "(give the folder)" in refusal(tmp_path / "hf" / "config.json")


class Doubling(torch.nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_programs_are_named(tmp_path):
    """Exported programs are zip archives or protobuf and look like checkpoints."""
    torch.export.save(torch.export.export(Doubling(), (torch.ones(2),)), tmp_path / "model.pt2")
    assert "is a program of torch.export, which is for running only" in refusal(tmp_path / "model.pt2")
    torch.jit.save(torch.jit.script(Doubling()), tmp_path / "model.pt")
    assert "an archive, not a checkpoint" in refusal(tmp_path / "model.pt")
    with zipfile.ZipFile(tmp_path / "photos.pth", "w") as archive:
        archive.writestr("photos/one.jpg", b"")
    assert "an archive, not a checkpoint" in refusal(tmp_path / "photos.pth")
    (tmp_path / "model.onnx").write_bytes(b"\x08\x0a\x12\x07pytorch\x1a\x062.11.0:\x10")
    assert "is an ONNX file, which is for running only" in refusal(tmp_path / "model.onnx")


def test_missing_file_and_folder(tmp_path):
    assert "none.pth cannot be read (No such file or directory); expected" in refusal(tmp_path / "none.pth")
    assert "is a folder without a config.json; expected an official .pth" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.ones(3), "a Tensor, not a state dict"),
        ([torch.ones(3)], "a list, not a state dict"),
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


DEEP = "[" * 100_000

NONSENSE = [
    ("taps", "x"),
    ("taps", "5"),
    ("taps", '["a"]'),
    ("taps", "[0, 1]"),
    ("taps", "[0, 1, 2, 2]"),
    ("taps", "[-1, 0, 1, 2]"),
    ("taps", "[0.5, 1, 2, 3]"),
    ("taps", "[true, 2, 3, 4]"),
    ("taps", "[0, 1, 2, 100000000000]"),
    ("taps", '{"0": 1}'),
    ("taps", DEEP),
    ("max_depth", "[]"),
    ("max_depth", "-1"),
    ("max_depth", "0"),
    ("max_depth", "NaN"),
    ("max_depth", "Infinity"),
    ("max_depth", "1e300"),
    ("max_depth", "true"),
    ("max_depth", '"20"'),
    ("input_size", "{}"),
    ("input_size", "-5"),
    ("input_size", "0"),
    ("input_size", "70.5"),
    ("input_size", "1e9"),
    ("input_size", "999999999"),
    ("input_size", "9" * 5000),
    ("input_size", "true"),
    ("input_size", "null"),
    ("input_size", "NaN"),
    ("encoder", "vitx"),
    ("encoder", "../../etc/passwd"),
    ("encoder", "hf-hub:someone/model"),
    ("encoder", "x" * 20_000),
    ("quantity", "depth"),
    ("quantity", "metres"),
    ("unit", "m"),
    ("licence", "x" * 20_000),
    ("calibration", "[1]"),
    ("calibration", "3"),
    ("calibration", '[1, "a"]'),
    ("calibration", "[1, NaN]"),
    ("calibration", "[Infinity, 0]"),
    ("calibration", "[0, 1]"),
    ("calibration", "[-1, 1]"),
    ("calibration", '{"0": 1, "1": 2}'),
    ("origin", "5"),
    ("origin", "[]"),
    ("origin", "{"),
    ("origin", DEEP),
    ("origin", '{"start": 5}'),
    ("origin", '{"start": null}'),
    ("origin", '{"start": {}}'),
    ("origin", '{"start": {"from": 5}}'),
    ("origin", '{"start": {"from": "x", "base": ["a"]}}'),
    ("origin", '{"start": {"from": "x", "licence": {}}}'),
    ("origin", '{"stage": 5}'),
    ("origin", '{"lora": "8"}'),
    ("origin", '{"data": 5}'),
    ("origin", '{"data": [5]}'),
    ("origin", '{"data": [{"set": "a"}]}'),
    ("origin", '{"data": [{"set": "a", "records": "many"}]}'),
    ("origin", '{"data": [{"set": "a", "records": NaN}]}'),
    ("origin", '{"data": [{"set": "a", "records": 1, "teacher": "x"}]}'),
    ("origin", '{"data": [{"set": "a", "records": 1, "teacher": {"licence": "x"}}]}'),
]


@pytest.mark.parametrize(
    ("fact", "value"), NONSENSE, ids=[f"{fact}-{value[:40]}" for fact, value in NONSENSE]
)
def test_invalid_metadata_is_named(tmp_path, model, fact, value):
    path = tmp_path / "m.safetensors"
    save_file(dict(model.state_dict()), path, metadata={**build_metadata(model), fact: value})
    message = refusal(path)
    assert message.startswith(f"{path} ") and f"{fact}=" in message and len(message) < 500


@pytest.mark.parametrize("value", [5, None, [0, 1, 2, 3], {"a": 1}])
@pytest.mark.parametrize("fact", ["taps", "max_depth", "input_size", "licence", "encoder", "origin"])
def test_metadata_of_a_checkpoint_must_be_text(tmp_path, model, fact, value):
    content = {"state_dict": model.state_dict(), "depth_anything": {**build_metadata(model), fact: value}}
    torch.save(content, tmp_path / "last.ckpt")
    assert f"last.ckpt has invalid metadata: {fact}=" in refusal(tmp_path / "last.ckpt")


def test_contradicting_metadata_is_named(tmp_path, model):
    path = tmp_path / "m.safetensors"
    for facts in (
        {"max_depth": "20"},
        {"calibration": "[1, 0]", "max_depth": "20", "quantity": "depth", "unit": "m"},
    ):
        save_file(dict(model.state_dict()), path, metadata={**build_metadata(model), **facts})
        assert "max_depth=20" in refusal(path) or "calibration=[1, 0]" in refusal(path)


def test_taps_beyond_the_encoder_are_named_with_the_file(tmp_path, model):
    path = tmp_path / "m.safetensors"
    save_file(dict(model.state_dict()), path, metadata={**build_metadata(model), "taps": "[0, 1, 2, 99]"})
    assert refusal(path).startswith(f"{path}: taps=[0, 1, 2, 99]")
    save_file(
        dict(model.state_dict()),
        path,
        metadata={**build_metadata(model), "encoder": "resnet18", "taps": "[0, 1, 2, 3]"},
    )
    assert refusal(path).startswith(f"{path}: encoder=resnet18")


def test_missing_metadata_has_defaults(tmp_path):
    """Files of older versions may lack some fields; the encoder defines the defaults."""
    model = DepthAnything("vitn")
    facts = build_metadata(model)
    for name in ("input_size", "licence", "taps", "quantity", "unit", "version"):
        del facts[name]
    save_file(dict(model.state_dict()), tmp_path / "m.safetensors", metadata=facts)
    read = load_model(tmp_path / "m.safetensors")
    assert (read.input_size, read.taps, read.licence) == (70, (0, 1, 2, 3), None)


def test_a_file_that_names_a_larger_encoder_allocates_nothing(tmp_path, model, monkeypatch):
    """Nothing is allocated before the names and shapes are compared."""
    path = tmp_path / "m.safetensors"
    facts = {**build_metadata(model), "encoder": "vit_giant_patch14_224", "taps": "[0, 1, 2, 3]"}
    save_file(dict(model.state_dict()), path, metadata=facts)
    monkeypatch.setattr(torch.random, "fork_rng", lambda **_: pytest.fail("a real network is built"))
    assert f"{path} is not vit_giant_patch14_224" in refusal(path)


@pytest.mark.parametrize("kind", [torch.int8, torch.int64, torch.bool])
def test_integer_weights_are_refused(tmp_path, model, kind):
    state = {**model.state_dict(), "pretrained.cls_token": torch.ones(1, 1, 48).to(kind)}
    torch.save(state, tmp_path / RELATIVE)
    assert f"pretrained.cls_token holds {kind}" in refusal(tmp_path / RELATIVE)


def test_text_in_metadata_becomes_one_printable_line(tmp_path, model):
    model.licence = "mit\nlicense: apache-2.0\x1b[31m"
    model.origin = {"start": {"from": "a\nb", "licence": " x ", "base": "y\u202ez"}, "later": {"a": 1}}
    save_model(model, tmp_path / "m.safetensors")
    read = load_model(tmp_path / "m.safetensors")
    assert read.licence == "mit\\nlicense: apache-2.0\\x1b[31m"
    assert read.origin == {
        "start": {"from": "a\\nb", "licence": "x", "base": "y\\u202ez"},
        "later": {"a": 1},
    }
    save_model(read, tmp_path / "again.safetensors")
    assert load_model(tmp_path / "again.safetensors").licence == read.licence


def test_a_dictionary_that_contains_itself_is_read(tmp_path, model):
    content = {"depth_anything": torch.ones(1), **model.state_dict()}
    content["model"] = content
    torch.save(content, tmp_path / RELATIVE)
    assert same(load_model(tmp_path / RELATIVE), model)


def test_version_is_one_or_two(tmp_path, model):
    save_model(model, tmp_path / "m.safetensors")
    assert "version=3 must be 1 or 2" in refusal(tmp_path / "m.safetensors", version=3)


def test_flipped_header_bytes_never_crash(tmp_path, model):
    """With any changed byte in the header, the file is read or refused."""
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


def test_paths_may_have_any_characters(tmp_path, model):
    path = tmp_path / "mes poids – 深度" / "modèle 1.safetensors"
    save_model(model, path)
    assert same(load_model(path), model)


@pytest.mark.parametrize("format", ["safetensors", "official", "transformers"])
def test_write_errors_name_the_final_path(tmp_path, model, format):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError) as raised:
        save_model(model, tmp_path / "file" / RELATIVE, format=format)
    assert str(raised.value).startswith(f"{tmp_path / 'file' / RELATIVE} cannot be written (")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_leaves_nothing(tmp_path, fork_server):
    """A limit on the file size interrupts writes like a full disk."""
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
    done = fork_server.run([sys.executable, "-c", code, str(tmp_path)])
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == 3
    for line in said:
        assert line.startswith(f"{tmp_path / RELATIVE} cannot be written (") and "File too large" in line
    assert not list(tmp_path.iterdir())
