"""The straightforward forms, by the method's definition: loops over images, masks and layers.

``points``, ``refine``, ``exchange``, ``strong_views``, ``losses`` and ``training_step`` do what
``ours`` does.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from benchmarking.bench import Bench, OneByOne
from s4m_d2.layers import ms_deform_attn
from s4m_d2.losses.matcher import HungarianMatcher, ImageMatches
from s4m_d2.losses.structural_distillation import sample_query_points
from s4m_d2.semi.pseudo_labels import Selection
from s4m_d2.structures import PseudoLabels, sample_generators

BLUR_REACH = 3.0  # half width of the strong view's kernel, in sigmas


def mask_points(
    selection: Selection, num_points: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Clicks drawn on the host, mask by mask: P(pixel) ∝ softmax of the logits inside the mask.

    Returns (N, P, 2) points (x, y) normalized to the content and (N, P) labels, -1 where a mask has
    too few pixels.
    """
    masks, (height, width) = selection.labels.masks, selection.content_size
    points = np.zeros((len(masks), num_points, 2), np.float32)
    labels = np.full((len(masks), num_points), -1)
    for row, (logits, mask) in enumerate(zip(selection.mask_logits, masks, strict=True)):
        inside = mask.cpu().numpy()
        weights = np.where(inside, logits.cpu().numpy().astype(np.float64), -np.inf).ravel()
        weights = np.exp(weights - weights.max())
        count = min(num_points, int(inside.sum()))
        chosen = rng.choice(weights.size, count, replace=False, p=weights / weights.sum())
        y, x = np.divmod(chosen, mask.shape[1])
        pixels = np.stack([(x + 0.5) / width, (y + 0.5) / height], axis=1)
        points[row, :count] = np.minimum(pixels, 1.0)
        labels[row, :count] = 1
    return torch.from_numpy(points).to(masks.device), torch.from_numpy(labels).to(masks.device)


@torch.no_grad()
def points(bench: Bench, selected: Sequence[Selection], rng: np.random.Generator) -> list:
    """Clicks in every mask of the batch, and their labels, image by image."""
    return [mask_points(one, bench.cfg.S4M.REFINE.NUM_POINTS, rng) for one in selected]


@torch.no_grad()
def refine(
    bench: Bench, selected: Sequence[Selection], rng: np.random.Generator
) -> list[PseudoLabels]:
    """Image by image: encode, draw, prompt, choose, resize; no synthetic answer is empty."""
    labels, answers, images = [], bench.answers, bench.rgb
    drawn = points(bench, selected, rng)
    for index, (one, (clicks, kinds)) in enumerate(zip(selected, drawn, strict=True)):
        own = patch.object(answers, "answers", answers.answers[index : index + 1])
        with bench.autocast(), own:
            encoded = answers.encode(images[index, None], [bench.size])
            [output] = answers.prompt(encoded, [clicks], [kinds])
        rated = zip(output.mask_logits, output.iou_predictions, strict=True)
        best = [logits[int(ious.argmax()), None] for logits, ious in rated]
        masks = torch.cat([answers.upscale(logits, bench.size) > 0 for logits in best])
        labels.append(one.labels.with_masks(masks))
    return labels


@torch.no_grad()
def exchange(bench: Bench, images: Sequence[Tensor], labels: Sequence[PseudoLabels]):
    """ARP with the draws that the samples' seeds give: from one image of a pair to the other."""
    arp = bench.cfg.S4M.ARP
    generators = sample_generators(bench.unlabeled, "arp", "cpu")
    order = torch.randperm(len(images), generator=generators[0]).tolist()
    count = max(1, int(arp.PAIR_FRACTION * len(images)))
    new_images, new_labels = list(images), list(labels)
    for pair in list(zip(order[::2], order[1::2], strict=False))[:count]:
        for source, base in (pair, pair[::-1]):
            large = [
                mask.sum().item() >= bench.labeling.arp.min_area for mask in labels[source].masks
            ]
            rows = np.flatnonzero(large)
            draws = None
            if arp.RANDOM_PLACEMENT:
                draws = torch.rand(len(rows), 3, generator=generators[base])
            if len(rows):
                pasted = images[source], labels[source][rows], draws, tuple(arp.SCALE_RANGE)
                new_images[base], new_labels[base] = paste(images[base], labels[base], *pasted)
    return new_images, new_labels


