"""The web demo in headless Chromium, and its security."""

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from depth_anything import DepthAnything, Predictor, save_model
from depth_anything.cli import main

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # those of others, on import
    pytest.importorskip("gradio", reason="pip install 'depth-anything-train[demo]'")
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    from depth_anything.demo.guard import UploadQuota
    from depth_anything.demo.page import Limits, run_page
    from depth_anything.inference.predictor import check_finite

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
LIMITS = Limits(megapixels=0.5, megabytes=1.0, queue=4)
TIMEOUT_MS = 300_000


class FakePredictor:
    """A fake predictor whose maps `make_map` returns; without it, memory runs out."""

    def __init__(self, like, make_map):
        self.like, self.make_map = like, make_map

    def __getattr__(self, name):
        return getattr(self.like, name)

    def predict(self, image, focal=None):
        if self.make_map is None:
            raise MemoryError
        map_ = self.make_map(image.shape[:2])
        check_finite(map_, "the image", precision="fp16")
        return map_


@pytest.fixture(scope="module")
def predictors():
    relative = Predictor(DepthAnything("vitn"), device="cpu", input_size=70)
    metric = Predictor(DepthAnything("vitn", max_depth=20.0), device="cpu", input_size=70)
    return {
        "relative": relative,
        "<b>metric</b>": metric,
        "sky": FakePredictor(relative, lambda shape: np.zeros(shape, np.float32)),
        "broken": FakePredictor(relative, lambda shape: np.full(shape, np.nan, np.float32)),
        "greedy": FakePredictor(relative, None),
    }


@pytest.fixture(scope="module")
def looked_up():
    return []


@pytest.fixture(scope="module")
def address(predictors, looked_up):
    """The running page; every host that the process looks up is recorded."""
    plain = socket.getaddrinfo

    def noted(host, *args, **kwargs):
        looked_up.append(host)
        return plain(host, *args, **kwargs)

    socket.getaddrinfo = noted
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with run_page(predictors, limits=LIMITS) as url:
                yield url
    finally:
        socket.getaddrinfo = plain


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs chromium: apt-get install chromium")
    with playwright.sync_playwright() as runner:
        chromium = runner.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"],
        )
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, address):
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    page.set_default_timeout(TIMEOUT_MS)
    page.asked, page.event_streams = [], set()
    page.on("request", lambda request: note_request(page, request))
    page.on("requestfinished", lambda request: page.event_streams.discard(request))
    page.on("requestfailed", lambda request: page.event_streams.discard(request))
    page.goto(address)
    page.wait_for_selector("#drop input[type=file]", state="attached", timeout=TIMEOUT_MS)
    wait_for_events(page)
    yield page
    page.close()


@pytest.fixture
def photo(tmp_path):
    """A color gradient of 90 × 120 pixels."""
    y, x = np.mgrid[0:90, 0:120]
    image = np.stack([x * 2, y * 2, (x + y) % 256], axis=2).astype(np.uint8)
    path = tmp_path / "a photo.png"
    Image.fromarray(image).save(path)
    return path


def note_request(page, request):
    page.asked.append(request.url)
    if "queue/data" in request.url:
        page.event_streams.add(request)


def wait_for_events(page):
    """Wait until Gradio has answered all events: it may lose one that begins while it closes the stream of another."""
    deadline = time.monotonic() + TIMEOUT_MS / 1000
    page.wait_for_timeout(50)
    while page.event_streams and time.monotonic() < deadline:
        page.wait_for_timeout(50)


def upload(page, path):
    page.set_input_files("#drop input[type=file]", str(path))


def upload_and_wait(page, path):
    upload(page, path)
    page.wait_for_selector("#legend .bar", timeout=TIMEOUT_MS)
    wait_for_events(page)


def toast_message(page, text):
    """Wait for a toast message with this text, close it and return its text."""
    toast = page.locator(".toast-body", has_text=text)
    toast.wait_for(timeout=TIMEOUT_MS)
    text = toast.inner_text()
    toast.locator(".toast-close").click()
    return text


def page_error(page, text):
    """Wait for an error on the page with this text and return its text."""
    error = page.locator("#legend .refused", has_text=text)
    error.wait_for(timeout=TIMEOUT_MS)
    return error.inner_text()


