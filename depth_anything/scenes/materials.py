"""Materials, light and air of procedural scenes, and the random numbers that choose them.

Pixels are computed only with operations that IEEE 754 rounds exactly (+ - * / sqrt, comparisons, integer arithmetic,
table lookups), so a seed gives the same image in any process and with any version of NumPy.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar, cast

import numpy as np

TEXTURE_SIZE = 256  # side of a texture in texels; a power of two, so that wrapping is a bit mask
MIP_LEVELS = 9

Color = tuple[float, float, float]
T = TypeVar("T")


class PhiloxRandom:
    """Random numbers from raw Philox words, which are the same in every version of NumPy."""

    def __init__(self, *key: int) -> None:
        """Start a sequence from a key of one or two integers in [0, 2**64)."""
        self._bits = np.random.Philox(key=np.array([*key, 0][:2], dtype=np.uint64))
        self._words: list[int] = []

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """Return a float in [low, high)."""
        if not self._words:
            self._words = self._bits.random_raw(256).tolist()
        return low + (high - low) * ((self._words.pop() >> 11) * 2.0**-53)

    def integer(self, count: int) -> int:
        """Return an integer in [0, count)."""
        return int(self.uniform(0, count))

    def bernoulli(self, probability: float) -> bool:
        """Return True with this probability."""
        return self.uniform() < probability

    def choice(self, options: Sequence[T]) -> T:
        """Return one of the options, all with equal probability."""
        return options[self.integer(len(options))]

    def array(self, *shape: int) -> np.ndarray:
        """Return a float32 array, uniform in [0, 1)."""
        words = self._bits.random_raw(math.prod(shape))
        return ((words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)).reshape(shape)

    def approx_normal(self, *shape: int) -> np.ndarray:
        """Return an approximately normal float32 array: mean 0, deviation 1, within ±3.5 (a sum of four uniforms)."""
        words = self._bits.random_raw(math.prod(shape)).view(np.uint16).reshape(4, -1)
        total = words.sum(axis=0, dtype=np.int32) - 131070
        return (total.astype(np.float32) * np.float32(math.sqrt(3.0) / 65536)).reshape(shape)

    def color(
        self, *, hue: tuple[float, float], saturation: tuple[float, float], value: tuple[float, float]
    ) -> Color:
        """Return a linear RGB color from ranges of hue (turns), saturation and value."""
        h, s, v = self.uniform(*hue) % 1.0 * 6.0, self.uniform(*saturation), self.uniform(*value)
        red, green, blue = (
            min(max(abs((h + shift) % 6.0 - 3.0) - 1.0, 0.0), 1.0) for shift in (0.0, 4.0, 2.0)
        )
        return v * (1 - s + s * red), v * (1 - s + s * green), v * (1 - s + s * blue)


# ---------------------------------------------------------------------------------------------- textures


def _value_noise(draw: PhiloxRandom, rows: int, columns: int) -> np.ndarray:
    """Return periodic value noise with rows x columns knots."""
    knots = draw.array(rows, columns)
    for axis, count in enumerate((rows, columns)):
        position = np.arange(TEXTURE_SIZE, dtype=np.float32) * np.float32(count / TEXTURE_SIZE)
        low = position.astype(np.int64)
        weight = position - low
        weight = (weight * weight * (3 - 2 * weight)).reshape((-1, 1) if axis == 0 else (1, -1))
        knots = np.take(knots, low, axis) * (1 - weight) + np.take(knots, (low + 1) % count, axis) * weight
    return knots


def _fractal_noise(draw: PhiloxRandom, coarse: int = 4, octaves: int = 5) -> np.ndarray:
    total = sum(_value_noise(draw, coarse << k, coarse << k) * np.float32(0.5**k) for k in range(octaves))
    return np.clip((total / np.float32(2 - 0.5 ** (octaves - 1)) - 0.5) * 2 + 0.5, 0, 1)


def _brick_pattern(
    draw: PhiloxRandom, *, height: int, width: int, joint: int, shifted: bool, contrast: float
) -> np.ndarray:
    """Return bricks, planks or tiles: each of one gray, with dark joints."""
    y, x = np.mgrid[:TEXTURE_SIZE, :TEXTURE_SIZE]
    row = y // height
    x = (x + (row % 2) * (width // 2)) % TEXTURE_SIZE if shifted else x
    gray = draw.array(TEXTURE_SIZE // height, TEXTURE_SIZE // width)[row, x // width]
    value = 1 - contrast + contrast * gray
    return np.where((y % height < joint) | (x % width < joint), np.float32(0.15), value).astype(np.float32)


def _wood_pattern(draw: PhiloxRandom) -> np.ndarray:
    planks = _brick_pattern(draw, height=32, width=256, joint=1, shifted=False, contrast=0.4)
    return planks * (0.6 + 0.4 * _value_noise(draw, 128, 4) + 0.15 * (_value_noise(draw, 32, 8) - 0.5))


def _collage_pattern(draw: PhiloxRandom) -> np.ndarray:
    """Return overlapping colored shapes and strokes: image edges without depth edges."""
    y, x = np.mgrid[:TEXTURE_SIZE, :TEXTURE_SIZE].astype(np.float32)
    canvas = np.stack([_fractal_noise(draw, 2) for _ in range(3)])
    for _ in range(70):
        dx = (x - draw.uniform(0, TEXTURE_SIZE) + TEXTURE_SIZE / 2) % TEXTURE_SIZE - TEXTURE_SIZE / 2
        dy = (y - draw.uniform(0, TEXTURE_SIZE) + TEXTURE_SIZE / 2) % TEXTURE_SIZE - TEXTURE_SIZE / 2
        a, b, shear = draw.uniform(3, 45), draw.uniform(3, 45), draw.uniform(-1, 1)
        dx = dx + np.float32(shear) * dy
        inside = (dx / a) ** 2 + (dy / b) ** 2 < 1 if draw.bernoulli(0.4) else (abs(dx) < a) & (abs(dy) < b)
        canvas[:, inside] = draw.array(3, 1)
    return canvas


def _text_pattern(draw: PhiloxRandom) -> np.ndarray:
    y, x = np.mgrid[:TEXTURE_SIZE, :TEXTURE_SIZE]
    ink = (
        (draw.array(TEXTURE_SIZE // 12 + 1, TEXTURE_SIZE // 3 + 1) < 0.6)[y // 12, x // 3]
        & (y % 12 < 7)
        & (x % 256 > 12)
    )
    return np.where(ink, np.float32(0.1), np.float32(0.95))


def _facade_pattern(draw: PhiloxRandom) -> np.ndarray:
    y, x = np.mgrid[:TEXTURE_SIZE, :TEXTURE_SIZE]
    window = (y % 64 > 18) & (y % 64 < 50) & (x % 64 > 16) & (x % 64 < 48)
    pane = draw.array(4, 4)[y // 64, x // 64] * 0.5
    frame = window & ((x % 64 == 32) | (y % 64 == 34))
    return np.where(window & ~frame, pane, 0.85).astype(np.float32)


def _spots_pattern(draw: PhiloxRandom) -> np.ndarray:
    y, x = np.mgrid[:TEXTURE_SIZE, :TEXTURE_SIZE].astype(np.float32)
    value = np.full((TEXTURE_SIZE, TEXTURE_SIZE), 0.2, np.float32)
    for _ in range(60):
        dx = (x - draw.uniform(0, TEXTURE_SIZE) + TEXTURE_SIZE / 2) % TEXTURE_SIZE - TEXTURE_SIZE / 2
        dy = (y - draw.uniform(0, TEXTURE_SIZE) + TEXTURE_SIZE / 2) % TEXTURE_SIZE - TEXTURE_SIZE / 2
        value[dx * dx + dy * dy < draw.uniform(4, 16) ** 2] = draw.uniform(0.5, 1)
    return value


_PATTERNS: dict[str, Callable[[PhiloxRandom], np.ndarray]] = {
    "fractal": _fractal_noise,
    "speckle": lambda draw: 0.5 * _fractal_noise(draw, 8, 5) + 0.5 * draw.array(TEXTURE_SIZE, TEXTURE_SIZE),
    "foliage": lambda draw: (
        np.clip(_fractal_noise(draw, 32, 3) * 2 - 0.6, 0, 1)
        * (0.4 + 0.6 * draw.array(TEXTURE_SIZE, TEXTURE_SIZE))
    ),
    "wood": _wood_pattern,
    "brick": lambda d: (
        _brick_pattern(d, height=16, width=32, joint=2, shifted=True, contrast=0.5)
        * (0.7 + 0.3 * _fractal_noise(d))
    ),
    "tiles": lambda d: _brick_pattern(d, height=32, width=32, joint=1, shifted=False, contrast=0.15),
    "checker": lambda d: (
        (np.indices((TEXTURE_SIZE, TEXTURE_SIZE)) // 32).sum(0).__mod__(2).astype(np.float32)
    ),
    "stripes": lambda d: np.repeat(d.array(64), 4)[None, :].repeat(TEXTURE_SIZE, 0),
    "spots": _spots_pattern,
    "collage": _collage_pattern,
    "camouflage": lambda d: np.stack([np.round(_fractal_noise(d, 6, 3) * 3) / 3 for _ in range(3)]),
    "text": _text_pattern,
    "facade": _facade_pattern,
}


@functools.cache
def texture(name: str) -> np.ndarray:
    """Return a periodic pattern in [0, 1] and its eight mip levels, concatenated: (1 or 3, 87381). Cached."""
    level: np.ndarray = _PATTERNS[name](
        PhiloxRandom(sum(ord(c) << 8 * k for k, c in enumerate(name[:7])), 77)
    ).astype(np.float32)
    level = level.reshape(-1, TEXTURE_SIZE, TEXTURE_SIZE)
    levels = []
    for _ in range(MIP_LEVELS):
        levels.append(level.reshape(level.shape[0], -1))
        side = level.shape[1]
        if side > 1:
            quads = level.reshape(-1, side // 2, 2, side // 2, 2)
            level = (
                quads[:, :, 0, :, 0] + quads[:, :, 0, :, 1] + quads[:, :, 1, :, 0] + quads[:, :, 1, :, 1]
            ) / 4
    return np.concatenate(levels, axis=1)


_MIP_OFFSETS = np.concatenate(
    [[0], np.cumsum([(TEXTURE_SIZE >> k) ** 2 for k in range(MIP_LEVELS - 1)])]
).astype(np.int32)


@dataclass(frozen=True)
class Material:
    """Two colors and the pattern that mixes them.

    Attributes:
        low: Linear RGB where the pattern is 0.
        high: Linear RGB where the pattern is 1.
        pattern: Name of a texture, or "" for plain `high`.
        texels_per_meter: Scale of the pattern.
        shift: Offset of the pattern in texels.
    """

    low: Color
    high: Color
    pattern: str = ""
    texels_per_meter: float = 64.0
    shift: tuple[float, float] = (0.0, 0.0)

    def albedo(self, a: np.ndarray, b: np.ndarray, footprint: np.ndarray) -> np.ndarray:
        """Return linear RGB (3, n) at surface coordinates a, b (n,) in meters; `footprint` (n,) is a pixel's size."""
        high = np.array(self.high, np.float32)[:, None]
        if not self.pattern:
            return np.broadcast_to(high, (3, a.size))
        scale = np.float32(self.texels_per_meter)
        level = np.clip(np.frexp(footprint * scale)[1], 0, MIP_LEVELS - 1)
        x = (a * scale + np.float32(self.shift[0] + (1 << 20))).astype(np.int32) >> level
        y = (b * scale + np.float32(self.shift[1] + (1 << 20))).astype(np.int32) >> level
        mask = (TEXTURE_SIZE - 1) >> level
        value = texture(self.pattern)[:, _MIP_OFFSETS[level] + (((y & mask) << (8 - level)) | (x & mask))]
        low = np.array(self.low, np.float32)[:, None]
        return low + (high - low) * value


