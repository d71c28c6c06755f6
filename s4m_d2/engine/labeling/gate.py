"""The gate: refinement, ARP and structural distillation go on only where the run's SAM helps.

Not part of the paper. Refined masks are compared with the teacher's own by labels that the teacher
has not seen; where there are none, SAM's quality on labeled images decides.
"""

import logging
import os
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn

from s4m_d2.data.splits import true_records
from s4m_d2.engine.checkpointing.checkpoint import holds_run
from s4m_d2.engine.labeling.pseudo_labeling import PseudoLabeling
from s4m_d2.engine.labeling.quality import AFTER, BEFORE, QualityMeasurement
from s4m_d2.engine.labeling.sam_quality import USEFUL_IOU, held_out_share, labeled_quality
from s4m_d2.engine.stages import STAGES, needs_sam, run_folder, runs_stage
from s4m_d2.engine.training.build import labeled_names
from s4m_d2.engine.training.stop_signals import interruptible, stop_if_asked
from s4m_d2.errors import attempt
from s4m_d2.report import read_results, stored_results, write_results
from s4m_d2.sam import SamBackend
from s4m_d2.semi.ema_teacher import EMATeacher
from s4m_d2.semi.refinement import AUTO_PROMPT, PROMPTS, TeacherMasks

logger = logging.getLogger(__name__)

OFF, WARN, AUTO = GATES = ("off", "warn", "auto")  # values of S4M.REFINE.GATE
_FEWEST_LABELED = 10  # images, of which a fifth can be held out
RESULT = "refinement_gate.json"  # in the folder of stage 2
SAM_RESULT = "sam_quality.json"  # of the stage that measured SAM

#: For JSON and checkpoints. "choice": a prompt or "off"; "drops_arp": whether ARP is off too;
#: "text"; if masks were compared, also "images", or tiles, and "pq", before and with each prompt.
#: {}: none was made.
Decision = dict[str, Any]


def held_out_records(cfg: CfgNode) -> list[dict]:
    """The labeled images that stage 1 leaves to the gate, a fifth; none where the gate is off, the
    teacher is another run's, or fewer than ten images are labeled."""
    on = cfg.S4M.REFINE.ENABLED and cfg.S4M.REFINE.GATE != OFF
    if not (on and runs_stage(cfg, "teacher") and runs_stage(cfg, "student")):
        return []
    records = true_records(labeled_names(cfg))
    return held_out_share(records) if len(records) >= _FEWEST_LABELED else []


def compare_refinement(cfg: CfgNode, labeling: PseudoLabeling) -> Decision:
    """Compare the pseudo-labels of stage 1's teacher before and after refinement, and decide.

    By their PQ on the images that stage 1 left out. With S4M.REFINE.PROMPT "auto" the best prompt
    is taken; with S4M.REFINE.GATE "auto" refinement is switched off where the teacher's own masks
    are better, and ARP with it, as it hurts unrefined labels (paper). All processes call it.
    """
    records, settings = held_out_records(cfg), cfg.S4M.REFINE
    if not records:
        return {}
    prompt = settings.PROMPT if _is_prompted(labeling) else settings.METHOD
    measurement = QualityMeasurement(cfg, labeling, records)
    prompts = PROMPTS if prompt == AUTO_PROMPT else (prompt,)
    pq: dict[str, float] = {}
    images = 0
    for prompt in prompts:
        if _is_prompted(labeling):
            labeling.refiner.prompt = prompt
        if report := measurement():
            images = report.steps[BEFORE].images
            for name, step in ((BEFORE, BEFORE), (prompt, AFTER)):
                pq[name] = report.steps[step].overall()["pq"] or 0.0
    pq, images = comm.all_gather((pq, images))[0]
    best = max(prompts, key=lambda prompt: pq[prompt])
    gain = pq[best] - pq[BEFORE]
    choice = OFF if cfg.S4M.REFINE.GATE == AUTO and gain < 0 else best
    drops_arp = choice == OFF and cfg.S4M.ARP.GATED and labeling.arp is not None
    verdict = f"helps, with {best}" if gain > 0 else "makes no difference"
    verdict = "makes masks worse" if gain < 0 else verdict
    verdict += ", and is switched off" * (choice == OFF) + ", as is ARP" * drops_arp
    values = ", ".join(f"{name} {100 * value:.1f}" for name, value in pq.items())
    text = f"refinement {verdict}: PQ {values}, on {images} labeled images or tiles"
    logger.log(logging.WARNING if gain < 0 else logging.INFO, "S4M.REFINE.GATE: %s.", text)
    return {"images": images, "pq": pq, "choice": choice, "drops_arp": drops_arp, "text": text}


