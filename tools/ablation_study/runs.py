"""The runs of the study: which there are, what each trains, and what each needs first."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from s4m_d2.engine.checkpointing.checkpoint import FINAL_CHECKPOINT
from s4m_d2.errors import ConfigError

MAIN_PERCENT = 10  # labels
FULL_PERCENT = 100
REPORTED_SEEDS = (0, 1, 2)  # none that a schedule was chosen on
# Models of a run. "student" is also what a supervised run trains: the model on the same schedule.
TEACHER, STUDENT, EMA = "stage-1 teacher", "student", "EMA teacher"
DUPLICATE_IOU = 0.7  # of two masks of one instance; the first that was tried


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    slug: str  # in names of runs
    title: str
    parts: tuple[str, ...] = ()  # of "sd", "pr", "arp"; "unique" drops duplicate pseudo-labels
    has_student: bool = True  # both stages are trained; otherwise stage 1 alone
    is_teacher: bool = False  # of stage 1, which methods with a student share
    # Config keys of this method alone. With SD, whose stage 1 uses SAM, it trains its own teacher.
    own: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def model(self) -> str:
        """The one that it is judged by."""
        return TEACHER if self.is_teacher else STUDENT


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

# Not of the paper: what this project adds for images that SAM may not know.
# The best one is without SD, which gained nothing on toyscapes, and shares the others' teacher.
# TRIES was chosen by the quality of pseudo-labels on `dev` (docs/evidence.md).
_GATE = {"S4M.REFINE.GATE": "auto"}
GATED = Method("s4m-gate", "S⁴M, gate", FULL.parts, own=_GATE)
ADAPTED = Method(
    "s4m-best",
    "PR (adapted SAM, 3 tries) + ARP, duplicates dropped",
    ("pr", "arp", "unique"),
    own={"S4M.SAM.ADAPT": "400", "S4M.REFINE.TRIES": "3", **_GATE},
)
WARM = Method(
    "s4m-warm",
    "the same, the student starts as the teacher",
    ADAPTED.parts,
    own={**ADAPTED.own, "S4M.STUDENT_FROM_TEACHER": "True"},
)
PACKAGED = Method("s4m-packaged", "S⁴M, SAM that saw this domain", FULL.parts,
                  own={"S4M.SAM.CHECKPOINT": ""})  # fmt: skip

TEACHERS = (PLAIN_TEACHER, SD_TEACHER)


@dataclass(frozen=True)
class Plan:
    """The runs of a study."""

    title: str  # of the images that are evaluated
    all_seeds: tuple[Method, ...]  # what each seed trains, what is learnt most from first
    first_seed: tuple[Method, ...]  # what the first seed trains too, and others if asked by name
    few: tuple[Method, ...]  # at other shares of labels, for the same seeds
    other_percents: tuple[int, ...]
    ceiling_seeds: int | None = None  # how many train on all labels; None: all
    # Margins of S4M over Guided Distillation in the paper (Cityscapes, R50), by share of labels.
    published: Mapping[int, float] = field(default_factory=dict, hash=False)

    @property
    def compared(self) -> tuple[Method, ...]:
        """In the order of the tables."""
        return tuple(m for m in _ROWS if m in self.all_seeds + self.first_seed)

    @property
    def percents(self) -> list[int]:
        return sorted((MAIN_PERCENT, *self.other_percents))


_ROWS = (SUPERVISED, GUIDED, SD, PR, SD_PR, SD_ARP, FULL, UNIQUE, GATED, ADAPTED, WARM, PACKAGED)
_FEW = (SUPERVISED, GUIDED, ADAPTED, WARM)
_REAL = (*_FEW, FULL, PR), (SD, SD_PR, GATED), _FEW
PLANS = {
    "toyscapes": Plan(
        "toyscapes' validation images",
        (SUPERVISED, GUIDED, FULL, SD_PR, PR, SD, SD_ARP, UNIQUE),
        (),
        (SUPERVISED, GUIDED, FULL),
        (5, 20, 30),
        published={5: 7.1, 10: 2.5, 20: 4.2, 30: 2.2},
    ),
    "nuclei": Plan("the 120 validation images of nuclei", *_REAL, (1, 5), 1),
    "facades": Plan(
        "the 85 validation images of facades",
        _REAL[0],
        (*_REAL[1], PACKAGED),
        _REAL[2],
        (20,),
        1,
    ),
}


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
        """The last stage that it trains; the folder that its results are in."""
        return "student" if self.method.has_student else "teacher"

    @property
    def teacher(self) -> Run | None:
        """The run of stage 1 that it continues; runs with the same stage 1 share one."""
        distills = "sd" in self.method.parts
        if not self.method.has_student or (self.method.own and distills):
            return None
        method = SD_TEACHER if distills else PLAIN_TEACHER
        return Run(method, self.percent, self.seed)

    def weights(self, runs: Path) -> Path:
        """Its last checkpoint, in the folder of all runs."""
        return runs / self.name / self.stage / FINAL_CHECKPOINT

    def overrides(self, runs: Path) -> dict[str, str]:
        """Config keys of this run and their values; ``runs``: the folder of all runs.

        A supervised run is stage 1 without distillation on the student's schedule: its labeled
        batches, initial weights and learning rates are those of the student of the same seed.
        """
        parts, both = self.method.parts, self.method.has_student and self.teacher is None
        values = {
            "SEED": str(self.seed),
            "S4M.STAGE": "both" if both else self.stage,
            "S4M.DISTILL.ENABLED": str("sd" in parts),
            "S4M.REFINE.ENABLED": str("pr" in parts),
            "S4M.ARP.ENABLED": str("arp" in parts),
            "S4M.PSEUDO_LABEL.DUPLICATE_IOU": str(DUPLICATE_IOU if "unique" in parts else 1.0),
            "OUTPUT_DIR": str(runs / self.name),
            **self.method.own,
        }
        if self.teacher is not None:
            values["S4M.TEACHER_WEIGHTS"] = str(self.teacher.weights(runs))
        elif not self.method.has_student and not self.method.is_teacher:  # 0, (): the student's
            values |= {f"S4M.TEACHER.{key}": "0" for key in ("IMS_PER_BATCH", "MAX_ITER")}
            values["S4M.TEACHER.STEPS"] = "()"
        return values


def all_runs(
    plan: Plan, seeds: Sequence[int] = REPORTED_SEEDS, *, every_seed: bool = False
) -> list[Run]:
    """Every run of the study, the most informative first, each after its teacher.

    ``every_seed``: also what is trained with the first seed alone unless it is asked for.
    """
    wanted, first = [], seeds if every_seed else seeds[:1]
    for seed in seeds:
        methods = plan.all_seeds + (plan.first_seed if seed in first else ())
        wanted += [Run(method, MAIN_PERCENT, seed) for method in methods]
        if every_seed or seed in seeds[: plan.ceiling_seeds]:
            wanted.append(Run(SUPERVISED, FULL_PERCENT, seed))
    for seed in first:
        wanted += [Run(m, percent, seed) for percent in plan.other_percents for m in plan.few]
    return with_teachers(wanted)


def with_teachers(runs: Sequence[Run]) -> list[Run]:
    """The runs without repetitions, the teacher of each before the first that needs it."""
    pairs = [(run.teacher, run) for run in runs]
    return list(dict.fromkeys(run for pair in pairs for run in pair if run is not None))


def chosen_runs(plan: Plan, seeds: Sequence[int], only: Sequence[str] = ()) -> list[Run]:
    """The runs that names or patterns as ``10pct-seed0-*`` ask for, in the order of the study."""
    if not only:
        return all_runs(plan, seeds)
    runs, wanted = all_runs(plan, seeds, every_seed=True), set()
    for pattern in only:
        found = fnmatch.filter([run.name for run in runs], pattern)
        if not found:
            raise ConfigError(
                f"--only {pattern}: no run of the seeds {', '.join(map(str, seeds))} is named so. "
                "--list names them."
            )
        wanted |= {*found}
    return [run for run in runs if run.name in wanted]


def left_to_train(runs: Sequence[Run], done: Collection[str], folder: Path) -> list[Run]:
    """The runs of ``folder`` that are not done, after the teachers they need.

    A teacher that is done but whose weights are gone is trained again.
    """
    missing = with_teachers([run for run in runs if run.name not in done])
    return [run for run in missing if run.name not in done or not run.weights(folder).is_file()]
