"""Skipping steps that are not finite, with a small model."""

import itertools
import json
import logging
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from s4m_d2.engine.training import bad_steps as module
from s4m_d2.engine.training.bad_steps import BadSteps
from s4m_d2.engine.training.hooks import EMATeacherHook
from s4m_d2.engine.training.step import TeacherStep
from s4m_d2.errors import ConfigError, DivergenceError, S4MError
from s4m_d2.semi.ema_teacher import EMATeacher

NAN, INF = math.nan, math.inf
GOOD = ({"x": 1.0}, {"x": -2.0}, {"x": 0.5}, {"x": 3.0})
BAD = {
    "loss nan": {"x": NAN},
    "loss inf": {"x": 2.0, "factor": INF},
    "one of two losses": {"x": 2.0, "second": -INF},
    "gradient nan": {"x": 2.0, "root": True},
}


class Toy(nn.Module):
    """Two losses of a batch's numbers, through a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1)
        self.line = nn.Linear(1, 1)
        with torch.no_grad():
            self.line.weight.fill_(0.5)
            self.line.bias.fill_(0.1)

    def forward(self, batch):
        batch = batch[0] if isinstance(batch, tuple) else batch
        x = torch.tensor([[sample["x"]] for sample in batch] + [[0.25]])
        out = self.line(self.norm(x)).square().mean() * batch[0].get("factor", 1.0)
        if batch[0].get("root"):  # finite, but its gradient is not
            out = out + (self.line.weight.sum() * 0).sqrt()
        return {"first": out, "second": out.detach() * 0 + batch[0].get("second", 0.0)}


def batches(*samples):
    return [[{"file_name": f"image_{i}.png", **sample}] for i, sample in enumerate(samples)]


def make(data, folder="unused", max_in_a_row=10, model=None):
    model = model or Toy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    bad_steps = BadSteps(max_in_a_row, str(folder), seed=7)
    trainer = TeacherStep(model, data, optimizer, bad_steps)
    trainer.register_hooks([bad_steps])
    return trainer


def run(data, folder, **options):
    trainer = make(data, folder, **options)
    trainer.train(0, len(data))
    return trainer


def state(trainer) -> list[torch.Tensor]:
    """Weights, buffers and the optimizer's state."""
    optimizer = trainer.optimizer.state_dict()["state"]
    kept = [value for entry in optimizer.values() for value in entry.values()]
    return [value.clone() for value in (*trainer.model.state_dict().values(), *kept)]


def assert_same(first, second):
    assert len(first) == len(second)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def records(folder) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(Path(folder).iterdir())]


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("position", [0, 2, 4])
def test_a_bad_step_leaves_no_trace_in_weights_buffers_and_optimizer(kind, position, tmp_path):
    expected = run(batches(*GOOD), tmp_path / "none")
    samples = [*GOOD[:position], BAD[kind], *GOOD[position:]]
    trainer = run(batches(*samples), tmp_path / "bad")
    assert_same(state(trainer), state(expected))
    assert trainer.iter == len(samples)
    assert trainer.bad_steps.total == 1
    assert not (tmp_path / "none").exists()


def test_the_record_names_iteration_seed_losses_and_files(tmp_path):
    labeled, unlabeled = batches({"x": 1.0}, {"x": 2.0, "second": -INF})
    data = [(labeled, unlabeled), (unlabeled, labeled)]
    run(data, tmp_path)
    [record] = records(tmp_path)
    [process] = record.pop("processes")
    assert record == {
        "iteration": 1,
        "seed": 7,
        "reason": "the loss 'second' is -inf",
        "in_a_row": 1,
    }
    assert process["files"] == {"labeled": ["image_1.png"], "unlabeled": ["image_0.png"]}
    assert process["losses"]["second"] == "-inf" and math.isfinite(process["losses"]["first"])
    assert process["learning_rate"] == 0.1 and process["gradients"] == []


def test_gradients_that_are_not_finite_are_named(tmp_path):
    run(batches(BAD["gradient nan"]), tmp_path)
    [record] = records(tmp_path)
    assert record["reason"] == "gradients are not finite (line.weight)"
    assert record["processes"][0]["gradients"] == ["line.weight"]


