"""The whole set-prediction loss against literal loops, at the same points and matches."""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from literal_losses import (
    Layer,
    Target,
    cheapest,
    cost_matrix,
    criterion,
    loss_points,
)
from problems import make_criterion, random_layers, random_targets
from seeds import generators

from s4m_d2.losses import mask_losses, matcher

TOLERANCE = {"rel": 2e-5, "abs": 1e-6}


# Sizes of a random problem.
cases = st.fixed_dictionaries(
    {
        "instances": st.lists(st.integers(0, 5), min_size=1, max_size=3),  # of each image
        "queries": st.integers(1, 5),
        "classes": st.integers(1, 4),
        "grid": st.tuples(st.integers(1, 7), st.integers(1, 9)),  # of the predicted masks
        "frame": st.tuples(st.integers(1, 15), st.integers(1, 17)),  # of the targets
        "layers": st.integers(1, 3),
        "num_points": st.integers(1, 12),
        "oversample_ratio": st.sampled_from([1.0, 1.6, 3.0]),
        "importance_ratio": st.sampled_from([0.0, 0.4, 0.75, 1.0]),
        "scale": st.sampled_from([0.3, 4.0, 40.0]),  # of the mask logits
        "weighted": st.booleans(),  # instances and pixels
        "seed": st.integers(0, 2**20),
    }
).map(lambda sizes: SimpleNamespace(**sizes))


def make_problem(case):
    """Outputs and targets as the criterion takes them."""
    sizes = len(case.instances), case.queries, case.classes, case.layers, case.seed
    layers = random_layers(*sizes, size=case.grid, scale=case.scale)
    for layer in layers:
        for values in layer.values():
            values.requires_grad_()
    outputs = {**layers[0], "aux_outputs": layers[1:]}
    targets = random_targets(case.instances, case.classes, case.seed, size=case.frame)
    rng = np.random.default_rng(case.seed)
    # Of weight 0 not all queries of a layer: it has no mean then.
    least = 0.0 if case.queries > max(case.instances) else 0.1
    for target in targets if case.weighted else ():
        weights = rng.choice([least, 0.25, 1.5], size=len(target["labels"]))
        doubts = rng.integers(250, size=target["masks"].shape, dtype=np.uint8)
        target |= {"weights": torch.from_numpy(weights).float(), "doubts": torch.from_numpy(doubts)}
    return outputs, targets


def criterion_of(case):
    ratios = {"oversample_ratio": case.oversample_ratio, "importance_ratio": case.importance_ratio}
    return make_criterion(case.classes, case.num_points, **ratios)


@contextmanager
def recorded_points():
    """All points that are drawn meanwhile, in their order, as arrays."""
    drawn, draw_points = [], mask_losses.draw_points

    def record(*args, **kwargs):
        drawn.append(draw_points(*args, **kwargs).double().numpy())
        return torch.from_numpy(drawn[-1]).float()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mask_losses, "draw_points", record)
        patch.setattr(matcher, "draw_points", record)
        yield drawn


class RecordingMatcher:
    """Remembers what another matcher found: for each layer, pairs for each image."""

    def __init__(self, matcher):
        self.matcher = matcher

    def __call__(self, layers, *args):
        found = self.matcher(layers, *args)
        pairs = [np.stack([image.queries, image.instances], axis=2).tolist() for image in found]
        self.layers = [[list(map(tuple, image[i])) for image in pairs] for i in range(len(layers))]
        return found


def array(tensor):
    return tensor.detach().double().numpy()


def check_matches(layer, targets, matching_points):
    """One to one, as many as possible, and as cheap as the reference's best assignment."""
    images = zip(layer.logits, layer.masks, targets, layer.matches, matching_points, strict=True)
    for logits, masks, target, pairs, points in images:
        cost = cost_matrix(logits, masks, target.labels, target.masks, points)
        for side in (0, 1):
            assert len({pair[side] for pair in pairs}) == len(pairs) == min(cost.shape)
        best = sum(cost[pair] for pair in cheapest(cost))
        assert sum(cost[pair] for pair in pairs) == pytest.approx(best, **TOLERANCE)


def split_points(drawn, targets, matches):
    """Of each image and layer: the points (P, 2) for matching, and those of each mask's loss.

    First come all images' points for matching, then the points for the losses of each image with
    matches; those of an image are of one layer after another.
    """
    if not any(target.labels for target in targets):
        assert not drawn, "points that no loss asked for"
        return [[None] * len(matches)] * len(targets), [[[]] * len(matches)] * len(targets)
    for_matching, drawn = drawn[: len(targets)], drawn[len(targets) :]
    assert all(len(points) == len(matches) for points in for_matching)
    for_losses = []
    for image in range(len(targets)):
        count = len(matches[0][image])
        points = drawn.pop(0) if count else np.zeros((0, 1, 2))
        assert len(points) == count * len(matches)
        for_losses.append([points[i * count : (i + 1) * count] for i in range(len(matches))])
    assert not drawn, "points that no loss asked for"
    return for_matching, for_losses