def _scale_color(color: Color, amount: float) -> Color:
    return color[0] * amount, color[1] * amount, color[2] * amount


# role: (hue, saturation, value, patterns). Light plain colors, as in computer graphics.
_SYNTHETIC_MATERIALS = {
    "floor": ((0.05, 0.15), (0.1, 0.4), (0.4, 0.7), ("wood", "tiles", "")),
    "wall": ((0.0, 1.0), (0.0, 0.15), (0.6, 0.85), ("", "", "fractal")),
    "ceiling": ((0.0, 1.0), (0.0, 0.05), (0.8, 0.95), ("",)),
    "furniture": ((0.0, 1.0), (0.2, 0.7), (0.3, 0.7), ("", "", "wood", "fractal")),
    "poster": ((0.0, 1.0), (0.2, 0.7), (0.3, 0.7), ("", "checker")),
    "thin": ((0.0, 1.0), (0.0, 0.3), (0.1, 0.4), ("",)),
    "lamp": ((0.1, 0.2), (0.0, 0.2), (0.9, 1.0), ("",)),
    "ground": ((0.05, 0.3), (0.05, 0.4), (0.3, 0.5), ("", "fractal")),
    "road": ((0.6, 0.7), (0.0, 0.1), (0.2, 0.35), ("", "fractal")),
    "facade": ((0.0, 1.0), (0.05, 0.4), (0.45, 0.8), ("facade", "facade", "")),
    "car": ((0.0, 1.0), (0.4, 0.9), (0.3, 0.8), ("",)),
    "foliage": ((0.22, 0.38), (0.4, 0.7), (0.2, 0.5), ("", "fractal")),
    "glass": ((0.5, 0.6), (0.1, 0.3), (0.6, 0.8), ("",)),
    "mirror": ((0.55, 0.6), (0.0, 0.1), (0.7, 0.9), ("",)),
}
_PHOTOGRAPHIC_PATTERNS = tuple(
    "fractal speckle wood brick tiles checker stripes spots collage camouflage text".split()
)
_PHOTOGRAPHIC_MATERIALS = {
    "floor": (
        (0.0, 0.2),
        (0.1, 0.6),
        (0.1, 0.8),
        ("wood", "tiles", "checker", "speckle", "camouflage", "fractal"),
    ),
    "wall": (
        (0.0, 1.0),
        (0.0, 0.6),
        (0.15, 0.9),
        ("brick", "stripes", "fractal", "spots", "speckle", "wood"),
    ),
    "ceiling": ((0.0, 1.0), (0.0, 0.2), (0.3, 0.95), ("fractal", "wood", "speckle", "tiles")),
    "furniture": ((0.0, 1.0), (0.0, 0.8), (0.05, 0.9), _PHOTOGRAPHIC_PATTERNS),
    "poster": ((0.0, 1.0), (0.0, 0.9), (0.5, 1.0), ("collage", "collage", "text", "camouflage")),
    "thin": ((0.0, 1.0), (0.0, 0.5), (0.03, 0.9), ("", "speckle", "stripes")),
    "lamp": ((0.05, 0.2), (0.0, 0.5), (0.9, 1.0), ("", "fractal")),
    "ground": ((0.05, 0.35), (0.1, 0.7), (0.1, 0.5), ("foliage", "speckle", "brick", "fractal")),
    "road": ((0.0, 1.0), (0.0, 0.15), (0.05, 0.5), ("speckle", "fractal", "brick")),
    "facade": (
        (0.0, 0.2),
        (0.05, 0.6),
        (0.15, 0.9),
        ("facade", "brick", "facade", "fractal", "collage", "tiles"),
    ),
    "car": ((0.0, 1.0), (0.0, 0.9), (0.03, 0.9), ("", "fractal", "collage")),
    "foliage": ((0.05, 0.4), (0.3, 0.9), (0.1, 0.5), ("foliage", "speckle")),
    "glass": ((0.3, 0.7), (0.0, 0.4), (0.6, 1.0), ("",)),
    "mirror": ((0.0, 1.0), (0.0, 0.1), (0.8, 0.95), ("",)),
}


