"""Validate the keys of stage=pseudolabel that several teachers share."""

from depth_anything.errors import UserError
from depth_anything.training.config import RunConfig
from depth_anything.training.value_rules import format_value


def check_teachers(config: RunConfig) -> None:
    """Refuse keys of several teachers that the teachers of the run do not use.

    Raises:
        UserError: Naming the key, and what to type.
    """
    several, shares = len(config.teachers) > 1, config.teacher_shares
    if not several and (config.label_confidence or config.teacher_rule == "confidence"):
        key = "label_confidence=true" if config.label_confidence else "teacher_rule=confidence"
        raise UserError(f"{key} needs several teachers to compare", "type 'teacher=[A,B]'")
    if shares is not None and (config.teacher_rule != "random" or len(shares) != len(config.teachers)):
        raise UserError(
            f"teacher_shares={format_value(shares)} is for teacher_rule=random and one number for each of the "
            f"{len(config.teachers)} teachers",
            "type teacher_shares=null",
        )
