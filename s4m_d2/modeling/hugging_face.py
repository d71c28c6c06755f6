"""Our Mask2Former as Hugging Face's: a folder that its ``from_pretrained`` loads.

Weights get the names of the models that Hugging Face publishes, which all its versions read. The
packages transformers and safetensors are imported only where a folder is written.
"""

import os
import re
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.modeling import ResNet
from torch import Tensor, nn

from s4m_d2.errors import ConfigError, first_names
from s4m_d2.pretrained import renamed

TOLERANCE = 1e-4  # of logits, as a share of the largest one if that is above 1
_SIZE = 224, 352  # of the random image that is compared: no multiples of Swin's windows
_STAGES = ["stage1", "stage2", "stage3", "stage4"]

# Patterns and replacements, applied in this order; <a b c> are the thirds of one weight.
_HEAD_NAMES = {
    r"^criterion\.": "criterion.",
    r"^sem_seg_head\.pixel_decoder\.": "model.pixel_level_module.decoder.",
    r"\.transformer\.(level_embed|encoder)": r".\1",
    r"(encoder\.layers\.\d+)\.norm1\.": r"\1.self_attn_layer_norm.",
    r"(encoder\.layers\.\d+)\.norm2\.": r"\1.final_layer_norm.",
    r"\.decoder\.input_proj\.": ".decoder.input_projections.",
    r"\.((?:adapter|layer)_\d)\.weight$": r".\1.0.weight",
    r"\.((?:adapter|layer)_\d)\.norm\.": r".\1.1.",
    r"\.mask_features\.": ".mask_projection.",
    r"^sem_seg_head\.predictor\.class_embed\.": "class_predictor.",
    r"^sem_seg_head\.predictor\.": "model.transformer_module.",
    r"\.query_feat\.": ".queries_features.",
    r"\.query_embed\.": ".queries_embedder.",
    r"\.transformer_module\.input_proj\.": ".transformer_module.input_projections.",
    r"(_self_attention_layers\.\d+)\.norm\.": r"\1.self_attn_layer_norm.",
    r"(_cross_attention_layers\.\d+)\.norm\.": r"\1.cross_attn_layer_norm.",
    r"(_ffn_layers\.\d+)\.norm\.": r"\1.final_layer_norm.",
    r"\.transformer_\w+_layers\.": ".decoder.layers.",
    r"\.self_attn\.in_proj_": ".self_attn.<q k v>_proj.",
    r"\.multihead_attn\.": ".cross_attn.",
    r"\.linear(\d)\.": r".fc\1.",
    r"\.decoder_norm\.": ".decoder.layernorm.",
    r"\.mask_embed\.layers\.(\d)\.": r".decoder.mask_predictor.mask_embedder.\1.0.",
}
_BACKBONE_NAMES = {
    r"^backbone\.(net\.)?": "model.pixel_level_module.encoder.",
    # ResNet
    r"\.stem\.conv1\.": ".embedder.embedder.",
    **{rf"\.res{i + 2}\.(\d+)\.": rf".encoder.stages.{i}.layers.\1." for i in range(4)},
    **{rf"\.conv{i + 1}\.": f".layer.{i}." for i in range(3)},
    r"(embedder|layer\.\d|shortcut)\.weight$": r"\1.convolution.weight",
    r"(embedder|layer\.\d|shortcut)\.norm\.": r"\1.normalization.",
    # Swin
    r"\.patch_embed\.proj\.": ".embeddings.patch_embeddings.projection.",
    r"\.patch_embed\.norm\.": ".embeddings.norm.",
    **{rf"(encoder\.layers\.){i + 1}(\.downsample\.)": rf"\g<1>{i}\2" for i in range(3)},
    r"module\.encoder\.layers\.": "module.encoder.encoder.layers.",
    r"\.norm1\.": ".layernorm_before.",
    r"\.norm2\.": ".layernorm_after.",
    r"\.attn\.qkv\.": ".attention.self.<query key value>.",
    r"\.attn\.relative": ".attention.self.relative",
    r"\.attn\.proj\.": ".attention.output.dense.",
    r"\.mlp\.fc1\.": ".intermediate.dense.",
    r"\.mlp\.fc2\.": ".output.dense.",
    **{rf"\.norms\.res{i + 2}\.": f".hidden_states_norms.stage{i + 1}." for i in range(4)},
}
_FIRST_LAYER = r"(embedder\.embedder\.convolution|patch_embeddings\.projection)\.weight$"


def save_pretrained(model: Any, folder: str, names: Sequence[str], edges: tuple[int, int]) -> str:
    """Write config.json, model.safetensors and preprocessor_config.json, and check them.

    Args:
        model: an :class:`~s4m_d2.modeling.meta_arch.S4MMaskFormer` in eval mode, on the CPU.
        folder: to write.
        names: of the classes.
        edges: shortest edge and longest edge to which images are resized, px.

    Returns the largest differences of class and mask logits between both models on a random image.
    ConfigError: packages are missing, or Hugging Face's model cannot be the same.
    """
    try:
        from safetensors.torch import save_file
        from transformers import Mask2FormerConfig, Mask2FormerImageProcessor
    except ImportError as error:
        raise ConfigError(
            f"--format transformers needs packages: pip install transformers safetensors ({error})."
        ) from error
    labels = dict(enumerate(names))
    config = Mask2FormerConfig(
        **_sizes(model), id2label=labels, label2id={n: i for i, n in labels.items()}
    )
    config.save_pretrained(folder)
    save_file(_renamed(model), os.path.join(folder, "model.safetensors"), {"format": "pt"})
    flip = slice(None, None, 1 if model.input_format == "RGB" else -1)
    mean, std = ((x.flatten() / 255).tolist()[flip] for x in (model.pixel_mean, model.pixel_std))
    Mask2FormerImageProcessor(
        size=dict(zip(("shortest_edge", "longest_edge"), edges, strict=True)),
        size_divisor=model.size_divisibility,
        image_mean=mean,
        image_std=std,
        num_labels=len(names),
    ).save_pretrained(folder)
    return _checked(model, folder)


