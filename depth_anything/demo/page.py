"""The web demo: upload a picture, compare it with its depth map under a slider, download the values, view points.

Privacy: no analytics, no fonts or scripts from other hosts, and no URL is fetched for a visitor. A visitor sends one
image and chooses one of the given models. Files are decoded, never unpickled. Responses contain an alias instead of
the path of the server's temporary folder.
"""

import html
import os
import secrets
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # Gradio reads it at import

import gradio as gr  # noqa: E402
import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402

from depth_anything.data.image_headers import estimate_decode_cost  # noqa: E402
from depth_anything.data.sample import decode_image  # noqa: E402
from depth_anything.demo.guard import FolderAlias, UploadGuard, UploadQuota  # noqa: E402
from depth_anything.inference.focal import choose_focal_length  # noqa: E402
from depth_anything.inference.formats import display_values, encode_map  # noqa: E402
from depth_anything.inference.memory import check_image_memory, is_out_of_memory  # noqa: E402
from depth_anything.inference.pointcloud import encode_points, unproject  # noqa: E402
from depth_anything.inference.predictor import Predictor  # noqa: E402
from depth_anything.visualize import colorize_by_distance, distance_colormap  # noqa: E402

COLORMAPS = {"Spectral": "Spectral_r", "Inferno": "inferno", "Gray": "gray"}
"""Label on the page to matplotlib's name, as `colorize_by_distance` takes it: near is red, bright or white."""

_MAX_DISPLAY_PX = 2048  # longer side of the images in the slider; the downloads have the full size
_MAX_POINTS = 400_000
_CLEANUP_INTERVAL_S, _MAX_FILE_AGE_S = 300, 3600
_CAMERA_AZIMUTH_DEG, _CAMERA_POLAR_DEG = 90, 86  # the direction of the photograph, slightly raised
_CAMERA_DISTANCE = 1.15  # times the distance of the middle of the points
_MAX_DEPTH_MEDIANS = 4.0  # far points of a disparity map are unreliable and would make the near ones tiny
_GRADIENT_STOPS = 24
_HARD_LIMIT_FACTOR = 4  # files up to so many times the limit are received, to show an error on the page
_MULTIPART_BYTES = 10_000  # upper bound of an upload's size beyond the size of its file
_MAX_ASPECT_RATIO = 8  # the network's short side is fixed; its cost grows with the square of the long one


@dataclass(frozen=True)
class Limits:
    """Limits on uploads.

    Attributes:
        megapixels: Maximum size of an image.
        megabytes: Maximum size of a file.
        queue: Maximum number of waiting visitors; they are served one at a time, since the network has one device.
        files: Maximum number of uploads and results kept on disk; the oldest are removed first.
        disk_megabytes: Maximum size of all of them.
    """

    megapixels: float = 50.0
    megabytes: float = 30.0
    queue: int = 16
    files: int = 500
    disk_megabytes: float = 4000.0


class UploadError(ValueError):
    """An upload that the page refuses; the message is shown to the visitor."""


@dataclass(frozen=True)
class _PageResult:
    """Files and HTML that the page shows for one image.

    Attributes:
        pair: Previews of the image and of the painted map, for the slider.
        legend: HTML of the color bar.
        png16: Path of the 16-bit PNG.
        exr: Path of the OpenEXR file.
        points: Path of the glb file; None if no pixel is near enough.
        camera_distance: Distance of the viewer's camera, in the unit of the points.
        points_error: HTML that says why there are no points; else empty.
        facts: HTML about the model and the image.
    """

    pair: tuple[str, str]
    legend: str
    png16: str
    exr: str
    points: str | None
    camera_distance: float
    points_error: str
    facts: str


