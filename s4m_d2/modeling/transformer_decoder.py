"""Masked-attention transformer decoder: queries attend only inside their own masks."""

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import Conv2d
from fvcore.common.registry import Registry
from torch import Tensor, nn

from s4m_d2.errors import require
from s4m_d2.layers import sine_position_encoding
from s4m_d2.modeling.pixel_decoder import NUM_FEATURE_LEVELS, resize, xavier_fill

TRANSFORMER_DECODER_REGISTRY = Registry("TRANSFORMER_DECODER")
TRANSFORMER_DECODER_REGISTRY.__doc__ = """
Transformer decoders, called with ``(cfg, in_channels)``, of MODEL.MASK_FORMER's
TRANSFORMER_DECODER_NAME. They map (feature maps from coarse to fine, mask features) to
``pred_logits``, ``pred_masks`` and ``aux_outputs``.
"""


class SelfAttentionLayer(nn.Module):
    """Attention among the queries, post-norm: (B, Q, C) queries and positions -> (B, Q, C)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.norm = nn.LayerNorm(dim)
        _xavier_matrices(self)

    def forward(self, queries: Tensor, query_positions: Tensor) -> Tensor:
        keys = queries + query_positions
        attended, _ = self.self_attn(keys, keys, queries, need_weights=False)
        return self.norm(queries + attended)


class CrossAttentionLayer(nn.Module):
    """Masked attention of the queries to the cells of one feature map, post-norm."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.multihead_attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.norm = nn.LayerNorm(dim)
        _xavier_matrices(self)

    def forward(
        self,
        queries: Tensor,
        query_positions: Tensor,
        cells: Tensor,
        cell_positions: Tensor,
        blocked: Tensor,
    ) -> Tensor:
        """queries (B, Q, C), cells (B, S, C), blocked (B, Q, S) bool: True is not attended."""
        # nn.MultiheadAttention would repeat the mask for each head, as floats.
        attention = self.multihead_attn
        weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
        given = (queries + query_positions, cells + cell_positions, cells)
        asked, keys, values = (
            F.linear(x, weight, bias).unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
            for x, weight, bias in zip(given, weights, biases, strict=True)
        )
        visible = ~blocked[:, None]
        attended = F.scaled_dot_product_attention(asked, keys, values, attn_mask=visible)
        return self.norm(queries + attention.out_proj(attended.transpose(1, 2).flatten(2)))


class FFNLayer(nn.Module):
    """Feed-forward network, post-norm: (B, Q, C) -> (B, Q, C)."""

    def __init__(self, dim: int, feedforward_dim: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, feedforward_dim)
        self.linear2 = nn.Linear(feedforward_dim, dim)
        self.norm = nn.LayerNorm(dim)
        _xavier_matrices(self)

    def forward(self, queries: Tensor) -> Tensor:
        return self.norm(queries + self.linear2(F.relu(self.linear1(queries))))


class MLP(nn.Module):
    """Linear layers with ReLU between them: (..., dims[0]) -> (..., dims[-1])."""

    def __init__(self, dims: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(dims[i], dims[i + 1]) for i in range(len(dims) - 1))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


