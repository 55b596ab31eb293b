"""Serve the web demo, as the authors' app.py; the same as `depth-anything demo`."""

from depth_anything.cli.video_commands import run_demo

if __name__ == "__main__":
    raise SystemExit(run_demo())
