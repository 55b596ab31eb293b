"""The DPT head: initialization at many seeds, unused parameters, odd grids."""

import pytest
import torch
from torch.nn import functional as F

from depth_anything.model.dpt import DPTHead
from depth_anything.model.encoder import ENCODERS


def normalised_tokens(width: int, generator: torch.Generator) -> torch.Tensor:
    """Tokens (3, 3·4, D) of mean 0 and deviation 1, as the last LayerNorm gives them: rough, smooth, equal."""
    rough = torch.randn(1, width, 3, 4, generator=generator)
    smooth = F.interpolate(torch.randn(1, width, 2, 2, generator=generator), (3, 4), mode="bilinear")
    equal = torch.randn(1, width, 1, 1, generator=generator).expand(1, width, 3, 4)
    return F.layer_norm(torch.cat((rough, smooth, equal)).flatten(2).transpose(1, 2), (width,))


@pytest.mark.parametrize(("encoder", "seeds"), [("vits", 50), ("vitb", 8), ("vitl", 2), ("vitt", 50)])
def test_output_is_active_at_any_seed(encoder, seeds):
    """With the default of torch over 99.9 % of map and gradient are zero for 10 of 20 seeds."""
    spec = ENCODERS[encoder]
    for seed in range(seeds):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = DPTHead(spec.width, features=spec.features, out_channels=spec.out_channels)
        generator = torch.Generator().manual_seed(seed)
        tokens = [normalised_tokens(spec.width, generator).requires_grad_() for _ in range(4)]
        output = head(tokens, (3, 4), (42, 56))
        assert output.min() > 0.4, seed
        assert output[:2].flatten(1).std(1).min() > 0.005, seed
        output[:2].std((1, 2)).sum().backward()
        assert all(level.grad[:2].abs().amax((1, 2)).min() > 0 for level in tokens), seed


def test_the_unused_unit_is_kept_and_frozen():
    head = DPTHead(96, features=32, out_channels=(12, 24, 48, 96))
    idle = {name for name, p in head.named_parameters() if not p.requires_grad}
    unit = "scratch.refinenet4.resConfUnit1"
    assert idle == {f"{unit}.conv{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}


def test_odd_grids_work():
    head = DPTHead(96, features=32, out_channels=(12, 24, 48, 96))
    for h, w in ((1, 1), (1, 5), (3, 2), (37, 49)):
        assert head([torch.randn(1, h * w, 96)] * 4, (h, w), (14 * h, 14 * w)).shape == (1, 14 * h, 14 * w)