def test_upload_slide_download(page, address, photo, predictors, tmp_path):
    upload_and_wait(page, photo)
    page.wait_for_selector("#slider img", timeout=TIMEOUT_MS)
    assert page.locator("#slider img").count() == 2
    assert re.search(r"near.*larger is nearer.*far", page.inner_text("#legend"), re.I | re.S)
    handle = page.locator("#slider .inner").first
    before = handle.bounding_box()
    page.mouse.move(before["x"] + before["width"] / 2, before["y"] + before["height"] / 2)
    page.mouse.down()
    page.mouse.move(before["x"] + 200, before["y"] + before["height"] / 2, steps=5)
    page.mouse.up()
    assert handle.bounding_box()["x"] - before["x"] > 100

    with page.expect_download() as coming:
        page.click("#png16")
    coming.value.save_as(tmp_path / "got.png")
    own = predictors["relative"].predict(np.asarray(Image.open(photo)))
    with Image.open(tmp_path / "got.png") as picture:
        low, high = float(picture.text["low"]), float(picture.text["high"])
        assert (picture.text["quantity"], picture.text["larger"]) == ("disparity", "nearer")
        values = low + np.asarray(picture).astype(np.float64) / 65535 * (high - low)
    assert (low, high) == (float(own.min()), float(own.max()))
    assert np.abs(values - own).max() <= (high - low) / 65535 * 0.51
    with page.expect_download() as coming:
        page.click("#exr")
    coming.value.save_as(tmp_path / "got.exr")
    assert (tmp_path / "got.exr").read_bytes()[:4] == b"\x76\x2f\x31\x01"

    for url in page.asked:  # nothing from elsewhere, no path of the disk
        assert url.startswith((address, "data:", "blob:")), url
    assert tempfile.gettempdir() + "/" not in page.content() and "depth-anything-" not in page.content()


def test_meters_are_shown_and_names_are_escaped(page, photo):
    upload_and_wait(page, photo)
    page.click("#model input")
    page.get_by_role("option", name="<b>metric</b>").click()
    page.wait_for_function("document.querySelector('#legend').innerText.includes(' m')", timeout=TIMEOUT_MS)
    ticks = page.locator("#legend .ticks span").all_inner_texts()
    assert len(ticks) == 5 and all(re.fullmatch(r"[\d.e+-]+ m", tick) for tick in ticks)
    assert float(ticks[0][:-2]) <= float(ticks[-1][:-2])  # from near to far
    assert "depth in meters" in page.inner_text("#facts") and "<b>metric</b>" in page.inner_text("#facts")


def test_points_load_when_their_tab_is_opened(page, photo):
    upload_and_wait(page, photo)
    for _ in range(10):  # a loaded machine may lose the event of a tab, which a visitor then opens again
        try:
            with page.expect_response(
                lambda got: got.url.endswith(".glb"), timeout=TIMEOUT_MS / 10
            ) as coming:
                page.get_by_role("tab", name="Point cloud").click()
            break
        except playwright.TimeoutError:
            page.get_by_role("tab", name="Picture and depth").click()
            wait_for_events(page)
    assert coming.value.status == 200 and coming.value.body()[:4] == b"glTF"


def test_files_that_are_not_images_are_refused_on_the_page(page, photo, tmp_path):
    upload_and_wait(page, photo)
    (tmp_path / "notes.txt").write_text("a note")
    upload(page, tmp_path / "notes.txt")
    toast_message(page, "Invalid file type: notes.txt")
    (tmp_path / "notes.jpg").write_text("a note in disguise")
    upload(page, tmp_path / "notes.jpg")
    text = page_error(page, "cannot be read as a picture")
    assert str(tmp_path) not in text and "tmp" not in text
    page.wait_for_selector("#legend .bar", state="detached", timeout=TIMEOUT_MS)  # no other picture's depth
    assert page.locator("#png16").is_disabled()
    assert page.locator("#drop img").count() == 0 and page.locator("#slider img").count() == 0
    page.wait_for_selector(".toast-body", state="detached", timeout=TIMEOUT_MS)  # no second message
    page_error(page, "cannot be read as a picture")
    Image.open(photo).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "again.webp")
    upload_and_wait(page, tmp_path / "again.webp")


