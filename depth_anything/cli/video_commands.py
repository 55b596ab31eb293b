"""`depth-anything video` and `depth-anything demo`; they need the extras `video` and `demo`."""

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from depth_anything.cli.evaluate_command import parse_named_paths
from depth_anything.cli.options import (
    ARGUMENT_FLAGS,
    MAX_BATCH,
    MAX_METERS,
    WEIGHTS_HELP,
    add_command,
    add_focal_flags,
    add_inference_flags,
    add_picture_flags,
    add_tiles_flag,
    add_version_flag,
    add_weight_flags,
    build_predictor,
    check_single_model,
    describe_values,
    float_in_range,
    format_count,
    int_in_range,
    load_predictor,
    load_weights,
)
from depth_anything.data.address import escape_unprintable
from depth_anything.errors import UserError
from depth_anything.progress import track

RANGES = ("clip", "running", "frame")
FORMATS = ("mp4", "png16", "npy", "exr")


def add_video(commands: Any) -> None:
    """Declare `video`."""
    video = add_command(
        commands,
        "video",
        "predict the depth of videos: write an MP4 with the audio, or a map of each frame",
        run=_video,
    )
    video.add_argument(
        "source",
        metavar="VIDEO|FOLDER|LIST",
        help="a video, a folder of videos (subfolders are kept) or of frames, or a .txt with one path per line",
    )
    video.add_argument("--output", required=True, metavar="DIR", help="output folder")
    _add_video_flags(video)


def add_demo(commands: Any) -> None:
    """Declare `demo`."""
    _add_demo_flags(
        add_command(
            commands, "demo", "serve a web page that predicts the depth of uploaded images", run=_demo
        )
    )


def run_video(arguments: Sequence[str] | None = None) -> int:
    """Run `run_video.py`: the authors' flags and defaults, and those of `depth-anything video`.

    Args:
        arguments: Command-line arguments; None: those of the process.
    """
    from depth_anything.cli import run

    parser = argparse.ArgumentParser(
        prog="run_video.py", description="Predict depth videos; see depth-anything video --help."
    )
    parser.add_argument("--video-path", dest="source", required=True, metavar="VIDEO|FOLDER|LIST")
    parser.add_argument(
        "--outdir", dest="output", default="./vis_video_depth", metavar="DIR", help="%(default)s"
    )
    _add_video_flags(parser)
    parser.set_defaults(run=_video)
    return run(parser, arguments)


def run_demo(arguments: Sequence[str] | None = None) -> int:
    """Run `app.py`, which is `depth-anything demo`.

    Args:
        arguments: Command-line arguments; None: those of the process.
    """
    from depth_anything.cli import run

    parser = argparse.ArgumentParser(
        prog="app.py", description="Serve a web page that predicts the depth of uploaded images."
    )
    _add_demo_flags(parser)
    parser.set_defaults(run=_demo)
    return run(parser, arguments)


def _add_demo_flags(demo: argparse.ArgumentParser) -> None:
    demo.add_argument(
        "--weights",
        nargs="+",
        action="extend",
        metavar="[NAME=]PATH",
        help=f"models to choose from: {WEIGHTS_HELP}; default: the official weights of --encoder",
    )
    demo.add_argument("--encoder", metavar="NAME", help="official weights: vits, vitb, vitl or vitg")
    demo.add_argument(
        "--max-depth",
        dest="weights_max_depth",
        type=float_in_range("--max-depth", most=MAX_METERS, unit="meters"),
        metavar="M",
        help="maximum depth in meters of a metric model whose file does not state it",
    )
    add_version_flag(demo)
    demo.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (%(default)s: this machine only)"
    )
    demo.add_argument(
        "--port",
        type=int_in_range("--port", least=0, most=65_535),
        default=7860,
        metavar="N",
        help="port to listen on (%(default)s)",
    )
    demo.add_argument(
        "--max-megapixels",
        type=float_in_range("--max-megapixels", most=1e6),
        default=50.0,
        metavar="N",
        help="maximum size of an image (%(default)s)",
    )
    demo.add_argument(
        "--max-megabytes",
        type=float_in_range("--max-megabytes", most=1e6),
        default=30.0,
        metavar="N",
        help="maximum size of a file (%(default)s)",
    )
    demo.add_argument(
        "--queue",
        type=int_in_range("--queue", least=1),
        default=16,
        metavar="N",
        help="maximum number of waiting requests (%(default)s)",
    )
    add_inference_flags(demo)
    demo.set_defaults(flags=ARGUMENT_FLAGS)