def paste(
    image: Tensor,
    labels: PseudoLabels,
    pixels: Tensor,
    objects: PseudoLabels,
    draws: Tensor | None,
    scale_range: tuple[float, float],
) -> tuple[Tensor, PseudoLabels]:
    """Paste the objects of an image ``pixels`` into another one, mask by mask.

    draws: (N, 3) in [0, 1), scale, x and y of each object; None: pasted in place.
    """
    masks = [mask.clone() for mask in labels.masks]
    for later, mask in enumerate(masks):
        for earlier in masks[:later]:
            earlier[mask] = False
    for number, mask in enumerate(objects.masks):
        shown = pixels
        if draws is not None:
            shown, mask = place(pixels, mask, draws[number], scale_range)
        image = torch.where(mask, shown, image)
        for other in masks:
            other[mask] = False
        masks.append(mask.clone())
    kept = [row for row, mask in enumerate(masks) if mask.any()]
    classes = torch.cat([labels.labels, objects.labels])
    scores = torch.cat([labels.scores, objects.scores])
    return image, PseudoLabels(classes, torch.stack(masks), scores)[np.array(kept)]


def place(
    image: Tensor, mask: Tensor, draw: Tensor, scale_range: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """An image (3, H, W) and one of its masks (H, W), scaled and moved as ``draw`` (3,) says."""
    height, width = mask.shape
    scale = scale_range[0] + (scale_range[1] - scale_range[0]) * float(draw[0])
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    axes = []
    for occupied, side, share in ((rows, height, draw[2]), (columns, width, draw[1])):
        start, end = int(occupied[0]), int(occupied[-1]) + 1
        offset = float(share) * (side - scale * (end - start)) - scale * start
        centers = torch.arange(side, device=mask.device) + 0.5
        axes.append((centers - offset) / scale)
    inside = (axes[0] >= 0) & (axes[0] < height), (axes[1] >= 0) & (axes[1] < width)
    pairs = zip(axes, mask.shape, strict=True)
    nearest = [axis.floor().long().clamp(0, side - 1) for axis, side in pairs]
    moved = mask[nearest[0]][:, nearest[1]] & inside[0][:, None] & inside[1]
    y, x = torch.meshgrid(2 * axes[0] / height - 1, 2 * axes[1] / width - 1, indexing="ij")
    grid = torch.stack([x, y], -1)[None]
    pixels = F.grid_sample(image[None].float(), grid, "bilinear", "border", False)
    return pixels[0].round().to(image.dtype), moved


def strong_view(image: Tensor, settings, generator: torch.Generator) -> Tensor:
    """The strong view of a (3, H, W) uint8 image on the host, with PIL; S4M.STRONG_VIEW."""
    names = ("brightness", "contrast", "saturation", "hue")
    *factors, hue = settings.JITTER
    ranges = [(max(0.0, 1 - s), 1 + s) for s in factors] + [(-hue, hue)]
    order = torch.randperm(4, generator=generator).tolist()
    jitter, gray, blur, sigma, *shares = torch.rand(8, generator=generator).tolist()
    picture = TF.to_pil_image(image.cpu())
    for index in order if jitter < settings.JITTER_PROB else ():
        low, high = ranges[index]
        change = getattr(TF, f"adjust_{names[index]}")
        picture = change(picture, low + (high - low) * shares[index])
    if gray < settings.GRAYSCALE_PROB:
        picture = TF.rgb_to_grayscale(picture, 3)
    if blur < settings.BLUR_PROB:
        low, high = settings.BLUR_SIGMA
        sigma = low + (high - low) * sigma
        kernel = 2 * int(np.ceil(BLUR_REACH * sigma)) + 1
        picture = TF.gaussian_blur(picture, [kernel, kernel], [sigma, sigma])
    return TF.pil_to_tensor(picture).to(image.device)


@torch.no_grad()
def strong_views(bench: Bench, images: Sequence[Tensor]) -> list[Tensor]:
    """The student's images, one by one on the host."""
    generators = sample_generators(bench.unlabeled, "strong_view", "cpu")
    pairs = zip(images, generators, strict=True)
    return [strong_view(image, bench.cfg.S4M.STRONG_VIEW, draws) for image, draws in pairs]


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """One EMA step, tensor by tensor."""
    source = {**dict(student.named_parameters()), **dict(student.named_buffers())}
    for tensors in (teacher.named_parameters(), teacher.named_buffers()):
        for name, tensor in tensors:
            if tensor.is_floating_point():
                tensor.copy_(decay * tensor + (1 - decay) * source[name])
            else:
                tensor.copy_(source[name])


def deformable_sampling(
    value: Tensor, level_sizes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """Deformable attention's look-up, level by level: read all points, then weigh and add.

    value (B, S, heads, C), locations (B, Q, heads, levels, points, 2), weights (B, Q, heads,
    levels, points) -> (B, Q, heads * C).
    """
    dtype = value.dtype
    kind = torch.promote_types(dtype, torch.float32)
    value, locations, weights = value.to(kind), locations.to(kind), weights.to(kind)
    batch, _, heads, channels = value.shape
    queries = locations.shape[1]
    read, start = [], 0
    for level, (height, width) in enumerate(level_sizes):
        cells = value[:, start : start + height * width]
        start += height * width
        maps = cells.permute(0, 2, 3, 1).reshape(batch * heads, channels, height, width)
        grid = 2 * locations[:, :, :, level] - 1  # B, Q, heads, points, 2
        grid = grid.permute(0, 2, 1, 3, 4).reshape(batch * heads, queries, -1, 2)
        read.append(F.grid_sample(maps, grid, align_corners=False))
    sampled = torch.stack(read, dim=3)  # B·heads, C, Q, levels, points
    factors = weights.permute(0, 2, 1, 3, 4).flatten(0, 1)[:, None]
    mixed = (sampled * factors).sum(dim=(3, 4)).view(batch, heads * channels, queries)
    return mixed.transpose(1, 2).to(dtype)


class Matcher(HungarianMatcher):
    """Hungarian matching of one image and one layer at a time, each with its own transfer."""

    @torch.no_grad()
    def __call__(
        self, layers: Sequence[dict], targets: Sequence[dict], generators: Sequence | None = None
    ) -> list[ImageMatches]:
        """An image's generator draws the points of all layers."""
        matches = []
        for index, target in enumerate(targets):
            generator = generators[index] if generators else None
            device = target["masks"].device
            source = generator.device if generator is not None else device
            shape = (len(layers), self.num_points, 2)
            points = torch.rand(shape, generator=generator, device=source).to(device)
            found = []
            for layer, its_points in zip(layers, points, strict=True):
                logits, masks = layer["pred_logits"][index], layer["pred_masks"][index]
                cost = self.cost(logits, masks, target, its_points)
                queries, instances = linear_sum_assignment(cost.cpu().numpy())
                order = instances.argsort()
                found.append((queries[order], instances[order]))
            queries, instances = map(np.stack, zip(*found, strict=True))
            labels = target["labels"].cpu().numpy()
            matches.append(ImageMatches(queries, instances, labels[instances]))
        return matches

    def cost(self, logits: Tensor, masks: Tensor, target: dict, points: Tensor) -> Tensor:
        """(Q, N) costs at points (P, 2), the mask terms by the two sides of the cross-entropy."""
        grid = (2 * points - 1)[None, None]
        predicted = F.grid_sample(masks[None].float(), grid, align_corners=False)[0, :, 0]
        wanted = F.grid_sample(target["masks"][None].float(), grid, align_corners=False)[0, :, 0]
        entropy = partial(F.binary_cross_entropy_with_logits, predicted, reduction="none")
        inside, outside = entropy(torch.ones_like(predicted)), entropy(torch.zeros_like(predicted))
        cross = (inside @ wanted.T + outside @ (1 - wanted).T) / self.num_points
        shares = predicted.sigmoid()
        total = shares.sum(1)[:, None] + wanted.sum(1)[None]
        dice = 1 - (2 * shares @ wanted.T + 1) / (total + 1)
        likely = logits.float().softmax(-1)[:, target["labels"]]
        return self.mask_cost * cross + self.dice_cost * dice - self.class_cost * likely


def distillation(loss, mask_features, images, image_sizes, masks, generators) -> dict[str, Tensor]:
    """What the StructuralDistillation ``loss`` computes of the other arguments.

    The image is repeated for each prompt and goes through the library's whole transformer. The
    grid's content must end where a cell does.
    """
    with torch.no_grad():
        embeddings = loss.backend.encode(images, list(image_sizes)).embeddings
    losses = []
    for index, size in enumerate(image_sizes):
        counts = loss.num_points, loss.num_foreground
        draws = generators[index], images.device
        points = sample_query_points(masks[index], size, *counts, *draws)
        content = loss.backend.content_mask(size)
        rows, columns = int(content.any(1).sum()), int(content.any(0).sum())
        with torch.no_grad():
            tokens = prompted_tokens(loss.backend, embeddings[index], size, points)
            cells = tokens[:, :, :rows, :columns].float()
            target = cosines(cells, points[:, None])[:, 0]
        features = mask_features[index, None].float()
        resized = F.interpolate(features, (rows, columns), mode="bilinear")
        similarity = cosines(resized, points[None])[0]
        losses.append(F.huber_loss(similarity, target, delta=loss.huber_delta))
    return {"loss_sd": loss.weight * torch.stack(losses).mean()}


def prompted_tokens(
    backend, embedding: Tensor, image_size: tuple[int, int], points: Tensor
) -> Tensor:
    """(P, C, S, S) tokens of an image (C, S, S) after each of P clicks, (x, y) in its content."""
    sam, count = backend.decoder, len(points)
    scale = torch.tensor(backend.grid_scale(image_size), device=points.device)
    clicks = (points * scale * backend.image_side - 0.5)[:, None]
    kinds = torch.ones(count, 1, dtype=torch.long, device=points.device)
    prompts, no_mask = sam.prompt_encoder(points=(clicks, kinds), boxes=None, masks=None)
    learned = torch.cat([sam.mask_decoder.iou_token.weight, sam.mask_decoder.mask_tokens.weight])
    tokens = torch.cat([learned.expand(count, -1, -1), prompts], dim=1)
    image = embedding[None].repeat_interleave(count, 0) + no_mask
    position = sam.prompt_encoder.get_dense_pe().repeat_interleave(count, 0)
    _, attended = sam.mask_decoder.transformer(image, position, tokens)
    return attended.transpose(1, 2).reshape(image.shape)


def cosines(maps: Tensor, points: Tensor) -> Tensor:
    """(N, P, h*w) of maps (N, C, h, w) at points (N, P, 2) with all of their cells."""
    chosen = F.grid_sample(maps, 2 * points[:, :, None] - 1, "bilinear", "border", False)
    chosen = F.normalize(chosen[..., 0], dim=1)
    return chosen.transpose(1, 2) @ F.normalize(maps.flatten(2), dim=1)


@contextlib.contextmanager
def plain_model(bench: Bench) -> Iterator[None]:
    """Use plain deformable attention in all models, and plain matching in the criterion."""
    criterion = bench.student.criterion
    matcher = patch.object(criterion, "matcher", Matcher(**vars(criterion.matcher)))
    with matcher, patch.object(ms_deform_attn, "deformable_sampling", deformable_sampling):
        yield


def losses(bench: Bench, rng: np.random.Generator, views=strong_views) -> dict[str, Tensor]:
    """All losses of a step, from its batches on; ``views`` makes the student's images."""
    with plain_model(bench):
        if bench.stage == 1:  # with SAM and the distillation image by image
            loss = partial(distillation, bench.distillation)
            one_by_one = patch.object(bench.distillation, "backend", OneByOne(bench.sam))
            with one_by_one, patch.object(bench.student, "distillation", loss), bench.autocast():
                return bench.student(bench.labeled)
        labels = refine(bench, bench.labeling.select(bench.predictions()), rng)
        images = [sample["image"].to(bench.device) for sample in bench.unlabeled]
        images, labels = exchange(bench, images, labels)
        parts = zip(bench.unlabeled, views(bench, images), labels, strict=True)
        batch = [{**s, "image": image, "instances": its.to_instances()} for s, image, its in parts]
        weight = bench.cfg.S4M.UNSUP_LOSS_WEIGHT
        with bench.autocast():
            found = dict(bench.student(bench.labeled))
            unsupervised = bench.student(batch).items()
            return found | {f"unsup/{name}": weight * loss for name, loss in unsupervised}


def training_step(bench: Bench) -> Callable[[], dict[str, float]]:
    """One step after another, as a plain loop: EMA, losses, backward, update."""
    rng = np.random.default_rng(0)
    scaler = torch.amp.GradScaler(bench.device.type, enabled=bench.half)

    def step() -> dict[str, float]:
        if bench.teacher is not None:
            update_teacher(bench.teacher.model, bench.student, bench.teacher.decay)
        found = losses(bench, rng)
        bench.optimizer.zero_grad()
        scaler.scale(sum(found.values())).backward()
        logged = {name: loss.item() for name, loss in found.items()}
        scaler.unscale_(bench.optimizer)
        scaler.step(bench.optimizer)
        scaler.update()
        return logged

    return step
