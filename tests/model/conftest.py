"""Small networks with the names of official ones, because tests of files do not need the real sizes."""

from dataclasses import replace

import pytest
import torch

from depth_anything.model.depth_anything import DepthAnything
from depth_anything.model.encoder import ENCODERS


@pytest.fixture
def small_official_encoders(monkeypatch):
    small = replace(
        ENCODERS["vits"],
        width=48,
        depth=6,
        heads=3,
        taps=(1, 2, 3, 5),
        features=16,
        out_channels=(6, 12, 24, 48),
        grid=5,
    )
    monkeypatch.setitem(ENCODERS, "vits", small)
    monkeypatch.setitem(ENCODERS, "vitb", replace(small, width=72, hub="vit_base_patch14_dinov2.lvd142m"))
    monkeypatch.setitem(
        ENCODERS,
        "vitg",
        replace(small, depth=5, swiglu=True, taps=(1, 2, 3, 4), hub="vit_giant_patch14_dinov2.lvd142m"),
    )


@pytest.fixture
def model(small_official_encoders):
    """A small network under the name vits."""
    torch.manual_seed(0)
    return DepthAnything("vits")
