"""Learning-rate schedules as pure functions of the step, so that resuming needs no state of theirs."""

from __future__ import annotations

import math

from pizoo.recipes import Constant, Cosine, Multistep


def schedule_factor(schedule: Constant | Multistep | Cosine, step: int, steps_per_epoch: int, steps: int) -> float:
    """What the learning rate is multiplied by at 0-based ``step`` of ``steps``."""
    match schedule:
        case Multistep():
            passed = sum(step >= milestone * steps_per_epoch for milestone in schedule.milestones)
            return schedule.gamma**passed
        case Cosine():
            return (1 + math.cos(math.pi * step / steps)) / 2
    return 1.0
