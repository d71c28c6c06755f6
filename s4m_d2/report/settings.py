"""What matters most of a run's config, whatever is missing or malformed in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from s4m_d2.report.curves import finite

LARGEST_COUNT = 10**15  # beyond it, a number of iterations or images is a mistake
# Shown where they are known and not empty; the page holds the whole config too.
SHOWN = """
    MODEL.META_ARCHITECTURE MODEL.BACKBONE.NAME MODEL.RESNETS.DEPTH MODEL.TIMM.NAME
    S4M.DATA.LABELED S4M.DATA.UNLABELED S4M.DATA.VAL
    DATASETS.TRAIN DATASETS.UNLABELED DATASETS.TEST
    S4M.STAGE S4M.TEACHER_WEIGHTS S4M.TEACHER.MAX_ITER S4M.TEACHER.IMS_PER_BATCH
    SOLVER.MAX_ITER SOLVER.IMS_PER_BATCH S4M.UNLABELED_IMS_PER_BATCH S4M.BURN_IN S4M.EMA_DECAY
    SOLVER.OPTIMIZER SOLVER.BASE_LR SOLVER.LR_SCHEDULER_NAME
    S4M.DISTILL.ENABLED S4M.DISTILL.WEIGHT S4M.REFINE.ENABLED S4M.REFINE.METHOD
    S4M.ARP.ENABLED S4M.ARP.RANDOM_PLACEMENT S4M.PSEUDO_LABEL.SCORE_THRESH S4M.UNSUP_LOSS_WEIGHT
    S4M.SAM.BACKEND S4M.SAM.CHECKPOINT
    MODEL.DEVICE SOLVER.AMP.ENABLED S4M.AMP_PRECISION SEED
""".split()


class Settings:
    """A config as plain dicts; what is not there is not known.

    >>> settings = Settings({"SOLVER": {"MAX_ITER": 5, "STEPS": []}, "SEED": -1})
    >>> settings.get("SOLVER.MAX_ITER"), settings.count("SEED"), settings.get("SOLVER.AMP.ENABLED")
    (5, 0, None)
    """

    def __init__(self, values: Any = None) -> None:
        self.values: Mapping[str, Any] = values if isinstance(values, Mapping) else {}

    def get(self, key: str, default: Any = None) -> Any:
        value: Any = self.values
        for part in key.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return default
            value = value[part]
        return value

    def count(self, key: str) -> int:
        """A key's number, 0 for one that is not known, no number, negative or absurdly large."""
        number = finite(self.get(key)) or 0
        return int(number) if 0 < number <= LARGEST_COUNT else 0

    def shown(self) -> list[tuple[str, str]]:
        """(key, text) of those that matter most."""
        values = {key: self.get(key) for key in SHOWN}
        texts = {k: ", ".join(map(str, v)) if isinstance(v, list) else v for k, v in values.items()}
        return [(key, str(text)) for key, text in texts.items() if text not in (None, "")]
