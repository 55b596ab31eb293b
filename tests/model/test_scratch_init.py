import math

import pytest
import torch

from depth_anything.model.depth_anything import DepthAnything
from depth_anything.model.scratch_init import init_attention, init_from_scratch, sine_cosine_positions


def test_positions_equal_the_formula():
    found = sine_cosine_positions(3, 8)
    for row in range(3):
        for column in range(3):
            expected = [
                0.5 * f(place / 3 * 6 * 100 ** (-k / 2))
                for place in (column, row)
                for f in (math.sin, math.cos)
                for k in range(2)
            ]
            assert found[3 * row + column].tolist() == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="width=6"):
        sine_cosine_positions(3, 6)


def test_positions_linear_layers_and_the_last_convolution_change_and_seeds_repeat():
    def build(*, scratch):
        torch.manual_seed(3)
        model = DepthAnything("vitn")
        if scratch:
            init_from_scratch(model)
        return model.state_dict()

    plain, one, other = build(scratch=False), build(scratch=True), build(scratch=True)
    assert all((one[name] == other[name]).all() for name in one)
    changed = {name for name in one if (one[name] != plain[name]).any()}
    linear = {
        f"pretrained.blocks.{k}.{n}.weight"
        for k in range(4)
        for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    last = {f"depth_head.scratch.output_conv2.2.{name}" for name in ("weight", "bias")}
    assert changed == linear | last | {"pretrained.pos_embed"}
    weight = one["pretrained.blocks.0.mlp.fc1.weight"]
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (96 + 384)), rel=0.02)
    assert (one["pretrained.pos_embed"][0, 1:] == sine_cosine_positions(10, 96)).all()


def test_attention_has_the_structure_of_the_paper():
    """The products of arXiv 2305.09828: a strong positive diagonal for queries · keys, a negative one for values."""
    torch.manual_seed(0)
    attention = DepthAnything("vitn").pretrained.blocks[0].attn
    init_attention(attention)
    queries, keys, values = attention.qkv.weight.detach().reshape(3, 96, 96)
    for start in range(0, 96, 32):
        product = queries[start : start + 32].T @ keys[start : start + 32]
        assert torch.linalg.matrix_rank(product) == 32
        # The 32 largest singular values of Z + I explain more than a third of its trace.
        assert 0.7 * 96 / 3 < product.trace() < 0.7 * 96
    out = values.T @ attention.proj.weight.detach().T
    diagonal, rest = out.diagonal(), out - torch.diag(out.diagonal())
    assert diagonal.mean().item() == pytest.approx(-0.4, abs=0.02)
    assert rest.std().item() == pytest.approx(0.4 / math.sqrt(96), rel=0.05)
    assert abs(rest.mean().item()) < 0.002


@pytest.mark.parametrize("encoder", ["vitn", "vitt", "vitn_reg4"])
def test_the_first_map_is_nearer_at_the_bottom_at_any_seed(encoder):
    """A map that begins inverted may stay so: the losses do not depend on its scale."""
    images = torch.nn.functional.interpolate(
        torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(9)), size=(70, 70), mode="bilinear"
    )
    ramp = torch.linspace(-1, 1, 70)[:, None].expand(70, 70).flatten()
    for seed in range(8):
        torch.manual_seed(seed)
        model = DepthAnything(encoder)
        init_from_scratch(model)
        assert model.training
        with torch.no_grad():
            maps = model.eval()(images).flatten(1)
        assert 0.2 < maps.min() and maps.max() < 1.8, seed
        agreement = torch.corrcoef(torch.cat([ramp[None], maps]))[0, 1:]
        assert agreement.min() > 0.1 and agreement.mean() > 0.25, seed  # of a random map about 0
