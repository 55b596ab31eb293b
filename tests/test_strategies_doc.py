"""The memory table of docs/strategies.md follows from the parameter counts of the networks."""

import re
from pathlib import Path

import pytest
import torch

from depth_anything.model.depth_anything import DepthAnything

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "strategies.md").read_text(encoding="utf-8")
GPUS = (8, 16, 64)


def memory_row(encoder: str) -> list[float]:
    """Compute the GB per GPU without activations: DDP, FSDP2 on `GPUS`, and what FSDP2 gathers."""
    with torch.device("meta"):
        model = DepthAnything(encoder)
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    block = sum(p.numel() for p in model.pretrained.blocks[0].parameters())
    head = sum(p.numel() for p in model.depth_head.parameters())
    rest = total - head - sum(p.numel() for p in model.pretrained.blocks.parameters())
    states = 4 * total + 12 * trained
    gathered = 2 * (2 * block + head) + 4 * rest + 4 * max(block, head)
    return [states / 1e9, *(states / count / 1e9 for count in GPUS), gathered / 1e9]


@pytest.mark.parametrize("encoder", ["vitb", "vitl", "vitg"])
def test_the_table_is_computed(encoder: str) -> None:
    row = re.search(rf"(?m)^\| {encoder} \|(.*)\|$", PAGE)
    assert row is not None
    assert [cell.strip() for cell in row[1].split("|")] == [f"{value:.2f}" for value in memory_row(encoder)]
