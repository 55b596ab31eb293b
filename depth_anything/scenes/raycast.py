"""Ray casting for procedural scenes: solids, pinhole views, exact depth, shading, shadows, mirrors and glass.

Arrays are float32 with one array per component. A ray is (u, v, 1) in the axes of the camera, so its length parameter
is the planar depth. In the axes of a solid it is u * a + (v * b + c). Only the rows and columns that the bounding box
of a solid may cover are computed.

World axes: x right, y down (the floor is y = 0, objects have negative y), z forward.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from depth_anything.scenes.materials import Atmosphere, Light, Material, exp_negative, illuminate, texture

FAR_M = 150.0  # everything beyond is sky
NEAR_M = 0.1
EPSILON = np.float32(1e-20)  # added to a divisor that is zero for a ray along a face; changes no other value


@dataclass(frozen=True, eq=False)
class Solid:
    """A box, ball (ellipsoid), tube (upright in its own axes), or shell (a room seen from the inside).

    Attributes:
        shape: "box" | "ball" | "tube" | "shell".
        center: (3,) in meters.
        half: (3,) half sizes along its axes, in meters.
        axes: (3, 3), the rows are its axes in the world.
        role: Kind of surface; see `materials.random_material`.
    """

    shape: str
    center: np.ndarray
    half: np.ndarray
    axes: np.ndarray
    role: str


@dataclass(frozen=True, eq=False)
class PinholeView:
    """A pinhole camera at `origin` (3,). The ray of column u, row v is rotation @ (u, v, 1); its parameter is depth."""

    origin: np.ndarray
    rotation: np.ndarray
    u: np.ndarray
    v: np.ndarray

    def crop(self, rows: slice, columns: slice) -> "PinholeView":
        """Return the view of a window of the pixels."""
        return replace(self, u=self.u[columns], v=self.v[rows])


@dataclass(frozen=True, eq=False)
class Scene:
    """Solids (glass last), their materials (of a shell: wall, ceiling, floor), and the atmosphere."""

    solids: list[Solid]
    materials: list[tuple[Material, ...]]
    air: Atmosphere


def rotation_matrix(yaw: float, pitch: float = 0.0, roll: float = 0.0) -> np.ndarray:
    """Return the rotation from camera to world: roll, then pitch (down is positive), then yaw (right is positive)."""
    a, b, c = (
        (math.cos(yaw), math.sin(yaw)),
        (math.cos(pitch), math.sin(pitch)),
        (math.cos(roll), math.sin(roll)),
    )
    turn = np.array([[a[0], 0, a[1]], [0, 1, 0], [-a[1], 0, a[0]]])
    nod = np.array([[1, 0, 0], [0, b[0], b[1]], [0, -b[1], b[0]]])
    lean = np.array([[c[0], -c[1], 0], [c[1], c[0], 0], [0, 0, 1]])
    return turn @ nod @ lean


# ------------------------------------------------------------------------------------------------ casting

_CORNERS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], np.float64)


def _projected_windows(solids: list[Solid], view: PinholeView) -> list[tuple[slice, slice] | None]:
    """Return for each solid the rows and columns that its bounding box may cover, None if it is not in view."""
    reach = np.stack([s.half[:, None] * s.axes for s in solids])
    corners = (_CORNERS @ reach + np.stack([s.center for s in solids])[:, None] - view.origin) @ view.rotation
    z = corners[..., 2]
    bounds = []
    for axis, grid in ((1, view.v), (0, view.u)):
        edge = corners[..., axis] / np.maximum(z, NEAR_M)
        low = np.searchsorted(grid, edge.min(1) - 1e-6).tolist()
        bounds.append((low, np.searchsorted(grid, edge.max(1) + 1e-6).tolist()))
    (top, bottom), (left, right) = bounds
    nearest, farthest = z.min(1).tolist(), z.max(1).tolist()
    windows: list[tuple[slice, slice] | None] = []
    for k in range(len(solids)):
        if farthest[k] < NEAR_M:
            windows.append(None)
        elif nearest[k] < NEAR_M:  # a corner behind the camera has no projection
            windows.append((slice(0, view.v.size), slice(0, view.u.size)))
        elif top[k] < bottom[k] and left[k] < right[k]:
            windows.append((slice(top[k], bottom[k]), slice(left[k], right[k])))
        else:
            windows.append(None)
    return windows


def _to_local(solid: Solid, view: PinholeView) -> tuple[np.ndarray, np.ndarray]:
    """Return origin (3,) and ray matrix (3, 3) in the axes of a solid, scaled to half sizes or radius 1."""
    scale = solid.axes / solid.half[:, None]
    return (scale @ (view.origin - solid.center)).astype(np.float32), (scale @ view.rotation).astype(
        np.float32
    )


def _slab_interval(o: np.float32, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where rays enter and leave [-1, 1] on one axis."""
    inverse = 1 / (d + EPSILON)
    middle, spread = -o * inverse, np.abs(inverse)
    return middle - spread, middle + spread


