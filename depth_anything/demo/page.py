"""A web page that maps the image it is given: picture and map under a slider, the values to download, points.

Nothing leaves the machine: no analytics, no fonts or scripts from elsewhere, no address is fetched for a
visitor. A visitor sends one image and a choice among given names; files are decoded, never unpickled, and what
the page is told of the server's disk is an alias.
"""

import html
import os
import secrets
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported

import gradio as gr  # noqa: E402
import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402

from depth_anything.data.image_headers import estimate_decode_cost  # noqa: E402
from depth_anything.data.sample import decode_image  # noqa: E402
from depth_anything.demo.guard import FolderAlias, UploadGuard, UploadQuota  # noqa: E402
from depth_anything.inference.formats import display_values, encode_map  # noqa: E402
from depth_anything.inference.memory import check_image_memory, is_out_of_memory  # noqa: E402
from depth_anything.inference.pointcloud import choose_focal_length, encode_points, unproject  # noqa: E402
from depth_anything.inference.predictor import Predictor  # noqa: E402
from depth_anything.visualize import colorize_by_distance, distance_colormap  # noqa: E402

COLORMAPS = {"Spectral": "Spectral_r", "Inferno": "inferno", "Grey": "gray"}
"""What the page calls them, and matplotlib's names, as `paint` takes them: near is red, bright or white."""

_MAX_DISPLAY_PX = 2048  # longer side of what the slider shows; the download has every pixel
_MAX_POINTS = 400_000
_SWEEP_S, _KEEP_S = 300, 3600  # how often old files are looked for, and how old they may get
_ROUND, _FROM_ABOVE = (
    90,
    86,
)  # degrees: the viewer of the points looks as the photographer did, slightly raised
_CAMERA_DISTANCE = 1.15  # times as far from their middle
_MAX_DEPTH_MEDIANS = 4.0  # disparity makes the far unsure; farther points would make the near ones small
_GRADIENT_STOPS = 24
_HARD_LIMIT_FACTOR = 4  # times as large as is taken is what a file may be to be told so on the page
_MULTIPART_BYTES = 10_000  # bytes of an upload beside its file's, at most
_MAX_ASPECT_RATIO = 8  # the network's short side is fixed; its cost grows with the square of the long one


@dataclass(frozen=True)
class Limits:
    """What the page takes.

    Attributes:
        megapixels: of an image.
        megabytes: of a file.
        queue: visitors who may wait; one is served at a time, since the network has one device.
        files: uploads, and maps of them, that are kept; the oldest go first.
        disk_megabytes: of all of them.
    """

    megapixels: float = 50.0
    megabytes: float = 30.0
    queue: int = 16
    files: int = 500
    disk_megabytes: float = 4000.0


class UploadError(ValueError):
    """What is wrong with what a visitor sent."""


@dataclass(frozen=True)
class _PageResult:
    """What one image became: files and words for the page."""

    pair: tuple[str, str]
    legend: str
    png16: str
    exr: str
    points: str | None
    distance: float
    no_points: str
    facts: str


def serve(predictors: Mapping[str, Predictor], *, host: str, port: int, limits: Limits) -> None:
    """Serve the page until interrupted.

    Args:
        predictors: by the names they are offered under.
        host: address to listen on; 127.0.0.1 is seen by this machine only.
        port: to listen on.
        limits: what is taken.

    Raises:
        OSError: the port is taken.
    """
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())  # else temporary files would stay
    with run_page(predictors, host=host, port=port, limits=limits) as address:
        print(f"{address}  ({', '.join(predictors)}; Ctrl-C ends it)", flush=True)
        stop.wait()


@contextmanager
def run_page(
    predictors: Mapping[str, Predictor],
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    limits: Limits | None = None,
) -> Iterator[str]:
    """Run the page in the background; yields its address. Leaving stops it and removes its files.

    Args:
        predictors: by the names they are offered under.
        host: address to listen on.
        port: to listen on; 0 takes a free one.
        limits: what is taken.
    """
    limits = limits or Limits()
    folder = Path(tempfile.mkdtemp(prefix="depth-anything-")).resolve()
    before = os.environ.get("GRADIO_TEMP_DIR")
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    quota = UploadQuota(folder, limits.files, round(limits.disk_megabytes * 1_000_000))
    # Gradio says of a larger file what nobody can change, in a corner; up to here the page itself says it.
    hard_limit = round(_HARD_LIMIT_FACTOR * limits.megabytes * 1_000_000)
    page = build_page(predictors, limits=limits, quota=quota)
    try:
        _, address, _ = page.queue(max_size=limits.queue, default_concurrency_limit=1).launch(
            server_name=host,
            server_port=port or None,
            max_file_size=hard_limit,
            theme=_theme(),
            css=_CSS,
            js="() => document.body.classList.add('dark')",
            footer_links=[],
            app_kwargs={
                "middleware": [
                    Middleware(UploadGuard, quota=quota, most_bytes=hard_limit + _MULTIPART_BYTES),
                    Middleware(FolderAlias, folder=str(folder)),
                ],
                "docs_url": None,
                "redoc_url": None,
            },
            prevent_thread_lock=True,
            ssr_mode=False,
            share=False,
            pwa=False,
            mcp_server=False,
            run_history=False,
            enable_monitoring=False,
            quiet=True,
        )
        yield address
    finally:
        page.close(verbose=False)
        if before is None:
            del os.environ["GRADIO_TEMP_DIR"]
        else:
            os.environ["GRADIO_TEMP_DIR"] = before
        shutil.rmtree(folder, ignore_errors=True)


