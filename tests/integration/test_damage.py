"""A run with damaged checkpoints continues from an undamaged one to the same weights, or stops."""

from pathlib import Path
from typing import Any

from depth_anything import load_model
from depth_anything.model.weights import fingerprint
from depth_anything.training.loggers import read_metrics


def flip(path: Path) -> None:
    """Overwrite 64 bytes in the middle of a file."""
    content = bytearray(path.read_bytes())
    for i in range(len(content) // 2, len(content) // 2 + 64):
        content[i] ^= 0xFF
    path.write_bytes(content)


def test_a_damaged_checkpoint_costs_only_its_steps(start: Any, tmp_path: Path) -> None:
    common = ("stage=teacher", "trainer=cpu", "workers=0", "recipe.schedule=constant", "checkpoint.every=2")
    unbroken = start(*common, "steps=6", "name=unbroken")
    assert unbroken.returncode == 0, unbroken.stderr[-2000:]
    first = start(*common, "steps=4", "name=damaged")
    assert first.returncode == 0, first.stderr[-2000:]
    folder = tmp_path / "outputs" / "damaged"
    newest = folder / "checkpoints" / "step-000000004.ckpt"
    flip(newest)
    with (folder / "metrics.csv").open("ab") as file:  # as after a power cut
        file.write(bytes(300))
    second = start(*common, "steps=6", "name=damaged")
    assert second.returncode == 0, second.stderr[-2000:]
    for word in (str(newest), "step-000000002.ckpt", "metrics.csv.damaged"):
        assert word in second.stderr
    rows = [
        read_metrics(tmp_path / "outputs" / name / "metrics.csv").rows for name in ("unbroken", "damaged")
    ]
    assert [[row[name] for name in ("step", "loss", "grad_norm")] for row in rows[0]] == [
        [row[name] for name in ("step", "loss", "grad_norm")] for row in rows[1]
    ]
    models = [tmp_path / "outputs" / name / "model.safetensors" for name in ("unbroken", "damaged")]
    assert fingerprint(load_model(models[0])) == fingerprint(load_model(models[1]))

    for path in (folder / "checkpoints").glob("*.ckpt"):
        flip(path)
    table = (folder / "metrics.csv").read_bytes()
    third = start(*common, "steps=8", "name=damaged")
    assert third.returncode == 1 and "Traceback" not in third.stderr
    for word in (str(folder), "step-000000006.ckpt", "resume=", "overwrite=true"):
        assert word in third.stderr
    assert (folder / "metrics.csv").read_bytes() == table
    flip(folder / "model.safetensors")
    labels = start("stage=pseudolabel", f"teacher={folder / 'model.safetensors'}", "workers=0")
    assert labels.returncode == 1 and str(folder / "model.safetensors") in labels.stderr
    assert "damaged" in labels.stderr and "Traceback" not in labels.stderr