def random_material(role: str, *, look: str, draw: PhiloxRandom) -> Material:
    """Return a random material for a role (floor, wall, furniture, …) in a look."""
    hue, saturation, value, patterns = (
        _SYNTHETIC_MATERIALS if look == "synthetic" else _PHOTOGRAPHIC_MATERIALS
    )[role]
    high = draw.color(hue=hue, saturation=saturation, value=value)
    pattern = draw.choice(patterns)
    texels_per_meter = draw.uniform(50, 90) if pattern != "facade" else 64 / draw.uniform(2.5, 4.0)
    if look == "synthetic":
        low = _scale_color(high, draw.uniform(0.75, 0.9) if pattern != "facade" else 0.4)
    elif draw.bernoulli(0.5):
        low = _scale_color(high, draw.uniform(0.1, 0.6))
    else:
        low = draw.color(hue=hue, saturation=saturation, value=(0.03, value[1]))
    if pattern in ("collage", "camouflage"):
        low = _scale_color((1.0, 1.0, 1.0), 0.05)
    if look == "photographic" and role != "facade":
        texels_per_meter *= 4.0 ** draw.uniform(-0.7, 0.7) * (0.4 if role in ("ground", "road") else 1.0)
    return Material(
        low, high, pattern, texels_per_meter, (draw.uniform(0, TEXTURE_SIZE), draw.uniform(0, TEXTURE_SIZE))
    )


