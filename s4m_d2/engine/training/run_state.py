"""What a run depends on beside its weights, and whether a continued run is still the same run."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm

from s4m_d2.engine.checks.findings import raise_all
from s4m_d2.engine.rng import default_generator_states, restore_default_generators
from s4m_d2.errors import ConfigError

logger = logging.getLogger(__name__)

MAX_ITER, BURN_IN = "SOLVER.MAX_ITER", "S4M.BURN_IN"
_SCHEDULE = "LRScheduler"  # Detectron2's hook
# setting -> what a continued run does otherwise if it has changed
_CONSEQUENCES = {
    "SEED": "other images come next, and all draws differ",
    "DATASETS.TRAIN": "other labeled images come next",
    "DATASETS.UNLABELED": "other unlabeled images come next",
    "S4M.SPLIT_SEED": "other images are labeled",
    "SOLVER.IMS_PER_BATCH": "labeled images are skipped or come again",
    "S4M.UNLABELED_IMS_PER_BATCH": "unlabeled images are skipped or come again",
    MAX_ITER: "from here on, the learning rate is that of a run of the new length",
    BURN_IN: "the teacher is frozen, copied and averaged in other iterations",
    "S4M.EMA_DECAY": "the teacher follows the student at another pace",
    "processes": "the same images come next, but the processes share them and draw otherwise",
}


def run_settings(cfg: CfgNode, processes: int, *, has_teacher: bool) -> dict[str, Any]:
    """What a stage's course depends on, by config key.

    Args:
        cfg: config of the stage.
        processes: that share a batch.
        has_teacher: stage 2.
    """
    settings = {
        "SEED": cfg.SEED,
        "DATASETS.TRAIN": tuple(cfg.DATASETS.TRAIN),
        "S4M.SPLIT_SEED": cfg.S4M.SPLIT_SEED,
        "SOLVER.IMS_PER_BATCH": cfg.SOLVER.IMS_PER_BATCH,
        MAX_ITER: cfg.SOLVER.MAX_ITER,
        "processes": processes,
    }
    if has_teacher:
        settings |= {
            "DATASETS.UNLABELED": tuple(cfg.DATASETS.UNLABELED),
            "S4M.UNLABELED_IMS_PER_BATCH": (
                cfg.S4M.UNLABELED_IMS_PER_BATCH or cfg.SOLVER.IMS_PER_BATCH
            ),
            BURN_IN: cfg.S4M.BURN_IN,
            "S4M.EMA_DECAY": cfg.S4M.EMA_DECAY,
        }
    return settings


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What a continued run does otherwise, by settings (:func:`run_settings`) then and now."""
    for name, value in now.items():
        if before.get(name, value) != value:
            yield (
                f"{name} was {before[name]} when the checkpoint was written and is {value} now: "
                f"{_CONSEQUENCES[name]}."
            )


def continuation_errors(
    finished: int, before: Mapping[str, Any], now: Mapping[str, Any]
) -> Iterator[ConfigError]:
    """Settings with which a run cannot continue after so many iterations; as for ``changes``."""
    if now[MAX_ITER] < finished:
        yield ConfigError(
            f"SOLVER.MAX_ITER (stage 1: S4M.TEACHER.MAX_ITER) is {now[MAX_ITER]}, but the run that "
            f"--resume continues has done {finished} iterations. Give {finished} or more, or start "
            "a new run in another OUTPUT_DIR."
        )
    old, new = before.get(BURN_IN), now.get(BURN_IN)
    if old is not None and new is not None and old != new and finished > min(old, new):
        yield ConfigError(
            f"S4M.BURN_IN is {new} and was {old} before, but the run that --resume continues has "
            f"done {finished} iterations, more than the shorter of the two: its teacher cannot "
            f"begin to follow the student at another time. Leave S4M.BURN_IN at {old}, or start a "
            "new run in another OUTPUT_DIR."
        )


class RunStateHook(HookBase):
    """Puts the run's settings and random states into checkpoints, and compares them on resume.

    Positions in the streams of images and in the burn-in follow from the iteration and the
    settings. A run that continues with other settings is not the same run: each difference is
    logged as a warning. Files without this state (of older versions or of other programs) are
    continued all the same, with a warning.

    The states of the default generators are the main process', restored before training. All
    processes seed them in each iteration (:class:`~s4m_d2.engine.training.hooks.SeedHook`), so that
    they matter only to what draws before the first step.

    Args:
        settings: of :func:`run_settings`.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = dict(settings)
        self._restored: Mapping[str, Any] | None = None

    def check(self, finished: int) -> None:
        """Refuse settings with which a run cannot continue after so many iterations.

        Raises:
            ConfigError: see :func:`continuation_errors`.
        """
        before = self._restored["settings"] if self._restored else {}
        raise_all(continuation_errors(finished, before, self.settings))

    def before_train(self) -> None:
        if self._restored is not None and comm.is_main_process():
            restore_default_generators(self._restored["random"])
        elif self._restored is None and self.trainer.start_iter > 0:
            logger.warning(
                "The checkpoint does not say with which seed, batch size and burn-in it was made: "
                "the run continues from iteration %d with the order of images and the draws of "
                "this config.",
                self.trainer.start_iter,
            )

    def state_dict(self) -> dict[str, Any]:
        return {"settings": dict(self.settings), "random": default_generator_states()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._restored = state_dict
        for change in changes(state_dict["settings"], self.settings):
            logger.warning("%s", change)


def with_own_schedule(state: Mapping[str, Any], scheduler: Any) -> Mapping[str, Any]:
    """A trainer's state with a schedule that follows the config; the checkpoint's is its position.

    Args:
        state: of Detectron2's ``DefaultTrainer``.
        scheduler: its own, some of which save their length and shape too.
    """
    hooks = state.get("hooks", {})
    if _SCHEDULE not in hooks:
        return state
    own = scheduler.state_dict()
    shape = {k: own[k] for k in own if k not in ("base_lrs", "last_epoch") and k[0] != "_"}
    return {**state, "hooks": {**hooks, _SCHEDULE: {**hooks[_SCHEDULE], **shape}}}
