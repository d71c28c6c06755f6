"""Masked attention, auxiliary outputs and old weights."""

import pytest
import torch

from s4m_d2.modeling import MultiScaleMaskedTransformerDecoder
from s4m_d2.modeling.transformer_decoder import _attention_mask

QUERIES, DIM = 5, 16


@pytest.fixture
def make_decoder():
    def make(in_channels=DIM, **overrides):
        torch.manual_seed(0)
        options = {
            "num_classes": 3,
            "hidden_dim": DIM,
            "num_queries": QUERIES,
            "nheads": 4,
            "dim_feedforward": 32,
            "dec_layers": 4,
            "mask_dim": 8,
            "enforce_input_project": False,
        }
        return MultiScaleMaskedTransformerDecoder(in_channels, **{**options, **overrides})

    return make


def random_maps(batch=2, channels=DIM):
    rng = torch.Generator().manual_seed(0)
    maps = [torch.randn(batch, channels, 2**i, 2 ** (i + 1), generator=rng) for i in (1, 2, 3)]
    return maps, torch.randn(batch, 8, 16, 32, generator=rng)


def test_attention_is_blocked_outside_the_mask_unless_all_would_be():
    masks = torch.tensor([[[[1.0, -1.0], [-0.5, 2.0]], [[-1.0, -2.0], [-3.0, -4.0]]]])
    blocked = _attention_mask(masks, (2, 2))
    assert blocked.tolist() == [[[False, True, True, False], [False] * 4]]
    masks = torch.tensor([[[[-3.0, 1.0, 1.0, -0.5]]]])  # pairs average to -1 and 0.25
    assert _attention_mask(masks, (1, 2)).tolist() == [[[True, False]]]


def test_an_auxiliary_output_is_of_the_queries_after_so_many_layers(make_decoder):
    """Its gradient reaches these layers and the learnable queries, of which the first one is."""
    decoder = make_decoder()
    maps, mask_features = random_maps()
    found = decoder(maps, mask_features)
    layers = [layer.linear2.weight for layer in decoder.transformer_ffn_layers]
    for depth, output in enumerate([*found["aux_outputs"], found]):
        for name, shape in (("pred_logits", (2, QUERIES, 4)), ("pred_masks", (2, QUERIES, 16, 32))):
            assert output[name].shape == shape
            inputs, total = [decoder.query_feat.weight, *layers], output[name].square().sum()
            queries, *grads = torch.autograd.grad(total, inputs, None, True, allow_unused=True)
            assert queries.any()
            taught = [grad is not None and bool(grad.any()) for grad in grads]
            assert taught == [True] * depth + [False] * (4 - depth)
    assert depth == 4


@pytest.mark.parametrize("batch", [1, 3])
def test_without_auxiliary_outputs_the_queries_see_the_same_cells(make_decoder, batch):
    """In double precision, where no cell lies within rounding of a mask's border."""
    decoder = make_decoder(dec_layers=7).double()
    maps, mask_features = random_maps(batch)
    maps, mask_features = [m.double() for m in maps], mask_features.double()
    seen = []
    for layer in decoder.transformer_cross_attention_layers:
        layer.register_forward_hook(lambda module, args, output: seen.append(args[-1]))
    full = decoder(maps, mask_features)
    lean = decoder(maps, mask_features, aux_outputs=False)
    assert lean["aux_outputs"] == []
    for masks, lean_masks in zip(seen[:7], seen[7:], strict=True):
        assert torch.equal(masks, lean_masks)
        assert masks.any() and not masks.all()
    for name in ("pred_logits", "pred_masks"):
        torch.testing.assert_close(lean[name], full[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("in_channels", "enforce", "projected"),
    [(16, False, False), (16, True, True), (8, False, True)],
)
def test_input_is_projected_where_needed_or_enforced(make_decoder, in_channels, enforce, projected):
    decoder = make_decoder(in_channels, dec_layers=1, enforce_input_project=enforce)
    assert ("input_proj.0.weight" in decoder.state_dict()) == projected
    maps, mask_features = random_maps(channels=in_channels)
    assert decoder(maps, mask_features)["pred_masks"].shape == (2, QUERIES, 16, 32)


def test_decoder_weights_start_as_xavier_uniform(make_decoder):
    decoder = make_decoder(hidden_dim=64)
    for name, fan_in, fan_out in (
        ("transformer_cross_attention_layers.0.multihead_attn.in_proj_weight", 64, 192),
        ("transformer_self_attention_layers.1.self_attn.out_proj.weight", 64, 64),
        ("transformer_ffn_layers.2.linear1.weight", 64, 32),
    ):
        weight = decoder.get_parameter(name)
        bound = (6 / (fan_in + fan_out)) ** 0.5
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