def build_page(
    predictors: Mapping[str, Predictor], *, limits: Limits, quota: UploadQuota | None = None
) -> gr.Blocks:
    """Lay out the page and wire it.

    Args:
        predictors: by the names they are offered under.
        limits: what is taken.
        quota: what may lie on the disk.
    """
    names = list(predictors)
    with gr.Blocks(
        title="Depth Anything", analytics_enabled=False, delete_cache=(_SWEEP_S, _KEEP_S), fill_width=True
    ) as page:
        gr.HTML('<h1>Depth Anything</h1><p class="lead">A picture in, its depth out.</p>', elem_id="head")
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=300, elem_id="side"):
                image = gr.Image(
                    type="filepath",
                    sources=["upload", "clipboard"],
                    label="Picture",
                    height=230,
                    elem_id="drop",
                )
                _disable_preprocessing(image)
                model = gr.Dropdown(
                    names, value=names[0], label="Model", visible=len(names) > 1, elem_id="model"
                )
                colours = gr.Radio(list(COLORMAPS), value="Spectral", label="Colours", elem_id="colours")
                with gr.Row(elem_id="save"):
                    png16 = gr.DownloadButton(
                        "16-bit PNG", interactive=False, size="sm", min_width=80, elem_id="png16"
                    )
                    exr = gr.DownloadButton(
                        "Float EXR", interactive=False, size="sm", min_width=80, elem_id="exr"
                    )
                facts = gr.HTML(_model_html(names[0], predictors[names[0]], limits), elem_id="facts")
            with gr.Column(scale=3, min_width=420):
                with gr.Tab("Picture and depth") as picture_tab:
                    slider = gr.ImageSlider(
                        show_label=False, interactive=False, height=580, max_height=580, elem_id="slider"
                    )
                    legend = gr.HTML(elem_id="legend")
                with gr.Tab("Points in space") as points_tab:
                    no_points = gr.HTML(elem_id="no-points")
                    points = gr.Model3D(
                        show_label=False,
                        height=640,
                        clear_color=(0.055, 0.06, 0.07, 1.0),
                        elem_id="points",
                    )

        cloud, in_space, refusals = gr.State(None), gr.State(False), gr.State("")

        # not `change`: a picture that is refused is taken off the page, and what is wrong with it stays
        gr.on(
            [image.upload, image.clear, model.input, colours.input],
            _make_handler(predictors, limits, quota),
            [image, model, colours, in_space],
            [slider, legend, png16, exr, cloud, points, facts, no_points, refusals],
            api_visibility="private",
            show_progress_on=slider,
            trigger_mode="always_last",
        )
        refusals.change(lambda: None, None, image, api_visibility="private")
        # a hidden canvas draws nothing, later neither: points are handed over when their tab is open
        points_tab.select(
            lambda made: (_point_viewer(made), True), cloud, [points, in_space], api_visibility="private"
        )
        picture_tab.select(lambda: (None, False), None, [points, in_space], api_visibility="private")
    return page


def _make_handler(
    predictors: Mapping[str, Predictor], limits: Limits, quota: UploadQuota | None
) -> Callable[..., list[Any]]:
    """Make what answers a visitor: from picture, model, colours and open tab to what the page shows."""

    def show(path: str | None, name: str, colour: str, in_space: bool) -> list[Any]:
        empty = gr.DownloadButton(interactive=False, value=None)
        facts = _model_html(name, predictors[name], limits) if name in predictors else ""
        made, told, refusal = None, "", gr.skip()
        if path:
            try:
                made = _predict_upload(path, name, colour, predictors, limits, quota)
            except UploadError as error:
                told, refusal = _error_html(error), secrets.token_hex(8)
        if made is None:
            return [None, told, empty, empty, None, _point_viewer(None), facts, "", refusal]
        return [
            made.pair,
            made.legend,
            gr.DownloadButton(value=made.png16, interactive=True),
            gr.DownloadButton(value=made.exr, interactive=True),
            made,
            _point_viewer(made if in_space else None),
            made.facts,
            made.no_points,
            refusal,
        ]

    return show


