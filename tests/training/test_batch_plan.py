"""Splitting a batch over devices, and errors that suggest values that work."""

import re

import pytest

from depth_anything.training.batch_plan import split_batch


@pytest.mark.parametrize("batch_size", [16, 64, 192])
@pytest.mark.parametrize("devices", [1, 2, 4, 8, 16])
def test_micro_batch_times_accumulation_times_devices_is_the_batch(batch_size: int, devices: int) -> None:
    share = batch_size // devices
    for micro_batch in [None, *(m for m in range(1, share + 1) if share % m == 0)]:
        micro, accumulation = split_batch(batch_size, devices, micro_batch)
        assert micro * accumulation * devices == batch_size
        assert micro == (micro_batch or share)


@pytest.mark.parametrize(
    ("batch_size", "devices", "micro_batch"),
    [
        (16, 3, None),
        (192, 7, None),
        (64, 128, None),
        (16, 1, 5),
        (16, 2, 3),
        (64, 8, 9),
        (64, 8, 0),
        (24, 1, 7),
    ],
)
def test_errors_suggest_values_that_work(batch_size: int, devices: int, micro_batch: int | None) -> None:
    with pytest.raises(ValueError) as caught:
        split_batch(batch_size, devices, micro_batch)
    message = str(caught.value)
    assert "\n" not in message and "type" in message
    offered = [int(n) for n in re.findall(r"type trainer.devices=(\d+)", message)]
    for number in offered:
        split_batch(batch_size, number, None)
    micros = [int(n) for n in re.findall(r"micro_batch=(\d+)", message.partition("type")[2])]
    for number in micros:
        split_batch(batch_size, devices, number)
    assert offered or micros