def serve(predictors: Mapping[str, Predictor], *, host: str, port: int, limits: Limits) -> None:
    """Serve the page until SIGTERM or Ctrl-C.

    Args:
        predictors: Name in the model menu to predictor.
        host: Address to listen on; 127.0.0.1 can be reached from this machine only.
        port: Port to listen on.
        limits: Limits on uploads.

    Raises:
        OSError: The port is taken.
    """
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())  # else the temporary files would stay
    with run_page(predictors, host=host, port=port, limits=limits) as address:
        print(f"{address}  ({', '.join(predictors)}; stop it with Ctrl-C)", flush=True)
        stop.wait()


@contextmanager
def run_page(
    predictors: Mapping[str, Predictor],
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    limits: Limits | None = None,
) -> Iterator[str]:
    """Run the page in the background and yield its address; stop it and remove its files on exit.

    Args:
        predictors: Name in the model menu to predictor.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        limits: Limits on uploads.
    """
    limits = limits or Limits()
    folder = Path(tempfile.mkdtemp(prefix="depth-anything-")).resolve()
    before = os.environ.get("GRADIO_TEMP_DIR")
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    quota = UploadQuota(folder, limits.files, round(limits.disk_megabytes * 1_000_000))
    # Gradio reports a larger file in a corner, in fixed words. Files up to the hard limit get our own error message.
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
                    Middleware(UploadGuard, quota=quota, max_bytes=hard_limit + _MULTIPART_BYTES),
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
    """Lay out the page and connect its events.

    Args:
        predictors: Name in the model menu to predictor.
        limits: Limits on uploads.
        quota: Limits on the temporary folder.
    """
    names, uploads = list(predictors), _UploadHandler(predictors, limits, quota)
    with gr.Blocks(
        title="Depth Anything",
        analytics_enabled=False,
        delete_cache=(_CLEANUP_INTERVAL_S, _MAX_FILE_AGE_S),
        fill_width=True,
    ) as page:
        gr.HTML('<h1>Depth Anything</h1><p class="lead">Depth from a single picture.</p>', elem_id="head")
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
                colors = gr.Radio(list(COLORMAPS), value="Spectral", label="Colors", elem_id="colors")
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
                with gr.Tab("Point cloud") as points_tab:
                    points_error = gr.HTML(elem_id="no-points")
                    points = gr.Model3D(
                        show_label=False,
                        height=640,
                        clear_color=(0.055, 0.06, 0.07, 1.0),
                        elem_id="points",
                    )

        result, points_shown, refusals = gr.State(None), gr.State(False), gr.State(0)

        # Not `change`: removing a refused picture would trigger it, and it would clear the error message.
        gr.on(
            [image.upload, image.clear, model.input, colors.input],
            uploads.show,
            [image, model, colors, points_shown],
            [slider, legend, png16, exr, result, points, facts, points_error, refusals],
            api_visibility="private",
            show_progress_on=slider,
            trigger_mode="always_last",
        )
        # The browser removes a refused picture itself: a request to the server could be answered after the next
        # upload and remove that one. The image cannot be an output above: Gradio then replaces the component, and
        # with it the methods that `_disable_preprocessing` sets.
        refusals.change(None, None, image, js="() => null", api_visibility="private")
        # A canvas that is hidden when it gets its points never draws them: they are sent when the tab is opened.
        points_tab.select(
            lambda shown: (_point_viewer(shown), True),
            result,
            [points, points_shown],
            api_visibility="private",
        )
        picture_tab.select(lambda: (None, False), None, [points, points_shown], api_visibility="private")
    return page


