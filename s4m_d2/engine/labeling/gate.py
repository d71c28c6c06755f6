"""Whether refinement makes pseudo-labels better, measured on labels that the teacher has not seen.

Not part of the paper: SAM helps where it knows the images, and harms where it does not.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.utils import comm
from torch import nn

from s4m_d2.data.annotations import targets
from s4m_d2.data.subsets import photograph
from s4m_d2.engine.checks.findings import Finding, attempt
from s4m_d2.engine.labeling.pseudo_labeling import PseudoLabeling
from s4m_d2.engine.labeling.quality import AFTER, BEFORE, QualityMeasurement, labeled_records
from s4m_d2.engine.stages import runs_stage
from s4m_d2.report import read_results
from s4m_d2.sam import SamBackend
from s4m_d2.semi.ema_teacher import EMATeacher
from s4m_d2.semi.refinement import AUTO_PROMPT, PROMPTS, TeacherMasks

logger = logging.getLogger(__name__)

OFF, WARN, AUTO = GATES = ("off", "warn", "auto")  # values of S4M.REFINE.GATE
RESULT = "refinement_gate.json"  # in the folder of stage 2
ITEM = "refinement gate"  # of the report before training, and of the page
HELD_OUT_SHARE = 0.2  # of the labeled images
_FEWEST_LABELED = 10


def _is_on(cfg: CfgNode) -> bool:
    on = cfg.S4M.REFINE.ENABLED and cfg.S4M.REFINE.GATE != OFF
    return on and runs_stage(cfg, "student")


def held_out_records(cfg: CfgNode) -> list[dict]:
    """The labeled images that stage 1 leaves to the gate, a fifth.

    None where the gate is off, the teacher is another run's, or fewer than ten images are labeled.
    """
    if not _is_on(cfg) or not runs_stage(cfg, "teacher"):
        return []
    records = labeled_records(cfg)
    return _share(records) if len(records) >= _FEWEST_LABELED else []


def _share(records: list[dict]) -> list[dict]:
    """The first fifth of the images, with all copies of its last photograph."""
    names = [photograph(record["file_name"]) for record in records]
    count = max(1, round(HELD_OUT_SHARE * len(names)))
    whole = len(names) - names[::-1].index(names[count - 1])  # copies are in a row
    return records[: whole if whole < len(names) else count]


def split_labeled(cfg: CfgNode) -> tuple[list[dict], list[dict]]:
    """Labeled images to adapt SAM on, and a fifth that is held out: the gate's, if it has one.

    Records of those with instances, without crowds.
    """
    records = labeled_records(cfg)
    held_out = held_out_records(cfg) or _share(records)
    names = {record["file_name"] for record in held_out}
    parts: tuple[list[dict], list[dict]] = ([], [])
    for record in records:
        if annotations := targets(record):
            part = parts[record["file_name"] in names]
            part.append({**record, "annotations": annotations})
    return parts


def gate_findings(cfg: CfgNode) -> list[Finding]:
    """A line of the report before training, if the gate is on."""
    if not _is_on(cfg):
        return []
    records, _ = attempt(held_out_records, cfg)
    if records is None:  # reported with that data set
        return [Finding(ITEM, "looked at when labeled data can be read", checked=False)]
    text = "few labeled images, or a teacher of another run: decided by the IoU of SAM's masks"
    if records:
        text = f"measured after stage 1, on {len(records)} labeled images left out of it"
    return [Finding(ITEM, text)]


class RefinementGate:
    """Compares the pseudo-labels of stage 1's teacher before and after refinement, and decides.

    By their PQ. With S4M.REFINE.PROMPT "auto" the best prompt is taken; with S4M.REFINE.GATE "auto"
    refinement is switched off where the teacher's own masks are better, and ARP with it, as it
    hurts unrefined labels (paper).

    ``decision``, for JSON and checkpoints: "images", or tiles; "pq", before and with each prompt;
    "choice", a prompt or "off"; "drops_arp", whether ARP is off too; "text". {}: none was made.
    """

    @configurable
    def __init__(
        self,
        *,
        labeling: PseudoLabeling,
        measurement: QualityMeasurement | None = None,
        prompts: Sequence[str] = (),
        switches_off: bool = False,
        switches_arp_off: bool = False,
    ) -> None:
        self.labeling, self.measurement, self.prompts = labeling, measurement, prompts
        self.switches_off, self.switches_arp_off = switches_off, switches_arp_off
        self.decision: dict[str, Any] = {}

    @classmethod
    def from_config(cls, cfg: CfgNode, labeling: PseudoLabeling) -> dict[str, Any]:
        records, prompt = held_out_records(cfg), cfg.S4M.REFINE.PROMPT
        return {
            "labeling": labeling,
            "measurement": QualityMeasurement(cfg, labeling, records) if records else None,
            "prompts": PROMPTS if prompt == AUTO_PROMPT else (prompt,),
            "switches_off": cfg.S4M.REFINE.GATE == AUTO,
            "switches_arp_off": cfg.S4M.ARP.GATED,
        }

    def measure(self) -> None:
        """Decide, in all processes together, and apply it."""
        if self.measurement is None:
            return
        pq: dict[str, float] = {}
        images = 0
        for prompt in self.prompts:
            self.labeling.refiner.prompt = prompt
            report = self.measurement()
            if report is not None:
                images = report.steps[BEFORE].images
                for name, step in ((BEFORE, BEFORE), (prompt, AFTER)):
                    pq[name] = report.steps[step].overall()["pq"] or 0.0
        pq, images = comm.all_gather((pq, images))[0]
        best = max(self.prompts, key=lambda prompt: pq[prompt])
        gain = pq[best] - pq[BEFORE]
        choice = OFF if self.switches_off and gain < 0 else best
        values = ", ".join(f"{name} {100 * value:.1f}" for name, value in pq.items())
        verdict = f"helps, with {best}" if gain > 0 else "makes no difference"
        verdict = "makes masks worse" if gain < 0 else verdict
        verdict += ", and is switched off" if choice == OFF else ""
        drops_arp = choice == OFF and self.switches_arp_off and self.labeling.arp is not None
        verdict += ", as is ARP" if drops_arp else ""
        text = f"refinement {verdict}: PQ {values}, on {images} labeled images or tiles"
        logger.log(logging.WARNING if gain < 0 else logging.INFO, "S4M.REFINE.GATE: %s.", text)
        decision = {"images": images, "pq": pq, "choice": choice, "drops_arp": drops_arp}
        self.apply({**decision, "text": text})

    def apply(self, decision: dict[str, Any]) -> None:
        """Change refiner and ARP as was decided."""
        self.decision = decision
        if decision.get("drops_arp"):
            self.labeling.arp = None
        choice = decision.get("choice")
        if choice == OFF:
            thresh = self.labeling.selection["mask_thresh"]
            self.labeling.refiner = TeacherMasks(mask_thresh=thresh)
        elif choice:
            self.labeling.refiner.prompt = choice


def labeling_of_run(
    cfg: CfgNode, weights: str, model: nn.Module, backend: SamBackend | None = None
) -> PseudoLabeling:
    """Build what labels images with ``model``, as decided by the gate of the run, if one did.

    Args:
        weights: file of the model, in a stage's folder of the run.
        backend: SAM; None: as the config says.
    """
    labeling = PseudoLabeling(cfg, EMATeacher(model, cfg.S4M.EMA_DECAY), backend)
    decision = os.path.join(os.path.dirname(weights), os.pardir, "student", RESULT)
    if cfg.S4M.REFINE.ENABLED and os.path.isfile(decision):
        RefinementGate(labeling=labeling).apply(read_results(decision))
    return labeling
