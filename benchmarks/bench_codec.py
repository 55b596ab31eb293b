"""Compare codecs of disparity maps: size, time to encode and to decode, and the largest error.

    python benchmarks/bench_codec.py [--map FILE.npy ...] [--json FILE]

The reference is a 16-bit PNG with Pillow's default (level 6), decoded to float32. All others store 12 bits and compress
with Zstandard; they differ in the layout of the bytes before compression. CPU time of one thread, median and quartiles;
the codecs take turns, so that other programs slow all of them equally.
"""

import argparse
import io
import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import PIL
import zstandard
from PIL import Image

from depth_anything.data import codec

Way = tuple[Callable[[np.ndarray], bytes], Callable[[bytes], np.ndarray]]
STEPS = 4095


def plausible_map(height: int, width: int, *, noise: float, seed: int = 0) -> np.ndarray:
    """Generate a floor, boxes and poles, sky (0), and noise as of a network, of standard deviation `noise` · range."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float64)
    values = np.clip(rows / height - 0.35, 0, None)
    for _ in range(40):
        y, x, size = rng.integers(0, height), rng.integers(0, width), rng.integers(4, height // 4)
        box = (slice(y, y + size), slice(x, x + size))
        values[box] = np.maximum(
            values[box], rng.uniform(0.2, 0.7) + 4e-4 * rng.normal() * (columns[box] - x)
        )
    for _ in range(60):
        y, x = rng.integers(0, height // 2), rng.integers(0, width)
        values[y : y + height // 3, x : x + rng.integers(1, 3)] = rng.uniform(0.2, 0.7)
    grain = rng.normal(size=values.shape)
    # The noise of a network is correlated between neighbors.
    grain = sum(np.roll(grain, (y, x), (0, 1)) for y in (0, 1) for x in (0, 1)) / 2
    return np.where(values > 0, np.maximum(values + noise * values.max() * grain, 0), 0).astype(np.float32)


def quantise(values: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    low, high = float(values.min()), float(values.max())
    levels = np.rint((values.astype(np.float64) - low) * (steps / (high - low))).astype(np.uint16)
    return levels, np.array([low, high], np.float32)


def restore(levels: np.ndarray, ends: np.ndarray, steps: int) -> np.ndarray:
    values = levels.astype(np.float64)
    values *= (float(ends[1]) - float(ends[0])) / steps
    values += float(ends[0])
    return values.astype(np.float32)


def png(bits: int) -> Way:
    steps = 2**bits - 1

    def encode(values: np.ndarray) -> bytes:
        levels, ends = quantise(values, steps)
        out = io.BytesIO(ends.tobytes())
        out.seek(8)
        Image.fromarray(levels).save(out, "PNG")
        return out.getvalue()

    def decode(data: bytes) -> np.ndarray:
        with Image.open(io.BytesIO(data[8:])) as image:
            return restore(np.asarray(image), np.frombuffer(data, np.float32, 2), steps)

    return encode, decode


def zstd(
    level: int,
    arrange: Callable[[np.ndarray], np.ndarray],
    undo: Callable[[np.ndarray, tuple[int, int]], np.ndarray],
) -> Way:
    """A 12-bit codec: `arrange` turns levels (H, W) into bytes, `undo` turns them back."""

    def encode(values: np.ndarray) -> bytes:
        levels, ends = quantise(values, STEPS)
        head = ends.tobytes() + np.array(values.shape, np.uint32).tobytes()
        return head + zstandard.ZstdCompressor(level=level).compress(arrange(levels).tobytes())

    def decode(data: bytes) -> np.ndarray:
        height, width = np.frombuffer(data, np.uint32, 2, 8).tolist()
        body = np.frombuffer(zstandard.ZstdDecompressor().decompress(data[16:]), np.uint8)
        return restore(undo(body, (height, width)), np.frombuffer(data, np.float32, 2), STEPS)

    return encode, decode


def split(levels: np.ndarray) -> np.ndarray:
    return levels.reshape(-1).view(np.uint8).reshape(-1, 2).T.copy()


def join(body: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    low, high = body.reshape(2, -1)
    levels = high.astype(np.uint16)
    levels <<= 8
    levels |= low
    return levels.reshape(shape)


def differences(levels: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    for axis in axes:
        levels = np.diff(levels, axis=axis, prepend=np.uint16(0))
    return levels + np.uint16(128)


def sums(levels: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    levels -= np.uint16(128)
    for axis in axes:
        levels = np.cumsum(levels, axis=axis, dtype=np.uint16)
    return levels


def pack12(levels: np.ndarray) -> np.ndarray:
    low = (levels & 255).astype(np.uint8).reshape(-1)
    high = (levels >> 8).astype(np.uint8).reshape(-1)
    high = np.append(high, np.zeros(high.size % 2, np.uint8))
    return np.concatenate([low, high[0::2] | high[1::2] << 4])


def unpack12(body: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    count = shape[0] * shape[1]
    packed = body[count:]
    levels = np.stack([packed & 15, packed >> 4], 1).reshape(-1)[:count].astype(np.uint16)
    levels <<= 8
    levels |= body[:count]
    return levels.reshape(shape)


def bit_planes(levels: np.ndarray) -> np.ndarray:
    return np.concatenate([np.packbits(levels.reshape(-1) >> bit & 1) for bit in range(12)])


def from_bit_planes(body: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    levels = np.zeros(shape[0] * shape[1], np.uint16)
    for bit, plane in enumerate(body.reshape(12, -1)):
        levels |= np.unpackbits(plane, count=levels.size).astype(np.uint16) << np.uint16(bit)
    return levels.reshape(shape)


def difference_way(level: int, axes: tuple[int, ...]) -> Way:
    return zstd(
        level, lambda v: split(differences(v, axes)), lambda b, shape: sums(join(b, shape), axes[::-1])
    )


WAYS: dict[str, Way] = {
    "png 16 bit (yardstick)": png(16),
    "png 12 bit": png(12),
    "u16, zstd 1": zstd(1, lambda v: v, lambda b, shape: b.view(np.uint16).reshape(shape)),
    "u16, zstd 3": zstd(3, lambda v: v, lambda b, shape: b.view(np.uint16).reshape(shape)),
    "byte planes, zstd 3": zstd(3, split, join),
    "12 bits packed, zstd 3": zstd(3, pack12, unpack12),
    "bit planes, zstd 3": zstd(3, bit_planes, from_bit_planes),
    "difference to the left, byte planes, zstd 1": difference_way(1, (1,)),
    "difference to above, byte planes, zstd 1": difference_way(1, (0,)),
    "difference to above, byte planes, zstd 9": difference_way(9, (0,)),
    "difference to both, byte planes, zstd 1": difference_way(1, (0, 1)),
    "codec.py f32": (lambda v: codec.encode(v, codec="f32"), codec.decode),
    "codec.py q12": (lambda v: codec.encode(v, codec="q12"), codec.decode),
}


def milliseconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return (time.process_time() - start) * 1e3


def measure(values: np.ndarray, *, repeats: int) -> Iterator[dict[str, float | str]]:
    """Measure every codec on a map."""
    encoded = {name: encode(values) for name, (encode, _) in WAYS.items()}
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in WAYS}
    for _ in range(repeats):
        for name, (encode, decode) in WAYS.items():
            times[name][0].append(milliseconds(lambda encode=encode: encode(values)))
            times[name][1].append(milliseconds(lambda name=name, decode=decode: decode(encoded[name])))
    yardstick, *_ = WAYS
    for name, (_, decode) in WAYS.items():
        error = np.abs(decode(encoded[name]).astype(np.float64) - values).max() / np.ptp(
            values.astype(np.float64)
        )
        quarter, median, three_quarters = np.percentile(times[name][1], [25, 50, 75])
        yield {
            "way": name,
            "bytes": len(encoded[name]),
            "of_png16": len(encoded[name]) / len(encoded[yardstick]),
            "encode_ms": float(np.median(times[name][0])),
            "decode_ms": float(median),
            "decode_ms_quartiles": [float(quarter), float(three_quarters)],
            "times_as_fast": float(np.median(times[yardstick][1]) / median),
            "error_of_range": float(error),
        }


def table(rows: list[dict]) -> str:
    """Format rows as a Markdown table."""
    lines = [
        "| way | KB | of PNG 16 | encode ms | decode ms (quartiles) | as fast as PNG 16 | largest error, 1/range |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["decode_ms_quartiles"]
        error = f"1/{1 / row['error_of_range']:,.0f}" if row["error_of_range"] else "0"
        lines.append(
            f"| {row['way']} | {row['bytes'] / 1000:.0f} | {row['of_png16']:.2f} | {row['encode_ms']:.1f} "
            f"| {row['decode_ms']:.2f} ({low:.2f}–{high:.2f}) | {row['times_as_fast']:.1f} × | {error} |"
        )
    return "\n".join(lines)


def hardware() -> str:
    """Return the name of the processor if the system has it."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{names[0].split(':')[1].strip()}, {len(names)} cores" if names else platform.processor()


def main() -> None:
    """Measure on generated maps and on those of --map, and print tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--map", type=Path, nargs="*", default=[], help="disparity (H, W), float, finite, .npy"
    )
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    options = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "hardware": hardware(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "zstandard": f"{zstandard.__version__} (libzstd {'.'.join(map(str, zstandard.ZSTD_VERSION))})",
    }
    print("\n".join(f"{name}: {value}" for name, value in facts.items()))
    maps = {f"made, noise {noise}": plausible_map(518, 686, noise=noise) for noise in (0.0, 3e-4, 1e-3)}
    maps |= {path.stem: np.load(path).astype(np.float32) for path in options.map}
    results = {}
    for name, values in maps.items():
        results[name] = list(measure(values, repeats=options.repeats))
        print(f"\n### {name}, {values.shape[0]} × {values.shape[1]}\n\n{table(results[name])}", flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**facts, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