def _sizes(model: Any) -> dict[str, Any]:
    """Arguments of ``Mask2FormerConfig``, from the model's layers."""
    try:
        decoder, predictor = model.sem_seg_head.pixel_decoder, model.sem_seg_head.predictor
        encoder_layers = decoder.transformer.encoder.layers
        return {
            "backbone_config": _backbone_config(model.backbone),
            "feature_size": decoder.mask_features.in_channels,
            "mask_feature_size": decoder.mask_features.out_channels,
            "encoder_feedforward_dim": encoder_layers[0].linear1.out_features,
            "encoder_layers": len(encoder_layers),
            "hidden_dim": predictor.query_feat.embedding_dim,
            "num_queries": predictor.query_feat.num_embeddings,
            "decoder_layers": predictor.num_layers + 1,
            "num_attention_heads": encoder_layers[0].self_attn.num_heads,
            "dim_feedforward": predictor.transformer_ffn_layers[0].linear1.out_features,
            "enforce_input_projection": not isinstance(predictor.input_proj[0], nn.Identity),
        }
    except AttributeError as error:
        raise ConfigError(
            f"Hugging Face's Mask2Former cannot be this model ({error}): --format transformers "
            "takes models with our pixel decoder and transformer decoder."
        ) from error


def _backbone_config(backbone: Any) -> Any:
    from transformers import ResNetConfig, SwinConfig

    if isinstance(backbone, ResNet):
        block = backbone.stages[1][0]
        return ResNetConfig(
            embedding_size=backbone.stem.conv1.out_channels,
            hidden_sizes=[stage[-1].out_channels for stage in backbone.stages],
            depths=[len(stage) for stage in backbone.stages],
            layer_type="bottleneck" if hasattr(block, "conv3") else "basic",
            downsample_in_bottleneck=block.conv1.stride == (2, 2),
            out_features=_STAGES,
        )
    net = getattr(backbone, "net", backbone)
    if type(net).__name__ != "SwinTransformer" or backbone.norms is None:
        raise ConfigError(
            f"Hugging Face's Mask2Former has no backbone like this {type(net).__name__}: --format "
            "transformers takes ResNets of Detectron2 (build_resnet_backbone), and Swins of timm "
            "with MODEL.TIMM.OUT_NORM True."
        )
    block = net.layers[0].blocks[0]
    return SwinConfig(
        patch_size=net.patch_embed.patch_size[0],
        embed_dim=net.embed_dim,
        depths=[len(layer.blocks) for layer in net.layers],
        num_heads=[layer.blocks[0].attn.num_heads for layer in net.layers],
        window_size=block.window_size[0],
        mlp_ratio=block.mlp.fc1.out_features / net.embed_dim,
        qkv_bias=block.attn.qkv.bias is not None,
        layer_norm_eps=block.norm1.eps,
        out_features=_STAGES,
    )


def _renamed(model: Any) -> dict[str, Tensor]:
    """The model's weights by Hugging Face's names; the first layer takes RGB."""
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        new = renamed(name, _BACKBONE_NAMES if name.startswith("backbone.") else _HEAD_NAMES)
        if model.input_format == "BGR" and re.search(_FIRST_LAYER, new):
            value = value.flip(1)
        if thirds := re.search(r"<(\w+) (\w+) (\w+)>", new):
            parts = zip(thirds.groups(), value.chunk(3), strict=True)
            state |= {new.replace(thirds[0], word): part for word, part in parts}
        else:
            state[new] = value
    return {name: value.clone().contiguous() for name, value in state.items()}


@torch.no_grad()
def _checked(model: Any, folder: str) -> str:
    """Compare the model with the one that the folder holds, see :func:`save_pretrained`."""
    from transformers import Mask2FormerForUniversalSegmentation

    loaded, info = Mask2FormerForUniversalSegmentation.from_pretrained(
        folder, output_loading_info=True, ignore_mismatched_sizes=True
    )
    wrong = sorted(str(n) for key in ("unexpected_keys", "mismatched_keys") for n in info[key])
    missing = sorted(str(name) for name in info["missing_keys"])  # or unused, as Swin's last norm
    if wrong:
        raise ConfigError(
            "Hugging Face's Mask2Former has not the layers of this model, so --format transformers "
            f"cannot write it: {first_names(wrong, most=3)}."
        )
    image = torch.randn(1, 3, *_SIZE, generator=torch.Generator().manual_seed(0))
    theirs = loaded.eval()(pixel_values=image)
    view = image if model.input_format == "RGB" else image.flip(1)
    ours = model.sem_seg_head(model.backbone(view))
    logits = {"pred_logits": theirs.class_queries_logits, "pred_masks": theirs.masks_queries_logits}
    differences = []
    for key, found in logits.items():
        of_queries = (ours[key] - found).abs().flatten(2).amax(2)
        differences.append(float(of_queries.max()))
        # The median: rounding can move a cell of a query's attention (docs/method.md, Rounding).
        if not of_queries.median() <= TOLERANCE * max(1.0, float(found.abs().max())):
            raise ConfigError(
                f"Hugging Face's Mask2Former gives other {key} for this model (difference "
                f"{differences[-1]:.2g}), so --format transformers cannot write it: it has one "
                "number of heads for both decoders, 4 points in deformable attention, and batch "
                f"norms in ResNets; missing: {first_names(missing, most=3) or 'nothing'}."
            )
    return f"{differences[0]:.1e} (class logits), {differences[1]:.1e} (mask logits)"