def reference_losses(case, outputs, targets, drawn, matches):
    """The literal losses at the drawn points; checks each layer's matches on the way."""
    plain = [
        {"weights": torch.ones(len(target["labels"])), "doubts": torch.zeros_like(target["masks"])}
        for target in targets
    ]
    targets = [
        Target(
            target["labels"].tolist(),
            array(target["masks"]),
            target["weights"].tolist(),
            array(target["doubts"]),
        )
        for target in map(dict.__or__, plain, targets)
    ]
    for_matching, for_losses = split_points(drawn, targets, matches)
    num_candidates = int(case.num_points * case.oversample_ratio)
    num_important = int(case.num_points * case.importance_ratio)
    layers = []
    for index, output in enumerate([outputs, *outputs["aux_outputs"]]):
        layer = Layer(array(output["pred_logits"]), array(output["pred_masks"]), matches[index])
        check_matches(layer, targets, [points[index] for points in for_matching])
        for image, (masks, pairs) in enumerate(zip(layer.masks, matches[index], strict=True)):
            its_points = for_losses[image][index]
            drawn_parts = [np.split(mine, [num_candidates]) for mine in its_points]
            layer.points.append(
                [
                    loss_points(masks[query], *parts, num_important)
                    for (query, _), parts in zip(pairs, drawn_parts, strict=True)
                ]
            )
        layers.append(layer)
    assert all(len(p) == case.num_points for layer in layers for i in layer.points for p in i)
    return criterion(layers, targets)


@settings(max_examples=40)
@given(cases)
def test_all_losses_of_all_layers_equal_literal_loops_in_double_precision(case):
    outputs, targets = make_problem(case)
    criterion = criterion_of(case)
    criterion.matcher = RecordingMatcher(criterion.matcher)
    with recorded_points() as drawn:
        losses = criterion(outputs, targets, generators(len(targets), case.seed))
    expected = reference_losses(case, outputs, targets, drawn, criterion.matcher.layers)
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value, **TOLERANCE), name


@pytest.mark.parametrize("name", ["some in each", "weighted"])
def test_gradients_are_the_slope_of_the_literal_loops(name):
    """Central differences along a random direction, at the same points and matches."""
    case, outputs, targets = spread_problem(name)
    criterion = criterion_of(case)
    criterion.matcher = RecordingMatcher(criterion.matcher)
    with recorded_points() as drawn:
        losses = criterion(outputs, targets, generators(len(targets)))
    sum(losses.values()).backward()
    layers = [outputs, *outputs.pop("aux_outputs")]
    rng = np.random.default_rng(case.seed)
    directions = [
        {key: torch.from_numpy(rng.normal(size=value.shape)) for key, value in layer.items()}
        for layer in layers
    ]

    def literal(step):
        first, *others = (
            {key: value.detach().double() + step * direction[key] for key, value in layer.items()}
            for layer, direction in zip(layers, directions, strict=True)
        )
        moved = {**first, "aux_outputs": others}
        found = reference_losses(case, moved, targets, drawn, criterion.matcher.layers)
        return sum(found.values())

    slope = sum(
        (layer[key].grad * direction[key]).sum().item()
        for layer, direction in zip(layers, directions, strict=True)
        for key in layer
    )
    assert slope == pytest.approx((literal(1e-6) - literal(-1e-6)) / 2e-6, rel=1e-3)


WORLD = 2
# Instances of the images of each process: none, or as many as processes at least.
SPREAD = {
    "some in each": ([3, 1], [2, 0]),
    "none in one": ([0, 0], [4, 1]),
    "one for each": ([0, 2], [0, 0]),
    "none at all": ([0, 0], [0, 0]),
    "more than queries": ([7, 1], [0, 2]),
    "weighted": ([3, 1], [4, 0]),
}


def spread_problem(name):
    case = SimpleNamespace(
        instances=sum(SPREAD[name], []),
        queries=5,
        classes=3,
        grid=(6, 8),
        frame=(12, 16),
        layers=2,
        num_points=20,
        oversample_ratio=3.0,
        importance_ratio=0.75,
        scale=4.0,
        weighted=name == "weighted",
        seed=7,
    )
    return case, *make_problem(case)


def run_images(name, images):
    """Losses of some of the images, and the gradients of all images' logits, layer by layer."""
    case, outputs, targets = spread_problem(name)
    layers = [outputs, *outputs["aux_outputs"]]
    rows = [{key: layer[key][images] for key in ("pred_logits", "pred_masks")} for layer in layers]
    own = generators(len(targets))[images]
    losses = criterion_of(case)({**rows[0], "aux_outputs": rows[1:]}, targets[images], own)
    sum(losses.values()).backward()
    return (
        {name: loss.item() for name, loss in losses.items()},
        [layer[key].grad for layer in layers for key in ("pred_logits", "pred_masks")],
    )


def run_rank(rank, folder):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD
    )
    results = {name: run_images(name, slice(2 * rank, 2 * rank + 2)) for name in SPREAD}
    torch.save(results, f"{folder}/rank_{rank}.pth")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two processes, joined by gloo, compute of two images each: losses and gradients."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(run_rank, (str(folder),), nprocs=WORLD, start_method="fork")
    return [torch.load(folder / f"rank_{rank}.pth", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("name", SPREAD)
def test_the_mean_over_processes_is_the_loss_of_all_images_in_one_process(ranks, name):
    """DDP averages the processes' gradients: every query and mask weighs the same."""
    losses, gradients = run_images(name, slice(0, 4))
    parts = [rank[name] for rank in ranks]
    for key, whole in losses.items():
        mean = sum(own[key] for own, _ in parts) / WORLD
        assert mean == pytest.approx(whole, rel=1e-5), key
    for index, whole in enumerate(gradients):
        mean = sum(own[index] for _, own in parts) / WORLD
        torch.testing.assert_close(mean, whole, rtol=1e-4, atol=1e-8)
