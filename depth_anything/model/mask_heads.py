"""What heads that predict masks and their classes share: Mask2Former's losses, and scores of pixels from masks.

Shapes: B images, Q queries, K classes, H W pixels, h w pixels of a mask.
"""

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from depth_anything.classes import IGNORED
from depth_anything.errors import UserError

INSTALL_ADVICE = "pip install 'depth-anything-train[segmentation]'"
_SEED_STEP = 1_000_003


class MaskPrediction(NamedTuple):
    """What a layer predicts.

    Attributes:
        classes: (B, Q, K + 1) logits of each mask's class; the last is "no object".
        masks: (B, Q, h, w) logits of each mask's pixels.
    """

    classes: Tensor
    masks: Tensor


@dataclass(frozen=True)
class MaskLossOptions:
    """Numbers of Mask2Former's loss (arXiv 2112.01527, section 4.1), which EoMT repeats.

    Attributes:
        class_weight: Weight of the cross-entropy of classes.
        mask_weight: Weight of the binary cross-entropy of masks.
        dice_weight: Weight of the dice loss of masks.
        no_object_weight: Weight of "no object" among the classes.
        points: Points at which a mask is compared.
        oversample: How many times as many points are drawn, to find uncertain ones.
        uncertain_share: Share of the points that are uncertain ones.
    """

    class_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0
    no_object_weight: float = 0.1
    points: int = 12544
    oversample: float = 3.0
    uncertain_share: float = 0.75


def require_transformers(head: str) -> Any:
    """Import transformers and scipy, which heads of masks are made of.

    Raises:
        UserError: If one of them is not installed.
    """
    try:
        import scipy.optimize  # noqa: F401  the Hungarian matching
        import transformers
    except ImportError as error:
        raise UserError(
            f"head={head} needs transformers and scipy ({error})", f"type  {INSTALL_ADVICE}"
        ) from error
    return transformers


def parse_options(kind: type, options: dict[str, Any], head: str) -> Any:
    """Build the options of a head from a mapping, which may come from a file.

    Raises:
        UserError: An option is unknown, or not a number of the right kind; it is named.
    """
    known = {field.name: field for field in fields(kind)}
    for name, value in options.items():
        if name not in known:
            raise UserError(f"head={head} has no option {name}", f"its options are {', '.join(known)}")
        default = known[name].default
        whole = isinstance(default, int) or default is None
        ok = isinstance(value, int) if whole else isinstance(value, int | float)
        if isinstance(value, bool) or not (ok or (value is None and default is None)) or (value or 0) < 0:
            what = "a whole number" if whole else "a number"
            raise UserError(
                f"head_options.{name}={value!r} must be {what} of at least 0",
                f"type head_options.{name}={default}",
            )
    return kind(**options)


def pixel_scores(prediction: MaskPrediction, size: Sequence[int]) -> Tensor:
    """Turn masks into scores of pixels: each mask adds its class probabilities where it is, as Mask2Former does.

    Returns:
        (B, K, H, W), at least 0; they do not sum to one.
    """
    masks = F.interpolate(prediction.masks.float(), size=tuple(size), mode="bilinear", align_corners=False)
    classes = prediction.classes.float().softmax(-1)[..., :-1]
    return torch.einsum("bqk,bqhw->bkhw", classes, masks.sigmoid())


def split_masks(target: Tensor) -> tuple[Tensor, Tensor]:
    """Split a class map (H, W) into a mask per class that occurs: float (N, H, W) and the classes, int64 (N,).

    Ignored pixels are in no mask.
    """
    classes = target.unique()
    classes = classes[classes != IGNORED]
    return (target[None] == classes[:, None, None]).float(), classes.long()


@contextmanager
def seeded(seed: int, device: torch.device) -> Any:
    """Draw the random points of a loss from a seed, so that a resumed run draws the same; restore the generators."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices, device_type="cuda"):
        torch.manual_seed(seed % 2**63)
        yield


def mask_loss(
    predictions: Sequence[MaskPrediction], target: Tensor, samples: Sequence[int], criterion: nn.Module
) -> dict[str, Tensor]:
    """Compute the loss of all layers: for each image on its own, then the mean over images.

    transformers' criterion matches masks and classes by the Hungarian algorithm and normalizes by the number of masks
    of a batch; with one image at a time the loss does not depend on how a batch is divided. Its random points depend on
    the number of the sample.

    Args:
        predictions: Of each layer, the last one last.
        target: Integers (B, H, W), `IGNORED` where a pixel belongs to no mask.
        samples: Number of each image's sample.
        criterion: transformers' Mask2FormerLoss or EomtLoss; its `weight_dict` has the weights.

    Returns:
        "loss", weighted, and its unweighted parts over all layers: "classes", "masks", "dice".
    """
    weights: dict[str, float] = criterion.weight_dict  # type: ignore[assignment]
    names = {"loss_cross_entropy": "classes", "loss_mask": "masks", "loss_dice": "dice"}
    totals = {name: target.new_zeros((), dtype=torch.float32) for name in names}
    for number, (image, sample) in enumerate(zip(target, samples, strict=True)):
        masks, classes = split_masks(image)
        with (
            seeded(_SEED_STEP * (sample + 1), target.device),
            torch.autocast(target.device.type, enabled=False),
        ):
            for layer in predictions:
                logits, pixels = layer.classes[number, None].float(), layer.masks[number, None].float()
                if len(classes):
                    parts = criterion(pixels, logits, [masks], [classes], None)
                else:  # nothing but ignored pixels
                    zero = logits.sum() * 0 + pixels.sum() * 0
                    parts = dict.fromkeys(names, zero)
                totals = {name: totals[name] + parts[name] for name in names}
    totals = {name: value / len(target) for name, value in totals.items()}
    loss = sum(weights[name] * value for name, value in totals.items())
    assert isinstance(loss, Tensor)
    return {"loss": loss, **{names[name]: value for name, value in totals.items()}}
