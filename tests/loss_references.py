"""Plain references of the losses, and inputs and lists of losses for their tests."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from depth_anything.losses import (
    gradient_matching_loss,
    scale_shift_invariant_loss,
    silog_loss,
)

SSI = scale_shift_invariant_loss
GM = gradient_matching_loss


def position_weight(prediction):
    """A weight in [0, 1] for each pixel, the same for all images; about a tenth are 0."""
    weight = np.random.default_rng(5).random(prediction.shape[1:])
    return torch.from_numpy(np.where(weight < 0.1, 0, weight)).expand(prediction.shape).float()


def weighted(loss, **options):
    return lambda p, t, v, **more: loss(p, t, v, pixel_weight=position_weight(p), **options, **more)


MAP_LOSSES = {
    "ssi": SSI,
    "ssi trimmed": partial(SSI, trim=0.1),
    "gm": GM,
    "gm trimmed": partial(GM, trim=0.1),
    "silog": silog_loss,
    "silog variance alone": partial(silog_loss, variance_focus=1.0),
    "ssi hybrid": partial(SSI, normalization="hybrid", levels=2, trim=0.1),
    "ssi local": partial(SSI, normalization="local", levels=2),
    "ssi raw": partial(SSI, normalization="none"),
    "ssi weighted": weighted(SSI, trim=0.1),
    "gm weighted": weighted(GM),
}
all_map_losses = pytest.mark.parametrize("loss", MAP_LOSSES.values(), ids=MAP_LOSSES.keys())
invariant = pytest.mark.parametrize("loss", list(MAP_LOSSES.values())[:4], ids=list(MAP_LOSSES)[:4])


def maps(batch=8, height=19, width=23, *, seed=0, dtype=torch.float64):
    """Positive maps; the images have 0, 1, 2, all, and about 70 % valid pixels."""
    rng = np.random.default_rng(seed)
    prediction, target = np.exp(rng.normal(size=(2, batch, height, width)))
    valid = rng.random((batch, height, width)) < 0.7
    if batch >= 4:
        valid[:3] = False
        valid[1, 4, 5] = valid[2, 4, 5] = valid[2, 4, 6] = True
        valid[3] = True
    return (
        torch.from_numpy(prediction).to(dtype),
        torch.from_numpy(target).to(dtype),
        torch.from_numpy(valid),
    )


def tokens(batch=4, count=12, channels=6, *, seed=0, noise=0.6):
    rng = np.random.default_rng(seed)
    student = rng.normal(size=(batch, count, channels))
    teacher = student + noise * rng.normal(size=student.shape)
    student[0] = teacher[0]  # an image without a far token
    return torch.from_numpy(student), torch.from_numpy(teacher)


# Plain references: an image at a time, loops, from the formulae.


def normalised(x):
    median = sorted(x)[(len(x) - 1) // 2]
    deviation = sum(abs(v - median) for v in x) / len(x)
    return (x - median) / max(deviation, 1e-6)


def kept_by(residual, trim):
    """Indices, in reading order, without the floor(trim * n) largest; the later of equals go first."""
    order = sorted(range(len(residual)), key=lambda i: (abs(residual[i]), i))
    return sorted(order[: len(residual) - math.floor(round(trim * len(residual), 9))])


def reference_ssi(prediction, target, valid, *, trim=0.0):
    total = 0.0
    for p, t, v in zip(prediction, target, valid, strict=True):
        if v.sum() < 2:
            continue
        residual = normalised(p[v]) - normalised(t[v])
        kept = kept_by(residual, trim)
        total += sum(abs(residual[i]) for i in kept) / len(kept)
    return total / len(prediction)


def reference_gm(prediction, target, valid, *, trim=0.0, scales=4):
    total = 0.0
    for p, t, v in zip(prediction, target, valid, strict=True):
        if v.sum() < 2:
            continue
        residual = normalised(p[v]) - normalised(t[v])
        pixels = np.argwhere(v)
        known = {tuple(pixels[i]): residual[i] for i in kept_by(residual, trim)}
        for stride in [2**k for k in range(scales)]:
            seen = {yx: r for yx, r in known.items() if yx[0] % stride == 0 and yx[1] % stride == 0}
            edges = [
                abs(r - seen[other])
                for (y, x), r in seen.items()
                for other in [(y, x + stride), (y + stride, x)]
                if other in seen
            ]
            total += sum(edges) / max(len(seen), 1)
    return total / len(prediction)


def reference_error(p, t, *, normalization, levels):
    """|p - t| of the valid pixels of one image by equations 1 to 6 of Distill Any Depth, pixel by pixel."""
    if normalization == "none":
        return np.abs(p - t)
    counts = {"global": [1], "hybrid": [2**k for k in range(levels)], "local": [2 ** (levels - 1)]}
    low, high = t.min(), t.max()
    errors = np.zeros((len(counts[normalization]), len(t)))
    for row, segments in enumerate(counts[normalization]):
        groups = {}
        for i, value in enumerate(t):
            number = min(int((value - low) / (high - low) * segments), segments - 1) if high > low else 0
            groups.setdefault(number, []).append(i)
        for members in groups.values():
            difference = np.array(normalised(p[members])) - np.array(normalised(t[members]))
            errors[row, members] = np.abs(difference)
    return errors.mean(0)


def reference_weighted(prediction, target, valid, weight, *, trim, normalization, levels, scales):
    """Both invariant losses with a weight of each pixel."""
    ssi = gm = 0.0
    for p, t, v, w in zip(prediction, target, valid, weight, strict=True):
        v = v & (w > 0)
        if v.sum() < 2:
            continue
        error = reference_error(p[v], t[v], normalization=normalization, levels=levels)
        kept = kept_by(error, trim)
        ssi += sum(error[i] * w[v][i] for i in kept) / sum(w[v][i] for i in kept)
        residual = p[v] - t[v] if normalization == "none" else normalised_difference(p[v], t[v])
        pixels = np.argwhere(v)
        known = {tuple(pixels[i]): residual[i] for i in kept}
        for stride in [2**k for k in range(scales)]:
            seen = {yx: r for yx, r in known.items() if yx[0] % stride == 0 and yx[1] % stride == 0}
            edges = [
                abs(r - seen[other]) * min(w[y, x], w[other])
                for (y, x), r in seen.items()
                for other in [(y, x + stride), (y + stride, x)]
                if other in seen
            ]
            gm += sum(edges) / (sum(w[yx] for yx in seen) or 1)
    return ssi / len(prediction), gm / len(prediction)


def normalised_difference(p, t):
    return np.array(normalised(p)) - np.array(normalised(t))


def reference_silog(prediction, target, valid, *, variance_focus=0.5):
    total = 0.0
    for p, t, v in zip(prediction, target, valid, strict=True):
        if v.sum() < 2:
            continue
        d = np.log(p[v]) - np.log(t[v])
        total += math.sqrt(np.mean(d**2) - variance_focus * np.mean(d) ** 2)
    return total / len(prediction)


def reference_feature(student, teacher, *, tolerance=0.85):
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(s, t, strict=True)]
        far = [1 - c for c in cosines if c < tolerance]
        total += sum(far) / len(far) if far else 0.0
    return total / len(student)
