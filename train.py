"""python train.py stage=STAGE [size=paper] [encoder=vits] [key=value …]; --help lists the stages."""

from pathlib import Path

from depth_anything.training.signals import signal_handler

if __name__ == "__main__":
    signal_handler.install()  # before the imports that take seconds
    from depth_anything.training.command import run_command

    try:
        run_command(Path(__file__).resolve().parent / "configs")
    finally:
        signal_handler.ignore()  # a handler that raises in one of Python's exit handlers prints a traceback
