"""Which parts of the decoder the losses of each layer supervise."""

import pytest

LAYERS = 3  # MODEL.MASK_FORMER.DEC_LAYERS counts the learnable queries too


@pytest.fixture
def losses_and_decoder(make_tiny_model, make_sample):
    model = make_tiny_model("MODEL.MASK_FORMER.DEC_LAYERS", LAYERS + 1).train()
    losses = model([make_sample(64, 96, (0, 3))])
    return losses, model.sem_seg_head.predictor


@pytest.mark.parametrize(
    ("name", "depth"), [("loss_ce", 0), ("loss_mask", 1), ("loss_dice", 2), ("loss_mask", LAYERS)]
)
def test_losses_after_some_layers_teach_these_layers_and_the_queries(
    losses_and_decoder, name, depth
):
    """Number 0 is of the learnable queries as they are; the last one has no number."""
    losses, decoder = losses_and_decoder
    losses[name if depth == LAYERS else f"{name}_{depth}"].backward()
    assert decoder.query_feat.weight.grad.any()
    taught = [
        layer.linear2.weight.grad is not None and bool(layer.linear2.weight.grad.any())
        for layer in decoder.transformer_ffn_layers
    ]
    assert taught == [True] * depth + [False] * (LAYERS - depth)
