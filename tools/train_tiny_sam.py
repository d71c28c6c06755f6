"""Train the tiny SAM, class-agnostic, on toyscapes scenes of its own seed.

    python tools/train_tiny_sam.py --output output/tiny_sam

The scenes are rendered in memory; none of them is in a toyscapes data set of another seed. A run
continues from OUTPUT/last.pth if that exists. The averaged weights go to OUTPUT/tiny_sam.pth
(half precision); copy them to s4m_d2/sam/weights/ to make them the packaged ones. Needs
PyTorch >= 2.9 for its Muon optimizer, which halves the steps.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from tiny_sam_data import PromptBatch, ScenePool, sample_batch  # noqa: E402
from tiny_sam_eval import evaluate_clicks  # noqa: E402
from tiny_sam_init import initialize_tiny_sam  # noqa: E402
from tiny_sam_losses import EncoderHead, mask_losses, true_quality  # noqa: E402

from s4m_d2.sam.decoder import predict_masks, transform_tokens  # noqa: E402
from s4m_d2.sam.tiny import PATCH_SIZE, build_tiny_sam  # noqa: E402

QUALITY_WEIGHT = 2.0
AUXILIARY_WEIGHT = 0.5
ALL_MASKS_WEIGHT = 0.1  # keeps the masks that are not chosen from drifting
NORM_CLIP = 1.0
WEIGHT_DECAY = 0.05
HELD_OUT_SPLIT = "held-out"


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("output/tiny_sam"))
    parser.add_argument("--init", type=Path, help="last.pth or tiny_sam.pth of a run to start from")
    parser.add_argument("--seed", type=int, default=1000, help="of scenes, prompts and weights")
    parser.add_argument("--scenes", type=int, default=1200)
    parser.add_argument("--held-out", type=int, default=100, help="scenes of the evaluation")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--images", type=int, default=8, help="per step")
    parser.add_argument("--prompts", type=int, default=10, help="per image")
    parser.add_argument("--lr", type=float, default=2e-3, help="of AdamW")
    parser.add_argument("--muon-lr", type=float, default=1e-2)
    parser.add_argument("--warmup", type=int, default=60)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--save-every", type=int, default=200, help="steps")
    parser.add_argument("--evaluate-every", type=int, default=400, help="steps")
    parser.add_argument("--workers", type=int, default=2, help="processes that render scenes")
    parser.add_argument(
        "--threads",
        type=int,
        default=2,
        help="replicas that share a step's images, one thread each",
    )
    parser.add_argument("--float32", action="store_true", help="no bfloat16 in the forward pass")
    return parser.parse_args()


class Trainee(nn.Module):
    """The tiny SAM with the auxiliary head that helps its encoder to learn."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.sam = build_tiny_sam()
        initialize_tiny_sam(self.sam, generator)
        self.head = EncoderHead(self.sam.prompt_encoder.embed_dim)

    def loss(self, batch: PromptBatch, generator: torch.Generator, bfloat16: bool) -> torch.Tensor:
        """Loss of one batch; masks are computed only where there is content."""
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            embeddings = self.sam.image_encoder(self.sam.preprocess(batch.images))
            hidden, features = transform_tokens(
                self.sam, embeddings, batch.image_index, batch.points, batch.labels
            )
            rows, columns = (math.ceil(side / PATCH_SIZE) for side in batch.images.shape[-2:])
            content = features[..., :rows, :columns]
            decoded = predict_masks(self.sam, hidden, content, slice(None))
        logits, quality = (value.float() for value in decoded)
        losses = mask_losses(logits, batch.targets, batch.valid)
        multi = losses[:, 1:]
        mask_loss = multi.amin(dim=1) + losses[:, 0] + ALL_MASKS_WEIGHT * multi.mean(dim=1)
        with torch.no_grad():
            truth = true_quality(logits, batch.targets, batch.valid)
        quality_loss = F.mse_loss(quality, truth, reduction="none").sum(dim=1)
        dense = self.head(embeddings.float(), batch.cell_regions, batch.cell_shapes, generator)
        return (mask_loss + QUALITY_WEIGHT * quality_loss).mean() + AUXILIARY_WEIGHT * dense


def learning_rate_factor(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine to 1 %."""
    if step < args.warmup:
        return (step + 1) / args.warmup
    progress = (step - args.warmup) / max(args.steps - args.warmup, 1)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def build_optimizers(model: nn.Module, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the linear layers, AdamW for everything else."""
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    trained = [p for n, p in model.named_parameters() if "mask_downscaling" not in n]
    matrices = [p for p in trained if id(p) in linear]
    others = [p for p in trained if id(p) not in linear]
    groups = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [
        torch.optim.Muon(matrices, lr=args.muon_lr, weight_decay=WEIGHT_DECAY,
                         adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98)),
    ]  # fmt: skip


