"""The stages of a run: which are trained, their configs, and whether they are finished."""

import os

from detectron2.config import CfgNode

from s4m_d2.engine.checkpointing.checkpoint import FINAL_CHECKPOINT, has_final, holds_run
from s4m_d2.errors import WeightsError
from s4m_d2.report import stored_results

STAGES = ("teacher", "student", "finetune")
METRICS, RESULTS = "metrics.json", "results.json"  # in a stage's folder; of the last evaluation
ITERATIONS = "iterations"  # of RESULTS: those that were done then
_LR_SHARE = 0.1  # of SOLVER.BASE_LR, in fine-tuning


def run_config(cfg: CfgNode) -> CfgNode:
    """Adapt the config to this machine: on a CPU AMP in bfloat16 only; a negative SEED (Detectron2:
    random) becomes 0, because exact resuming needs the same one."""
    cfg = cfg.clone()
    cfg.defrost()
    if not cfg.MODEL.DEVICE.startswith("cuda") and cfg.S4M.AMP_PRECISION == "float16":
        cfg.SOLVER.AMP.ENABLED = False
    cfg.SEED = max(cfg.SEED, 0)
    cfg.freeze()
    return cfg


def runs_stage(cfg: CfgNode, stage: str) -> bool:
    """True if a run with this config trains ``stage``, one of STAGES."""
    if stage == "teacher":
        return cfg.S4M.STAGE != "student" and not cfg.S4M.TEACHER_WEIGHTS
    return cfg.S4M.STAGE != "teacher" and (stage == "student" or cfg.S4M.FINETUNE.MAX_ITER > 0)


def stages_to_run(cfg: CfgNode, *, resume: bool) -> list[str]:
    """List the stages that a run trains; with ``resume``, only unfinished ones.

    Once a later stage has begun, a stage is fixed: its new length has no effect.
    """
    stages = [stage for stage in STAGES if runs_stage(cfg, stage)]
    if not resume:
        return stages
    lengths = {stage: 0 if is_fixed(cfg, stage) else None for stage in stages}
    return [s for s in stages if not stage_is_finished(stage_config(cfg, s), lengths[s])]


def is_fixed(cfg: CfgNode, stage: str) -> bool:
    """True if OUTPUT_DIR has a checkpoint of a later stage, which began with this one's model."""
    later = STAGES[STAGES.index(stage) + 1 :]
    return any(holds_run(stage_config(cfg, name).OUTPUT_DIR) for name in later)


def stage_is_finished(cfg: CfgNode, iterations: int | None = None) -> bool:
    """True if a stage is trained and evaluated: at its end RESULTS is written, after the model.

    Of the stage are ``cfg`` and ``iterations``, its length (default: SOLVER.MAX_ITER).
    """
    iterations = cfg.SOLVER.MAX_ITER if iterations is None else iterations
    done = stored_results(os.path.join(cfg.OUTPUT_DIR, RESULTS)).get(ITERATIONS, 0)
    return has_final(cfg.OUTPUT_DIR) and done >= iterations


def needs_sam(cfg: CfgNode, stage: str) -> bool:
    """True if this run trains the stage, and SAM is used in it."""
    part = {"teacher": cfg.S4M.DISTILL, "student": cfg.S4M.REFINE}.get(stage)
    return part is not None and part.ENABLED and runs_stage(cfg, stage)


def final_weights(cfg: CfgNode, stage: str) -> str:
    """Path of a stage's final checkpoint."""
    return os.path.join(stage_config(cfg, stage).OUTPUT_DIR, FINAL_CHECKPOINT)


def last_weights(run: str) -> str:
    """The final checkpoint of the last stage of a run in a folder; what is no folder, as it is.

    WeightsError: there is none.
    """
    if not os.path.isdir(run):
        return run
    folders = [os.path.join(run, stage) for stage in reversed(STAGES)]
    begun = next(filter(holds_run, folders), folders[-1])
    path = os.path.join(begun, FINAL_CHECKPOINT)
    if not os.path.isfile(path):
        raise WeightsError(
            f"'{run}' holds no finished run: '{path}' does not exist. Give the OUTPUT_DIR of a "
            "run, finish it with --resume, or give a file of weights."
        )
    return path


def run_folder(weights: str) -> str:
    """OUTPUT_DIR of the run that wrote a checkpoint, OUTPUT_DIR/stage/file."""
    return os.path.dirname(os.path.dirname(os.path.abspath(weights)))


def stage_config(cfg: CfgNode, stage: str) -> CfgNode:
    """Make a stage's config: folder, batch, schedule, sampler; distillation in stage 1 alone."""
    student = final_weights(cfg, "student") if stage == "finetune" else ""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, stage)
    if stage == "teacher":
        teacher = cfg.S4M.TEACHER
        cfg.SOLVER.IMS_PER_BATCH = teacher.IMS_PER_BATCH or cfg.SOLVER.IMS_PER_BATCH
        cfg.SOLVER.MAX_ITER = teacher.MAX_ITER or cfg.SOLVER.MAX_ITER
        cfg.SOLVER.STEPS = teacher.STEPS or cfg.SOLVER.STEPS
        cfg.DATALOADER.SAMPLER_TRAIN = teacher.SAMPLER
    else:
        cfg.S4M.DISTILL.ENABLED = False
    if stage == "finetune":
        cfg.MODEL.WEIGHTS, cfg.SOLVER.STEPS = student, ()
        cfg.SOLVER.MAX_ITER = cfg.S4M.FINETUNE.MAX_ITER
        cfg.SOLVER.BASE_LR = cfg.S4M.FINETUNE.BASE_LR or _LR_SHARE * cfg.SOLVER.BASE_LR
    cfg.freeze()
    return cfg
