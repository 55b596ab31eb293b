"""Several teachers as one: `teacher=[A,B]` with a rule that combines what they predict for an image."""

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from depth_anything.errors import UserError
from depth_anything.licenses import combine_licenses
from depth_anything.teachers.combine import (
    AGREEMENT_TOLERANCE,
    RULES,
    agreement_map,
    align_maps,
    choose_teacher,
    mean_map,
    median_map,
)
from depth_anything.teachers.teacher import LabelMaps, Photographs, Teacher, TeacherFacts


class EnsembleTeacher(Teacher):
    """Teachers of any kind whose maps a rule combines.

    first       the map of the first teacher that has one for the image
    random      the map of a teacher that a hash of the record's key chooses; of the next one if it has none
    mean        the mean of the maps, each fitted to the first by scale and shift
    confidence  the median of the fitted maps, with the agreement of the teachers as "confidence"
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        *,
        rule: str = "first",
        shares: Sequence[float] | None = None,
        confidence: bool = False,
        tolerance: float = AGREEMENT_TOLERANCE,
    ) -> None:
        """Combine teachers.

        Args:
            teachers: At least two; the first is the one that others are fitted to.
            rule: One of RULES.
            shares: With rule="random", how often each is chosen; None for equally often.
            confidence: Store where the teachers agree, whatever the rule; all of them then label each image.
            tolerance: As in `agreement_map`.

        Raises:
            UserError: If the rule is unknown, or the shares do not belong to the teachers.
        """
        super().__init__()
        if rule not in RULES:
            raise UserError(f"teacher_rule={rule} is unknown", f"type one of {', '.join(RULES)}")
        if shares is not None and (len(shares) != len(teachers) or min(shares) < 0 or not sum(shares)):
            raise UserError(
                f"teacher_shares={list(shares)} must be {len(teachers)} numbers from 0 up, one for each teacher",
                f"type 'teacher_shares=[{','.join(['1'] * len(teachers))}]'",
            )
        self.teachers = nn.ModuleList(teachers)
        self.rule, self.tolerance = rule, tolerance
        self.shares = [1.0] * len(teachers) if shares is None else list(shares)
        self.confidence = confidence or rule == "confidence"
        self.multiple = math.lcm(*(teacher.multiple for teacher in teachers))
        self.resized = all(teacher.resized for teacher in teachers)
        self.facts = self._combine_facts()

    @property
    def members(self) -> list[Teacher]:
        """The teachers."""
        return list(self.teachers)  # type: ignore[arg-type]

    def describe(self) -> dict[str, Any]:
        """Return the record of the label set: the joint facts, the rule, and the record of each teacher."""
        record = {**self.facts.as_record(), **self._settings()}
        return {**record, "teachers": [teacher.describe() for teacher in self.members]}

    def preprocessing(self, *, image_size: int, precision: str) -> str:
        """Return the texts of the teachers, without repetitions."""
        texts = [
            teacher.preprocessing(image_size=image_size, precision=precision) for teacher in self.members
        ]
        return " | ".join(dict.fromkeys(texts))

    def predict(self, photographs: Photographs) -> LabelMaps:
        """Predict with the teachers that the rule needs, and combine their maps."""
        if not self.confidence and self.rule in ("first", "random"):
            return self._predict_in_turn(photographs)
        results = [teacher.predict(photographs) for teacher in self.members]
        maps = _stack_maps(results)
        aligned = align_maps(maps)
        if self.rule in ("first", "random"):
            combined = _first_complete(maps, self._order(photographs))
        else:
            combined = mean_map(aligned) if self.rule == "mean" else median_map(aligned)
        failed = {
            position: reason
            for position, reason in results[0].failed.items()
            if all(position in result.failed for result in results)
        }
        extra = {}
        if self.confidence:
            extra["confidence"] = agreement_map(aligned, tolerance=self.tolerance)
        return LabelMaps(combined, failed, extra)

    def _order(self, photographs: Photographs) -> list[list[int]]:
        """Return for each image the teachers in the order in which they are asked."""
        everyone = list(range(len(self.members)))
        if self.rule != "random":
            return [everyone for _ in photographs.keys]
        chosen = [choose_teacher(key, self.shares) for key in photographs.keys]
        return [[first, *(k for k in everyone if k != first)] for first in chosen]

    def _predict_in_turn(self, photographs: Photographs) -> LabelMaps:
        """Ask for each image one teacher, and another one only if that has no complete map."""
        order = self._order(photographs)
        count, size = len(photographs.keys), photographs.size
        combined = torch.full((count, *size), torch.nan)
        failed: dict[int, str] = {}
        waiting = list(range(count))
        for turn in range(len(self.members)):
            still: list[int] = []
            for k, teacher in enumerate(self.members):
                positions = [i for i in waiting if order[i][turn] == k]
                if not positions:
                    continue
                result = teacher.predict(_select(photographs, positions))
                maps = result.disparity.float().cpu()
                complete = maps.isfinite().flatten(1).all(1).tolist()
                for row, position in enumerate(positions):
                    if row in result.failed:
                        failed.setdefault(position, result.failed[row])
                        still.append(position)
                    else:
                        combined[position] = maps[row]
                        if complete[row]:
                            failed.pop(position, None)
                        else:
                            still.append(position)
            waiting = sorted(still)
        return LabelMaps(combined, {i: reason for i, reason in failed.items() if i in waiting})

    def _settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = {"rule": self.rule}
        if self.rule == "random":
            settings["shares"] = self.shares
        if self.confidence:
            settings["confidence"] = {"tolerance": self.tolerance}
        return settings

    def _combine_facts(self) -> TeacherFacts:
        facts = [teacher.facts for teacher in self.members]
        identity = [[each.fingerprint, each.quantity, each.unit, each.conversion] for each in facts]
        content = json.dumps([self._settings(), identity], sort_keys=True)
        kinds = {(each.quantity, each.unit) for each in facts}
        quantity, unit = kinds.pop() if len(kinds) == 1 else ("disparity", "relative")
        conversions = [
            f"teacher {number}: {each.conversion}" for number, each in enumerate(facts, 1) if each.conversion
        ]
        return TeacherFacts(
            fingerprint=f"sha256:{hashlib.sha256(content.encode()).hexdigest()}",
            file=f"[{','.join(each.file for each in facts)}]",
            licence=combine_licenses(each.licence for each in facts),
            quantity=quantity,
            unit=unit,
            conversion="; ".join(conversions) or None,
        )


def _select(photographs: Photographs, positions: Sequence[int]) -> Photographs:
    """Return the photographs at these positions of the batch."""
    if len(positions) == len(photographs.keys):
        return photographs
    return Photographs(
        photographs.image[list(positions)],
        photographs.size,
        [photographs.keys[i] for i in positions],
        [photographs.metas[i] for i in positions],
    )


def _stack_maps(results: Sequence[LabelMaps]) -> Tensor:
    """Stack the maps of teachers, (K,B,H,W) float32; NaN for an image for which a teacher has no map."""
    device = results[0].disparity.device
    if device.type == "mps":  # it has no float64, which the fit needs
        device = torch.device("cpu")
    maps = torch.stack([result.disparity.to(device).float() for result in results])
    for k, result in enumerate(results):
        for position in result.failed:
            maps[k, position] = torch.nan
    return maps


def _first_complete(maps: Tensor, order: Sequence[Sequence[int]]) -> Tensor:
    """Return for each image the map of the first teacher in its order without NaN and infinity, (B,H,W)."""
    complete = maps.isfinite().flatten(2).all(2).tolist()
    chosen = [
        next((k for k in teachers if complete[k][image]), teachers[0]) for image, teachers in enumerate(order)
    ]
    return maps[chosen, torch.arange(len(chosen), device=maps.device)]
