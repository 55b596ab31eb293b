"""Commands as they are typed in the tests, and what they leave."""

import numpy as np
from PIL import Image

from depth_anything.cli import main


def complaint(capsys, *arguments):
    """Type a command that must be refused in one sentence; return the sentence."""
    assert main([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"depth-anything {arguments[0]}: ")
    return lines[0]


def read_png(path):
    with Image.open(path) as picture:
        return np.asarray(picture), picture.text