def _error_html(why: object) -> str:
    return f'<p class="refused" role="alert">{html.escape(str(why))}</p>'


def _point_viewer(made: _PageResult | None) -> gr.Model3D:
    if made is None or made.points is None:
        return gr.Model3D(value=None)
    return gr.Model3D(value=made.points, camera_position=(_ROUND, _FROM_ABOVE, made.distance))


def _disable_preprocessing(image: gr.Image) -> None:
    """Have a file handed on as it was sent, so that what is wrong with it is told by us, and no address fetched.

    On the instance: for a subclass, Gradio would write a .pyi file beside this one.
    """
    move = image.async_move_resource_to_block_cache

    async def refuse_addresses(path: Any) -> str | None:
        if "://" in str(path):
            raise gr.Error("Send the picture itself: this page fetches nothing.", print_exception=False)
        return await move(path)

    setattr(image, "preprocess", lambda payload: payload and payload.path)  # noqa: B010
    setattr(image, "async_move_resource_to_block_cache", refuse_addresses)  # noqa: B010


def _predict_upload(
    path: str,
    name: str,
    colour: str,
    predictors: Mapping[str, Predictor],
    limits: Limits,
    quota: UploadQuota | None,
) -> _PageResult:
    """Map a visitor's image; what is wrong with it, or with one request alone, is a message on the page."""
    if name not in predictors or colour not in COLORMAPS:
        raise UploadError("There is no such model, or no such colours.")
    try:
        data = _read_upload(Path(path), limits)
        if quota and not quota.make_room(0, keep=Path(path)):
            raise UploadError("The disk of this page is full for now: try again in a minute.")
        return _build_result(Path(path), data, name, colour, predictors[name], limits)
    except UploadError:
        raise
    except FileNotFoundError as error:
        raise UploadError("This picture is no longer here, others needed its room: send it again.") from error
    except ValueError as error:
        raise UploadError(f"This picture cannot be mapped: {error}.") from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UploadError("There is not enough memory for this picture: reduce it first.") from error


def _build_result(
    path: Path, data: bytes, name: str, colour: str, predictor: Predictor, limits: Limits
) -> _PageResult:
    image = decode_image(data)
    map_ = predictor.predict(image)
    folder = Path(tempfile.mkdtemp(prefix="made-", dir=path.parent))
    values, quantity = display_values(map_, predictor)
    painted = colorize_by_distance(values, quantity=quantity, colormap=COLORMAPS[colour])
    focal_px, origin = choose_focal_length(data, image.shape)
    origin = origin.partition(";")[0]  # what follows is about the command line
    cloud = unproject(
        image,
        map_,
        quantity=predictor.quantity,
        focal_px=focal_px,
        far=None if predictor.unit == "m" else _MAX_DEPTH_MEDIANS,
        max_points=_MAX_POINTS,
    )
    points, distance, no_points = None, 1.0, ""
    try:
        points = _save_bytes(folder / "points.glb", encode_points(cloud, "glb"))
        distance = float(cloud.points[:, 2].min() + cloud.points[:, 2].max()) / 2 * _CAMERA_DISTANCE
    except ValueError as error:  # of sky alone there are none: the map is as good as any
        no_points = _error_html(f"No points: {error}.")
    return _PageResult(
        pair=(_save_preview(folder / "picture.webp", image), _save_preview(folder / "depth.webp", painted)),
        legend=_legend_html(map_, colour, predictor),
        png16=_save_map(folder / f"{predictor.quantity}.png", map_, "png16", predictor),
        exr=_save_map(folder / f"{predictor.quantity}.exr", map_, "exr", predictor),
        points=points,
        distance=distance,
        no_points=no_points,
        facts=_model_html(name, predictor, limits)
        + f"<p>{image.shape[1]} × {image.shape[0]} px. Points: focal {focal_px:.0f} px, {html.escape(origin)}.</p>",
    )


def _read_upload(path: Path, limits: Limits) -> bytes:
    """Read a visitor's file if its size, and what its header says that it costs, are within the limits."""
    if path.stat().st_size > limits.megabytes * 1_000_000:
        raise UploadError(f"This file is over {limits.megabytes:g} MB, the most this page takes.")
    data = path.read_bytes()
    try:
        cost = estimate_decode_cost(data)
    except ValueError as error:
        raise UploadError(f"That is no picture this page can read ({error}).") from error
    if cost.pixels > limits.megapixels * 1e6:
        raise UploadError(
            f"This picture has {cost.pixels / 1e6:.3g} megapixels; this page takes {limits.megapixels:g}: "
            "reduce it first."
        )
    long, short = max(cost.width, cost.height), max(1, min(cost.width, cost.height))
    if long > _MAX_ASPECT_RATIO * short:
        raise UploadError(
            f"This picture is {long / short:.3g} times as long as it is wide; this page takes "
            f"{_MAX_ASPECT_RATIO}: crop it."
        )
    check_image_memory(cost.pixels)
    return data