def test_records_are_bounded_to_the_latest(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_RECORDS", 3)
    run(batches(*[BAD["loss nan"]] * 5), tmp_path)
    assert [record["iteration"] for record in records(tmp_path)] == [2, 3, 4]


def test_a_folder_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    trainer = run(batches(BAD["loss nan"], *GOOD), blocked)
    assert trainer.bad_steps.total == 1
    assert "could not be recorded" in caplog.text


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_more_bad_steps_in_a_row_than_allowed_end_the_run(limit, tmp_path):
    bad, good = BAD["loss nan"], GOOD[0]
    survived = [*[bad] * limit, good] * 3
    assert run(batches(*survived), tmp_path / "survived").bad_steps.total == 3 * limit

    trainer = make(batches(*survived, *[bad] * 9), tmp_path / "ended", max_in_a_row=limit)
    assert trainer.bad_steps.max_in_a_row == limit
    with pytest.raises(DivergenceError) as stop:
        trainer.train(0, len(survived) + 9)
    last = len(survived) + limit
    message = str(stop.value)
    assert trainer.iter == last
    for part in (
        f"iteration {last}:",
        f"{limit + 1} steps in a row",
        f"S4M.MAX_BAD_STEPS, {limit}.",
        "the loss 'first' is nan",
        f"image_{last}.png (labeled)",
        "SOLVER.BASE_LR",
        "SOLVER.AMP.ENABLED",
        str(tmp_path / "ended"),
    ):
        assert part in message
    assert isinstance(stop.value, S4MError)


def test_the_count_in_a_row_goes_on_after_a_resume(tmp_path):
    data = batches(*[BAD["loss nan"]] * 4)
    first = make(data, tmp_path, max_in_a_row=3)
    first.train(0, 3)
    second = make(data[3:], tmp_path, max_in_a_row=3)
    second.load_state_dict(first.state_dict())
    assert (second.bad_steps.in_a_row, second.bad_steps.total) == (3, 3)
    with pytest.raises(DivergenceError, match="iteration 3: 4 steps"):
        second.train(3, 4)


def test_skipped_steps_are_warned_of_and_counted_in_the_log(tmp_path, caplog):
    trainer = make(batches(GOOD[0], BAD["loss inf"], GOOD[1]), tmp_path)
    with caplog.at_level(logging.WARNING, logger="s4m_d2"):
        trainer.train(0, 3)
    assert "Skipped iteration 1: the loss 'first' is inf (1 in a row, 1 in all)" in caplog.text
    assert "image_1.png (labeled)" in caplog.text
    counts = trainer.storage.history("train/bad_steps").values()
    assert counts == [(0, 0), (1, 1), (1, 2)]
    losses = [iteration for _, iteration in trainer.storage.history("total_loss").values()]
    assert losses == [0, 2]


def test_the_teacher_does_not_move_after_a_skipped_step(tmp_path):
    """The teacher of a run with a bad step is that of the run without it, step for step."""

    def train(samples, burn_in):
        trainer = make(batches(*samples), tmp_path)
        teacher = EMATeacher(Toy(), decay=0.5)
        watched = []

        class Watch(EMATeacherHook):
            def before_step(self):
                super().before_step()
                watched.append([v.clone() for v in self.teacher.model.state_dict().values()])

        hook = Watch(teacher, trainer.model, burn_in, trainer.bad_steps)
        trainer.register_hooks([hook])
        trainer.train(0, len(samples))
        return watched

    expected = train(GOOD, burn_in=1)
    watched = train([*GOOD[:2], BAD["loss nan"], *GOOD[2:]], burn_in=1)
    assert_same(watched[3], watched[2])
    for mine, theirs in zip(watched[:3] + watched[4:], expected, strict=True):
        assert_same(mine, theirs)
    copied = train([GOOD[0], BAD["loss nan"], *GOOD[1:]], burn_in=2)  # the copy is not put off
    assert_same(copied[2], train(GOOD, burn_in=1)[1])


def test_a_negative_limit_is_refused():
    with pytest.raises(ConfigError, match="S4M.MAX_BAD_STEPS is -1"):
        BadSteps(-1, "unused", 0)


class Scaled(nn.Module):
    """A loss whose gradient is the batch's number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, batch):
        return {"loss": self.weight * batch[0]["x"]}


@pytest.fixture
def amp(tmp_path):
    """(loss scale, numbers) → the trainer after mixed-precision steps, which ran on the CPU."""

    def train(scale, *numbers):
        model = Scaled()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        data = batches(*({"x": number} for number in numbers))
        bad_steps = BadSteps(10, str(tmp_path), seed=0)
        trainer = TeacherStep(model, data, optimizer, bad_steps, torch.float16)
        trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        trainer.iter = 0
        with EventStorage(0):
            for _ in numbers:
                trainer.run_step()
        return trainer

    return train


def test_a_loss_scale_that_is_too_large_is_the_scalers_affair(amp):
    trainer = amp(2.0**120, 1e4)
    assert trainer.bad_steps.total == 0
    assert trainer.model.weight.item() == 1.0  # the scaler made no update either
    assert trainer.grad_scaler.get_scale() == 2.0**119


def test_with_amp_a_loss_that_is_not_finite_is_a_bad_step_and_leaves_the_scale(amp):
    trainer = amp(2.0**10, NAN, 2.0)
    assert trainer.bad_steps.total == 1
    assert trainer.grad_scaler.get_scale() == 2.0**10
    assert trainer.model.weight.item() == pytest.approx(1.0 - 0.1 * 2.0)


def test_gradients_that_overflow_without_a_scale_are_a_bad_step(amp, monkeypatch):
    def root(self, batch):  # finite, but its gradient is not
        return {"loss": (self.weight * 0).sqrt()}

    monkeypatch.setattr(Scaled, "forward", root)
    assert amp(4.0, 1.0, 1.0, 1.0).bad_steps.in_a_row == 1  # scales 4, 2, 1


WORLD = 2


def run_rank(rank, folder):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD
    )
    torch.set_num_threads(1)
    # The bad loss has no gradient, which DDP would hand to both processes.
    samples = [*GOOD[:2], {"x": 4.0, "second": -INF if rank == 1 else 0.0}, *GOOD[2:]]
    data = batches(*samples)
    for index, [sample] in enumerate(data):
        sample["file_name"] = f"rank_{rank}_{index}.png"
    model = DistributedDataParallel(Toy(), broadcast_buffers=False)
    trainer = run(data, f"{folder}/bad", model=model)
    good = run(batches(*GOOD), f"{folder}/none", model=DistributedDataParallel(Toy()))
    ends = make(
        itertools.repeat(data[2]),
        f"{folder}/end",
        max_in_a_row=1,
        model=DistributedDataParallel(Toy()),
    )
    try:
        ends.train(0, 9)
    except DivergenceError:
        ended = ends.iter
    result = {"with": state(trainer), "without": state(good), "ended": ended}
    torch.save(result | {"total": trainer.bad_steps.total}, f"{folder}/rank_{rank}.pth")
    dist.destroy_process_group()


def test_processes_agree_to_skip_what_one_of_them_finds(tmp_path):
    mp.start_processes(run_rank, (str(tmp_path),), nprocs=WORLD, start_method="fork")
    ranks = [torch.load(tmp_path / f"rank_{r}.pth", weights_only=True) for r in range(WORLD)]
    for rank in ranks:
        assert rank["total"] == 1 and rank["ended"] == 1
        assert_same(rank["with"], rank["without"])
    [record] = records(tmp_path / "bad")
    assert record["reason"] == "the loss 'second' is -inf"
    assert [process["rank"] for process in record["processes"]] == [0, 1]
    assert [process["files"] for process in record["processes"]] == [
        {"labeled": ["rank_0_2.png"]},
        {"labeled": ["rank_1_2.png"]},
    ]
    assert not (tmp_path / "none").exists()
