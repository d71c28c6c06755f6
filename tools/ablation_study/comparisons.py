"""What is compared with what, and what the paper says of it."""

from __future__ import annotations

from dataclasses import dataclass

from ablation_study.figures import GAIN, LOSS, Summary
from ablation_study.results import STUDENT, TEACHER
from ablation_study.runs import (
    FULL,
    GUIDED,
    PLAIN_TEACHER,
    PR,
    SD,
    SD_ARP,
    SD_PR,
    SD_TEACHER,
    SUPERVISED,
    UNIQUE,
    Method,
)


@dataclass(frozen=True)
class Comparison:
    """A difference of two methods, paired by seed.

    Attributes:
        title: what is added.
        more, less: the method with it and the method without.
        expected: of the paper: +1 where it finds a gain, -1 where a loss, 0 where it does not say.
        model: whose AP.
    """

    title: str
    more: Method
    less: Method
    expected: int = 1
    model: str = STUDENT

    def verdict(self, difference: Summary) -> str:
        """Whether the paper's finding shows here."""
        reading = difference.reading
        if reading not in (GAIN, LOSS) or not self.expected:
            return reading
        agrees = (reading == GAIN) == (self.expected > 0)
        return f"{reading}, {'as' if agrees else 'not as'} in the paper"


COMPARISONS = (
    Comparison("unlabeled images (Guided Distillation − supervised)", GUIDED, SUPERVISED),
    Comparison("SD, in the stage-1 teacher", SD_TEACHER, PLAIN_TEACHER, model=TEACHER),
    Comparison("SD", SD, GUIDED),
    Comparison("SD, with PR", SD_PR, PR),
    Comparison("PR", PR, GUIDED),
    Comparison("PR, with SD", SD_PR, SD),
    Comparison("PR, with SD and ARP", FULL, SD_ARP),
    Comparison("ARP, with SD and PR", FULL, SD_PR),
    Comparison("ARP, with SD, without PR", SD_ARP, SD, expected=-1),
    Comparison("all of S⁴M (− Guided Distillation)", FULL, GUIDED),
    Comparison("dropping duplicates, with all of S⁴M (not in the paper)", UNIQUE, FULL, expected=0),
)
# Margins of S4M over Guided Distillation in the paper (Cityscapes, R50), by the share of labels.
PUBLISHED_MARGINS = {5: 7.1, 10: 2.5, 20: 4.2, 30: 2.2}