def _save_map(path: Path, map_: np.ndarray, format: str, predictor: Predictor) -> str:
    return _save_bytes(path, encode_map(map_, format, quantity=predictor.quantity, unit=predictor.unit))


def _save_bytes(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def _save_preview(path: Path, image: np.ndarray) -> str:
    picture = Image.fromarray(image)
    picture.thumbnail((_MAX_DISPLAY_PX, _MAX_DISPLAY_PX), Image.Resampling.LANCZOS)
    picture.save(path, quality=90, method=2)
    return str(path)


def _legend_html(map_: np.ndarray, colour: str, predictor: Predictor) -> str:
    """Say what the colours mean: a bar from near to far with values of the map."""
    values, quantity = display_values(map_, predictor)
    low, high = float(values.min()), float(values.max())
    near, far = (high, low) if quantity == "disparity" else (low, high)
    marks = [near + (far - near) * part / 4 for part in range(5)]
    if predictor.calibrated:  # one over depth is painted, and metres are read
        marks = [1 / mark for mark in marks]
    table = matplotlib.colormaps[distance_colormap(quantity, COLORMAPS[colour])]
    shares = (
        np.linspace(1, 0, _GRADIENT_STOPS) if quantity == "disparity" else np.linspace(0, 1, _GRADIENT_STOPS)
    )
    stops = ", ".join("rgb({:.0f} {:.0f} {:.0f})".format(*(255 * c for c in table(s)[:3])) for s in shares)
    unit = " m" if predictor.unit == "m" else ""
    ticks = "".join(f"<span>{mark:.3g}{unit}</span>" for mark in marks)
    means = (
        "relative disparity, larger is nearer: it has no unit; distances are one over it, up to a scale and a shift"
        if predictor.unit != "m"
        else "depth in metres, along the line of sight of the camera's axis"
    )
    return (
        f'<div class="bar" style="background: linear-gradient(to right, {stops})"></div>'
        f'<div class="ticks">{ticks}</div>'
        f'<div class="ends"><b>near</b><span>{means}</span><b>far</b></div>'
    )


def _model_html(name: str, predictor: Predictor, limits: Limits) -> str:
    model = predictor.model
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    gives = "depth in metres" if predictor.unit == "m" else "relative disparity"
    facts = [
        f"<b>{html.escape(name)}</b>",
        f"{html.escape(model.encoder)}, {millions:.3g} M parameters, gives {gives}",
        f"Licence of the weights: {html.escape(model.licence or 'not stated')}",
        f"Takes JPEG, PNG, WebP, TIFF up to {limits.megapixels:g} megapixels and {limits.megabytes:g} MB",
    ]
    return "".join(f"<p>{fact}</p>" for fact in facts)


def _theme() -> gr.themes.Base:
    """Neutral greys, as in a grading suite; and only fonts that the visitor's machine has."""
    return gr.themes.Base(
        primary_hue="orange",
        neutral_hue="zinc",
        font=["system-ui", "-apple-system", "Segoe UI", "Helvetica Neue", "sans-serif"],
        font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
        radius_size="md",
    )


_CSS = """
.gradio-container, .gradio-container main, .gradio-container .wrap.fillable { width: 100% !important; }
.gradio-container { max-width: 1500px !important; margin: 0 auto; padding: 18px 22px !important; }
.dark, .dark body, .dark .gradio-container { background: #0e0f12 !important; }
#head h1 { font-size: 21px; font-weight: 650; letter-spacing: -.01em; margin: 0; }
#head .lead { color: #8d9099; margin: 2px 0 6px; font-size: 14px; }
#facts p { margin: 0 0 3px; font-size: 12.5px; line-height: 1.45; color: #9a9da6; overflow-wrap: anywhere; }
#facts b { color: #e6e7ea; font-size: 14px; }
#slider, #points { background: #08090a; border-color: #23252b; }
#legend .bar { height: 12px; border-radius: 3px; margin-top: 2px; }
#legend .ticks { display: flex; justify-content: space-between; font: 12px ui-monospace, Menlo, monospace;
  font-variant-numeric: tabular-nums; color: #d5d7db; margin-top: 5px; }
#legend .ends { display: flex; justify-content: space-between; gap: 16px; color: #9a9da6;
  font-size: 12.5px; margin-top: 3px; }
#legend .ends b { color: #e6e7ea; text-transform: uppercase; font-size: 11px; letter-spacing: .08em; }
#legend .ends span { text-align: center; }
.refused { color: #ffb4a6; font-size: 14px; margin: 8px 0; overflow-wrap: anywhere; }
footer { display: none !important; }
"""
