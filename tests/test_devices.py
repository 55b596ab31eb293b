"""Peaks of devices by the name that is typed; by the name that CUDA reports they are tested in test_bench.py."""

import pytest

from depth_anything.devices import DEVICES, find_device, peak_tflops
from depth_anything.errors import UserError


@pytest.mark.parametrize(
    ("name", "peak"),
    [("a100", 312), ("H100", 989), ("h100 pcie", 756), ("H200", 989), ("L40S", 362), ("RTX_4090", 165)],
)
def test_a_device_is_found_by_its_name(name: str, peak: float) -> None:
    assert find_device(name).peak_tflops == peak


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA GeForce RTX 4090", 165.0),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090", 71.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40", None),
    ],
)
def test_a_card_is_not_taken_for_a_similar_one(name: str, peak: float | None) -> None:
    assert peak_tflops(name) == peak


@pytest.mark.parametrize(("name", "closest"), [("h10", "h100"), ("rtx4080", "rtx4090"), ("abacus", None)])
def test_an_unknown_device_is_refused_with_those_that_are_known(name: str, closest: str | None) -> None:
    with pytest.raises(UserError) as caught:
        find_device(name)
    assert repr(name) in caught.value.what
    assert all(device.name in caught.value.fix for device in DEVICES)
    assert closest is None or caught.value.fix.startswith(f"type {closest} ")
