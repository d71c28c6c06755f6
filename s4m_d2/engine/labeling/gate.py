"""Whether SAM's masks are used: decided by labels that the teacher has not seen, or by SAM's IoU.

Not part of the paper: SAM helps where it knows the images, and harms where it does not.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn

from s4m_d2.engine.checkpointing.checkpoint import holds_run
from s4m_d2.engine.labeling import quality, sam_quality
from s4m_d2.engine.labeling.pseudo_labeling import PseudoLabeling
from s4m_d2.engine.labeling.quality import AUTO, BEFORE, OFF
from s4m_d2.engine.stages import STAGES, needs_sam, run_folder
from s4m_d2.errors import attempt
from s4m_d2.report import read_results, stored_results, write_results
from s4m_d2.sam import SamBackend
from s4m_d2.semi.ema_teacher import EMATeacher
from s4m_d2.semi.refinement import AUTO_PROMPT, PROMPTS, TeacherMasks

logger = logging.getLogger(__name__)

RESULT = "refinement_gate.json"  # in the folder of stage 2

#: For JSON and checkpoints. "choice": a prompt or "off"; "drops_arp": whether ARP is off too;
#: "text"; if masks were compared, also "images", or tiles, and "pq", before and with each prompt.
#: {}: none was made.
Decision = dict[str, Any]


def compare_refinement(cfg: CfgNode, labeling: PseudoLabeling) -> Decision:
    """Compare the pseudo-labels of stage 1's teacher before and after refinement, and decide.

    By their PQ on the images that stage 1 left out. With S4M.REFINE.PROMPT "auto" the best prompt
    is taken; with S4M.REFINE.GATE "auto" refinement is switched off where the teacher's own masks
    are better, and ARP with it, as it hurts unrefined labels (paper). All processes call it.
    """
    records, prompt = quality.held_out_records(cfg), cfg.S4M.REFINE.PROMPT
    if not records:
        return {}
    measurement = quality.QualityMeasurement(cfg, labeling, records)
    prompts = PROMPTS if prompt == AUTO_PROMPT else (prompt,)
    pq: dict[str, float] = {}
    images = 0
    for prompt in prompts:
        labeling.refiner.prompt = prompt
        if report := measurement():
            images = report.steps[BEFORE].images
            for name, step in ((BEFORE, BEFORE), (prompt, quality.AFTER)):
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
        labeling.refiner = TeacherMasks(mask_thresh=labeling.selection["mask_thresh"])
    elif choice:
        labeling.refiner.prompt = choice


def labeling_of_run(
    cfg: CfgNode, weights: str, model: nn.Module, backend: SamBackend | None = None
) -> PseudoLabeling:
    """Build what labels images with ``model``, as decided by the gate of the run, if one did.

    ``weights``: file of the model, in a stage's folder of the run; ``backend`` None: the config's.
    """
    labeling = PseudoLabeling(cfg, EMATeacher(model, cfg.S4M.EMA_DECAY), backend)
    decision = os.path.join(run_folder(weights), "student", RESULT)
    if cfg.S4M.REFINE.ENABLED and os.path.isfile(decision):
        apply_decision(read_results(decision), labeling)
    return labeling


def decide_by_sam(cfg: CfgNode, stage: str, *, resume: bool) -> CfgNode:
    """The config of a stage after a measurement of SAM; all processes call it.

    With S4M.REFINE.GATE "auto" and an IoU below 0.6, stage 1 has no structural distillation; stage
    2, if the gate cannot compare its teacher's masks, no refinement, and no ARP unless the user
    set it, which is noted as the gate's decision. A run that continues keeps what was decided.
    """
    mode, is_main = cfg.S4M.REFINE.GATE, comm.is_main_process()
    if mode == OFF or stage == "finetune" or not any(needs_sam(cfg, s) for s in STAGES):
        return cfg
    if stage == "student" and (not cfg.S4M.REFINE.ENABLED or quality.held_out_records(cfg)):
        return cfg
    found = comm.all_gather(_measured(cfg, stage, resume) if is_main else {})[0]
    is_useful = found.get("iou", 1.0) >= sam_quality.USEFUL_IOU
    stays = is_useful or mode != AUTO
    if found and is_main:
        what = "structural distillation" if stage == "teacher" else "refinement"
        verdict = "" if stays else f"; no {what} in this stage"
        level = logging.INFO if is_useful else logging.WARNING
        logger.log(level, "S4M.REFINE.GATE: SAM's masks: %s%s.", found["text"], verdict)
    if stays:
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
    path = os.path.join(cfg.OUTPUT_DIR, sam_quality.RESULT)
    of_run = os.path.join(os.path.dirname(cfg.OUTPUT_DIR), "teacher", sam_quality.RESULT)
    measured = {} if stage == "teacher" or cfg.S4M.TEACHER_WEIGHTS else stored_results(of_run)
    if measured:
        return measured
    if resume and holds_run(cfg.OUTPUT_DIR):
        return stored_results(path)
    found, errors = attempt(sam_quality.labeled_quality, cfg)
    if found is None:
        logger.warning("S4M.REFINE.GATE: SAM was not measured: %s", errors[0])
        return {}
    write_results(found, path)
    return found
