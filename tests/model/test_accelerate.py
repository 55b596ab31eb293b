"""Activation checkpointing and compilation change neither state dict names nor results."""

import copy
from functools import partial

import pytest
import torch

from depth_anything.model.accelerate import accelerate
from depth_anything.model.depth_anything import DepthAnything

# torch 2.15 warns of what its own compiler does.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def step(model, image):
    output = model(image)
    output.square().mean().backward()
    return output.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_state_dict_names_and_results_do_not_change(monkeypatch, checkpoint, compiled):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # inductor takes a minute
    torch.manual_seed(0)
    model = DepthAnything("vitn")
    image = torch.randn(2, 3, 70, 98)
    names = list(model.state_dict())
    output, gradients = step(model, image)
    model.zero_grad()
    accelerate(model, checkpoint=checkpoint, compile=compiled)
    again, gradients_again = step(model, image)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(again, output, atol=1e-6, rtol=0)
    for got, want in zip(gradients_again, gradients, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_checkpointed_blocks_are_recomputed_in_the_backward_pass():
    """With checkpointing each block runs twice in a training step, once in a prediction."""
    model = DepthAnything("vitn")
    calls = []
    for block in model.pretrained.blocks:
        block.norm1.register_forward_hook(lambda *_: calls.append(1))
    accelerate(model, checkpoint=True, compile=False)
    model(torch.randn(1, 3, 28, 28)).sum().backward()
    assert len(calls) == 2 * len(model.pretrained.blocks)
    calls.clear()
    with torch.no_grad():
        model(torch.randn(1, 3, 28, 28))
    assert len(calls) == len(model.pretrained.blocks)


def test_compiled_blocks_share_one_compilation(monkeypatch):
    """The compiler sees the recomputation."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    model = DepthAnything("vitn")
    accelerate(model, checkpoint=True, compile=True)
    model(torch.randn(1, 3, 28, 28))
    assert len(graphs) == 1
    assert "tag_activation_checkpoint" in graphs[0].code


def test_a_copy_runs_its_own_blocks():
    """Weight averaging copies models: a copy must use its own weights."""
    model = DepthAnything("vitn")
    accelerate(model, checkpoint=True, compile=False)
    image = torch.randn(1, 3, 28, 28)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.pretrained.blocks.parameters():
            parameter.zero_()
    assert not torch.equal(other(image), model(image))
