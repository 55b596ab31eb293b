"""The task of depth estimation: maps are compared with depth in meters, pixel by pixel."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from depth_anything.data.sample import Frame
from depth_anything.evaluation.evaluate import (
    BOUNDARY_METRICS,
    HIGHER_IS_BETTER,
    METRICS,
    DepthResult,
    crop_to_view,
    masked_truth,
    score_frames,
)
from depth_anything.evaluation.html_report import DepthExample, depth_page
from depth_anything.evaluation.protocols import EvalProtocol
from depth_anything.evaluation.task import Column, EvalTask, MapSource, Row, format_keys, join_reasons


@dataclass(frozen=True)
class DepthTask(EvalTask):
    """Frames with depth in meters, compared by a protocol.

    Attributes:
        protocol: which maps are aligned, and between which depths they are compared.
    """

    metric: ClassVar[str] = "abs_rel"
    higher_is_better: ClassVar[bool] = False
    protocol: EvalProtocol = field(kw_only=True)

    def check_quantity(self, quantity: str) -> None:
        """Raise ValueError if the protocol cannot compare this quantity, or needs meters that the set does not have."""
        self.protocol.check_quantity(quantity)
        unit = self.facts.get("unit", "m")
        if quantity == "depth" and "depth" not in self.protocol.fitted and unit != "m":
            raise ValueError(
                f"the depth of {self.name} is in {unit}, not in meters: metric models cannot be compared with it "
                "unless they are aligned; use a protocol that fits depth (marigold), or another set"
            )

    def score(self, source: MapSource, frames: Sequence[Frame]) -> list[Row]:
        """Predict a batch of frames and compute the metrics of each."""
        return [row for _, row in score_frames(source, frames, protocol=self.protocol)]

    def result(self, name: str, rows: Iterable[Row], model: Mapping[str, Any] | None = None) -> DepthResult:
        """Collect the rows of a model."""
        return DepthResult(name, tuple(rows), model or {}, protocol=self.protocol)

    def columns(self, results: Sequence[DepthResult]) -> list[Column]:
        """One column per metric, with an arrow that shows which way it improves."""
        metrics = METRICS | BOUNDARY_METRICS if self.protocol.sharp else METRICS
        return [
            Column(metric, f"{label} {'↑' if better else '↓'}", higher_is_better=better)
            for metric, label in metrics.items()
            for better in [metric in HIGHER_IS_BETTER]
        ]

    def notes(self, results: Sequence[DepthResult]) -> list[str]:
        """How many images, by which protocol, what models predict, empty images and warnings."""
        lines = [f"{results[0].images} images. Protocol {self.protocol.text}."]
        if self.protocol.sharp:
            lines.append(
                "Boundary F1: as Depth Pro (arXiv 2410.02073), of maps after alignment; 0 without edges in the truth."
            )
        quantities = {result.name: result.model.get("quantity") for result in results}
        if len(set(quantities.values()) - {None}) > 1:
            given = ", ".join(f"{name} {quantity}" for name, quantity in quantities.items() if quantity)
            lines.append(f"Models predict different quantities: {given}; the protocol says which are fitted.")
        if results[0].empty:
            lines.append(
                f"Without a valid pixel, and left out of the means: {format_keys(results[0].empty)}."
            )
        return lines + [warning for result in results for warning in result.warnings]

    def choose_examples(self, results: Sequence[DepthResult], *, first: int = 4) -> dict[str, str]:
        """The first few images, then the best, median and worst of the best model: key → reason."""
        rows = best_result(results).rows
        ranked = sorted((row for row in rows if row["valid"]), key=lambda row: row["abs_rel"])
        choices = [(row["key"], "first") for row in rows[:first]]
        if ranked:
            places = {"best": 0, "median": len(ranked) // 2, "worst": len(ranked) - 1}
            choices += [(ranked[place]["key"], reason) for reason, place in places.items()]
        return join_reasons(choices)

    def make_example(self, frame: Frame, reason: str, sources: Mapping[str, MapSource]) -> DepthExample:
        """Predict a frame again with every model."""
        maps = {
            name: score_frames(source, [frame], protocol=self.protocol)[0][0]
            for name, source in sources.items()
        }
        view = crop_to_view(frame, self.protocol)
        return DepthExample(frame.key, reason, view.image, masked_truth(view, self.protocol), maps)

    def page(
        self, results: Sequence[DepthResult], examples: Sequence[DepthExample]
    ) -> tuple[str, dict[str, Any]]:
        """The template, its notes, curves and pictures."""
        return "depth_report.html.j2", {
            "columns": len(results) + 2,
            "leader": best_result(results).name,
            "notes": self.notes(results)[1:],
            **depth_page(results, examples),
        }

    def document(self, results: Sequence[DepthResult]) -> dict[str, Any]:
        """Protocol and models, for results.json."""
        return {
            "protocol": {**self.protocol.to_dict(), "text": self.protocol.text},
            "models": [
                {
                    "name": result.name,
                    "facts": result.model,
                    "images": result.images,
                    "empty": result.empty,
                    "broken": result.non_finite,
                    "inverted": result.inverted,
                    "constant": result.constant,
                    "warnings": result.warnings,
                    "means": result.means,
                    "rows": result.rows,
                }
                for result in results
            ],
        }


def best_result(results: Sequence[DepthResult]) -> DepthResult:
    """The result with the lowest mean AbsRel; one without a mean is last."""
    return min(results, key=lambda result: (math.isnan(result.means["abs_rel"]), result.means["abs_rel"]))
