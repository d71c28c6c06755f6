"""The runs of the study: which there are, what each trains, and what each needs first."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from s4m_d2.engine.checkpointing.checkpoint_files import FINAL_CHECKPOINT
from s4m_d2.errors import ConfigError

MAIN_PERCENT = 10  # labels; all methods, all seeds
OTHER_PERCENTS = (5, 20, 30)  # a few methods, the first seed
FULL_PERCENT = 100
REPORTED_SEEDS = (0, 1, 2)  # none that a schedule was chosen on
DUPLICATE_IOU = 0.7  # of two masks of one instance; the first that was tried


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        slug, title: its name in names of runs, and in the report.
        parts: of S4M that are on: "sd", "pr", "arp"; "unique" drops duplicate pseudo-labels.
        has_student: both stages are trained; otherwise stage 1 alone.
        is_teacher: a stage-1 teacher, which methods with a student share.
    """

    slug: str
    title: str
    parts: tuple[str, ...] = ()
    has_student: bool = True
    is_teacher: bool = False


PLAIN_TEACHER = Method("teacher", "stage-1 teacher", (), False, True)
SD_TEACHER = Method("teacher-sd", "stage-1 teacher + SD", ("sd",), False, True)
SUPERVISED = Method("supervised", "supervised only", (), False)
GUIDED = Method("gd", "Guided Distillation")
SD = Method("gd-sd", "+ SD", ("sd",))
PR = Method("gd-pr", "+ PR", ("pr",))
SD_PR = Method("gd-sd-pr", "+ SD + PR", ("sd", "pr"))
FULL = Method("gd-sd-pr-arp", "+ SD + PR + ARP (S⁴M)", ("sd", "pr", "arp"))
# ARP on the teacher's own masks. SD stays on: then it differs from the rows above and below it by
# one part each, ARP from + SD and PR from S4M.
SD_ARP = Method("gd-sd-arp", "+ SD + ARP (no PR)", ("sd", "arp"))
# Not of the paper: what is left once SAM has drawn an instance for each query on a part of it.
UNIQUE = Method("gd-sd-pr-arp-unique", "S⁴M, duplicates dropped", ("sd", "pr", "arp", "unique"))

TEACHERS = (PLAIN_TEACHER, SD_TEACHER)
COMPARED = (SUPERVISED, GUIDED, SD, PR, SD_PR, SD_ARP, FULL, UNIQUE)  # in the order of the table
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
        """The stage that it trains, as S4M.STAGE; the folder that it writes into."""
        return "student" if self.method.has_student else "teacher"

    @property
    def teacher(self) -> Run | None:
        """The run of stage 1 that it continues; runs with the same stage 1 share one."""
        if not self.method.has_student:
            return None
        method = SD_TEACHER if "sd" in self.method.parts else PLAIN_TEACHER
        return Run(method, self.percent, self.seed)

    def weights(self, runs: Path) -> Path:
        """Its last checkpoint, in the folder of all runs."""
        return runs / self.name / self.stage / FINAL_CHECKPOINT

    def overrides(self, runs: Path) -> dict[str, str]:
        """Config keys of this run and their values, as ``train_net.py`` takes them.

        A supervised run is stage 1 without distillation on the student's schedule: its labeled
        batches, initial weights and learning rates are those of the student of the same seed.

        Args:
            runs: the folder of all runs.
        """
        share = "" if self.percent == FULL_PERCENT else f"_{self.percent}pct"
        parts = self.method.parts
        values = {
            "DATASETS.TRAIN": f"('toyscapes_train{share}',)",
            "SEED": str(self.seed),
            "S4M.STAGE": self.stage,
            "S4M.DISTILL.ENABLED": str("sd" in parts),
            "S4M.REFINE.ENABLED": str("pr" in parts),
            "S4M.ARP.ENABLED": str("arp" in parts),
            "S4M.PSEUDO_LABEL.DUPLICATE_IOU": str(DUPLICATE_IOU if "unique" in parts else 1.0),
            "OUTPUT_DIR": str(runs / self.name),
        }
        if self.teacher is not None:
            values["S4M.TEACHER_WEIGHTS"] = str(self.teacher.weights(runs))
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
    pairs = [(run.teacher, run) for run in runs]
    return list(dict.fromkeys(run for pair in pairs for run in pair if run is not None))


def chosen_runs(seeds: Sequence[int], only: Sequence[str] = ()) -> list[Run]:
    """The runs that are asked for, in the order of the study.

    Args:
        only: names, or patterns such as ``10pct-seed0-*``; none: all runs.

    Raises:
        ConfigError: a name is none of a run of these seeds.
    """
    runs = all_runs(seeds)
    found = {pattern: fnmatch.filter([run.name for run in runs], pattern) for pattern in only}
    for pattern, names in found.items():
        if not names:
            raise ConfigError(
                f"--only {pattern}: no run of the seeds {', '.join(map(str, seeds))} is named so. "
                "--list names them."
            )
    wanted = {name for names in found.values() for name in names}
    return [run for run in runs if run.name in wanted or not only]


def left_to_train(runs: Sequence[Run], done: Collection[str], folder: Path) -> list[Run]:
    """The runs whose names are not among those done, and before them the teachers they need.

    A teacher that is done but whose weights are gone is trained again.

    Args:
        folder: of all runs.
    """
    missing = with_teachers([run for run in runs if run.name not in done])
    return [run for run in missing if run.name not in done or not run.weights(folder).is_file()]
