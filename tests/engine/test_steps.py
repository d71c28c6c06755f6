"""Steps of a small model: values that come to the host, and steps that are not finite."""

import copy
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from s4m_d2.engine.training import hooks as module
from s4m_d2.engine.training.hooks import BadSteps, BufferSyncHook, EMATeacherHook
from s4m_d2.engine.training.step import PRECISIONS, TeacherStep, fetch_step, gradient_norms
from s4m_d2.errors import DivergenceError
from s4m_d2.semi.ema_teacher import EMATeacher
from s4m_d2.transfers import to_device

from .sameness import assert_same

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
        values = [[sample["x"]] for sample in batch] + [[0.25]]
        x = to_device(values, self.line.weight.device)
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


def run(data, folder="unused", **options):
    trainer = make(data, folder, **options)
    trainer.train(0, len(data))
    return trainer


def state(trainer) -> list:
    """Weights, buffers and the optimizer's state."""
    return copy.deepcopy(
        [dict(trainer.model.state_dict()), trainer.optimizer.state_dict()["state"]]
    )


def records(folder) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(Path(folder).iterdir())]


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_step_leaves_no_trace_in_weights_buffers_and_optimizer(kind, tmp_path):
    expected = run(batches(*GOOD), tmp_path / "none")
    for position in (0, 2, 4):
        samples = [*GOOD[:position], BAD[kind], *GOOD[position:]]
        trainer = run(batches(*samples), tmp_path / "bad")
        assert_same(state(trainer), state(expected))
        counts = [(int(i >= position), i) for i in range(len(samples))]
        assert trainer.storage.history("train/bad_steps").values() == counts
        logged = [i for _, i in trainer.storage.history("total_loss").values()]
        assert logged == [i for i in range(len(samples)) if i != position]
    assert not (tmp_path / "none").exists()


