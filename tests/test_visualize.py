import matplotlib
import numpy as np
import pytest

from depth_anything.visualize import GRAY, colorize, make_panel


def ramp(height=5, width=300):
    return np.tile(np.linspace(-3, 8, width, dtype=np.float32), (height, 1))


@pytest.mark.parametrize("colormap", ["Spectral_r", "Spectral", "inferno", "viridis", "turbo"])
def test_equals_the_official_colors(colormap):
    """The official run.py: 255 truncated levels between the extremes, then truncated matplotlib colors."""
    values = np.random.default_rng(0).random((400, 500), dtype=np.float32) * 7
    levels = ((values - values.min()) / (values.max() - values.min()) * 255.0).astype(np.uint8)
    expected = (matplotlib.colormaps[colormap](levels)[:, :, :3] * 255).astype(np.uint8)
    picture = colorize(values, colormap=colormap)
    assert picture.dtype == np.uint8 and picture.shape == (400, 500, 3)
    assert (picture == expected).all()


def test_gray_levels_equal_their_index():
    picture = colorize(np.arange(256.0)[None], colormap="gray")
    assert (picture == np.arange(256)[None, :, None]).all()


def test_near_is_warm_and_far_is_cold():
    picture = colorize(ramp()).astype(int)
    assert picture[0, 0, 2] > picture[0, 0, 0] and picture[0, -1, 0] > picture[0, -1, 2]


def test_given_bounds_are_used():
    picture = colorize(ramp(), low=0, high=4, colormap="gray")
    values = ramp()
    assert (picture[values <= 0] == 0).all() and (picture[values >= 4] == 255).all()
    assert (np.diff(picture[0, :, 0].astype(int)) >= 0).all()
    assert abs(int(picture[0, np.searchsorted(values[0], 2), 0]) - 128) <= 2


def test_invalid_pixels_are_gray_and_do_not_set_the_bounds():
    values = ramp()
    expected = colorize(values)
    dirty, valid = values.copy(), np.ones(values.shape, bool)
    dirty[0], dirty[1], dirty[2], dirty[3] = np.nan, np.inf, -np.inf, 1e30
    valid[3] = False
    picture = colorize(dirty, valid=valid)
    assert (picture[:4] == GRAY).all()
    assert (picture[4] == expected[4]).all()


def test_maps_without_range_or_without_pixels():
    constant = colorize(np.full((2, 3), 4.2))
    assert (constant == colorize(ramp())[0, 0]).all()
    assert (colorize(np.full((2, 3), np.nan)) == GRAY).all()
    assert (colorize(np.ones((2, 3)), valid=np.zeros((2, 3), bool)) == GRAY).all()
    assert colorize(np.zeros((0, 3))).shape == (0, 3, 3)
    assert (colorize(np.ones((2, 3)), low=2, high=2) == constant).all()
    assert colorize(np.array([[0, 7]])).shape == (1, 2, 3)
    assert colorize(np.array([[-3e38, 3e38]], np.float32)).any()


def test_an_unknown_colormap_is_named():
    with pytest.raises(ValueError, match="'spektral'.*Spectral_r"):
        colorize(ramp(), colormap="spektral")


def test_panel_contains_every_picture():
    rng = np.random.default_rng(0)
    rows = [
        [rng.integers(0, 255, (h, w, 3), dtype=np.uint8) for h, w in row]
        for row in [[(20, 90), (31, 80)], [(10, 8)]]
    ]
    sheet = make_panel(rows, ["a", "b"])
    top = sheet.shape[0] - 31 - 10 - 2 * 4
    assert (sheet[top : top + 20, 4:94] == rows[0][0]).all()
    assert (sheet[top : top + 31, 98:178] == rows[0][1]).all()
    assert (sheet[top + 35 : top + 45, 4:12] == rows[1][0]).all()
    assert sheet.shape[1] == 4 + 90 + 4 + 80 + 4
    assert (sheet[top + 35 : top + 45, 12:] == 255).all()


def test_panel_writes_titles_above_columns():
    black = np.zeros((20, 30, 3), np.uint8)
    plain, titled = (
        make_panel([[black, black]]),
        make_panel([[black, black]], ["truth", "a title wider than its picture"]),
    )
    room = titled.shape[0] - plain.shape[0]
    assert 16 <= room <= 32 and titled.shape[1] > plain.shape[1] + 100
    head = titled[:room]
    ink = np.flatnonzero((head < 128).any((0, 2)))
    assert ink.min() < 10 and ink.max() > 150
    assert ink.max() < titled.shape[1] - 2
    assert (titled[[0, -1]] == 255).all()


def test_panel_downscales_wide_pictures():
    wide = np.full((100, 1000, 3), 60, np.uint8)
    sheet = make_panel([[wide]], max_width=200)
    assert sheet.shape == (4 + 20 + 4, 4 + 200 + 4, 3)
    assert (sheet[4:24, 4:204] == 60).all()
    assert make_panel([[np.zeros((1, 5000, 3), np.uint8)]], max_width=100).shape == (4 + 1 + 4, 108, 3)
