"""Predict depth maps of images with the flags of the authors' run.py; see also `depth-anything predict`."""

from depth_anything.cli.predict_command import run_images

if __name__ == "__main__":
    raise SystemExit(run_images())