def _ray_interval(solid: Solid, view: PinholeView) -> tuple[np.ndarray, np.ndarray]:
    """Return the depths at which rays enter and leave a solid; entry >= exit means a miss."""
    o, m = _to_local(solid, view)
    u, v = view.u, view.v[:, None]
    d = [m[k, 0] * u + (m[k, 1] * v + m[k, 2]) for k in range(3)]
    if solid.shape in ("box", "shell"):
        (near, far), y, z = (_slab_interval(o[k], d[k]) for k in range(3))
        return np.maximum(np.maximum(near, y[0]), z[0]), np.minimum(np.minimum(far, y[1]), z[1])
    round_axes = (0, 1, 2) if solid.shape == "ball" else (0, 2)
    a = sum(d[k] * d[k] for k in round_axes) + EPSILON
    b = sum(o[k] * d[k] for k in round_axes)
    root = b * b - a * (sum(o[k] * o[k] for k in round_axes) - 1)
    miss = root < 0
    root, inverse = np.sqrt(np.maximum(root, 0)), 1 / a
    near, far = (-b - root) * inverse, (root - b) * inverse
    near[miss] = np.inf
    if solid.shape == "tube":
        low, high = _slab_interval(o[1], d[1])
        near, far = np.maximum(near, low), np.minimum(far, high)
    return near, far


