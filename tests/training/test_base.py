"""The module that training stages share: schedule, optimizer, loss terms, CutMix, feature alignment and clipping."""

from typing import Any

import pytest
import torch
from made_configs import make_config

from depth_anything import DepthAnything
from depth_anything.data.transforms import draw_cutmix_box, draw_perturbation, normalize
from depth_anything.losses import feature_alignment_loss, gradient_matching_loss, scale_shift_invariant_loss
from depth_anything.training.base import DepthModule
from depth_anything.training.optimizer import (
    adam_factory,
    gradient_norm,
    learning_rate_factor,
    optimizer_factory,
    parameter_groups,
)
from depth_anything.training.recipes import Recipe
from depth_anything.training.student import Student

SIDE = 28


def recipe(**changes: Any) -> Recipe:
    """Give the numbers of a short run."""
    return Recipe(**{"steps": 100, "encoder_lr": 1e-4, "head_lr": 1e-3, **changes})


def network(seed: int = 0) -> DepthAnything:
    """Build the smallest network with weights of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return DepthAnything("vitn").eval()


def batch(size: int = 4, **more: torch.Tensor) -> dict[str, Any]:
    """Make images and disparities with a few invalid pixels."""
    generator = torch.Generator().manual_seed(size)
    return {
        "image": torch.randint(0, 256, (size, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator),
        "target": torch.rand(size, SIDE, SIDE, generator=generator),
        "valid": torch.rand(size, SIDE, SIDE, generator=generator) > 0.1,
        **more,
    }


def drawn(draw: Any, size: int = 4) -> torch.Tensor:
    """Draw what the loader would send along."""
    return torch.stack([torch.from_numpy(draw(1, n)) for n in range(size)])


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant", [1 / 11, 1, 1, 1]),
        ("linear", [1 / 11, 1, 0.5, 0]),
        ("cosine", [1 / 11, 1, 0.5, 0]),
        ("poly", [1 / 11, 1, 0.5**0.9, 0]),
    ],
)
def test_learning_rate_factor(schedule: str, factors: list[float]) -> None:
    got = [learning_rate_factor(step, steps=100, warmup=0.1, schedule=schedule) for step in (0, 10, 55, 100)]
    assert got == pytest.approx(factors)


def test_an_unknown_schedule_raises() -> None:
    with pytest.raises(ValueError, match=r"recipe\.schedule=step is unknown; type recipe\.schedule="):
        recipe(schedule="step")


def test_two_groups_hold_every_trainable_parameter() -> None:
    model = network()
    encoder, head = parameter_groups(model, encoder_lr=1.0, head_lr=2.0)
    assert (encoder["lr"], head["lr"]) == (1.0, 2.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].split(".")[0] for p in encoder["params"]} == {"pretrained"}
    assert {names[id(p)].split(".")[0] for p in head["params"]} == {"depth_head"}
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert len(encoder["params"]) + len(head["params"]) + len(frozen) == len(names)
    assert "pretrained.mask_token" in frozen


def test_loss_terms_are_weighted_and_summed() -> None:
    given, model = batch(), network()
    parts = DepthModule(model, recipe(ssi_weight=3.0, gm_weight=5.0, trim=0.1, gm_trim=0.2)).losses(given)
    maps = model(normalize(given["image"])), given["target"], given["valid"]
    ssi = scale_shift_invariant_loss(*maps, trim=0.1)
    gm = gradient_matching_loss(*maps, trim=0.2)
    torch.testing.assert_close(parts["loss"], 3 * ssi + 5 * gm)
    assert (parts["ssi"], parts["gm"]) == (ssi, gm)


def test_the_frozen_encoder_gets_the_clean_image_and_is_not_trained_or_saved() -> None:
    given, model, frozen = batch(perturbation=drawn(draw_perturbation)), network(), network(1)
    module = Student(model, recipe(alignment_weight=7.0), frozen=frozen)
    parts = module.losses(given)
    seen = model.features(normalize(given["image"], given["perturbation"]))
    wanted = frozen.features(normalize(given["image"]))
    torch.testing.assert_close(parts["alignment"], feature_alignment_loss(seen, wanted))
    torch.testing.assert_close(parts["loss"], parts["ssi"] + 2 * parts["gm"] + 7 * parts["alignment"])
    parts["loss"].backward()
    assert all(p.grad is None for p in frozen.parameters())
    assert module.state_dict().keys() == {f"model.{name}" for name in model.state_dict()}


def test_cutmix_compares_parts_separately_and_weights_them_by_area() -> None:
    boxes = drawn(draw_cutmix_box)
    boxes[0], boxes[1] = torch.tensor([0.25, 0.25, 0.75, 0.5]), 0  # one that is mixed, one that is not
    given, model = batch(box=boxes), network()
    parts = DepthModule(model, recipe(trim=0.1)).losses(given)

    clean, expected = normalize(given["image"]), torch.zeros(2)
    for i, box in enumerate((boxes * SIDE - 0.5).ceil().int().tolist()):
        top, left, bottom, right = box
        region = torch.zeros(SIDE, SIDE, dtype=torch.bool)
        region[top:bottom, left:right] = True
        image = torch.where(region, clean[i - 1], clean[i])
        target = torch.where(region, given["target"][i - 1], given["target"][i])[None]
        valid = torch.where(region, given["valid"][i - 1], given["valid"][i])
        prediction = model(image[None])
        for part in (region, ~region):
            maps = prediction, target, (valid & part)[None]
            share = part.float().mean()
            expected[0] += share * scale_shift_invariant_loss(*maps, trim=0.1).detach()
            expected[1] += share * gradient_matching_loss(*maps).detach()
    got = torch.stack([parts["ssi"], parts["gm"]]).detach()
    torch.testing.assert_close(got, expected / len(boxes), rtol=1e-4, atol=1e-5)


def label_maps(size: int = 4) -> dict[str, torch.Tensor]:
    """Make the optional fields of labels: a confidence, and the label of a box with a confidence of its own."""
    generator = torch.Generator().manual_seed(9)
    box = torch.zeros(size, SIDE, SIDE, dtype=torch.bool)
    box[:, 3:19, 5:21] = True
    confidence, local, local_confidence = torch.rand(3, size, SIDE, SIDE, generator=generator)
    return {
        "confidence": confidence,
        "local": torch.where(box, local, 0),
        "local_valid": box,
        "local_confidence": local_confidence,
    }


def test_confidence_and_local_labels_enter_the_loss() -> None:
    given, model = batch(**label_maps()), network()
    numbers = recipe(trim=0.1, local_weight=0.5, normalization="hybrid", normalization_levels=2)
    parts = DepthModule(model, numbers).losses(given)
    prediction = model(normalize(given["image"]))
    options = {"trim": 0.1, "normalization": "hybrid", "levels": 2}
    ssi = scale_shift_invariant_loss(
        prediction, given["target"], given["valid"], pixel_weight=given["confidence"], **options
    )
    gm = gradient_matching_loss(prediction, given["target"], given["valid"], pixel_weight=given["confidence"])
    local = scale_shift_invariant_loss(
        prediction, given["local"], given["local_valid"], pixel_weight=given["local_confidence"], **options
    )
    torch.testing.assert_close(parts["loss"], ssi + 2 * gm + 0.5 * local)
    assert (parts["ssi"], parts["gm"], parts["local"]) == (ssi, gm, local)


def test_cutmix_mixes_the_optional_fields_like_the_label() -> None:
    box = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(4, 1)  # each image is replaced by the one before it
    given, model = batch(**label_maps()), network()
    module = DepthModule(model, recipe(local_weight=1.0))
    rolled = {name: values.roll(1, 0) for name, values in given.items()}
    mixed, expected = module.losses({**given, "box": box}), module.losses(rolled)
    for name in ("ssi", "gm", "local"):
        torch.testing.assert_close(mixed[name], expected[name])


def test_cutmix_without_boxes_changes_nothing() -> None:
    module = DepthModule(network(), recipe())
    module.recipe = recipe(local_weight=0.5)
    more = label_maps()
    plain, mixed = module.losses(batch(**more)), module.losses(batch(**more, box=torch.zeros(4, 4)))
    for name in plain:
        torch.testing.assert_close(plain[name], mixed[name])


def one_step(**changes: Any) -> tuple[DepthModule, dict[str, torch.Tensor], float]:
    """Make a training step; return the module, the change of each parameter, and the gradient norm before clipping."""
    module = DepthModule(network(), recipe(**{"schedule": "constant", **changes}))
    optimizer = module.configure_optimizers()["optimizer"]
    before = {name: p.detach().clone() for name, p in module.model.named_parameters()}
    module.losses(batch())["loss"].backward()
    module.configure_gradient_clipping(optimizer)
    optimizer.step()
    assert module.grad_norm is not None
    moved = {
        name: p.detach() - before[name] for name, p in module.model.named_parameters() if p.requires_grad
    }
    return module, moved, float(module.grad_norm)


@pytest.mark.parametrize("clip_norm", [None, 0.01, 1e6])
def test_clip_norm_limits_the_gradient_norm(clip_norm: float | None) -> None:
    module, _, norm = one_step(clip_norm=clip_norm)
    assert norm > 0.01
    gradients = [p.grad for p in module.model.parameters() if p.grad is not None]
    clipped = float(torch.nn.utils.get_total_norm(gradients))
    assert clipped == pytest.approx(min(norm, clip_norm or norm), rel=1e-4)


def test_one_process_computes_the_gradient_norm_of_older_versions() -> None:
    """In float32, to the last bit, so that a run continues with the bytes of the version that began it."""
    gradients = [
        torch.randn(size, generator=torch.Generator().manual_seed(size)) for size in (7, 3001, 40_000)
    ]
    assert gradient_norm(gradients).equal(torch.nn.utils.get_total_norm(gradients))


def test_weight_decay_shrinks_every_parameter_by_its_rate() -> None:
    """Decoupled: a step with decay differs from one without by rate × decay × parameter."""
    _, plain, _ = one_step()
    module, decayed, _ = one_step(weight_decay=0.5)
    for name, start in network().named_parameters():
        if name in plain:
            rate = 1e-4 if name.startswith("pretrained.") else 1e-3
            torch.testing.assert_close(
                decayed[name] - plain[name], -rate * 0.5 * start.detach(), rtol=1e-2, atol=1e-7
            )
    assert module.recipe.weight_decay == 0.5


def test_the_optimizer_of_the_shipped_config_equals_the_default() -> None:
    config = make_config("stage=metric")
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 1e-3}]
    composed, default = optimizer_factory(config.optimizer)(groups), adam_factory(config.recipe)(groups)
    assert type(composed) is type(default) is torch.optim.AdamW
    assert composed.state_dict() == default.state_dict() and isinstance(composed.defaults["betas"], tuple)


def test_another_optimizer_gets_the_two_groups_and_their_rates() -> None:
    config = make_config("stage=teacher", "optimizer=sgd", "optimizer.momentum=0.5", "recipe.head_lr=0.01")
    module = DepthModule(network(), recipe())
    module.build_optimizer = optimizer_factory(config.optimizer)
    configured = module.configure_optimizers()
    optimizer = configured["optimizer"]
    assert isinstance(optimizer, torch.optim.SGD)
    assert [group["name"] for group in optimizer.param_groups] == ["encoder", "head"]
    assert [group["initial_lr"] for group in optimizer.param_groups] == [1e-4, 1e-3]
    assert {group["momentum"] for group in optimizer.param_groups} == {0.5}
