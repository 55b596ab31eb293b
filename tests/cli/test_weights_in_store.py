"""Commands that take the address of a model in an object store as --weights."""

import json

from PIL import Image

from depth_anything.cli import main
from depth_anything.data import local_copy
from depth_anything.data.store import ObjectStore


def test_commands_take_the_address_of_a_run(weights, scenes, s3_prefix, tmp_path, capsys):
    """The run is removed from the store in between: a process uses the copy that it has made."""
    run = ObjectStore(f"{s3_prefix}/runs/{weights.name}")
    for name in ("model.safetensors", "config.yaml"):
        run.upload(weights / name, name)
    report = tmp_path / "report"
    arguments = ["--data", str(scenes), "--limit", "2", "--weights"]
    assert main(["evaluate", *arguments, run.root, "--output", str(report)]) == 0
    (model,) = json.loads((report / "results.json").read_text())["models"]
    facts = model["facts"]
    assert model["name"] == weights.name and facts["weights"] == f"{run.root}/model.safetensors"
    again = [*arguments, f"a={run.root}/model.safetensors", "--output", str(tmp_path / "again")]
    assert main(["evaluate", *again]) == 0
    (named,) = json.loads((tmp_path / "again" / "results.json").read_text())["models"]
    assert named["name"] == "a" and named["facts"]["fingerprint"] == facts["fingerprint"]

    exported = tmp_path / "new.pth"
    arguments = ["--weights", run.root, "--to", "official", "--output", str(exported)]
    assert main(["export", *arguments]) == 0 and exported.exists()
    photo = tmp_path / "photo.png"
    Image.new("RGB", (70, 56), (90, 60, 30)).save(photo)
    assert main(["predict", str(photo), "--weights", run.root, "--outdir", str(tmp_path / "maps")]) == 0
    capsys.readouterr()

    local_copy._copies.clear()
    run.delete("model.safetensors")
    for command in (
        ["export", "--to", "official", "--output", str(exported)],
        ["evaluate", "--data", str(scenes)],
    ):
        assert main([*command, "--weights", run.root]) == 2
        printed = capsys.readouterr().err
        assert f"the run {run.root} is not finished" in printed and printed.count("\n") == 1
    run.write("model.safetensors", b"damaged")
    assert main(["export", "--to", "official", "--output", str(exported), "--weights", run.root]) == 2
    printed = capsys.readouterr().err
    assert f"{run.root}/model.safetensors" in printed and str(local_copy.cache_folder()) not in printed
