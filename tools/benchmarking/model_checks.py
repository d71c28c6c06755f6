"""Matching and deformable attention, each alone, in both forms."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarking import checks, ours_model, plain_model, plain_step, synthetic
from benchmarking.bench import Bench
from benchmarking.parts import Part
from benchmarking.timing import Form
from s4m_d2.structures import sample_generators


def matching_part(
    bench: Bench, batches: list[list[dict]], outputs: Callable[[], tuple[list[dict]]]
) -> Part:
    """The assignments of all layers and images of a step; ``outputs`` gives the student's."""
    wanted = [ours_model.targets(bench, batch) for batch in batches]
    for targets in wanted:
        for target in targets:
            target["masks"] = target["masks"].float()
    matcher = plain_step.matcher(bench)

    def run(found: list[dict]) -> list:
        return [
            ours_model.match(bench, output, targets, _generators(bench, batch))
            for output, targets, batch in zip(found, wanted, batches, strict=True)
        ]

    def run_plainly(found: list[dict]) -> list:
        return [
            matcher([output, *output["aux_outputs"]], targets, _generators(bench, batch))
            for output, targets, batch in zip(found, wanted, batches, strict=True)
        ]

    def check() -> None:
        found = [_clear_outputs(bench, targets) for targets in wanted]
        checks.close(run(found), run_plainly(found), "matching", atol=0.1)

    return Part("matching", Form(run, outputs), Form(run_plainly, outputs), check)


def _generators(bench: Bench, batch: list[dict]):
    return sample_generators(batch, "loss_points", bench.device)


def _clear_outputs(bench: Bench, targets: list[dict]) -> dict:
    """Two layers of outputs whose assignment no choice of points can change.

    Query 2 i, or i where queries are few, is instance i; the instances' masks stay far apart.
    """
    queries = bench.cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES
    classes = bench.cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    size = tuple(side // 4 for side in bench.size)
    draws = synthetic.generator("clear outputs")
    layers = []
    for _ in range(2):
        logits = torch.zeros(len(targets), queries, classes + 1)
        masks = torch.full((len(targets), queries, *size), synthetic.NO_MASK)
        for row, target in enumerate(targets):
            found = min(queries, len(target["labels"]))
            chosen = torch.randperm(queries, generator=draws)[:found]
            logits[row, chosen, target["labels"][:found].cpu()] = synthetic.CLASS_LOGIT
            small = torch.nn.functional.interpolate(target["masks"][None, :found].cpu(), size)[0]
            masks[row, chosen] = synthetic.SHARPNESS * (2 * small - 1)
        layers.append(
            {"pred_logits": logits.to(bench.device), "pred_masks": masks.to(bench.device)}
        )
    return {**layers[0], "aux_outputs": layers[1:]}


def deformable_part(bench: Bench) -> Part:
    """Forward and backward of one layer of the pixel decoder's look-ups, for one batch."""
    head = bench.cfg.MODEL.SEM_SEG_HEAD
    heads, points = (
        head.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS,
        head.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS,
    )
    levels = [(bench.size[0] // stride, bench.size[1] // stride) for stride in (32, 16, 8)]
    cells = sum(height * width for height, width in levels)
    draws = synthetic.generator("deformable attention")
    batch = len(bench.labeled)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=draws).to(bench.device)

    value = random(batch, cells, heads, head.CONVS_DIM // heads).requires_grad_()
    # near the query's own place, as an encoder looks: within a few cells
    centers = torch.cat([_centers(level) for level in levels]).to(bench.device)
    offsets = (random(batch, cells, heads, len(levels), points, 2) - 0.5) * 0.1
    locations = (centers[None, :, None, None, None] + offsets).requires_grad_()
    weights = random(batch, cells, heads, len(levels), points).requires_grad_()
    inputs = (value, locations, weights)

    def run(form) -> list[torch.Tensor]:
        output = form(value, levels, locations, weights)
        return [output, *torch.autograd.grad(output.sum(), inputs)]

    def check() -> None:
        found, expected = (
            run(ours_model.deformable_sampling()),
            run(plain_model.deformable_sampling),
        )
        checks.close(found[:2], expected[:2], "deformable attention", rtol=1e-3, atol=1e-3)
        checks.close(found[3], expected[3], "deformable attention", rtol=1e-3, atol=1e-3)

    return Part(
        "deformable attention",
        Form(lambda: run(ours_model.deformable_sampling())),
        Form(lambda: run(plain_model.deformable_sampling)),
        check,
    )


def _centers(size: tuple[int, int]) -> torch.Tensor:
    """(H·W, 2) centers (x, y) of a map's cells, in [0, 1]."""
    y, x = ((torch.arange(side) + 0.5) / side for side in size)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1)
