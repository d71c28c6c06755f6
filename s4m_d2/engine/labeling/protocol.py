"""Protocol of models for the teacher–student trainer, and checks of it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, TypedDict, runtime_checkable

from torch import Tensor, nn

from s4m_d2.errors import ConfigError, InputError

_WHERE = "s4m_d2.engine.S4MTrainable says what is expected; examples/own_meta_arch shows two models"


class QueryPredictions(TypedDict):
    """All predictions of a model for B images, without selection.

    A query is a candidate: a query of Mask2Former, a cell of a grid, a detected box. If images have
    different numbers of queries, ``pred_logits`` and ``pred_masks`` are lists of B tensors.

    Keys:
        pred_logits: (B, Q, K + 1) float class logits for a softmax; the last class is "no object".
            K is MODEL.SEM_SEG_HEAD.NUM_CLASSES. Logarithms of probabilities are such logits.
        pred_masks: (B, Q, h, w) float mask logits (a pixel belongs to the mask above 0). They
            cover the padded frame, so a pixel is padded_size / (h, w) wide. S4M.PSEUDO_LABEL's
            MIN_AREA counts these pixels; its published value is for a quarter of the frame's side.
        image_sizes: B pairs (H, W), the sizes of the input images.
        padded_size: (H, W) of the padded batch, with each image at the top left.
    """

    pred_logits: Tensor | Sequence[Tensor]
    pred_masks: Tensor | Sequence[Tensor]
    image_sizes: Sequence[tuple[int, int]]
    padded_size: tuple[int, int]


@runtime_checkable
class S4MTrainable(Protocol):
    """A Detectron2 meta-architecture that :class:`~s4m_d2.engine.S4MTrainer` can train.

    Register an ``nn.Module`` with these two methods in META_ARCH_REGISTRY and name it in
    MODEL.META_ARCHITECTURE; no base class is needed. ``forward`` is that of every Detectron2 model.
    ``predict_queries`` is new: pseudo-labels are selected by probability, and SAM is prompted where
    mask logits are high, so scores and masks are needed before any threshold. (A detector that
    finds objects more than once must apply NMS first.)

    In each iteration of stage 2 the student's ``forward`` is called twice in training mode, on
    labeled images and on pseudo-labeled ones; the teacher, a copy of the same architecture in eval
    mode, gets one call of ``predict_queries`` under ``torch.no_grad``.

    For structural distillation (S4M.DISTILL.ENABLED, stage 1) a model must add that loss itself and
    have it as a non-empty attribute ``distillation``.
    """

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Compute losses in training mode, predict instances in eval mode.

        Args:
            batched_inputs: samples with "image" (3, H, W) uint8, in the order INPUT.FORMAT. In
                training also "instances" of the image's size, none or more, with ``gt_classes``
                (N,) int64 in [0, K), ``gt_masks`` BitMasks (N, H, W) and ``gt_boxes`` around them.
                In eval mode optionally "height" and "width", the size of the result.

        Returns:
            in training mode a dictionary of weighted 0-dim losses, which are summed (also if no
            image has an instance); in eval mode a dictionary per image whose "instances" have
            ``pred_masks``, ``pred_classes`` and ``scores``.
        """

    def predict_queries(self, batched_inputs: list[dict[str, Any]]) -> QueryPredictions:
        """Predict all candidates of each image; annotations, if any, are not read."""


def check_model(model: nn.Module) -> None:
    """Raise ConfigError if a model is not a :class:`S4MTrainable`."""
    cls = type(model)
    lacking = ["forward"] if cls.forward is nn.Module.forward else []
    lacking += [] if hasattr(model, "predict_queries") else ["predict_queries"]
    if lacking:
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE: {cls.__name__} has no {' and '.join(lacking)}, which the "
            f"teacher–student training needs. Add it, for example in a subclass: {_WHERE}. "
            "(S4M.STAGE teacher trains the model on labeled images alone.)"
        )


def check_predictions(
    predictions: Any, image_sizes: Sequence[tuple[int, int]], model: Any, num_classes: int
) -> None:
    """InputError unless ``predictions`` are :class:`QueryPredictions` of images of sizes (H, W)."""
    for problem in _problems(predictions, image_sizes, num_classes):
        raise InputError(f"{type(model).__name__}.predict_queries: {problem}. {_WHERE}.")


def _problems(found: Any, sizes: Sequence[tuple[int, int]], num_classes: int) -> Iterator[str]:
    keys = QueryPredictions.__annotations__
    lacking = [key for key in keys if not isinstance(found, Mapping) or key not in found]
    if lacking:
        yield f"the result has no {' and '.join(lacking)}"
    for key in ("pred_logits", "pred_masks", "image_sizes"):
        if len(found[key]) != len(sizes):
            yield f"{key} are of {len(found[key])} images; {len(sizes)} images were given"
    padded, classes = tuple(found["padded_size"]), num_classes + 1
    for index, image_size in enumerate(sizes):
        logits, masks = found["pred_logits"][index], found["pred_masks"][index]
        size, image = tuple(found["image_sizes"][index]), f"of image {index},"
        if logits.ndim != 2 or masks.ndim != 3 or len(logits) != len(masks):
            shapes = f"{tuple(logits.shape)} and pred_masks {tuple(masks.shape)}"
            yield f"{image} pred_logits are {shapes}; expected (Q, K + 1) and (Q, h, w)"
        if logits.shape[-1] != classes:
            expected = f"{classes}: MODEL.SEM_SEG_HEAD.NUM_CLASSES, and no-object as the last"
            yield f"{image} pred_logits have {logits.shape[-1]} classes; expected {expected}"
        if not (logits.is_floating_point() and masks.is_floating_point()):
            yield f"{image} logits are {logits.dtype} and masks {masks.dtype}; expected floats"
        if size != tuple(image_size):
            yield f"{image} image_sizes say {size}, but the image was {tuple(image_size)}"
        if padded[0] < size[0] or padded[1] < size[1]:
            yield f"{image} padded_size {padded} is smaller than the image, {size}"
