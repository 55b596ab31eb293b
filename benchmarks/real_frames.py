"""Evaluate networks on real RGB-D frames, and compare them with maps that ignore the picture.

    python benchmarks/real_frames.py --real DIR --weights teacher=FILE student=FILE --output outputs/real

DIR/SET/set.yaml declares each set of frames for `depth-anything shard custom`; the shards are written to
--shards once. Each map is fitted as `depth-anything evaluate` does (protocol da2). Disparity without a calibration
(Middlebury) is compared as depth in units of the median distance. Two mean maps are compared too: that of the classic
scenes, which is always the same and is what the ratio in the last line refers to, and those of --mean-map SETS.

The sets in TUNING may be used to choose settings; all others are for the final judgment only.
real.json, real.md and, with --photos, photos.jpg have the results.
"""

import argparse
import json
import math
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from depth_anything import Predictor, load_model
from depth_anything.data.sample import Frame
from depth_anything.evaluation.evaluate import evaluate
from depth_anything.evaluation.frames import MeanMap, compute_mean_map, read_frames
from depth_anything.evaluation.task import MapSource
from depth_anything.ingest.declaration import load_declaration
from depth_anything.ingest.writer import write_source
from depth_anything.progress import track
from depth_anything.scenes.render import render_scene
from depth_anything.visualize import colorize, make_panel

TUNING = (
    "AMAZONBOX_F200",
    "BOXES_REALSENSE",
    "DDAD_DGP",
    "DESK_IPHONE",
    "NYU",
    "OFFICE_HOLOLENS",
    "ROOM_KINECT_RAHUL",
    "TABLETOP_UOC",
    "MIDDLEBURY2006",
)
"""Groups of sets on which settings may be chosen."""

FAMILIES = ("KITTI", "NYU", "TUM", "SUNRGBD")
"""Sets whose names begin with one of these and an underscore are one group."""

BASELINE = "mean map"


def group_of(name: str) -> str:
    """Return the group of a set: its family, or itself."""
    return next((family for family in FAMILIES if name.startswith(f"{family}_")), name)


def find_sets(real: Path, which: str) -> dict[str, list[Path]]:
    """Return the declarations below a folder by group: those for "tuning", for "judging", or "all".

    Raises:
        FileNotFoundError: There is none.
    """
    groups: dict[str, list[Path]] = {}
    for file in sorted(real.glob("*/set.yaml")):
        group = group_of(file.parent.name)
        if which == "all" or (group in TUNING) == (which == "tuning"):
            groups.setdefault(group, []).append(file)
    if not groups:
        raise FileNotFoundError(
            f"no SET/set.yaml for {which} below {real}: name the folder of the RGB-D sets"
        )
    return groups


def read_group(files: Sequence[Path], shards: Path) -> list[Frame]:
    """Write the sets of a group as shards, unless they are written, and read their frames."""
    frames = []
    for file in files:
        root = shards / file.parent.name
        if not (root / "manifest.json").exists():
            custom = replace(load_declaration(str(file)), leave_out=root.resolve())
            write_source(custom, custom.folder, root, name=custom.name)
        frames += [with_depth(frame) for frame in read_frames(str(root))]
    return frames


def with_depth(frame: Frame) -> Frame:
    """Return a frame whose disparity, without depth, is converted to depth in units of the median distance."""
    if frame.depth is not None or frame.disparity is None:
        return frame
    known = np.isfinite(frame.disparity) & (frame.disparity > 0)
    middle = np.median(frame.disparity[known])
    depth = np.where(known, middle / np.where(known, frame.disparity, 1), np.nan)
    return replace(frame, depth=depth.astype(np.float32))


def classic_scenes(count: int = 256) -> Iterator[Frame]:
    """Draw the scenes of the fixed baseline: the first of `make quickstart` before the varied layout, small."""
    for number in range(count):
        yield render_scene(10_000_000 + number, look="synthetic", height=42, width=54)


