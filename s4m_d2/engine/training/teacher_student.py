"""The student and what labels for it, as one model of Detectron2's training loop."""

from __future__ import annotations

from torch import nn

from s4m_d2.engine.labeling.protocol import check_losses


class TeacherStudentModel(nn.Module):
    """The student as Detectron2's training loop sees it in stage 2.

    In training it takes (labeled, unlabeled) batches and returns one dictionary of losses, the
    unsupervised ones named ``unsup/...`` and weighted; in evaluation it is the student. The teacher
    and SAM are no submodules: nothing of them is trained, counted or saved with the student.

    Args:
        student: the model to train, as the trainer holds it (DDP-wrapped or not).
        pseudo_labeling: labels the unlabeled batch.
        unsup_loss_weight: weight of the losses on pseudo-labels.
        log: receives the labeling's scalars in each step, numbers or 0-dim tensors.
    """

    def __init__(
        self,
        student: nn.Module,
        pseudo_labeling,
        unsup_loss_weight: float,
        log=None,
    ) -> None:
        super().__init__()
        self.student = student
        self.pseudo_labeling = pseudo_labeling
        self.unsup_loss_weight = unsup_loss_weight
        self._log = log or (lambda stats: None)

    def forward(self, batch):
        if not self.training:
            return self.student(batch)
        labeled, unlabeled = batch
        views = self.pseudo_labeling(unlabeled)
        self._log(views.stats)
        losses = check_losses(self.student(labeled), self.student)
        of_pseudo_labels = check_losses(self.student(views.student_batch), self.student)
        for name, loss in of_pseudo_labels.items():
            losses[f"unsup/{name}"] = self.unsup_loss_weight * loss
        return losses
