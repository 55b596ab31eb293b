"""The contact sheet of a set: image, target and facts of each frame."""

import re

import numpy as np

from depth_anything.data.sample import Frame
from depth_anything.inspect.contact_sheet import contact_sheet, describe_frame


def make_frames(count, height=40, width=60):
    frames = []
    for number in range(count):
        rows = np.linspace(12, 2, height, dtype=np.float32)[:, None]
        depth = rows + np.cos(np.arange(width, dtype=np.float32) / 5 + number)
        depth[: number % 3] = np.inf
        image = np.full((height, width, 3), number, np.uint8)
        frames.append(Frame(f"toy/0/{number:03d}", image, {}, depth=depth))
    return frames


def test_contact_sheet_holds_images_targets_and_facts():
    frames = make_frames(5)
    frames[1].depth, frames[1].disparity = None, np.ones((20, 30), np.float32)
    frames[2].depth = None
    frames[3].depth[:] = np.nan
    sheet = contact_sheet(frames, columns=2)
    assert sheet.dtype == np.uint8 and sheet.ndim == 3
    assert sheet.shape[1] > 2 * 2 * 200 and len(np.unique(sheet.reshape(-1, 3), axis=0)) > 50
    assert describe_frame(frames[4])[0] == "toy/0/004"
    assert re.fullmatch(r"60 x 40, depth 1 to 1\d\.\d m, median \d\.\d+ m", describe_frame(frames[4])[1])
    assert describe_frame(frames[4])[2] == "98% known, 2% sky, 0% unknown"
    assert describe_frame(frames[1])[1] == "60 x 40 (target 30 x 20), disparity 1 to 1, median 1"
    frames[4].meta["unit"], frames[1].meta["unit"] = "arbitrary", "px"
    assert re.fullmatch(r"60 x 40, depth 1 to 1\d\.\d, median \d\.\d+", describe_frame(frames[4])[1])
    assert describe_frame(frames[1])[1].endswith("disparity 1 to 1 px, median 1 px")
    assert "no target" in describe_frame(frames[2])[1] and "0% known" in describe_frame(frames[3])[2]
