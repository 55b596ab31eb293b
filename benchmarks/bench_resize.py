"""Measure quality and bytes when photographs are stored at the size that training uses.

    python benchmarks/bench_resize.py PHOTOS

Every photograph is stored as `depth-anything shard images --short-side` stores it. What the loader reads from it is
compared with what it reads from the original: the resize of the whole photograph, uint8, RGB. PSNR in dB and SSIM
(Wang et al. 2004: luma, Gaussian window of 11 px, sigma 1.5) are means over the photographs. The last row is
lossless.
"""

import argparse
import json
from pathlib import Path
from unittest import mock

import cv2
import numpy as np

from depth_anything.data.sample import decode_image
from depth_anything.data.transforms import resize_image
from depth_anything.ingest import record
from depth_anything.ingest.photographs import list_photographs
from depth_anything.ingest.source import RawSample
from depth_anything.preprocess import resize_shape


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Peak signal to noise over all channels, dB."""
    error = np.mean((one.astype(np.float64) - other) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def ssim(one: np.ndarray, other: np.ndarray) -> float:
    """Structural similarity of the luma."""
    x, y = (cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float64) for image in (one, other))

    def blur(image: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(image, (11, 11), 1.5)[5:-5, 5:-5]

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y, both = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    top = (2 * mean_x * mean_y + c1) * (2 * both + c2)
    return float((top / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", help="folder, list or tar of photographs")
    parser.add_argument("--short-side", type=int, default=518)
    parser.add_argument("--quality", type=int, nargs="+", default=[85, 90, 92, 95, 98])
    parser.add_argument("--json", help="also write the figures here")
    options = parser.parse_args()
    rows: dict[str, list[tuple[float, float, float, float]]] = {}
    sizes = []
    for photograph in list_photographs(options.photos):
        data = photograph.read()
        image = decode_image(data)
        size = resize_shape(*image.shape[:2], options.short_side)
        if min(image.shape[:2]) < options.short_side:
            continue
        sizes.append(image.shape[:2])
        wanted = resize_image(image, *size)
        png = cv2.imencode(".png", wanted[..., ::-1])[1].tobytes()
        for quality in options.quality:
            with mock.patch.object(record, "JPEG_QUALITY", quality):
                made = record.encode_sample(
                    RawSample(data), source="", name="", short_side=options.short_side
                )
            stored = made.fields.get("jpg", b"")
            got = resize_image(decode_image(stored), *size)
            row = (psnr(wanted, got), ssim(wanted, got), len(stored), len(stored) / len(data))
            rows.setdefault(f"JPEG {quality}", []).append(row)
        rows.setdefault("PNG", []).append((float("inf"), 1.0, len(png), len(png) / len(data)))
    print(
        f"{len(sizes)} photographs, {min(sizes)} to {max(sizes)}, stored at a short side of {options.short_side}"
    )
    print(f"{'':10} {'PSNR dB':>8} {'worst':>8} {'SSIM':>8} {'worst':>8} {'KB':>8} {'of the original':>16}")
    for name, values in rows.items():
        mean, worst = np.mean(values, 0), np.min(values, 0)
        quality = f"{mean[0]:8.2f} {worst[0]:8.2f} {mean[1]:8.4f} {worst[1]:8.4f}"
        print(f"{name:10} {quality} {mean[2] / 1000:8.1f} {mean[3]:16.2f}")
    if options.json:
        figures = {name: np.mean(values, 0).tolist() for name, values in rows.items()}
        Path(options.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