@TRANSFORMER_DECODER_REGISTRY.register()
class MultiScaleMaskedTransformerDecoder(nn.Module):
    """Mask2Former's decoder: learnable queries, refined layer by layer over three scales in turn.

    Args:
        in_channels: channels of the feature maps.
        num_classes: object classes, without "no object".
        hidden_dim: channels of the queries, a multiple of 4 and of ``nheads``.
        num_queries: number of queries Q.
        dec_layers: decoder layers; predictions exist for one more, the learnable queries.
        mask_dim: channels of the mask features.
        enforce_input_project: project the feature maps even if their channels are equal.
    """

    @configurable
    def __init__(
        self,
        in_channels: int,
        *,
        num_classes: int,
        hidden_dim: int,
        num_queries: int,
        nheads: int,
        dim_feedforward: int,
        dec_layers: int,
        mask_dim: int,
        enforce_input_project: bool,
    ) -> None:
        super().__init__()
        self.num_layers = dec_layers
        self.transformer_self_attention_layers, self.transformer_cross_attention_layers = (
            nn.ModuleList(kind(hidden_dim, nheads) for _ in range(dec_layers))
            for kind in (SelfAttentionLayer, CrossAttentionLayer)
        )
        self.transformer_ffn_layers = nn.ModuleList(
            FFNLayer(hidden_dim, dim_feedforward) for _ in range(dec_layers)
        )
        self.decoder_norm = nn.LayerNorm(hidden_dim)
        self.query_feat = nn.Embedding(num_queries, hidden_dim)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        self.level_embed = nn.Embedding(NUM_FEATURE_LEVELS, hidden_dim)
        project = in_channels != hidden_dim or enforce_input_project
        self.input_proj = nn.ModuleList(
            xavier_fill(Conv2d(in_channels, hidden_dim, 1)) if project else nn.Identity()
            for _ in range(NUM_FEATURE_LEVELS)
        )
        self.class_embed = nn.Linear(hidden_dim, num_classes + 1)
        self.mask_embed = MLP([hidden_dim] * 3 + [mask_dim])
        # What no layer reads has no gradient, which several processes would wait for.
        self.input_proj[dec_layers:].requires_grad_(False)
        if dec_layers == 0:
            self.query_embed.requires_grad_(False)
            self.level_embed.requires_grad_(False)

    @classmethod
    def from_config(cls, cfg, in_channels: int) -> dict:
        former = cfg.MODEL.MASK_FORMER
        key, layers = "MODEL.MASK_FORMER", former.DEC_LAYERS
        require(f"{key}.PRE_NORM", former.PRE_NORM, not former.PRE_NORM, "False")
        require(f"{key}.DEC_LAYERS", layers, layers >= 1, "1 or more")
        divides = former.HIDDEN_DIM % 4 == 0 == former.HIDDEN_DIM % former.NHEADS
        require(f"{key}.HIDDEN_DIM", former.HIDDEN_DIM, divides, "a multiple of 4 and of NHEADS")
        return {
            "in_channels": in_channels,
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "hidden_dim": former.HIDDEN_DIM,
            "num_queries": former.NUM_OBJECT_QUERIES,
            "nheads": former.NHEADS,
            "dim_feedforward": former.DIM_FEEDFORWARD,
            "dec_layers": layers - 1,
            "mask_dim": cfg.MODEL.SEM_SEG_HEAD.MASK_DIM,
            "enforce_input_project": former.ENFORCE_INPUT_PROJ,
        }

    def forward(
        self, features: list[Tensor], mask_features: Tensor, *, aux_outputs: bool = True
    ) -> dict[str, Tensor | list[dict[str, Tensor]]]:
        """Decode.

        Args:
            features: three maps (B, in_channels, H_l, W_l), from coarse to fine.
            mask_features: (B, mask_dim, h, w).
            aux_outputs: also predict from every earlier layer. If False, earlier layers predict no
                classes and, where that is less work, masks only at the size of the next layer's
                feature map, from mask features resized once. Resizing is linear, so these equal
                the resized masks up to rounding (which may move a cell across a mask's border).

        Returns:
            ``pred_logits`` (B, Q, num_classes + 1), the last class being "no object";
            ``pred_masks`` (B, Q, h, w), logits; ``aux_outputs``, dicts with the same two entries
            for the learnable queries and every layer but the last, or [].
        """
        sizes = [(feature.shape[-2], feature.shape[-1]) for feature in features]
        cells, cell_positions = self._flatten(features, sizes)
        queries, query_positions = (
            embedding.weight.expand(len(mask_features), -1, -1)
            for embedding in (self.query_feat, self.query_embed)
        )
        normed = self.decoder_norm(queries)
        auxiliary = []
        small = [] if aux_outputs else self._small_features(mask_features, sizes)
        for index in range(self.num_layers):
            level = index % NUM_FEATURE_LEVELS
            masks = self._predict_masks(normed, small[level] if small else mask_features)
            if aux_outputs:
                auxiliary.append({"pred_logits": self.class_embed(normed), "pred_masks": masks})
            blocked = _attention_mask(masks, sizes[level])
            queries = self.transformer_cross_attention_layers[index](
                queries, query_positions, cells[level], cell_positions[level], blocked
            )
            queries = self.transformer_self_attention_layers[index](queries, query_positions)
            queries = self.transformer_ffn_layers[index](queries)
            normed = self.decoder_norm(queries)
        return {
            "pred_logits": self.class_embed(normed),
            "pred_masks": self._predict_masks(normed, mask_features),
            "aux_outputs": auxiliary,
        }

    def _flatten(self, features: list[Tensor], sizes: list) -> tuple[list[Tensor], list[Tensor]]:
        """Per level: cells (B, S, C) with the level's embedding, and their positions (1, S, C)."""
        levels = zip(features, self.input_proj, self.level_embed.weight, strict=True)
        cells = [project(x).flatten(2).transpose(1, 2) + embed for x, project, embed in levels]
        channels, device = self.level_embed.embedding_dim, cells[0].device
        codes = [sine_position_encoding(size, channels, device=device) for size in sizes]
        return cells, [code.flatten(1).T[None] for code in codes]

    def _small_features(self, mask_features: Tensor, sizes: list) -> list[Tensor]:
        """Mask features at each level's size; empty if resizing each layer's masks is less work."""
        num_queries = self.query_feat.num_embeddings
        if NUM_FEATURE_LEVELS * mask_features.shape[1] > self.num_layers * num_queries:
            return []
        return [resize(mask_features, size) for size in sizes]

    def _predict_masks(self, normed: Tensor, mask_features: Tensor) -> Tensor:
        return torch.einsum("bqc,bchw->bqhw", self.mask_embed(normed), mask_features)


def _attention_mask(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, Q, S) bool from mask logits: True outside the mask; all False if the mask is empty."""
    blocked = resize(masks.detach(), size).flatten(2) < 0
    return blocked & ~blocked.all(dim=-1, keepdim=True)


def _xavier_matrices(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