class Replicas:
    """Copies of a model, one a thread, that share the images of a step.

    On few cores this beats one model on all of them: the threads meet once a step.
    """

    def __init__(self, model: torch.nn.Module, count: int) -> None:
        self.models = [model] + [copy.deepcopy(model) for _ in range(count - 1)]
        self.threads = ThreadPoolExecutor(count)

    def backward(self, loss_of: Callable[[torch.nn.Module, int], torch.Tensor]) -> float:
        """Mean loss over ``loss_of(model, number)``; its gradient is added to the first model's."""

        def work(number: int) -> float:
            loss = loss_of(self.models[number], number) / len(self.models)
            loss.backward()
            return loss.item()

        first, *others = (list(model.parameters()) for model in self.models)
        for parameters in others:
            for source, copied in zip(first, parameters, strict=True):
                copied.data.copy_(source.data)
                copied.grad = None
        total = sum(self.threads.map(work, range(len(self.models))))
        for parameters in others:
            for target, copied in zip(first, parameters, strict=True):
                if copied.grad is not None:
                    target.grad.add_(copied.grad)
        return total


class Run:
    """Model, average, optimizer and position of a training run."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args = args
        self.model = Trainee(torch.Generator().manual_seed(args.seed))
        if args.init is not None:
            self._start_from(args.init)
        self.average = copy.deepcopy(self.model.sam).eval().requires_grad_(False)
        self.optimizers = build_optimizers(self.model, args)
        self.rates = [[g["lr"] for g in o.param_groups] for o in self.optimizers]
        self.replicas = Replicas(self.model, args.threads)
        self.step = 0
        self.seconds = 0.0
        self.checkpoint = args.output / "last.pth"
        if self.checkpoint.exists():
            self._load()

    def _start_from(self, path: Path) -> None:
        """Take the weights of another run: of its last.pth, or of its tiny_sam.pth."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        if "model" in state:
            self.model.load_state_dict(state["model"])
        else:
            self.model.sam.load_state_dict(state)

    def _load(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]

    def save(self) -> None:
        """Write the state of the run and the averaged weights."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
        }
        weights = {name: value.half() for name, value in self.average.state_dict().items()}
        for path, content in (
            (self.checkpoint, state),
            (self.args.output / "tiny_sam.pth", weights),
        ):
            temporary = path.with_name(path.name + ".tmp")
            torch.save(content, temporary)
            os.replace(temporary, path)

    def train_step(self, pool: ScenePool) -> float:
        """One update; the batch is a function of the seed and the step."""
        args = self.args
        images = max(args.images // args.threads, 1)

        def loss_of(model: torch.nn.Module, number: int) -> torch.Tensor:
            rng = np.random.default_rng([args.seed, self.step, number])
            batch = sample_batch(pool, rng, images, args.prompts)
            generator = torch.Generator().manual_seed(int(rng.integers(1 << 62)))
            return model.loss(batch, generator, bfloat16=not args.float32)

        factor = learning_rate_factor(self.step, args)
        for optimizer, rates in zip(self.optimizers, self.rates, strict=True):
            optimizer.zero_grad()
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        loss = self.replicas.backward(loss_of)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), NORM_CLIP)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        decay = min(args.ema, self.step / (self.step + 10))
        with torch.no_grad():
            trained = self.model.sam.parameters()
            for mean, value in zip(self.average.parameters(), trained, strict=True):
                mean.lerp_(value, 1 - decay)
        return loss


def main() -> None:
    """Train, save and evaluate."""
    args = parse_args()
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    run = Run(args)
    pool = ScenePool.render(args.seed, "train", args.scenes, args.workers)
    held_out = ScenePool.render(args.seed, HELD_OUT_SPLIT, args.held_out, args.workers, scales=(1,))
    smooth = None
    with tqdm(total=args.steps, initial=run.step, mininterval=5) as progress:
        while run.step < args.steps:
            start = time.monotonic()
            loss = run.train_step(pool)
            run.seconds += time.monotonic() - start
            smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
            progress.update()
            progress.set_postfix(loss=f"{smooth:.3f}", refresh=False)
            last = run.step == args.steps
            if last or run.step % args.save_every == 0:
                run.save()
            if last or run.step % args.evaluate_every == 0:
                scores = evaluate_clicks(run.average, held_out, args.seed)
                record = {
                    "step": run.step,
                    "seconds": round(run.seconds),
                    "loss": smooth,
                    **asdict(scores),
                }
                with open(args.output / "log.jsonl", "a") as log:
                    log.write(json.dumps(record) + "\n")
                tqdm.write(f"step {run.step}: {scores}")


if __name__ == "__main__":
    main()
