"""An untrained network, as a predictor and as a file."""

import pytest
import torch

from depth_anything import DepthAnything, Predictor, save_model


@pytest.fixture(scope="module")
def predictor():
    torch.manual_seed(0)
    return Predictor(DepthAnything("vitn"), device="cpu", input_size=28)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_model(DepthAnything("vitn"), path)
    return str(path)
