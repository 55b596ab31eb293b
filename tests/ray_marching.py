"""Depth of solids by walking along rays, for the tests of the renderer."""

from collections.abc import Sequence

import numpy as np

from depth_anything.scenes.raycast import PinholeView, Solid


def inside(one: Solid, points: np.ndarray) -> np.ndarray:
    """Return whether float64 points (n, 3) are inside a solid, from its definition."""
    p = (points - one.center) @ one.axes.T / one.half
    if one.shape == "ball":
        return (p**2).sum(1) < 1
    if one.shape == "tube":
        return (p[:, 0] ** 2 + p[:, 2] ** 2 < 1) & (abs(p[:, 1]) < 1)
    return (abs(p) < 1).all(1)


def march(solids: Sequence[Solid], seen: PinholeView, step: float = 0.02, far: float = 14.0) -> np.ndarray:
    """Depth by walking along every ray in float64: no algebra in common with `cast`."""
    v, u = np.meshgrid(seen.v.astype(float), seen.u.astype(float), indexing="ij")
    rays = np.stack([u, v, np.ones_like(u)], -1).reshape(-1, 3) @ seen.rotation.T
    depth = np.full(len(rays), np.inf)
    left = np.arange(len(rays))
    for t in np.arange(0.1, far, step):
        points = seen.origin + t * rays[left]
        hit = np.zeros(len(left), bool)
        for one in solids:
            within = inside(one, points)
            hit |= ~within if one.shape == "shell" else within
        depth[left[hit]] = t
        left = left[~hit]
        if not left.size:
            break
    return depth.reshape(len(seen.v), len(seen.u))