class _UploadHandler:
    """Computes what the page shows for a visitor's picture."""

    def __init__(
        self, predictors: Mapping[str, Predictor], limits: Limits, quota: UploadQuota | None
    ) -> None:
        self._predictors, self._limits, self._quota = predictors, limits, quota

    def show(self, path: str | None, name: str, color: str, points_shown: bool) -> list[Any]:
        """Return the values of the page's components for a picture, a model, a colormap and the open tab."""
        result, error_html, refusal = None, "", gr.skip()
        if path:
            try:
                result = self._predict_upload(Path(path), name, color)
            except UploadError as error:
                error_html, refusal = _error_html(error), secrets.token_hex(8)
        if result is None:
            disabled = gr.DownloadButton(interactive=False, value=None)
            predictor = self._predictors.get(name)
            facts = _model_html(name, predictor, self._limits) if predictor else ""
            return [None, error_html, disabled, disabled, None, _point_viewer(None), facts, "", refusal]
        return [
            result.pair,
            result.legend,
            gr.DownloadButton(value=result.png16, interactive=True),
            gr.DownloadButton(value=result.exr, interactive=True),
            result,
            _point_viewer(result if points_shown else None),
            result.facts,
            result.points_error,
            refusal,
        ]

    def _predict_upload(self, path: Path, name: str, color: str) -> _PageResult:
        """Predict a picture; anything wrong with it or with this one request becomes an UploadError."""
        if name not in self._predictors or color not in COLORMAPS:
            raise UploadError("There is no such model or colormap.")
        try:
            data = _read_upload(path, self._limits)
            if self._quota and not self._quota.make_room(0, keep=path):
                raise UploadError("The disk of this page is full: try again in a minute.")
            return _build_result(path, data, name, color, self._predictors[name], self._limits)
        except UploadError:
            raise
        except FileNotFoundError as error:
            raise UploadError("This picture was removed to make room for others: upload it again.") from error
        except ValueError as error:
            raise UploadError(f"No depth map can be computed for this picture: {error}.") from error
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise UploadError("There is not enough memory for this picture: reduce it first.") from error


def _error_html(why: object) -> str:
    return f'<p class="refused" role="alert">{html.escape(str(why))}</p>'


def _point_viewer(result: _PageResult | None) -> gr.Model3D:
    if result is None or result.points is None:
        return gr.Model3D(value=None)
    camera = (_CAMERA_AZIMUTH_DEG, _CAMERA_POLAR_DEG, result.camera_distance)
    return gr.Model3D(value=result.points, camera_position=camera)


def _disable_preprocessing(image: gr.Image) -> None:
    """Make the component pass uploaded files on unchanged, and refuse URLs, which Gradio would fetch.

    Our own decoder then reports what is wrong with a file. The methods are set on the instance, because Gradio writes a
    .pyi file for each subclass.
    """
    move = image.async_move_resource_to_block_cache

    async def refuse_urls(path: Any) -> str | None:
        if "://" in str(path):
            raise gr.Error("Upload the picture itself: this page fetches no URLs.", print_exception=False)
        return await move(path)

    setattr(image, "preprocess", lambda payload: payload and payload.path)  # noqa: B010
    setattr(image, "async_move_resource_to_block_cache", refuse_urls)  # noqa: B010


def _build_result(
    path: Path, data: bytes, name: str, color: str, predictor: Predictor, limits: Limits
) -> _PageResult:
    image = decode_image(data)
    focal = choose_focal_length(data, image.shape)
    map_ = predictor.predict(image, focal=focal.pixels)
    folder = Path(tempfile.mkdtemp(prefix="result-", dir=path.parent))
    values, quantity = display_values(map_, predictor)
    painted = colorize_by_distance(values, quantity=quantity, colormap=COLORMAPS[color])
    cloud = unproject(
        image,
        map_,
        quantity=predictor.quantity,
        focal_px=focal.pixels,
        far=None if predictor.unit == "m" else _MAX_DEPTH_MEDIANS,
        max_points=_MAX_POINTS,
    )
    points, camera_distance, points_error = None, 1.0, ""
    try:
        points = _save_bytes(folder / "points.glb", encode_points(cloud, "glb"))
        camera_distance = float(cloud.points[:, 2].min() + cloud.points[:, 2].max()) / 2 * _CAMERA_DISTANCE
    except ValueError as error:  # a map of nothing but sky has no points, and is shown all the same
        points_error = _error_html(f"No points: {error}.")
    size = f"{image.shape[1]} × {image.shape[0]} px"
    use = "the points" if predictor.canonical_focal is None else "the meters and the points"
    return _PageResult(
        pair=(_save_preview(folder / "picture.webp", image), _save_preview(folder / "depth.webp", painted)),
        legend=_legend_html(map_, color, predictor),
        png16=_save_map(folder / f"{predictor.quantity}.png", map_, "png16", predictor),
        exr=_save_map(folder / f"{predictor.quantity}.exr", map_, "exr", predictor),
        points=points,
        camera_distance=camera_distance,
        points_error=points_error,
        facts=_model_html(name, predictor, limits)
        + f"<p>{size}. Focal length of {use}: {focal.pixels:.0f} px, {html.escape(focal.source)}.</p>",
    )


