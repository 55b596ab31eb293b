"""Confusion matrices of class maps, and the measures computed from their sum over all images."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from depth_anything.classes import IGNORED


def count_confusion(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Count the pixels of each pair of classes.

    Args:
        truth: uint8 (H, W), 255 where a pixel is ignored.
        predicted: Integers (H, W), 0 to `classes` - 1.
        classes: Number of classes K.

    Returns:
        int64 (K, K): rows are the true class, columns the predicted one.

    Raises:
        ValueError: The maps differ in shape, or hold a number that is no class.
    """
    if truth.shape != predicted.shape:
        raise ValueError(f"the prediction has {predicted.shape} pixels, the truth {truth.shape}")
    counted = truth != IGNORED
    true, found = truth[counted].astype(np.int64), predicted[counted].astype(np.int64)
    for name, values in (("truth", true), ("prediction", found)):
        if values.size and not 0 <= values.min() <= values.max() < classes:
            raise ValueError(f"the {name} has the class {values.max()}, and there are {classes}")
    return np.bincount(true * classes + found, minlength=classes * classes).reshape(classes, classes)


@dataclass(frozen=True)
class SegmentationScores:
    """Measures of a confusion matrix; NaN for a class that neither truth nor prediction has, and where nothing is.

    Attributes:
        iou: float64 (K,), intersection over union of each class.
        class_accuracy: float64 (K,), share of each class's pixels that are found; NaN without such pixels.
        accuracy: Share of all pixels that are right.
    """

    iou: np.ndarray
    class_accuracy: np.ndarray
    accuracy: float

    @property
    def mean_iou(self) -> float:
        """Mean IoU over the classes that occur, the usual mIoU."""
        return _mean(self.iou)

    @property
    def mean_accuracy(self) -> float:
        """Mean of the class accuracies over the classes in the truth."""
        return _mean(self.class_accuracy)


def score_confusion(matrix: np.ndarray) -> SegmentationScores:
    """Compute IoU and accuracies from a confusion matrix (K, K)."""
    right = np.diag(matrix).astype(np.float64)
    truth, found = matrix.sum(1).astype(np.float64), matrix.sum(0).astype(np.float64)
    union = truth + found - right
    with np.errstate(invalid="ignore", divide="ignore"):
        total = truth.sum()
        return SegmentationScores(
            right / union, right / truth, float(right.sum() / total) if total else float("nan")
        )


def sparse_matrix(matrix: np.ndarray) -> list[list[int]]:
    """Return the pairs that occur, [true class, predicted class, pixels]: an image has few of them."""
    return [[int(row), int(column), int(matrix[row, column])] for row, column in np.argwhere(matrix)]


def sum_matrices(sparse: Iterable[Sequence[Sequence[int]]], classes: int) -> np.ndarray:
    """Add sparse matrices to int64 (K, K)."""
    total = np.zeros((classes, classes), np.int64)
    for pairs in sparse:
        for row, column, count in pairs:
            total[row, column] += count
    return total


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")