def vary_material(material: Material, role: str, *, detail: float, draw: PhiloxRandom) -> Material:
    """Return a material of the varied layout: half of all surfaces plain, patterns from coarse to fine.

    Args:
        material: The look's material.
        role: Its role.
        detail: Factor of the patterns' frequency, above 1 for close-ups.
        draw: Random numbers.
    """
    plain = draw.bernoulli(0.75 if role in ("ceiling", "wall") else 0.4)
    finer = detail * 3.0 ** draw.uniform(-1, 1)
    if role in ("poster", "facade", "foliage", "ground", "road", "glass", "mirror"):
        return replace(material, texels_per_meter=material.texels_per_meter * detail)
    pattern = "" if plain else material.pattern
    low = material.low
    if draw.bernoulli(0.5):  # faint
        weight = draw.uniform(0.1, 0.5)
        low = cast(Color, tuple(h + (c - h) * weight for c, h in zip(low, material.high, strict=True)))
    return replace(material, low=low, pattern=pattern, texels_per_meter=material.texels_per_meter * finer)


# ------------------------------------------------------------------------------------------------- light


@dataclass(frozen=True)
class Light:
    """A lamp or the sun.

    Attributes:
        position: World position in meters; if `distant`, the direction toward the light.
        reach: Distance in meters at which a lamp has a quarter of its strength.
        shadow: Function of world points (three arrays) that is True in shadow, or None.
    """

    position: Color
    color: Color
    distant: bool
    reach: float = 4.0
    shadow: Callable[[list[np.ndarray]], np.ndarray] | None = None