def _read_upload(path: Path, limits: Limits) -> bytes:
    """Read an uploaded file if its size and the decoding cost in its header are within the limits."""
    if path.stat().st_size > limits.megabytes * 1_000_000:
        raise UploadError(f"This file is over {limits.megabytes:g} MB, the limit of this page.")
    data = path.read_bytes()
    try:
        cost = estimate_decode_cost(data)
    except ValueError as error:
        raise UploadError(f"This file cannot be read as a picture ({error}).") from error
    if cost.pixels > limits.megapixels * 1e6:
        raise UploadError(
            f"This picture has {cost.pixels / 1e6:.3g} megapixels; the limit of this page is "
            f"{limits.megapixels:g}: reduce it first."
        )
    long, short = max(cost.width, cost.height), max(1, min(cost.width, cost.height))
    if long > _MAX_ASPECT_RATIO * short:
        raise UploadError(
            f"The sides of this picture are {long / short:.3g} to 1; the limit of this page is "
            f"{_MAX_ASPECT_RATIO} to 1: crop it."
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


def _legend_html(map_: np.ndarray, color: str, predictor: Predictor) -> str:
    """Build the color bar: a gradient from near to far with five values of the map."""
    values, quantity = display_values(map_, predictor)
    low, high = float(values.min()), float(values.max())
    near, far = (high, low) if quantity == "disparity" else (low, high)
    marks = [near + (far - near) * part / 4 for part in range(5)]
    if predictor.calibrated:  # the colors are those of 1 / depth; the labels are meters
        marks = [1 / mark for mark in marks]
    table = matplotlib.colormaps[distance_colormap(quantity, COLORMAPS[color])]
    positions = np.linspace(0, 1, _GRADIENT_STOPS)
    if quantity == "disparity":
        positions = 1 - positions
    stops = ", ".join("rgb({:.0f} {:.0f} {:.0f})".format(*(255 * c for c in table(s)[:3])) for s in positions)
    unit = " m" if predictor.unit == "m" else ""
    ticks = "".join(f"<span>{mark:.3g}{unit}</span>" for mark in marks)
    meaning = (
        "depth in meters, along the camera's axis"
        if predictor.unit == "m"
        else "relative disparity, larger is nearer: the inverse of depth, up to a scale and a shift, without a unit"
    )
    return (
        f'<div class="bar" style="background: linear-gradient(to right, {stops})"></div>'
        f'<div class="ticks">{ticks}</div>'
        f'<div class="ends"><b>near</b><span>{meaning}</span><b>far</b></div>'
    )


def _model_html(name: str, predictor: Predictor, limits: Limits) -> str:
    model = predictor.model
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    output = "depth in meters" if predictor.unit == "m" else "relative disparity"
    facts = [
        f"<b>{html.escape(name)}</b>",
        f"{html.escape(model.encoder)}, {millions:.3g} M parameters, predicts {output}",
        f"License of the weights: {html.escape(model.licence or 'not stated')}",
        f"JPEG, PNG, WebP or TIFF up to {limits.megapixels:g} megapixels and {limits.megabytes:g} MB",
    ]
    return "".join(f"<p>{fact}</p>" for fact in facts)


def _theme() -> gr.themes.Base:
    """Neutral grays, and fonts that are installed on the visitor's machine."""
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