def apply_decision(decision: Decision, labeling: PseudoLabeling) -> None:
    """Change refiner and ARP as was decided."""
    if decision.get("drops_arp"):
        labeling.arp = None
    choice = decision.get("choice")
    if choice == OFF:
        labeling.refiner = TeacherMasks()
    elif choice and _is_prompted(labeling):
        labeling.refiner.prompt = choice


def _is_prompted(labeling: PseudoLabeling) -> bool:
    """Whether the refiner has prompts to choose from; any callable may be one."""
    return hasattr(labeling.refiner, "prompt")


def labeling_of_run(
    cfg: CfgNode, weights: str, model: nn.Module, backend: SamBackend | None = None
) -> PseudoLabeling:
    """Build what labels images with ``model``, as decided by the gate of the run, if one did.

    ``weights``: file of the model, in a stage's folder of the run, which may also be the config's
    OUTPUT_DIR; ``backend`` None: the config's.
    """
    labeling = PseudoLabeling(cfg, EMATeacher(model, cfg.S4M.EMA_DECAY), backend)
    if cfg.S4M.REFINE.ENABLED and cfg.S4M.REFINE.GATE != OFF:
        apply_decision(_decision_of_run(cfg, weights), labeling)
    return labeling


def _decision_of_run(cfg: CfgNode, weights: str) -> Decision:
    """That of the weights' run, or else of the config's; a run of stage 1 alone has SAM's IoU."""
    for folder in (run_folder(weights), cfg.OUTPUT_DIR):
        path = os.path.join(folder, "student", RESULT)
        if os.path.isfile(path):
            return read_results(path)
        if _is_dismissed(cfg, stored_results(os.path.join(folder, "teacher", SAM_RESULT))):
            return {"choice": OFF}
    return {}


def _is_dismissed(cfg: CfgNode, measured: dict[str, Any]) -> bool:
    """Whether the gate leaves SAM out, by :func:`labeled_quality` or {}."""
    return cfg.S4M.REFINE.GATE == AUTO and measured.get("iou", 1.0) < USEFUL_IOU


def decide_by_sam(cfg: CfgNode, stage: str, *, resume: bool) -> CfgNode:
    """The config of a stage after a measurement of SAM; all processes call it.

    With S4M.REFINE.GATE "auto" and an IoU below 0.6, stage 1 has no structural distillation; stage
    2, if the gate cannot compare its teacher's masks, no refinement, and no ARP unless the user
    set it, which is noted as the gate's decision. A run that continues keeps what was decided.
    """
    gate, is_main = cfg.S4M.REFINE.GATE, comm.is_main_process()
    if gate == OFF or stage == "finetune" or not any(needs_sam(cfg, s) for s in STAGES):
        return cfg
    if stage == "student" and (not cfg.S4M.REFINE.ENABLED or held_out_records(cfg)):
        return cfg
    found = {}
    if is_main:
        with interruptible():
            found = _measured(cfg, stage, resume)
    stop_if_asked()
    found = comm.all_gather(found)[0]
    if found and is_main:
        level = logging.INFO if found["iou"] >= USEFUL_IOU else logging.WARNING
        logger.log(level, "S4M.REFINE.GATE: SAM's masks: %s.", found["text"])
    if not _is_dismissed(cfg, found):
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    if stage == "teacher":
        cfg.S4M.DISTILL.ENABLED = False
    else:
        drops_arp = cfg.S4M.ARP.ENABLED and cfg.S4M.ARP.GATED
        cfg.S4M.REFINE.ENABLED, cfg.S4M.ARP.ENABLED = False, cfg.S4M.ARP.ENABLED and not drops_arp
        if is_main:  # for whoever labels with this run's models
            text = f"refinement is switched off{', as is ARP' * drops_arp}: {found['text']}"
            decision = {"choice": OFF, "drops_arp": drops_arp, "text": text}
            write_results(decision, os.path.join(cfg.OUTPUT_DIR, RESULT))
    cfg.freeze()
    return cfg


def _measured(cfg: CfgNode, stage: str, resume: bool) -> dict[str, Any]:
    """What was measured for this stage or, in this run, for stage 1; {}: nothing was."""
    path = os.path.join(cfg.OUTPUT_DIR, SAM_RESULT)
    of_run = os.path.join(os.path.dirname(cfg.OUTPUT_DIR), "teacher", SAM_RESULT)
    measured = {} if stage == "teacher" or cfg.S4M.TEACHER_WEIGHTS else stored_results(of_run)
    if measured:
        return measured
    if resume and holds_run(cfg.OUTPUT_DIR):
        return stored_results(path)
    found, errors = attempt(labeled_quality, cfg)
    if found is None:
        logger.warning("S4M.REFINE.GATE: SAM was not measured: %s", errors[0])
        return {}
    if stage == "teacher" and _is_dismissed(cfg, found):
        found["text"] += "; stage 1 has no structural distillation"
    write_results(found, path)
    return found