def score(sources: Mapping[str, MapSource], groups: Mapping[str, list[Frame]]) -> dict[str, dict[str, float]]:
    """Return AbsRel and δ1 of each source on each group, as {group: {"frames": n, "NAME abs_rel": …}}."""
    table: dict[str, dict[str, float]] = {}
    for group, frames in groups.items():
        row: dict[str, float] = {"frames": len(frames)}
        for name, source in sources.items():
            means = evaluate(source, frames, name=name).means
            row |= {f"{name} {metric}": means[metric] for metric in ("abs_rel", "d1")}
        table[group] = row
    return table


def ratio(table: Mapping[str, Mapping[str, float]], name: str) -> float:
    """Return the geometric mean over groups of a source's AbsRel divided by that of the fixed mean map."""
    logs = [math.log(row[f"{name} abs_rel"] / row[f"{BASELINE} abs_rel"]) for row in table.values()]
    return math.exp(sum(logs) / len(logs))


def markdown(table: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> str:
    """Write the table of AbsRel, the lowest of each line in bold, and the ratios."""
    lines = [f"| set | frames | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for group, row in table.items():
        best = min(row[f"{name} abs_rel"] for name in names)
        cells = [
            f"**{row[f'{name} abs_rel']:.3f}**"
            if row[f"{name} abs_rel"] == best
            else f"{row[f'{name} abs_rel']:.3f}"
            for name in names
        ]
        lines.append(f"| {group} | {row['frames']:.0f} | {' | '.join(cells)} |")
    lines.append(f"| ratio to {BASELINE} | | {' | '.join(f'{ratio(table, name):.3f}' for name in names)} |")
    return "\n".join(lines) + "\n"


def paint(models: Mapping[str, Predictor], photos: Path, output: Path) -> None:
    """Put the photographs of a folder and the maps of each model into one picture."""
    rows = []
    for file in sorted(path for path in photos.iterdir() if path.suffix in (".jpg", ".png")):
        with Image.open(file) as opened:
            picture = opened.convert("RGB")
        picture.thumbnail((320, 240))
        image = np.asarray(picture)
        rows.append([image, *(colorize(model.predict(image)) for model in models.values())])
    Image.fromarray(make_panel(rows, titles=["photograph", *models])).save(output, quality=88)


def main() -> None:
    """Evaluate, print the table and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--real", type=Path, required=True, help="folder of the RGB-D sets")
    parser.add_argument("--weights", nargs="*", default=[], metavar="NAME=PATH", help="networks")
    parser.add_argument("--mean-map", nargs="*", default=[], metavar="SET", help="labeled sets to average")
    parser.add_argument("--sets", choices=("tuning", "judging", "all"), default="tuning", help="%(default)s")
    parser.add_argument("--shards", type=Path, default=Path("data/real"), help="default %(default)s")
    parser.add_argument("--photos", type=Path, help="folder of photographs to paint")
    parser.add_argument("--output", type=Path, default=Path("outputs/real"), help="default %(default)s")
    options = parser.parse_args()
    sources: dict[str, MapSource] = {BASELINE: compute_mean_map(classic_scenes())}
    for root in options.mean_map:
        sources[f"mean of {Path(root).name}"] = MeanMap(compute_mean_map(read_frames(root, limit=768)).map)
    models = {}
    for text in options.weights:
        name, _, path = text.rpartition("=")
        model = load_model(path)
        models[name or Path(path).name] = Predictor(model, device="cpu", input_size=model.input_size)
    sources |= models
    found = find_sets(options.real, options.sets)
    groups = {g: read_group(files, options.shards) for g, files in track(found.items(), what="sets")}
    table = score(sources, groups)
    text = f"`{shlex.join(['python', *sys.argv])}`\n\n{markdown(table, list(sources))}"
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "real.json").write_text(json.dumps(table, indent=1))
    (options.output / "real.md").write_text(text)
    if options.photos:
        paint(models, options.photos, options.output / "photos.jpg")
    print(text)


if __name__ == "__main__":
    main()
