"""Rules that combine the maps of several teachers, against loops over images and pixels in NumPy."""

import hashlib
from collections.abc import Callable

import numpy as np
import pytest
import torch

from depth_anything.teachers.combine import (
    RULES,
    agreement_map,
    align_maps,
    choose_teacher,
    mean_map,
    median_map,
)
from depth_anything.training import config

K, B, H, W = 4, 3, 9, 11


def make_maps(seed: int = 0) -> np.ndarray:
    """Make four views of one scene in units of their own, with noise, holes, and odd teachers for some images."""
    rng = np.random.default_rng(seed)
    scene = rng.uniform(1, 5, (B, H, W))
    maps = np.stack(
        [a * scene + b + 0.2 * rng.normal(size=scene.shape) for a, b in [(1, 0), (3, -2), (0.1, 7), (40, 1)]]
    )
    maps[:, :, 0][rng.random((K, B, W)) < 0.4] = np.nan
    maps[2, 1, 4, 5], maps[0, 1, 6, 6] = np.inf, -np.inf
    maps[1, 0] *= -1  # larger is farther
    maps[0, 2] = np.nan  # the first teacher has no map: the second becomes the reference
    maps[3, 2] = 4.0  # a constant
    return maps.astype(np.float32)


def reference_alignment(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fit with numpy.linalg.lstsq, image by image."""
    aligned, scales, correlations = np.full(maps.shape, np.nan), np.zeros(B), np.ones(B)
    for b in range(B):
        first = next(k for k in range(K) if np.isfinite(maps[k, b]).sum() >= 2)
        target = maps[first, b].astype(np.float64)
        values = np.sort(target[np.isfinite(target)])
        scales[b] = np.abs(values - values[(len(values) - 1) // 2]).mean()
        for k in range(K):
            known = np.isfinite(maps[k, b])
            both = known & np.isfinite(target)
            if k == first:
                aligned[k, b][known] = target[known]
                continue
            if both.sum() < 2:
                continue
            x = maps[k, b].astype(np.float64)
            if np.ptp(x[both]) == 0:
                correlations[b] = 0
                continue
            a, c = np.linalg.lstsq(np.stack([x[both], np.ones(both.sum())], 1), target[both], rcond=None)[0]
            r = np.corrcoef(x[both], target[both])[0, 1]
            correlations[b] = min(correlations[b], max(r, 0))
            if a > 0:
                aligned[k, b][known] = a * x[known] + c
    return aligned, scales, correlations


@pytest.mark.parametrize("seed", range(3))
def test_rules_equal_the_loops(seed: int) -> None:
    maps = make_maps(seed)
    expected, scales, correlations = reference_alignment(maps)
    aligned = align_maps(torch.from_numpy(maps))
    np.testing.assert_allclose(aligned.maps, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(aligned.scale, scales, rtol=1e-5)
    np.testing.assert_allclose(aligned.correlation, correlations, atol=1e-5)
    assert (correlations > 0).tolist() == [False, True, False]
    mean, median, agreement = (
        values.numpy()
        for values in (mean_map(aligned), median_map(aligned), agreement_map(aligned, tolerance=0.7))
    )
    for b, y, x in np.ndindex(B, H, W):
        values = [v for v in expected[:, b, y, x] if np.isfinite(v)]
        if not values:
            assert np.isnan(mean[b, y, x]) and np.isnan(median[b, y, x]) and agreement[b, y, x] == 0
            continue
        assert mean[b, y, x] == pytest.approx(np.mean(values), abs=1e-4)
        assert median[b, y, x] == pytest.approx(np.median(values), abs=1e-4)
        agree = correlations[b] * max(0.0, 1 - (max(values) - min(values)) / (0.7 * scales[b]))
        assert agreement[b, y, x] == pytest.approx(agree if len(values) > 1 else 0.0, abs=1e-3)
    assert 0 < agreement[1].mean() < 1 and agreement.min() == 0 and agreement.max() <= 1


def test_the_reference_map_is_not_changed() -> None:
    maps = torch.from_numpy(make_maps())
    aligned = align_maps(maps).maps
    known = maps[0, 0].isfinite()
    assert torch.equal(aligned[0, 0][known], maps[0, 0][known])


def test_equal_teachers_agree_everywhere_in_any_unit() -> None:
    scene = torch.rand(2, H, W, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
    aligned = align_maps(torch.stack([scene, 100 * scene - 3]))
    torch.testing.assert_close(mean_map(aligned), scene)
    torch.testing.assert_close(agreement_map(aligned), torch.ones_like(scene), atol=1e-4, rtol=0)


def test_an_opposed_or_constant_teacher_changes_no_label_and_agrees_nowhere() -> None:
    scene = torch.rand(1, H, W, generator=torch.Generator().manual_seed(0))
    for other in (5 - scene, torch.full_like(scene, 2.0)):
        aligned = align_maps(torch.stack([scene, other]))
        assert torch.equal(mean_map(aligned), scene) and torch.equal(median_map(aligned), scene)
        assert not agreement_map(aligned).any()


def test_unrelated_teachers_do_not_agree_along_the_mean() -> None:
    a, b = torch.rand(2, 1, 80, 90, generator=torch.Generator().manual_seed(0))
    agreement = agreement_map(align_maps(torch.stack([a, b])))
    assert agreement.max() < 0.05


@pytest.mark.parametrize("combine", [mean_map, median_map, agreement_map])
def test_images_do_not_influence_each_other(combine: Callable[..., torch.Tensor]) -> None:
    maps = torch.from_numpy(make_maps())
    whole = combine(align_maps(maps))
    for b in range(B):
        torch.testing.assert_close(combine(align_maps(maps[:, b : b + 1]))[0], whole[b], equal_nan=True)


def test_the_choice_depends_on_the_key_alone() -> None:
    keys = [f"photos/0/{i}" for i in range(2000)]
    chosen = [choose_teacher(key, [7, 3]) for key in keys]
    words = [
        int.from_bytes(hashlib.sha256(f"teacher\n{key}".encode()).digest()[:8], "little") for key in keys
    ]
    assert chosen == [int(word / 2**64 >= 0.7) for word in words]
    assert chosen.count(1) / len(keys) == pytest.approx(0.3, abs=0.03)
    assert {choose_teacher(key, [0, 1, 0]) for key in keys} == {1}
    assert {choose_teacher(key, [1, 1, 1]) for key in keys} == {0, 1, 2}


def test_the_config_knows_the_rules() -> None:
    assert config.TEACHER_RULES == RULES
