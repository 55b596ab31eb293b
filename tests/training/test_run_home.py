"""Where a run works if its addresses are in an object store."""

from pathlib import Path

import pytest
from made_configs import flatten, make_config

from depth_anything.data import local_copy
from depth_anything.data.store import ObjectStore
from depth_anything.errors import UserError
from depth_anything.training.initialization import check_initial_weights
from depth_anything.training.run_home import RunHome, local_run_dir, localize, mirror_options


def test_a_run_on_a_disk_stays_where_it_is() -> None:
    config = make_config("stage=teacher")
    assert localize(config) is config and RunHome(config, config).describe("outputs/a") == "outputs/a"


def test_every_path_of_the_run_folder_is_local_and_the_stored_config_is_as_typed(tmp_path: Path) -> None:
    typed = ("stage=teacher", "output_dir=s3://bucket/runs", "logger=tensorboard")
    config = make_config(*typed, mirror__folder=str(tmp_path))
    local = localize(config)
    folder = local_run_dir(config)
    assert folder.is_relative_to(tmp_path) and folder.name == config.name
    assert local.run_dir == local.data.run_dir == str(folder)
    assert flatten(local).values["logger.tensorboard.save_dir"] == str(folder)
    other = make_config(*typed[:1], "output_dir=s3://other/runs", mirror__folder=str(tmp_path))
    assert local_run_dir(other) != folder
    home = RunHome(config, local, ObjectStore(config.run_dir))
    assert (
        home.describe(f"finished: {folder}/model.safetensors")
        == f"finished: {config.run_dir}/model.safetensors"
    )
    assert config.run_dir == "s3://bucket/runs/teacher-vitt-tiny"


def test_the_store_keeps_what_the_run_keeps() -> None:
    options = mirror_options(make_config("stage=teacher", "checkpoint.keep=3", "checkpoint.keep_every=500"))
    assert (options.keep, options.keep_every) == (3, 500)


def test_starting_weights_in_a_store_are_local_to_the_run(s3_prefix: str) -> None:
    store = ObjectStore(f"{s3_prefix}/runs/teacher")
    store.write("model.safetensors", b"weights")
    config = make_config("stage=metric", init=f"{store.root}/model.safetensors")
    assert Path(str(localize(config).init)).read_bytes() == b"weights"
    store.write("config.yaml", b"stage: teacher\n")
    local_copy._copies.clear()
    student = localize(make_config("stage=student", init=f"{store.root}/model.safetensors"))
    with pytest.raises(UserError, match="is a teacher, but a student starts from DINOv2"):
        check_initial_weights(student)


def test_another_node_fetches_the_checkpoint_that_rank_0_has_chosen(s3_prefix: str, tmp_path: Path) -> None:
    config = make_config("stage=teacher", run_dir=str(tmp_path / "run"))
    store = ObjectStore(s3_prefix)
    store.write("checkpoints/step-000000005.ckpt", b"state")
    home = RunHome(config, config, store)
    path = tmp_path / "run" / "checkpoints" / "step-000000005.ckpt"
    assert home.local_checkpoint(path) == path and path.read_bytes() == b"state"
    assert home.local_checkpoint(path) == path and home.local_checkpoint(None) is None


def test_another_node_fetches_the_checkpoint_that_resume_names(s3_prefix: str, tmp_path: Path) -> None:
    store = ObjectStore(f"{s3_prefix}/runs/a")
    store.write("checkpoints/step-000000005.ckpt", b"state")
    config = make_config(
        "stage=teacher",
        run_dir=str(tmp_path / "run"),
        resume=f"{store.root}/checkpoints/step-000000005.ckpt",
    )
    there = Path("/cache/of/rank-0/checkpoints/step-000000005.ckpt")
    copy = RunHome(config, config).local_checkpoint(there)
    assert copy is not None and copy != there and copy.read_bytes() == b"state"
