"""Make the folder that docs/own-data.md works on: photographs, and depth of some of them as a camera would store it.

    python docs/make_own_data.py try

try/photos/*.jpg are 32 drawn pictures, try/depth/*.png the depth of 24 of them in millimeters, 16 bits, 65535 where
there is sky and 0 where nothing was measured; try/set.yaml declares them. The same files every time.
"""

import sys
from pathlib import Path

import cv2
import numpy as np

from depth_anything.scenes.render import render_scene

COUNT, MEASURED = 32, 24
HEIGHT, WIDTH = 240, 320
YAML = """\
name: yard
images: photos
depth: depth
unit: mm
sky: 65535
licence: CC0-1.0
"""


def main(folder: Path) -> None:
    for kind in ("photos", "depth"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for number in range(COUNT):
        frame = render_scene(1000 + number, look="photographic", height=HEIGHT, width=WIDTH)
        name = f"{number:04d}"
        cv2.imwrite(
            str(folder / f"photos/{name}.jpg"), frame.image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95]
        )
        if number < MEASURED:
            assert frame.depth is not None
            stored = np.rint(np.nan_to_num(frame.depth, posinf=0) * 1000)
            stored[stored > 65534] = 0  # beyond the camera's range
            stored[np.isinf(frame.depth)] = 65535
            stored[:, :8] = 0  # a sensor next to the lens does not see the image's edge
            cv2.imwrite(str(folder / f"depth/{name}.png"), stored.astype(np.uint16))
    (folder / "set.yaml").write_text(YAML)
    print(f"{folder}: {COUNT} photographs, {MEASURED} with depth, set.yaml")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
