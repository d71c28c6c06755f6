"""Several batches in one forward pass: the losses and gradients of a pass each."""

import pytest
import torch
from torch import nn

from s4m_d2.modeling.parts import split_outputs, uses_batch_statistics


class Distillation:
    """A loss of the mask features, images and seeds that each part has of its own."""

    def __call__(self, mask_features, images, image_sizes, masks, generators):
        seed = sum(generator.initial_seed() for generator in generators)
        return {"loss_sd": (mask_features.square().mean() + images.float().mean() / 255) * seed}


@pytest.fixture
def run(make_tiny_model):
    """(parts, options) → losses and gradients together and apart, and the batches that each saw."""

    def run(parts, *options, mode=None, distillation=None):
        model = make_tiny_model(*options).train()
        if mode is not None:
            mode(model)
        model.distillation = distillation
        batches = []
        model.backbone.register_forward_hook(lambda _, args, out: batches.append(len(args[0])))
        outcomes = []
        for apart in (False, True):
            model.zero_grad()
            start = len(batches)
            losses = [model(part) for part in parts] if apart else model(*parts)
            weights = torch.arange(1.0, len(parts) + 1)
            sum(w * sum(part.values()) for w, part in zip(weights, losses, strict=True)).backward()
            gradients = gradient_vector(model)
            outcomes.append((losses, gradients, batches[start:]))
        return outcomes

    return run


def gradient_vector(model):
    """All gradients; those that backward did not reach are zero."""
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()]
    )


def relative_distance(first, second):
    return ((first - second).norm() / second.norm()).item()


def assert_close(together, apart):
    for first, second in zip(together[0], apart[0], strict=True):
        assert first.keys() == second.keys()
        for name in first:
            torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-5, msg=name)
    assert relative_distance(together[1], apart[1]) < 1e-4


@pytest.fixture
def parts(make_sample):
    """Two batches that differ in number and size of images and instances; one padded size."""
    labeled = [make_sample(64, 96, [1, 5, 5]), make_sample(50, 70, [2], seed=3)]
    unlabeled = [make_sample(64, 80, labels, seed=7 + len(labels)) for labels in ([], [4], [0, 3])]
    return [labeled, unlabeled]


@pytest.mark.parametrize("norm", ["FrozenBN", "GN"])
def test_parts_of_one_size_go_through_together(norm, run, parts):
    together, apart = run(parts, "MODEL.RESNETS.NORM", norm)
    assert (together[2], apart[2]) == ([5], [2, 3])
    assert_close(together, apart)


def test_each_part_has_its_own_distillation(run, parts):
    together, apart = run(parts, "MODEL.RESNETS.NORM", "GN", distillation=Distillation())
    assert together[2] == [5]
    assert "loss_sd" in together[0][1] and together[0][0]["loss_sd"] != together[0][1]["loss_sd"]
    assert_close(together, apart)


def test_a_frozen_batch_norm_in_eval_mode_does_not_keep_the_parts_apart(run, parts):
    together, apart = run(parts, mode=lambda model: model.backbone.eval())
    assert together[2] == [5]
    assert_close(together, apart)


@pytest.mark.parametrize("norm", ["BN", "SyncBN"])
def test_norms_over_the_batch_keep_the_parts_apart(norm, run, parts):
    def as_on_one_process(model):  # SyncBN itself computes on GPUs only
        for module in model.modules():
            if isinstance(module, nn.SyncBatchNorm):
                module.forward = lambda x: x * 1.0

    together, apart = run(parts, "MODEL.RESNETS.NORM", norm, mode=as_on_one_process)
    assert together[2] == apart[2] == [2, 3]
    assert_close(together, apart)


def test_parts_that_would_be_padded_otherwise_together_stay_apart(run, make_sample):
    parts = [[make_sample(64, 96, [1])], [make_sample(64, 128, [2], seed=1)]]
    together, apart = run(parts, "MODEL.RESNETS.NORM", "GN")
    assert together[2] == apart[2] == [1, 1]
    assert_close(together, apart)


def test_one_batch_gives_one_dictionary_and_several_give_a_list(make_tiny_model, make_sample):
    model = make_tiny_model("MODEL.RESNETS.NORM", "GN").train()
    alone = model([make_sample(64, 64, [1])])
    [first, second] = model([make_sample(64, 64, [1])], [make_sample(64, 64, [1])])
    for name in alone:
        torch.testing.assert_close(first[name], alone[name], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(second[name], alone[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        (nn.BatchNorm2d(4), True),
        (nn.SyncBatchNorm(4), True),
        (nn.BatchNorm2d(4).eval(), False),
        (nn.BatchNorm2d(4, track_running_stats=False).eval(), True),
        (nn.GroupNorm(2, 4), False),
        (nn.InstanceNorm2d(4), False),
        (nn.LayerNorm(4), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_norms_that_mix_images_are_found(norm, expected):
    assert uses_batch_statistics(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(norm))) is expected


def test_outputs_are_split_down_to_the_layers():
    outputs = {
        "pred_logits": torch.arange(6.0).view(3, 2),
        "aux_outputs": [{"pred_logits": torch.arange(6.0).view(3, 2) + 10 * i} for i in (1, 2)],
    }
    first, second = split_outputs(outputs, [1, 2])
    assert first["pred_logits"].tolist() == [[0, 1]]
    assert second["pred_logits"].tolist() == [[2, 3], [4, 5]]
    assert [aux["pred_logits"].tolist() for aux in first["aux_outputs"]] == [[[10, 11]], [[20, 21]]]
    assert [aux["pred_logits"][1].tolist() for aux in second["aux_outputs"]] == [[14, 15], [24, 25]]
    assert split_outputs({"aux_outputs": []}, [1, 2]) == [{"aux_outputs": []}] * 2
