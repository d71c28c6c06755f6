"""The training loop, its hooks, and one optimization step with or without mixed precision."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage
from torch import nn

__all__ = ["AMPTrainer", "HookBase", "SimpleTrainer", "TrainerBase"]


class HookBase:
    """Called at fixed points of the loop; ``self.trainer`` is set on registration.

    ``after_train`` also runs after an exception. ``before_step`` should be cheap. A hook with a
    ``state_dict`` that is not empty also has ``load_state_dict``.
    """

    trainer: TrainerBase = None  # a weak reference

    def before_train(self) -> None: ...

    def after_train(self) -> None: ...

    def before_step(self) -> None: ...

    def after_backward(self) -> None: ...

    def after_step(self) -> None: ...

    def state_dict(self) -> dict:
        return {}


class TrainerBase:
    """A loop with hooks that knows nothing of models or data.

    Attributes: ``iter``, the current iteration, equal to ``max_iter`` in ``after_train`` only if
    training finished; ``start_iter``, ``max_iter``; ``storage``, open while training runs.
    """

    max_iter: int
    storage: EventStorage

    def __init__(self) -> None:
        self._hooks: list[HookBase] = []
        self.iter = self.start_iter = 0

    def register_hooks(self, hooks: Iterable[HookBase | None]) -> None:
        """Add hooks, which run in the order of registration; None is left out."""
        hooks = [hook for hook in hooks if hook is not None]
        for hook in hooks:
            assert isinstance(hook, HookBase), f"not a HookBase: {hook!r}"
            hook.trainer = weakref.proxy(self)
        self._hooks.extend(hooks)

    def train(self, start_iter: int, max_iter: int) -> None:
        """Run the iterations in [start_iter, max_iter)."""
        logger = logging.getLogger(__name__)
        logger.info(f"Starting training from iteration {start_iter}")
        self.iter = self.start_iter = start_iter
        self.max_iter = max_iter
        with EventStorage(start_iter) as self.storage:
            try:
                self.before_train()
                for self.iter in range(start_iter, max_iter):
                    self.before_step()
                    self.run_step()
                    self.after_step()
                self.iter += 1
            except Exception:
                logger.exception("Exception during training:")
                raise
            finally:
                self.after_train()

    def run_step(self) -> None:
        raise NotImplementedError

    def _run_hooks(self, point: str) -> None:
        for hook in self._hooks:
            getattr(hook, point)()

    def before_train(self) -> None:
        self._run_hooks("before_train")

    def after_train(self) -> None:
        self.storage.iter = self.iter
        self._run_hooks("after_train")

    def before_step(self) -> None:
        self.storage.iter = self.iter
        self._run_hooks("before_step")

    def after_backward(self) -> None:
        self._run_hooks("after_backward")

    def after_step(self) -> None:
        self._run_hooks("after_step")

    def state_dict(self) -> dict[str, Any]:
        """The iteration and, by class name, the first state of each kind of hook."""
        hooks: dict[str, Any] = {}
        for hook in self._hooks:
            if state := hook.state_dict():
                hooks.setdefault(type(hook).__qualname__, state)
        return {"iteration": self.iter, **({"hooks": hooks} if hooks else {})}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.iter = state_dict["iteration"]
        by_name = {type(hook).__qualname__: hook for hook in reversed(self._hooks)}
        for name, state in state_dict.get("hooks", {}).items():
            if name in by_name:
                by_name[name].load_state_dict(state)
            else:
                logging.getLogger(__name__).warning(f"There is no hook for the state of {name}")


class SimpleTrainer(TrainerBase):
    """One model, one data source, one optimizer: losses, gradients, update.

    ``model``, put into training mode, takes an element of ``data_loader`` and returns a loss or a
    dict of losses, which are summed.
    """

    def __init__(self, model: nn.Module, data_loader: Iterable, optimizer: torch.optim.Optimizer):
        super().__init__()
        model.train()
        self.model, self.data_loader, self.optimizer = model, data_loader, optimizer
        self._data_loader_iter_obj: Iterator | None = None

    @property
    def _data_loader_iter(self) -> Iterator:
        if self._data_loader_iter_obj is None:
            self._data_loader_iter_obj = iter(self.data_loader)
        return self._data_loader_iter_obj

    def reset_data_loader(self, data_loader_builder: Callable[[], Iterable]) -> None:
        """Drop the loader, then build its successor, so that only one exists at a time."""
        del self.data_loader
        self._data_loader_iter_obj = None
        self.data_loader = data_loader_builder()

    def run_step(self) -> None:
        assert self.model.training, f"[{type(self).__name__}] model was changed to eval mode!"
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        loss_dict = self._forward(data)
        if isinstance(loss_dict, torch.Tensor):
            loss_dict = {"total_loss": loss_dict}
        self.optimizer.zero_grad()
        self._backward(sum(loss_dict.values()))
        self.after_backward()
        self.write_metrics(loss_dict, data_time, self.iter)
        self._update()

    def _forward(self, data: Any) -> torch.Tensor | dict[str, torch.Tensor]:
        return self.model(data)

    def _backward(self, losses: torch.Tensor) -> None:
        losses.backward()

    def _update(self) -> None:
        self.optimizer.step()

    @staticmethod
    def write_metrics(
        loss_dict: Mapping[str, torch.Tensor], data_time: float, cur_iter: int
    ) -> None:
        """Put losses, averaged over the ranks, their sum as "total_loss", and the slowest rank's
        loading time. Raises FloatingPointError for a sum that is not finite."""
        storage = get_event_storage()
        storage.put_scalar("rank_data_time", data_time, cur_iter=cur_iter)
        losses = {name: loss.detach().cpu().item() for name, loss in loss_dict.items()}
        gathered = comm.gather((losses, data_time))
        if not comm.is_main_process():
            return
        storage.put_scalar("data_time", max(t for _, t in gathered), cur_iter=cur_iter)
        means = {name: np.mean([other[name] for other, _ in gathered]) for name in losses}
        total = sum(means.values())
        if not np.isfinite(total):
            raise FloatingPointError(f"Loss is infinite or NaN at iteration={cur_iter}: {means}")
        storage.put_scalar("total_loss", total, cur_iter=cur_iter)
        if len(means) > 1:
            storage.put_scalars(cur_iter=cur_iter, **means)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.optimizer.load_state_dict(state_dict["optimizer"])


class AMPTrainer(SimpleTrainer):
    """``SimpleTrainer`` with automatic mixed precision on CUDA; ``precision`` is autocast's."""

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable,
        optimizer: torch.optim.Optimizer,
        *,
        grad_scaler: torch.amp.GradScaler | None = None,
        precision: torch.dtype = torch.float16,
    ):
        super().__init__(model, data_loader, optimizer)
        self.grad_scaler = torch.amp.GradScaler("cuda") if grad_scaler is None else grad_scaler
        self.precision = precision

    def run_step(self) -> None:
        assert torch.cuda.is_available(), "[AMPTrainer] CUDA is required for AMP training!"
        super().run_step()

    def _forward(self, data: Any) -> torch.Tensor | dict[str, torch.Tensor]:
        with torch.autocast("cuda", dtype=self.precision):
            return self.model(data)

    def _backward(self, losses: torch.Tensor) -> None:
        self.grad_scaler.scale(losses).backward()

    def _update(self) -> None:
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