def test_the_record_names_iteration_seed_losses_gradients_and_files(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(module, "MAX_RECORDS", 2)
    labeled, unlabeled, root = batches({"x": 1.0}, {"x": 2.0, "second": -INF}, BAD["gradient nan"])
    run([unlabeled, (unlabeled, labeled), root], tmp_path)
    first, second = records(tmp_path)  # the latest
    [process] = first.pop("processes")
    reason = "the loss 'second' is -inf"
    assert first == {"iteration": 1, "seed": 7, "reason": reason, "in_a_row": 2}
    assert process["files"] == {"labeled": ["image_1.png"], "unlabeled": ["image_0.png"]}
    assert process["losses"]["second"] == "-inf" and math.isfinite(process["losses"]["first"])
    assert process["learning_rate"] == 0.1 and process["gradients"] == []
    assert second["processes"][0]["gradients"] == ["line.weight"]
    assert "line.weight" in second["reason"]
    assert "image_1.png (labeled)" in caplog.text


@pytest.mark.parametrize("limit", [0, 3])
def test_more_bad_steps_in_a_row_than_allowed_end_the_run(limit, tmp_path):
    """Counted on over a resume."""
    bad, good = BAD["loss nan"], GOOD[0]
    data = batches(*[*[bad] * limit, good] * 3, *[bad] * 9)
    last = 3 * (limit + 1) + limit
    first = make(data, tmp_path, max_in_a_row=limit)
    first.train(0, last)
    second = make(data[last:], tmp_path, max_in_a_row=limit)
    second.load_state_dict(first.state_dict())
    assert (second.bad_steps.in_a_row, second.bad_steps.total) == (limit, 4 * limit)
    with pytest.raises(DivergenceError) as stop:
        second.train(last, len(data))
    assert second.iter == last
    named = f"iteration {last}", "'first' is nan", f"image_{last}.png", str(tmp_path)
    assert all(part in str(stop.value) for part in named)


def test_the_teacher_does_not_move_after_a_skipped_step(tmp_path):
    """The teacher of a run with a bad step is that of the run without it, step for step."""

    def train(samples, burn_in):
        trainer = make(batches(*samples), tmp_path)
        watched = []

        class Watch(EMATeacherHook):
            def before_step(self):
                super().before_step()
                watched.append([v.clone() for v in self.teacher.model.state_dict().values()])

        teacher = EMATeacher(Toy(), decay=0.5)
        trainer.register_hooks([Watch(teacher, trainer.model, burn_in, trainer.bad_steps)])
        trainer.train(0, len(samples))
        return watched

    expected = train(GOOD, burn_in=1)
    watched = train([*GOOD[:2], BAD["loss nan"], *GOOD[2:]], burn_in=1)
    assert_same(watched[3], watched[2])
    assert_same(watched[:3] + watched[4:], expected)
    copied = train([GOOD[0], BAD["loss nan"], *GOOD[1:]], burn_in=2)  # the copy is not put off
    assert_same(copied[2], train(GOOD, burn_in=1)[1])


class Scaled(nn.Module):
    """A loss whose gradient is the batch's number; infinite where that is None."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, batch):
        x = batch[0]["x"]
        return {"loss": (self.weight * 0).sqrt() if x is None else self.weight * x}


def amp(tmp_path, precision, *numbers, scale=1.0):
    """The trainer after mixed-precision steps with these gradients, on the CPU."""
    model = Scaled()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = batches(*({"x": number} for number in numbers))
    bad_steps = BadSteps(10, str(tmp_path), seed=0)
    step = TeacherStep(model, data, optimizer, bad_steps, PRECISIONS.get(precision))
    if precision == "float16":
        step.grad_scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    step.train(0, len(numbers))
    return step


@pytest.mark.parametrize(
    ("precision", "scale", "numbers", "skipped", "weight", "scale_after"),
    [
        ("float16", 2.0**120, [1e4], 0, 1.0, 2.0**119),  # the scaler's affair: no update either
        ("float16", 2.0**10, [NAN, 2.0], 1, 0.8, 2.0**10),
        ("float16", 4.0, [None] * 3, 1, 1.0, 1.0),  # with scales 4 and 2 it may be the scale
        ("bfloat16", 1.0, [None], 1, 1.0, None),
        (None, 1.0, [None], 1, 1.0, None),
    ],
)
def test_what_overflows_because_of_the_loss_scale_is_no_bad_step(
    tmp_path, precision, scale, numbers, skipped, weight, scale_after
):
    trainer = amp(tmp_path, precision, *numbers, scale=scale)
    assert trainer.bad_steps.total == skipped
    assert trainer.model.weight.item() == pytest.approx(weight)
    assert scale_after is None or trainer.grad_scaler.get_scale() == scale_after


def test_a_run_continues_in_any_precision(tmp_path):
    for written, read in itertools.product(("float16", "bfloat16", None), repeat=2):
        source, target = amp(tmp_path, written, scale=16.0), amp(tmp_path, read, scale=4.0)
        target.load_state_dict(source.state_dict())
        assert target.grad_scaler.is_enabled() == (read == "float16")
        if read == "float16":
            assert target.grad_scaler.get_scale() == (16.0 if written == "float16" else 4.0)


def test_losses_are_logged_as_they_are_but_none_of_skipped_steps(tmp_path):
    trainer = run(batches(GOOD[3]))
    expected = Toy()(batches(GOOD[3])[0])["first"].item()
    latest = {name: value for name, (value, _) in trainer.storage.latest().items()}
    assert latest["first"] == latest["total_loss"] == expected and latest["second"] == 0.0
    trainer = run(batches(BAD["loss inf"]), tmp_path)
    assert "first" not in trainer.storage.latest()


def test_losses_and_scalars_of_any_precision_come_over_exactly():
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        loss = torch.tensor(1 / 3, dtype=dtype, requires_grad=True)
        scalars = {"share": loss.detach(), "count": torch.tensor(3), "number": 4.0}
        _, losses, logged = fetch_step({"loss": loss}, [loss], scalars, torch.ones(()))
        assert losses["loss"].item() == loss.item()
        assert logged == {"share": loss.item(), "count": 3.0, "number": 4.0}


def test_norms_are_of_gradients_that_exist():
    used, unused, empty = (nn.Parameter(torch.zeros(size)) for size in (2, 2, 0))
    used.grad, empty.grad = torch.tensor([3.0, 4.0]), torch.zeros(0)
    norms = gradient_norms(torch.optim.SGD([used, unused, empty], lr=1.0))
    assert [norm.item() for norm in norms] == [5.0]


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

    def model():
        return DistributedDataParallel(Toy(), broadcast_buffers=False)

    trainer = run(data, f"{folder}/bad", model=model())
    good = run(batches(*GOOD), f"{folder}/none", model=model())
    endless = itertools.repeat(data[2])
    ends = make(endless, f"{folder}/end", max_in_a_row=1, model=model())
    try:
        ends.train(0, 9)
    except DivergenceError:
        ended = ends.iter
    other = make(batches(*({"x": s["x"] + rank} for s in GOOD)), "unused", model=model())
    other.register_hooks([BufferSyncHook(other.model.module)])
    other.train(0, len(GOOD))
    result = {"with": state(trainer), "without": state(good), "ended": ended}
    result["synchronized"] = dict(other.model.state_dict())
    torch.save(result | {"total": trainer.bad_steps.total}, f"{folder}/rank_{rank}.pth")
    dist.destroy_process_group()


def test_processes_skip_together_and_have_the_same_statistics_of_batch_norms(tmp_path):
    mp.start_processes(run_rank, (str(tmp_path),), nprocs=WORLD, start_method="fork")
    ranks = [torch.load(tmp_path / f"rank_{r}.pth", weights_only=True) for r in range(WORLD)]
    for seen in ranks:
        assert seen["total"] == 1 and seen["ended"] == 1
        assert_same(seen["with"], seen["without"])
    assert_same(ranks[0]["synchronized"], ranks[1]["synchronized"])
    [record] = records(tmp_path / "bad")
    assert record["reason"] == "the loss 'second' is -inf"
    files = [{"labeled": [f"rank_{rank}_2.png"]} for rank in range(WORLD)]
    assert [process["files"] for process in record["processes"]] == files
    assert not (tmp_path / "none").exists()
