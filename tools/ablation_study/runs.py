"""The runs of the study: which there are, what each trains, and what each needs first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from s4m_d2.engine.checkpointing.checkpoint_files import FINAL_CHECKPOINT

MAIN_PERCENT = 10  # labels; all methods, all seeds
OTHER_PERCENTS = (5, 20, 30)  # a few methods, the first seed
FULL_PERCENT = 100
REPORTED_SEEDS = (0, 1, 2)  # none that a schedule was chosen on

TEACHER_STAGE = "teacher"  # as S4M.STAGE, and the folder that the stage writes into
STUDENT_STAGE = "student"
DUPLICATE_IOU = 0.7  # of two masks of one instance; the first that was tried


@dataclass(frozen=True)
class Method:
    """A row of the table: which parts of S4M are on.

    Attributes:
        slug: its name in names of runs.
        title: its name in the report.
        has_student: both stages are trained; otherwise stage 1 alone.
        is_teacher: a stage-1 teacher, which methods with a student share.
        distills, refines, pastes: structural distillation (SD), refinement (PR) and augmentation
            with refined pseudo-labels (ARP).
        drops: of several refined pseudo-labels on one instance all but the most certain.
    """

    slug: str
    title: str
    has_student: bool = False
    is_teacher: bool = False
    distills: bool = False
    refines: bool = False
    pastes: bool = False
    drops: bool = False


def _student(slug: str, title: str, *parts: str) -> Method:
    return Method(slug, title, has_student=True, distills="sd" in parts, refines="pr" in parts,
                  pastes="arp" in parts, drops="unique" in parts)  # fmt: skip


PLAIN_TEACHER = Method("teacher", "stage-1 teacher", is_teacher=True)
SD_TEACHER = Method("teacher-sd", "stage-1 teacher + SD", is_teacher=True, distills=True)
SUPERVISED = Method("supervised", "supervised only")
GUIDED = _student("gd", "Guided Distillation")
SD = _student("gd-sd", "+ SD", "sd")
PR = _student("gd-pr", "+ PR", "pr")
SD_PR = _student("gd-sd-pr", "+ SD + PR", "sd", "pr")
FULL = _student("gd-sd-pr-arp", "+ SD + PR + ARP (S⁴M)", "sd", "pr", "arp")
# ARP on the teacher's own masks. SD stays on: then it differs from the rows above and below it by
# one part each, ARP from + SD and PR from S4M.
SD_ARP = _student("gd-sd-arp", "+ SD + ARP (no PR)", "sd", "arp")
# Not of the paper: what is left once SAM has drawn an instance for each query on a part of it.
UNIQUE = _student("gd-sd-pr-arp-unique", "S⁴M, duplicates dropped", "sd", "pr", "arp", "unique")

TEACHERS = (PLAIN_TEACHER, SD_TEACHER)
COMPARED = (SUPERVISED, GUIDED, SD, PR, SD_PR, SD_ARP, FULL, UNIQUE)  # in the order of the table
METHODS = {method.slug: method for method in (*TEACHERS, *COMPARED)}
FEW = (SUPERVISED, GUIDED, FULL)  # at the other shares of labels
# What is learnt from each first run of a seed, the largest question first.
_ORDER = (SUPERVISED, GUIDED, FULL, SD_PR, PR, SD, SD_ARP, UNIQUE)


@dataclass(frozen=True)
class Run:
    """A training of one method with one share of labels and one seed."""

    method: Method
    percent: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.percent}pct-seed{self.seed}-{self.method.slug}"

    @property
    def stage(self) -> str:
        """The stage that it trains."""
        return STUDENT_STAGE if self.method.has_student else TEACHER_STAGE

    @property
    def teacher(self) -> Run | None:
        """The run of stage 1 that it continues; runs with the same stage 1 share one."""
        if not self.method.has_student:
            return None
        method = SD_TEACHER if self.method.distills else PLAIN_TEACHER
        return Run(method, self.percent, self.seed)

    def overrides(self, runs: Path) -> dict[str, str]:
        """Config keys of this run and their values, as ``train_net.py`` takes them.

        A supervised run is stage 1 without distillation on the student's schedule: its labeled
        batches, initial weights and learning rates are those of the student of the same seed.

        Args:
            runs: the folder of all runs.
        """
        labeled = "toyscapes_train"
        if self.percent != FULL_PERCENT:
            labeled += f"_{self.percent}pct"
        values = {
            "DATASETS.TRAIN": f"('{labeled}',)",
            "SEED": str(self.seed),
            "S4M.STAGE": self.stage,
            "S4M.DISTILL.ENABLED": str(self.method.distills),
            "S4M.REFINE.ENABLED": str(self.method.refines),
            "S4M.ARP.ENABLED": str(self.method.pastes),
            "S4M.PSEUDO_LABEL.DUPLICATE_IOU": str(DUPLICATE_IOU if self.method.drops else 1.0),
            "OUTPUT_DIR": str(runs / self.name),
        }
        if self.teacher is not None:
            weights = runs / self.teacher.name / TEACHER_STAGE / FINAL_CHECKPOINT
            values["S4M.TEACHER_WEIGHTS"] = str(weights)
        elif not self.method.is_teacher:  # 0 and (): as in SOLVER, where the student's are
            values |= {f"S4M.TEACHER.{key}": "0" for key in ("IMS_PER_BATCH", "MAX_ITER")}
            values["S4M.TEACHER.STEPS"] = "()"
        return values


def all_runs(seeds: Sequence[int] = REPORTED_SEEDS) -> list[Run]:
    """Every run of the study, the most informative first, each after its teacher.

    All methods and the ceiling seed by seed, then the other shares of labels with the first seed.
    """
    wanted = []
    for seed in seeds:
        wanted += [Run(method, MAIN_PERCENT, seed) for method in _ORDER]
        wanted.append(Run(SUPERVISED, FULL_PERCENT, seed))
    wanted += [Run(method, percent, seeds[0]) for percent in OTHER_PERCENTS for method in FEW]
    return with_teachers(wanted)


def with_teachers(runs: Sequence[Run]) -> list[Run]:
    """The runs without repetitions, the teacher of each before the first that needs it."""
    found: dict[Run, None] = {}
    for run in runs:
        if run.teacher is not None:
            found.setdefault(run.teacher)
        found.setdefault(run)
    return list(found)