@dataclass(frozen=True)
class Atmosphere:
    """Light and air of a scene: ambient light from above and below, lamps, haze, sky."""

    above: Color
    below: Color
    lights: tuple[Light, ...]
    haze: Color
    density: float  # per meter
    zenith: Color
    clouds: float = 0.0


def exp_negative(x: np.ndarray) -> np.ndarray:
    """Approximate exp(-x) for x >= 0 within 0.02 with exactly rounded operations, as (1 + x/16)**-16."""
    y = 1 / (1 + x * np.float32(1 / 16))
    for _ in range(4):
        y = y * y
    return y


def illuminate(
    albedo: np.ndarray, points: list[np.ndarray], normals: np.ndarray, air: Atmosphere
) -> np.ndarray:
    """Return the light leaving each point, (3, n): ambient light by the normal's height, and lamps by Lambert's law."""
    up = 0.5 - 0.5 * normals[1]
    total = [np.float32(b) + np.float32(a - b) * up for a, b in zip(air.above, air.below, strict=True)]
    for light in air.lights:
        if light.distant:
            strength = sum(n * np.float32(p) for n, p in zip(normals, light.position, strict=True))
        else:
            to = [np.float32(p) - q for p, q in zip(light.position, points, strict=True)]
            squared = to[0] * to[0] + to[1] * to[1] + to[2] * to[2]
            facing = normals[0] * to[0] + normals[1] * to[1] + normals[2] * to[2]
            fall = 1 + squared * np.float32(3 / light.reach**2)
            strength = facing / (np.sqrt(squared) * fall + np.float32(1e-6)) * np.float32(4)
        strength = np.maximum(strength, 0)
        if light.shadow is not None:
            strength[light.shadow(points)] = 0
        total = [t + strength * np.float32(c) for t, c in zip(total, light.color, strict=True)]
    return albedo * np.stack(total)


