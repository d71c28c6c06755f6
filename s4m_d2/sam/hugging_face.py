"""SAM, HQ-SAM, SAM 2 and SAM 3's tracker by the classes of Hugging Face's transformers.

A model is a folder with ``config.json`` and ``model.safetensors``, or a name on the hub that was
downloaded before: nothing is downloaded, unpickled or run from it here. The package is optional
(``s4m_d2[transformers]``) and is imported where a backend is built.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s4m_d2.errors import WeightsError, first_names
from s4m_d2.files import atomic_write
from s4m_d2.pretrained import import_optional
from s4m_d2.sam.backend import SAM_BACKEND_REGISTRY, EncodedImages
from s4m_d2.sam.decoder import Prompts
from s4m_d2.sam.point_prompts import Decoder, Frame, PointPromptBackend

# Classes by the model_type of config.json; those of videos hold the model of images.
CLASSES = {
    "sam": "SamModel",
    "sam_hq": "SamHQModel",
    "sam2": "Sam2Model",
    "sam2_video": "Sam2Model",
    "sam3_tracker": "Sam3TrackerModel",
    "sam3_tracker_video": "Sam3TrackerModel",
    "sam3_video": "Sam3TrackerModel",
}
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
PROCESSORS = ("processor_config.json", "preprocessor_config.json")
Pixels = tuple[Sequence[float], Sequence[float]]  # mean and standard deviation of RGB in 0..1
PIXELS: Pixels = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # where no file tells
SAM3_PIXELS: Pixels = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(?<!\.pth)(?<!\.pt)")
LEARNED_TOKENS = ("obj_score_token", "iou_token", "mask_tokens", "hq_token")  # those a model has


class TransformersBackend(PointPromptBackend):
    """Any ``SamModel``, ``SamHQModel``, ``Sam2Model`` or ``Sam3TrackerModel``, as in its forward.

    HQ-SAM's masks are the sums of SAM's and of the high-quality token's.

    The prompts of a pass are decoded image by image, as the modules do it: HQ-SAM fuses the
    encoder's features once per image.
    """

    def __init__(self, sam: Any, pixels: Pixels | None = None, **options: Any) -> None:
        """Freeze ``sam``; options as those of :class:`PointPromptBackend`."""
        self.has_finer_maps = hasattr(sam.mask_decoder, "conv_s0")  # SAM 2 and 3
        self.is_hq = hasattr(sam.mask_decoder, "hq_token")
        if pixels is None:
            pixels = SAM3_PIXELS if sam.config.model_type.startswith("sam3") else PIXELS
        mean, std = 255 * torch.tensor(pixels, device=sam.device)[..., None, None]
        side = sam.prompt_encoder.input_image_size
        frame = Frame(side, mean, std, padded=not self.has_finer_maps)
        super().__init__(sam, sam, frame, **options)

    @property
    def image_encoder(self) -> nn.Module:
        return self.sam.vision_encoder

    def save(self, path: str) -> str:
        """Write the model's folder; returns ``path``."""
        self.sam.save_pretrained(path)
        mean, std = ((x.flatten() / 255).tolist() for x in (self.frame.mean, self.frame.std))
        with atomic_write(Path(path, PROCESSORS[1])) as file:
            json.dump({"image_mean": mean, "image_std": std}, file)
        return path

    def _encode_frames(self, frames: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        found = self.sam.get_image_embeddings(frames)
        if self.has_finer_maps:
            return found[-1], tuple(found[:-1])
        if self.is_hq:
            embeddings, layers = found
            return embeddings, tuple(layer.permute(0, 3, 1, 2) for layer in layers[:1])
        return found, ()

    def _masks(self, encoded: EncodedImages) -> Decoder:
        position = self._positions()

        def decode(prompts: Prompts) -> tuple[Tensor, ...]:
            tokens = self._prompt_tokens(prompts)
            passes: Iterable[tuple[Any, Tensor, Tensor]]  # images, tokens (images, n, T, C), masks
            if prompts.masks is None:
                of_images, no_mask = prompts.by_image(tokens), self._no_mask()
                passes = ((slice(image, image + 1), own[None], no_mask) for image, own in of_images)
            else:  # the modules take one per image: each prompt has an image of its own
                dense = self.sam.prompt_encoder.mask_embed(prompts.masks[:, None])
                passes = [(prompts.image_index, tokens[:, None], dense)]
            parts = []
            for which, own, dense in passes:
                logits, ratings, *_ = self.sam.mask_decoder(
                    image_embeddings=encoded.embeddings[which],
                    image_positional_embeddings=position,
                    sparse_prompt_embeddings=own,
                    dense_prompt_embeddings=dense,
                    multimask_output=True,
                    **self._maps([finer_map[which] for finer_map in encoded.finer_maps]),
                )
                parts.append((logits.flatten(0, 1), ratings.flatten(0, 1)))
            return tuple(map(torch.cat, zip(*parts, strict=True)))

        return decode

    def _features(self, encoded: EncodedImages) -> Decoder:
        images, position = encoded.embeddings + self._no_mask(), self._positions()

        def decode(prompts: Prompts) -> tuple[Tensor, ...]:
            of_images = prompts.by_image(self._prompt_tokens(prompts))
            parts = [self._transformed(images[i, None], position, own) for i, own in of_images]
            return (torch.cat(parts),)

        return decode

    def _positions(self) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):  # as of points
            return self.sam.get_image_wide_positional_embeddings()

    def _no_mask(self) -> Tensor:
        return self.sam.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)

    def _prompt_tokens(self, prompts: Prompts) -> Tensor:
        """(N, P or P + 1, C) as of the prompt encoder, whose boxes come apart from its points."""
        encoder, points = self.sam.prompt_encoder, prompts.points[:, None]
        with torch.autocast(points.device.type, enabled=False):  # positions need more bits
            positions = encoder.shared_embedding(points.float(), 2 * (self.image_side,))
        kinds = torch.cat(list(encoder.point_embed.parameters()))  # of labels 0 to 3
        tokens = positions[:, 0] + kinds[prompts.labels]
        if prompts.has_box and not self.has_finer_maps:
            return tokens
        padding = encoder.not_a_point_embed.weight.expand(len(tokens), -1, -1)
        return torch.cat([tokens, padding], dim=1)

    def _maps(self, maps: list[Tensor]) -> dict[str, Any]:
        """Arguments of the mask decoder that only some models have."""
        if self.has_finer_maps:
            return {"high_resolution_features": maps}
        if self.is_hq:
            layers = [layer.permute(0, 2, 3, 1) for layer in maps]
            return {"intermediate_embeddings": layers, "hq_token_only": False}
        return {}

    def _transformed(self, image: Tensor, position: Tensor, prompts: Tensor) -> Tensor:
        """(N, C, S, S) tokens of an image (1, C, S, S) after each prompt (N, T, C)."""
        decoder = self.sam.mask_decoder
        learned = [getattr(decoder, name, None) for name in LEARNED_TOKENS]
        tokens = torch.cat([table.weight for table in learned if table is not None])
        tokens = torch.cat([tokens.expand(len(prompts), -1, -1), prompts], dim=1)
        _, attended = decoder.transformer(
            point_embeddings=tokens[None],
            image_embeddings=image.expand(len(prompts), -1, -1, -1),
            image_positional_embeddings=position,
            attention_similarity=None,
        )
        return attended[:, 0].transpose(1, 2).unflatten(2, image.shape[2:])


