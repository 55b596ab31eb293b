"""Frames of which a part is compared: the fit over all that is known, the errors over the part."""

import numpy as np
import pytest

from depth_anything.data.sample import Frame
from depth_anything.evaluation.benchmarks.benchmark import MaskedFrame
from depth_anything.evaluation.evaluate import crop_to_view, masked_truth, score_map
from depth_anything.evaluation.protocols import EvalProtocol, find_protocol

SIZE = (36, 48)


@pytest.mark.parametrize(
    ("protocol", "quantity"), [("da2", "disparity"), ("moge", "disparity"), ("marigold", "depth")]
)
def test_a_masked_frame_is_aligned_over_all_known_pixels(protocol, quantity):
    """By numpy in float64: the fit over all known pixels, the errors over those of the mask."""
    rng = np.random.default_rng(7)
    depth = rng.uniform(1, 9, SIZE).astype(np.float32)
    depth[0, :5] = np.nan
    noisy = depth * rng.uniform(0.8, 1.2, SIZE)
    prediction = np.nan_to_num(1 / noisy if quantity == "disparity" else noisy, nan=1.0).astype(np.float32)
    part = np.zeros(SIZE, bool)
    part[:4] = True
    prediction[:4] *= 1.5  # what is compared is off; a fit over it alone would hide that
    frame = MaskedFrame("k", np.zeros((*SIZE, 3), np.uint8), {}, depth=depth, eval_mask=part)
    rules = find_protocol(protocol)
    row = score_map(prediction, frame, quantity=quantity, protocol=rules)[1]
    known = np.isfinite(depth)
    target = (1 / depth if quantity == "disparity" else depth).astype(np.float64)
    columns = np.stack([prediction[known], np.ones(known.sum())], 1).astype(np.float64)
    scale, shift = np.linalg.lstsq(columns, target[known], rcond=None)[0]
    fitted = scale * prediction.astype(np.float64) + shift
    meters = 1 / np.maximum(fitted, 1 / depth[known].max()) if quantity == "disparity" else fitted
    errors = (np.abs(meters - depth) / depth)[part & known]
    assert row["valid"] == errors.size == 4 * SIZE[1] - 5
    assert row["abs_rel"] == pytest.approx(errors.mean(), rel=1e-5) and row["abs_rel"] > 0.15
    whole = score_map(
        prediction, Frame("k", frame.image, {}, depth=depth), quantity=quantity, protocol=rules
    )[1]
    assert (row["scale"], row["shift"]) == (whole["scale"], whole["shift"])
    assert np.isfinite(masked_truth(frame, rules)).sum() == row["valid"]


def test_the_mask_is_cropped_with_its_frame():
    part = np.zeros((400, 1300), bool)
    part[100:, 50:] = True
    frame = MaskedFrame(
        "k", np.zeros((400, 1300, 3), np.uint8), {}, depth=np.ones((400, 1300), np.float32), eval_mask=part
    )
    seen = crop_to_view(frame, EvalProtocol("own", fitted=(), view_crop="kb"))
    np.testing.assert_array_equal(seen.eval_mask, part[48:, 42:1258])
