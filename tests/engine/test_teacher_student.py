"""How often the student is called for the two batches of a step, and with what."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from s4m_d2.engine import S4MCheckpointer, S4MTrainer, stage_config
from s4m_d2.engine.labeling.protocol import check_losses_of_parts, takes_parts
from s4m_d2.engine.training.teacher_student import TeacherStudentModel
from s4m_d2.errors import InputError
from s4m_d2.modeling import S4MMaskFormer


class OneBatch(nn.Module):
    """A model that knows nothing of parts; its loss is the batch's sum."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.calls = []

    def forward(self, batched_inputs):
        self.calls.append([batched_inputs])
        return {"loss": self.weight * sum(batched_inputs)}


class Parts(OneBatch):
    """A model that takes both batches."""

    def forward(self, batched_inputs, *other_parts):
        parts = [batched_inputs, *other_parts]
        self.calls.append(parts)
        losses = [{"loss": self.weight * sum(part)} for part in parts]
        return losses if other_parts else losses[0]

    forward.takes_parts = True


class OwnForward(Parts):
    """A user's model that adds to the losses of another and knows nothing of parts."""

    def forward(self, batched_inputs):
        return {**super().forward(batched_inputs), "more": self.weight}


def labeling(batch):
    return SimpleNamespace(student_batch=[10 * x for x in batch], stats={})


TOGETHER, APART = [[[1, 2], [30]]], [[[1, 2]], [[30]]]


@pytest.mark.parametrize(
    ("student", "shared", "calls"),
    [
        (OneBatch, True, APART),
        (Parts, True, TOGETHER),
        (Parts, False, APART),
        (OwnForward, True, APART),
    ],
)
def test_both_batches_go_in_one_call_where_the_model_takes_parts(student, shared, calls):
    student = student()
    model = TeacherStudentModel(student, labeling, 2.0, shared_forward=shared).train()
    losses = {name: loss.item() for name, loss in model(([1, 2], [3])).items()}
    expected = {"loss": 3.0, "unsup/loss": 60.0}
    if isinstance(student, OwnForward):
        expected |= {"more": 1.0, "unsup/more": 2.0}
    assert losses == expected
    assert student.calls == calls


@pytest.mark.parametrize(
    ("norm", "shared", "batches"), [("GN", True, [5]), ("GN", False, [2, 3]), ("BN", True, [2, 3])]
)
def test_a_step_of_stage_two_is_one_pass_of_the_student_where_it_can_be(
    norm, shared, batches, small_config, tmp_path
):
    cfg = small_config(
        MODEL__RESNETS__NORM=norm,
        S4M__SHARED_FORWARD=shared,
        S4M__UNLABELED_IMS_PER_BATCH=3,
        SOLVER__MAX_ITER=1,
        DATASETS__TEST="()",
    )
    cfg = stage_config(cfg, "student")
    S4MCheckpointer(S4MTrainer.build_model(cfg), str(tmp_path)).save("teacher")
    trainer = S4MTrainer(cfg, str(tmp_path / "teacher.pth"))
    seen = []
    trainer.trained_model.backbone.register_forward_hook(lambda _, args, out: seen.append(args))
    trainer.train()
    assert [len(images) for (images,) in seen] == batches
    logged = trainer.storage.latest()
    assert {"loss_ce", "unsup/loss_ce", "pseudo_labels/per_image"} <= logged.keys()


def test_our_model_takes_parts_and_reads_which_labels_are_valid():
    assert takes_parts(S4MMaskFormer)
    assert S4MMaskFormer.reads_gt_valid is True

    class Derived(S4MMaskFormer):
        def forward(self, batched_inputs):
            return super().forward(batched_inputs)

    assert not takes_parts(Derived)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({"loss": torch.zeros(())}, "Parts.forward takes parts and returned dict for 2"),
        ([{"loss": torch.zeros(())}], "returned 1 results for 2 batches"),
        ([{"loss": torch.zeros(())}, torch.zeros(())], "Parts.forward returned a Tensor"),
        ([{"loss": torch.zeros(())}, {"loss": torch.zeros(3)}], r"'loss' .* \(3,\)"),
    ],
)
def test_losses_that_are_not_one_dictionary_a_part_are_named(losses, message):
    with pytest.raises(InputError, match=message):
        check_losses_of_parts(losses, 2, Parts())