def find_model(checkpoint: str) -> Path:
    """Folder of a model: S4M.SAM.CHECKPOINT itself, or in the hub's cache."""
    from huggingface_hub import snapshot_download

    folder = Path(checkpoint)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(checkpoint, local_files_only=True))
        except (OSError, ValueError):  # not downloaded; no name
            name = checkpoint if HUB_NAME.fullmatch(checkpoint) else "facebook/sam-vit-large"
            raise WeightsError(
                f"S4M.SAM.CHECKPOINT: '{checkpoint}' is neither a folder nor a model in the cache "
                f"of the Hugging Face hub. Download one (hf download {name}) and set "
                f"S4M.SAM.CHECKPOINT to its name ({name}), or to a folder with config.json and "
                f"{WEIGHTS[0]}."
            ) from None
    if not any((folder / name).is_file() for name in WEIGHTS):
        raise WeightsError(
            f"S4M.SAM.CHECKPOINT: '{checkpoint}' has no {WEIGHTS[0]} in {folder}; other files of "
            "weights may run code and are not read. Save the model by save_pretrained()."
        )
    return folder


def load_model(checkpoint: str) -> tuple[nn.Module, Pixels | None]:
    """Load the model of S4M.SAM.CHECKPOINT, in float32, and what its processor's file tells.

    Under ``torch.device("meta")`` the model has no values, and its weights are not read.
    """
    transformers = import_optional("transformers", "S4M.SAM.BACKEND transformers")
    folder, without_values = find_model(checkpoint), torch.empty(0).is_meta
    try:
        kind = transformers.PreTrainedConfig.get_config_dict(folder)[0].get("model_type")
        if kind not in CLASSES:
            raise ValueError(f"config.json has type '{kind}'; expected one of {', '.join(CLASSES)}")
        cls = getattr(transformers, CLASSES[kind])
        config, pixels = cls.config_class.from_pretrained(folder), _read_pixels(folder)
        if not without_values:
            with torch.random.fork_rng(devices=[]):  # initial weights, which are replaced
                sam, found = cls.from_pretrained(
                    folder,
                    config=config,
                    use_safetensors=True,
                    attn_implementation="sdpa",  # a name in config.json might be downloaded code
                    output_loading_info=True,
                )
            if missing := sorted(found["missing_keys"]):
                raise ValueError(f"its weights lack {first_names(missing, 3)} of {cls.__name__}")
    except Exception as error:  # those of the library have no common class
        raise WeightsError(
            f"S4M.SAM.CHECKPOINT: '{checkpoint}' cannot be loaded from {folder} "
            f"({type(error).__name__}): {str(error).strip().partition(chr(10))[0]}"
        ) from error
    return cls(config) if without_values else sam.float(), pixels


def _read_pixels(folder: Path) -> Pixels | None:
    for path in (folder / name for name in PROCESSORS):
        settings = json.loads(path.read_bytes()) if path.is_file() else {}
        settings = settings.get("image_processor", settings)
        if "image_mean" in settings:
            return settings["image_mean"], settings["image_std"]
    return None


@SAM_BACKEND_REGISTRY.register()
def transformers(cfg: Any) -> TransformersBackend:
    """Build the model of ``cfg.S4M.SAM.CHECKPOINT``; MODEL_TYPE does not count."""
    sam, pixels = load_model(cfg.S4M.SAM.CHECKPOINT)
    return TransformersBackend.build_from_config(cfg, sam, pixels)