def cast_rays(
    solids: list[Solid], view: PinholeView, *, beyond: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Find the first solid on each ray.

    Args:
        solids: The solids.
        view: H x W rays.
        beyond: depth (H, W) up to which solids are ignored. None: 0.1 m.

    Returns:
        Depth, float32 (H, W) in meters, +inf where a ray hits nothing within 150 m; and the number of the solid, int16
        (H, W), -1 for none.
    """
    depth = np.full((view.v.size, view.u.size), np.float32(FAR_M))
    number = np.full(depth.shape, -1, np.int16)
    windows = _projected_windows(solids, view) if solids else []
    for k, (solid, window) in enumerate(zip(solids, windows, strict=True)):
        if window is None:
            continue
        near, far = _ray_interval(solid, view.crop(*window))
        so_far = depth[window]
        start = np.float32(NEAR_M) if beyond is None else beyond[window]
        if solid.shape == "shell":  # seen from the inside: the wall is where the ray leaves
            near, hit = far, (far < so_far) & (far > start)
        else:
            hit = (near < far) & (near < so_far) & (near > start)
        np.copyto(so_far, near, where=hit)
        np.copyto(number[window], np.int16(k), where=hit)
    depth[number < 0] = np.inf
    return depth, number


# ------------------------------------------------------------------------------------------------ shading


def _curved_normals(solid: Solid, local: list[np.ndarray]) -> np.ndarray:
    """Return the world normals (3, n) of a ball or of a tube, whose ends are flat."""
    half, axes = solid.half.astype(np.float32), solid.axes.astype(np.float32)
    bent = [p / h for p, h in zip(local, half, strict=True)]
    if solid.shape == "tube":
        end = np.abs(local[1]) > np.float32(0.9999)
        bent = [np.where(end, 0, bent[0]), np.where(end, np.sign(local[1]), 0), np.where(end, 0, bent[2])]
    length = np.sqrt(bent[0] * bent[0] + bent[1] * bent[1] + bent[2] * bent[2])
    bent = [b / length for b in bent]
    return np.stack([axes[0, w] * bent[0] + axes[1, w] * bent[1] + axes[2, w] * bent[2] for w in range(3)])


def _surface_properties(
    solid: Solid,
    made_of: tuple[Material, ...],
    view: PinholeView,
    u: np.ndarray,
    v: np.ndarray,
    depth: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the albedo and the world normal, both (3, n), of one solid at n rays."""
    o, m = _to_local(solid, view)
    local = [o[k] + depth * (m[k, 0] * u + (m[k, 1] * v + m[k, 2])) for k in range(3)]
    meters = [p * h for p, h in zip(local, solid.half.astype(np.float32), strict=True)]
    footprint = depth * np.float32(view.u[-1] - view.u[0]) / np.float32(view.u.size)
    if solid.shape in ("ball", "tube"):
        return made_of[0].albedo(meters[0] + meters[2], meters[1], footprint), _curved_normals(solid, local)
    size = [np.abs(p) for p in local]
    on_x, on_y = (size[0] > size[1]) & (size[0] > size[2]), size[1] > size[2]
    face = np.where(on_x, 0, np.where(on_y, 1, 2))
    outside = np.where(on_x, local[0], np.where(on_y, local[1], local[2])) > 0
    a, b = np.where(on_x, meters[2], meters[0]), np.where(face == 1, meters[2], meters[1])
    sign = np.where(outside != (solid.shape == "shell"), np.float32(1), np.float32(-1))
    normal = solid.axes.astype(np.float32).T[:, face] * sign
    if solid.shape != "shell":
        return made_of[0].albedo(a, b, footprint), normal
    albedo = np.empty_like(normal)
    for material, part in zip(
        made_of, (face != 1, (face == 1) & ~outside, (face == 1) & outside), strict=True
    ):
        albedo[:, part] = material.albedo(a[part], b[part], footprint[part])
    return albedo, normal


def shade(scene: Scene, view: PinholeView, depth: np.ndarray, number: np.ndarray) -> np.ndarray:
    """Compute linear RGB (3, H, W) for the result of `cast_rays`, including haze and sky."""
    order = np.argsort(
        number.ravel(), kind="stable"
    )  # sorted by solid: each is shaded as one contiguous slice
    starts = np.searchsorted(number.ravel()[order], np.arange(len(scene.solids) + 1)).tolist()
    row, column = np.divmod(order, view.u.size)
    u, v, depth = view.u[column], view.v[row], depth.ravel()[order]
    sky, solid = slice(0, starts[0]), slice(starts[0], None)
    albedo, normal = np.empty((3, order.size), np.float32), np.empty((3, order.size), np.float32)
    for k, (start, stop) in enumerate(zip(starts, starts[1:], strict=False)):
        if start < stop:
            part = slice(start, stop)
            found = _surface_properties(
                scene.solids[k], scene.materials[k], view, u[part], v[part], depth[part]
            )
            albedo[:, part], normal[:, part] = found
    m, o = view.rotation.astype(np.float32), view.origin.astype(np.float32)
    rays = [m[k, 0] * u + (m[k, 1] * v + m[k, 2]) for k in range(3)]
    points = [o[k] + depth[solid] * rays[k][solid] for k in range(3)]
    light = illuminate(albedo[:, solid], points, normal[:, solid], scene.air)
    haze = np.array(scene.air.haze, np.float32)[:, None]
    clear = exp_negative(depth[solid] * np.float32(scene.air.density))
    image = np.empty((3, order.size), np.float32)
    image[:, order[solid]] = haze + (light - haze) * clear
    if sky.stop:
        image[:, order[sky]] = _sky_color(scene.air, [ray[sky] for ray in rays])
    return image.reshape(3, view.v.size, view.u.size)


def _sky_color(air: Atmosphere, rays: list[np.ndarray]) -> np.ndarray:
    """Return the color of the sky: haze at the horizon, the zenith's color above, clouds."""
    length = np.sqrt(rays[0] * rays[0] + rays[1] * rays[1] + rays[2] * rays[2])
    up = np.clip(rays[1] / length * -2, 0, 1)
    haze, zenith = (np.array(c, np.float32)[:, None] for c in (air.haze, air.zenith))
    sky = haze + (zenith - haze) * up
    if air.clouds:
        flat = np.float32(40) / ((up + np.float32(0.15)) * length)
        x, y = ((r * flat + 512).astype(np.int32) & 255 for r in (rays[0], rays[2]))
        cover = np.clip(texture("fractal")[0, y * 256 + x] * 2 - np.float32(1.2 - air.clouds), 0, 1)
        sky = sky + (np.float32(0.9) - sky) * cover * np.float32(air.clouds)
    return sky


def shadow_map(
    solids: list[Solid], light: Light, center: np.ndarray, *, reach: float | None = None
) -> Callable[[list[np.ndarray]], np.ndarray]:
    """Return a function of world points that is True in shadow, from a depth map as the light sees `center`.

    `reach` is the size in meters of the part around `center` that matters; None: that of a room.
    """
    origin, spread, side, bias = np.array(light.position), 2.2, 96, 0.04
    if reach is not None and not light.distant:
        away = center - origin
        distance = math.sqrt(float((away * away).sum()))
        spread = min(2.2, 1.3 * reach / max(distance, 0.1))
        bias = min(0.04, 0.03 * reach)
    if light.distant:
        origin, spread, side = center + 60 * origin, 0.28, 160
    ahead = center - origin
    ahead = ahead / math.sqrt(ahead[0] ** 2 + ahead[1] ** 2 + ahead[2] ** 2)
    across = np.array([ahead[2] + 1e-3, 0, -ahead[0]])
    across = across / math.sqrt(across[0] ** 2 + across[2] ** 2)
    turn = np.stack([across, np.cross(ahead, across), ahead], axis=1)
    grid = ((np.arange(side, dtype=np.float32) + 0.5) * np.float32(2 / side) - 1) * np.float32(spread)
    depth, _ = cast_rays(
        [s for s in solids if s.shape != "shell" and s.role not in ("lamp", "glass", "road", "ground")],
        PinholeView(origin, turn, grid, grid),
    )
    depth = depth + np.float32(0.4 if light.distant else bias)  # else surfaces would shadow themselves
    axes, start, half = turn.T.astype(np.float32), origin.astype(np.float32), np.float32(side / 2)

    def in_shadow(points: list[np.ndarray]) -> np.ndarray:
        moved = [p - s for p, s in zip(points, start, strict=True)]
        x, y, z = (axes[k, 0] * moved[0] + axes[k, 1] * moved[1] + axes[k, 2] * moved[2] for k in range(3))
        scale = half / np.float32(spread) / np.maximum(z, np.float32(1e-3))
        column, row = np.clip(x * scale + half, -1, side), np.clip(y * scale + half, -1, side)
        inside = (z > 0) & (column >= 0) & (column < side) & (row >= 0) & (row < side)
        index = np.where(inside, row.astype(np.int32) * side + column.astype(np.int32), 0)
        return inside & (depth.ravel()[index] < z)

    return in_shadow


def add_reflections(
    image: np.ndarray, scene: Scene, view: PinholeView, depth: np.ndarray, number: np.ndarray
) -> None:
    """Draw the reflections of the largest mirror into `image` (3, H, W), as the view from behind its face."""
    mirrors = [(int((number == k).sum()), k) for k, s in enumerate(scene.solids) if s.role == "mirror"]
    pixels, k = max(mirrors, default=(0, 0))
    if pixels < 16:
        return
    solid = scene.solids[k]
    thin = int(solid.half.argmin())
    away = solid.axes[thin]
    away = away if float(away @ (view.origin - solid.center)) > 0 else -away
    face = solid.center + away * solid.half[thin]
    flip = np.eye(3) - 2 * np.outer(away, away)
    rows, columns = np.nonzero((number == k).any(1))[0], np.nonzero((number == k).any(0))[0]
    window = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    behind = PinholeView(face + flip @ (view.origin - face), flip @ view.rotation, view.u, view.v).crop(
        *window
    )
    rest = replace(
        scene,
        solids=scene.solids[:k] + scene.solids[k + 1 :],
        materials=scene.materials[:k] + scene.materials[k + 1 :],
    )
    seen = shade(rest, behind, *cast_rays(rest.solids, behind, beyond=depth[window] + np.float32(0.01)))
    tint = np.array(scene.materials[k][0].high, np.float32)[:, None, None]
    own = image[:, window[0], window[1]]
    np.copyto(own, seen * tint * np.float32(0.9) + own * np.float32(0.1), where=number[window] == k)


def tint_glass(image: np.ndarray, scene: Scene, number: np.ndarray) -> None:
    """Tint `image` (3, H, W) behind each glass pane; `number` (H, W) is the pane in front, -1 for none."""
    for k in np.unique(number[number >= 0]).tolist():
        tint = np.array(scene.materials[k][0].high, np.float32)[:, None, None]
        np.copyto(image, image * tint * np.float32(0.75) + np.float32(0.05), where=number == k)