def random_atmosphere(look: str, *, indoors: bool, height: float, draw: PhiloxRandom) -> Atmosphere:
    """Return random light, haze and sky, without shadows; indoors, lamps hang below `height` meters."""
    if look == "synthetic":
        side = _normalize(draw.uniform(-1, 1), -draw.uniform(0.5, 1.5), -draw.uniform(0.2, 1))
        sky = (0.55, 0.7, 0.9)
        density = draw.uniform(0.03, 0.07) if indoors else draw.uniform(0.012, 0.03)
        return Atmosphere(
            (0.5,) * 3, (0.3,) * 3, (Light(side, (0.6,) * 3, True),), sky, density, (0.3, 0.5, 0.9)
        )
    tint = color_temperature(draw.uniform(-1, 1))
    ambient = draw.uniform(0.06, 0.4)
    red, green, blue = color_temperature(draw.uniform(-0.8, 0.8))
    above = (ambient * red, ambient * green, ambient * blue)
    below = _scale_color(above, draw.uniform(0.3, 0.9))
    if indoors:
        lamps = []
        for _ in range(1 + draw.integer(2)):
            place = (draw.uniform(-2, 2), -height * draw.uniform(0.5, 0.95), draw.uniform(-2.5, 3))
            power = draw.uniform(0.5, 1.6)
            lamps.append(Light(place, _scale_color(tint, power), False, draw.uniform(2, 6)))
        density = draw.choice((0.01, 0.03, 0.05, 0.08)) * draw.uniform(0.7, 1.3)
        gray = draw.color(hue=(0, 1), saturation=(0, 0.3), value=(0.4, 0.9))
        return Atmosphere(above, below, tuple(lamps), gray, density, gray)
    sun = _normalize(draw.uniform(-1, 1), -draw.uniform(0.25, 1.2), draw.uniform(-1, 0.6))
    strength = draw.choice((0.0, 0.6, 1.1)) * draw.uniform(0.7, 1.2)
    haze = draw.color(
        hue=(0.02, 0.12) if draw.bernoulli(0.3) else (0.5, 0.65), saturation=(0, 0.4), value=(0.45, 1.0)
    )
    zenith = draw.color(hue=(0.55, 0.65), saturation=(0.0, 0.7), value=(0.15, 0.9))
    density = draw.choice((0.006, 0.015, 0.025, 0.045)) * draw.uniform(0.7, 1.3)
    lights = (Light(sun, _scale_color(tint, strength), True),) if strength else ()
    return Atmosphere(above, below, lights, haze, density, zenith, draw.uniform(0, 1))


def color_temperature(warmth: float) -> Color:
    """Return the color of a light, from blue (-1, open shade) through white (0) to orange (1, a bulb)."""
    return 1 + 0.35 * warmth, 1 + 0.05 * warmth, 1 - 0.5 * warmth if warmth > 0 else 1 - 0.3 * warmth


def _normalize(x: float, y: float, z: float) -> Color:
    length = math.sqrt(x * x + y * y + z * z)
    return x / length, y / length, z / length