def _add_video_flags(command: argparse.ArgumentParser) -> None:
    add_weight_flags(command)
    add_picture_flags(command)
    command.add_argument(
        "--range",
        choices=RANGES,
        default="clip",
        help="range of the colors: of the whole clip (two passes), running, or of each frame (%(default)s)",
    )
    command.add_argument(
        "--smooth",
        type=float_in_range("--smooth", most=0.999999, above=False),
        default=0.0,
        metavar="S",
        help="weight of the previous map where the image does not move, 0 to below 1 (%(default)s)",
    )
    command.add_argument(
        "--format",
        nargs="+",
        choices=FORMATS,
        default=("mp4",),
        help="files to write: mp4 for a video, others for one file of values per frame (mp4)",
    )
    command.add_argument(
        "--fps",
        default="24",
        metavar="RATE",
        help="frame rate of folders of frames: 24, 29.97, 30000/1001 (%(default)s)",
    )
    command.add_argument(
        "--batch-size",
        type=int_in_range("--batch-size", least=1, most=MAX_BATCH),
        default=4,
        metavar="N",
        help="frames per forward pass (%(default)s)",
    )
    add_focal_flags(command, default="assumed")
    add_inference_flags(command)
    add_tiles_flag(command)


def _video(options: argparse.Namespace) -> int:
    require_extra("av", extra="video", what="PyAV")
    from depth_anything.inference.clips import parse_frame_rate
    from depth_anything.inference.video import VideoSettings, predict_videos

    try:
        rate = parse_frame_rate(options.fps)
    except ValueError as error:
        raise ValueError(f"--fps: {error}") from None
    settings = VideoSettings(
        range=options.range,
        smooth=options.smooth,
        formats=tuple(dict.fromkeys(options.format)),
        pred_only=options.pred_only,
        grayscale=options.grayscale,
        colormap=options.colormap,
        batch_size=options.batch_size,
        rate=rate,
    )
    if not Path(options.source).exists():  # checked before a model is read
        raise UserError(f"{options.source} does not exist", "give a video, a folder or a list of videos")
    predictor, _ = load_predictor(options)
    result = predict_videos(predictor, options.source, options.output, settings=settings, progress=track)
    for name, why in result.skipped.items():
        print(f"skipped {escape_unprintable(name)}: {escape_unprintable(why)}", file=sys.stderr)
    for name, notes in result.notes.items():
        for note in notes:
            print(f"{escape_unprintable(name)}: {escape_unprintable(note)}", file=sys.stderr)
    for name, written in result.written.items():
        print(f"{escape_unprintable(', '.join(map(str, written)))}: {result.frames[name]} frames")
    print(
        f"{format_count(len(result.written), 'video')} predicted, {format_count(len(result.skipped), 'file')} skipped: "
        f"{escape_unprintable(options.output)} ({describe_values(predictor)})"
    )
    return 1 if result.failed else 0


def _demo(options: argparse.Namespace) -> None:
    require_extra("gradio", extra="demo", what="Gradio")
    from depth_anything.demo.page import Limits, serve

    named: list[tuple[str, Path | None]]
    named = (
        [*parse_named_paths(options.weights).items()]
        if options.weights
        else [(options.encoder or "vitl", None)]
    )
    check_single_model(options, len(named))
    predictors = {}
    for name, path in named:
        model, _ = load_weights(
            path,
            input_size=options.input_size,
            encoder=options.encoder,
            max_depth=options.weights_max_depth,
            version=options.weights_version,
        )
        predictors[name] = build_predictor(model, options)
    limits = Limits(megapixels=options.max_megapixels, megabytes=options.max_megabytes, queue=options.queue)
    serve(predictors, host=options.host, port=options.port, limits=limits)


def require_extra(module: str, *, extra: str, what: str) -> None:
    """Check that a library of an optional extra is installed.

    Raises:
        ValueError: It is missing; the message names the pip command to type.
    """
    if find_spec(module) is None:
        raise UserError(f"{extra} needs {what}", f"type  pip install 'depth-anything-train[{extra}]'")
