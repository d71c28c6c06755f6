"""The memory format of the backbone's maps."""

import torch


def gradient_vector(model):
    """All gradients; those that backward did not reach are zero."""
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()]
    )


def relative_distance(first, second):
    return ((first - second).norm() / second.norm()).item()


def test_the_memory_format_changes_nothing_but_speed(make_tiny_model, make_sample):
    sample, grads, formats = make_sample(64, 96, [1, 2]), [], []
    for channels_last in (False, True):
        model = make_tiny_model(
            "S4M.CHANNELS_LAST", channels_last, "MODEL.RESNETS.NORM", "FrozenBN"
        ).train()
        model.backbone.register_forward_hook(
            lambda _, args, out: formats.append(
                out["res2"].is_contiguous(memory_format=torch.channels_last)
            )
        )
        sum(model([sample]).values()).backward()
        grads.append(gradient_vector(model))
        assert all(p.is_contiguous() for p in model.parameters())
    assert formats == [False, True]
    assert relative_distance(*grads) < 1e-3
