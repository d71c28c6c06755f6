"""Student forward, losses, backward and optimizer: the parts that both stages have."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarking import checks, ours_model, plain_step
from benchmarking.bench import Bench
from benchmarking.parts import Part
from benchmarking.timing import Form


class StudentPass:
    """The student on the batches of a step, in one form.

    Args:
        plainly: plain deformable attention, plain matching.
    """

    def __init__(
        self, bench: Bench, batches: list[list[dict]], wanted: list, plainly: bool
    ) -> None:
        self._bench, self._batches, self._wanted = bench, batches, wanted
        self._plainly = plainly

    def forward(self) -> list[dict]:
        """Outputs of each batch, with their graph."""
        with ours_model.forms(
            self._bench, plain_step.plain_forms(self._bench) if self._plainly else None
        ):
            return ours_model.student_outputs(self._bench, self._batches)

    def losses(self, outputs: list[dict]) -> Tensor:
        """The sum of all losses."""
        with ours_model.forms(
            self._bench, plain_step.plain_forms(self._bench) if self._plainly else None
        ):
            return ours_model.losses(self._bench, outputs, self._wanted, self._batches)

    def graph(self) -> tuple[Tensor]:
        """The losses, ready for a backward pass."""
        self._bench.optimizer.zero_grad()
        return (self.losses(self.forward()),)

    def backward(self, loss: Tensor) -> None:
        """From the losses to the gradients."""
        loss.backward()

    def gradient_norm(self) -> Tensor:
        """Of all parameters together, after one pass."""
        self.backward(*self.graph())
        return torch.nn.utils.get_total_norm(
            [p.grad for p in self._bench.student.parameters() if p.grad is not None]
        )


def model_parts(
    bench: Bench, batches: list[list[dict]], outputs: Callable[[], tuple[list[dict]]]
) -> list[Part]:
    """The parts from the student's input to its new weights.

    ``outputs`` gives what the student predicts, without a graph, for the time of the losses alone.
    """
    wanted = [ours_model.targets(bench, batch) for batch in batches]
    mine, plainly = (StudentPass(bench, batches, wanted, plain) for plain in (False, True))
    loose = 5e-2 if bench.cfg.SOLVER.AMP.ENABLED else 2e-3

    def check_forward() -> None:
        with torch.no_grad():
            found, expected = (
                [outputs["mask_features"] for outputs in form.forward()] for form in (mine, plainly)
            )
        checks.close(found, expected, "student forward", rtol=loose, atol=loose)

    def check_losses() -> None:
        found, expected = mine.losses(*outputs()), plainly.losses(*outputs())
        checks.close(found, expected, "losses", rtol=loose)

    def check_backward() -> None:
        found, expected = mine.gradient_norm(), plainly.gradient_norm()
        checks.close(found, expected, "backward", rtol=5 * loose)

    return [
        Part(
            "student forward",
            Form(mine.forward),
            Form(plainly.forward),
            check_forward,
            counts_flops=True,
        ),
        Part(
            "losses",
            Form(mine.losses, outputs),
            Form(plainly.losses, outputs),
            check_losses,
        ),
        Part(
            "backward",
            Form(mine.backward, mine.graph),
            Form(plainly.backward, plainly.graph),
            check_backward,
            counts_flops=True,
        ),
        optimizer_part(bench, mine),
    ]


def optimizer_part(bench: Bench, student: StudentPass) -> Part:
    """Clipping and update. It reads the gradients twice and writes them; then four and three."""

    def gradients() -> tuple:
        if all(parameter.grad is None for parameter in tensors):
            student.backward(*student.graph())
        return ()

    tensors = [p for group in bench.optimizer.param_groups for p in group["params"]]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return Part("optimizer", Form(lambda: bench.optimizer.step(), gradients), moved_bytes=10 * size)