def test_images_over_a_limit_are_refused_on_the_page(page, tmp_path):
    Image.new("L", (1000, 800)).save(tmp_path / "wide.png")
    upload(page, tmp_path / "wide.png")
    page_error(page, "0.8 megapixels")
    noise = np.random.default_rng(0).integers(0, 255, (700, 700, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "heavy.png")
    upload(page, tmp_path / "heavy.png")
    page_error(page, "over 1 MB")
    Image.new("L", (19_000, 10_000)).save(tmp_path / "bomb.png")  # Pillow itself refuses from 179 on
    upload(page, tmp_path / "bomb.png")
    page_error(page, "190 megapixels")
    Image.new("L", (900, 90)).save(tmp_path / "strip.png")
    upload(page, tmp_path / "strip.png")  # at once: a late answer must not remove this upload
    page_error(page, "10 to 1")


def test_a_map_without_points_is_shown_with_the_reason(page, photo):
    upload_and_wait(page, photo)
    page.click("#model input")
    page.get_by_role("option", name="sky").click()
    page.wait_for_function("document.querySelector('#facts').innerText.includes('sky')", timeout=TIMEOUT_MS)
    page.wait_for_selector("#legend .bar", timeout=TIMEOUT_MS)
    assert page.locator("#slider img").count() == 2 and page.locator("#png16").is_enabled()
    page.get_by_role("tab", name="Point cloud").click()
    page.wait_for_selector("#no-points .refused", timeout=TIMEOUT_MS)
    assert "No points" in page.inner_text("#no-points")


@pytest.mark.parametrize("name", ["broken", "greedy"])
def test_the_page_works_after_a_failed_request(page, photo, name):
    upload_and_wait(page, photo)
    page.click("#model input")
    page.get_by_role("option", name=name).click()
    page_error(page, "NaN" if name == "broken" else "not enough memory")
    assert page.locator("#slider img").count() == 0
    page.click("#model input")
    page.get_by_role("option", name="relative").click()
    upload_and_wait(page, photo)


def make_uploads(folder, count, size, *, age=0.0):
    for number in range(count):
        (folder / f"{number}").mkdir()
        path = folder / f"{number}/picture.png"
        path.write_bytes(bytes(size))
        for touched in (path, path.parent):
            os.utime(touched, (time.time() - age - number, time.time() - age - number))


def test_the_quota_removes_old_uploads_only(tmp_path):
    make_uploads(tmp_path, 5, 1000, age=100)
    assert (
        UploadQuota(tmp_path, files=10, bytes=10_000).make_room(1000) and len(list(tmp_path.iterdir())) == 5
    )
    assert UploadQuota(tmp_path, files=10, bytes=5000).make_room(2000, keep=tmp_path / "4/picture.png")
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1", "4"}  # the oldest is 4, which is in use
    assert UploadQuota(tmp_path, files=2, bytes=10_000).make_room(0)
    assert len(list(tmp_path.iterdir())) == 1
    shutil.rmtree(tmp_path / next(tmp_path.iterdir()))
    make_uploads(tmp_path, 5, 1000)
    assert (
        not UploadQuota(tmp_path, files=10, bytes=5000).make_room(1000) and len(list(tmp_path.iterdir())) == 5
    )


def test_an_upload_over_the_quota_is_refused_before_it_is_received(predictors):
    limits = Limits(megabytes=0.1, disk_megabytes=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with run_page(predictors, limits=limits) as url:
            for size, status in ((60_000, 507), (600_000, 413)):
                line = http.client.HTTPConnection(url.split("/")[2], timeout=300)
                line.putrequest("POST", "/gradio_api/upload")
                line.putheader("Content-Type", "multipart/form-data; boundary=b")
                line.putheader("Content-Length", str(size))
                line.endheaders()  # and not a byte of what was announced
                assert line.getresponse().status == status
                line.close()


def ask(url, data=None):
    request = urllib.request.Request(
        url, data and json.dumps(data).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def call(address, file):
    """Call the page's event handler over HTTP with any file; return the whole response."""
    config = json.loads(ask(f"{address}config")[1])
    number = next(d["id"] for d in config["dependencies"] if len(d["inputs"]) == 4)
    body = {"data": [file, "relative", "Spectral", None], "fn_index": number, "session_hash": "abc"}
    status, text = ask(f"{address}gradio_api/queue/join", body)
    if status != 200:
        return text
    return text + ask(f"{address}gradio_api/queue/data?session_hash=abc")[1]


@pytest.mark.parametrize(
    "path",
    [__file__, "/etc/passwd", "../../etc/passwd", "http://127.0.0.1:1/x.png", "https://example.com/x.png"],
)
def test_a_visitor_can_neither_read_files_nor_make_the_server_fetch_urls(address, looked_up, path):
    answer = call(address, {"path": path, "meta": {"_type": "gradio.FileData"}})
    assert '"success":false' in answer.replace(" ", "") or "error" in answer.lower()
    assert "root:" not in answer and tempfile.gettempdir() not in answer
    status, text = ask(f"{address}gradio_api/file={path}")
    assert status in (403, 404) and "root:" not in text
    assert "example.com" not in looked_up


def test_no_other_host_is_looked_up(address, looked_up):
    assert set(looked_up) <= {"127.0.0.1", "localhost", "::1", None, "0.0.0.0"}


def test_responses_contain_no_server_path(address):
    for place in ("", "config", "gradio_api/info", "gradio_api/startup-events", "nowhere"):
        _, text = ask(address + place)
        for secret in (os.getcwd(), tempfile.gettempdir() + "/", sys.prefix, str(Path.home()) + "/"):
            assert secret not in text, f"/{place} contains {secret}"


def test_temporary_files_and_environment_are_cleaned_up(predictors, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
    before = threading.active_count()
    with run_page(predictors) as url:
        assert url.startswith("http://127.0.0.1:")
        assert len(list(tmp_path.iterdir())) == 1
    assert not list(tmp_path.iterdir())
    assert "GRADIO_TEMP_DIR" not in os.environ
    assert threading.active_count() <= before + 1


def test_the_command_serves_until_sigterm(tmp_path):
    save_model(DepthAnything("vitn"), tmp_path / "model.safetensors")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        "-m",
        "depth_anything",
        "demo",
        "--weights",
        f"mine={tmp_path / 'model.safetensors'}",
        "--port",
        str(port),
    ]
    (tmp_path / "temp").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "temp")}
    with subprocess.Popen(
        [sys.executable, *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            line = process.stdout.readline()
            assert f"http://127.0.0.1:{port}" in line and "mine" in line
            assert ask(f"http://127.0.0.1:{port}/")[0] == 200
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=300) == 0
    assert not list((tmp_path / "temp").iterdir())


def test_a_taken_port_is_reported_in_one_line(tmp_path, capsys, address):
    save_model(DepthAnything("vitn"), tmp_path / "model.safetensors")
    taken = address.rstrip("/").rpartition(":")[2]
    assert main(["demo", "--weights", str(tmp_path / "model.safetensors"), "--port", taken]) == 2
    text = capsys.readouterr().err.strip()
    assert text.startswith("depth-anything demo: ") and taken in text and "\n" not in text


def test_a_written_video_plays_in_the_browser(browser, tmp_path):
    pytest.importorskip("av", reason="pip install 'depth-anything-train[video]'")
    from depth_anything.inference.video_writer import VideoWriter

    rate = Fraction(30000, 1001)
    with VideoWriter(
        tmp_path / "a.mp4", height=90, width=161, rate=rate, time_base=1 / rate, metadata={}
    ) as film:
        for number in range(60):
            film.write(np.full((90, 161, 3), (4 * number, 200, 30), np.uint8), number)
    (tmp_path / "play.html").write_text('<video src="a.mp4" muted autoplay></video>')
    page = browser.new_page()
    page.set_default_timeout(TIMEOUT_MS)
    page.goto((tmp_path / "play.html").as_uri())
    if not page.evaluate("document.createElement('video').canPlayType('video/mp4; codecs=\"avc1.640028\"')"):
        pytest.skip("this chromium plays no H.264: apt-get install chromium, Debian's, which does")
    page.wait_for_function("document.querySelector('video').currentTime > 0.3", timeout=TIMEOUT_MS)
    facts = page.evaluate(
        "(v => [v.videoWidth, v.videoHeight, v.duration, v.error])(document.querySelector('video'))"
    )
    page.close()
    assert facts[:2] == [162, 90] and facts[3] is None
    assert facts[2] == pytest.approx(60 * 1001 / 30000, abs=0.002)


def test_app_py_is_the_demo_command(capsys):
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, root / "app.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--weights" in done.stdout


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_elongated_image_is_refused_by_its_header(tmp_path):
    from depth_anything.demo import page as page_module

    Image.new("L", (900, 90)).save(tmp_path / "strip.png")
    with pytest.raises(page_module.UploadError, match="10 to 1"):
        page_module._read_upload(tmp_path / "strip.png", page_module.Limits())
    Image.new("L", (700, 90)).save(tmp_path / "panorama.png")
    assert page_module._read_upload(tmp_path / "panorama.png", page_module.Limits())
