"""The criterion takes all layers together: equal to one after another, and it waits once."""

import pytest
import torch
from layer_by_layer import layer_losses
from problems import make_criterion, random_layers, random_targets
from seeds import generators
from torch.profiler import ProfilerActivity, profile

from s4m_d2.errors import InputError
from s4m_d2.losses import mask_losses, matcher
from s4m_d2.transfers import TO_HOST

CLASSES, QUERIES, LAYERS, POINTS = 3, 5, 3, 40
CANDIDATES, IMPORTANT = 3 * POINTS, 30
# Names under which PyTorch shows that the host reads a value of the device, or a size that
# depends on values.
WAITING = {
    "aten::item",
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::masked_select",
    "aten::repeat_interleave",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::equal",
}


def make_layers(batch):
    return random_layers(batch, QUERIES, CLASSES, LAYERS)


def make_targets(*counts):
    return random_targets(counts, CLASSES)


def evaluate(layers, targets, criterion=None):
    """Losses and the gradient of their sum (weighted, so that layers do not cancel)."""
    tensors = [tensor for layer in layers for tensor in layer.values()]
    for tensor in tensors:
        tensor.grad = None
        tensor.requires_grad_()
    losses = (criterion or make_criterion(CLASSES, POINTS))(
        {**layers[0], "aux_outputs": layers[1:]}, targets, generators(len(targets))
    )
    sum(loss * (2 + i) for i, loss in enumerate(losses.values())).backward()
    return losses, [tensor.grad for tensor in tensors]


@pytest.mark.parametrize("counts", [(3,), (2, 0, 4), (QUERIES, 1), (QUERIES + 3, 2), (1, 0)])
def test_all_layers_together_are_the_layers_one_by_one(counts, monkeypatch):
    drawn, draw_points = [], mask_losses.draw_points

    def record(*args, **kwargs):
        drawn.append(draw_points(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(mask_losses, "draw_points", record)
    monkeypatch.setattr(matcher, "draw_points", record)
    layers, targets = make_layers(len(counts)), make_targets(*counts)
    losses, gradients = evaluate(layers, targets)

    for_matching, for_losses = drawn[: len(counts)], iter(drawn[len(counts) :])
    for_losses = [next(for_losses).unflatten(0, (LAYERS, -1)) if n else [None] * 3 for n in counts]
    copies = [{k: v.detach().clone().requires_grad_() for k, v in x.items()} for x in layers]
    expected = {}
    for index, layer in enumerate(copies):
        points = [image[index] for image in for_matching], [image[index] for image in for_losses]
        one = layer_losses(layer, targets, *points, CANDIDATES, IMPORTANT)
        suffix = f"_{index - 1}" if index else ""
        expected |= {name + suffix: loss for name, loss in one.items()}
    assert losses.keys() == expected.keys()
    torch.testing.assert_close(losses, {name: expected[name] for name in losses})
    sum(expected[name] * (2 + i) for i, name in enumerate(losses)).backward()
    for gradient, reference in zip(
        gradients, (tensor.grad for layer in copies for tensor in layer.values()), strict=True
    ):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("counts", "waits"), [((3, 0, 7), 1), ((0, 0), 0)])
def test_the_host_waits_once_for_all_images_and_layers(counts, waits):
    layers, targets = make_layers(len(counts)), make_targets(*counts)
    evaluate(layers, targets)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        evaluate(layers, targets)
    names = [event.name for event in profiled.events()]
    assert names.count(TO_HOST) == waits
    assert not WAITING & set(names)
    assert "aten::grid_sampler_2d" in names or not any(counts)


@pytest.mark.gpu
def test_a_gpu_is_waited_for_in_the_matcher_only(monkeypatch):
    """PyTorch itself raises where the host would wait."""

    def allowed(*tensors):
        torch.cuda.set_sync_debug_mode("default")
        try:
            return to_host(*tensors)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    to_host = matcher.to_host
    monkeypatch.setattr(matcher, "to_host", allowed)
    layers = [{k: v.cuda().requires_grad_() for k, v in x.items()} for x in make_layers(2)]
    targets = [{k: v.cuda() for k, v in target.items()} for target in make_targets(3, 7)]
    criterion, outputs = (
        make_criterion(CLASSES, POINTS).cuda(),
        {**layers[0], "aux_outputs": layers[1:]},
    )
    sum(criterion(outputs, targets, generators(2, device="cuda")).values()).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sum(criterion(outputs, targets, generators(2, device="cuda")).values()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_order_of_images_and_instances_does_not_matter_to_the_matches():
    """An image beside one with more instances, or fewer, finds what it finds alone."""
    counts = (1, 4, 0, 8)
    layers, targets = make_layers(len(counts)), make_targets(*counts)
    find = make_criterion(CLASSES, POINTS).matcher
    together = find(layers, targets, generators(4))
    for image, (target, rng) in enumerate(zip(targets, generators(4), strict=True)):
        alone = [{k: v[image : image + 1] for k, v in layer.items()} for layer in layers]
        order = torch.arange(counts[image]).flip(0)
        [found] = find(alone, [{k: v[order] for k, v in target.items()}], [rng])
        assert found.num_instances == counts[image]
        for layer in range(LAYERS):
            mine = zip(
                together[image].queries[layer], together[image].instances[layer], strict=True
            )
            again = zip(found.queries[layer], order[found.instances[layer]].tolist(), strict=True)
            assert sorted(mine) == sorted(again)


@pytest.mark.parametrize("label", [-1, CLASSES, 99])
def test_a_label_that_is_no_class_is_refused(label):
    targets = make_targets(2, 3)
    targets[1]["labels"][2] = label
    with pytest.raises(InputError, match=rf"image 1 .* class id {label} .* 0\.\.2"):
        make_criterion(CLASSES, POINTS)({**make_layers(2)[0]}, targets, generators(2))


def test_reading_a_few_masks_at_a_time_changes_nothing(monkeypatch):
    layers, targets = make_layers(2), make_targets(4, QUERIES + 3)
    expected, _ = evaluate(layers, targets)
    monkeypatch.setitem(mask_losses.PIXELS_AT_ONCE, "cpu", 2 * 16 * 24)
    monkeypatch.setattr(mask_losses, "POINTS_AT_ONCE", 4 * CANDIDATES)
    losses, _ = evaluate(layers, targets)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
