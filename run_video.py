"""Predict depth videos with the flags of the authors' run_video.py; see also `depth-anything video`."""

from depth_anything.cli.video_commands import run_video

if __name__ == "__main__":
    raise SystemExit(run_video())
