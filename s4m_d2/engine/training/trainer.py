"""The trainers of the stages, on Detectron2's ``DefaultTrainer``."""

import functools
import logging
import math
import os
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, build_detection_test_loader
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase
from detectron2.engine.hooks import EvalHook
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.projects.deeplab import build_lr_scheduler
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from s4m_d2.data import splits
from s4m_d2.data.images import open_image
from s4m_d2.engine import stages
from s4m_d2.engine.checkpointing.checkpoint import S4MCheckpointer
from s4m_d2.engine.figures.figure_set import figure_hooks
from s4m_d2.engine.labeling import quality
from s4m_d2.engine.labeling.gate import (
    RESULT,
    Decision,
    apply_decision,
    compare_refinement,
    held_out_records,
)
from s4m_d2.engine.labeling.protocol import check_model
from s4m_d2.engine.labeling.pseudo_labeling import PseudoLabeling
from s4m_d2.engine.own_data import class_lists
from s4m_d2.engine.rng import derive_seed
from s4m_d2.engine.training import build, hooks
from s4m_d2.engine.training.step import PRECISIONS, StudentStep, TeacherStep
from s4m_d2.engine.training.stop_signals import StopHook
from s4m_d2.errors import ConfigError, WeightsError
from s4m_d2.evaluation import build_evaluator, masks_as_rle
from s4m_d2.report import stored_results, write_results
from s4m_d2.semi.ema_teacher import EMATeacher, TeacherPhase
from s4m_d2.tiling import TiledModel, build_tiling

logger = logging.getLogger(__name__)


class TeacherTrainer(DefaultTrainer):
    """Stage 1: supervised training of the teacher, with structural distillation if enabled.

    Also a plain supervised Mask2Former trainer (S4M.DISTILL.ENABLED False). Resuming is exact:
    draws and data order are functions of the iteration.
    """

    _trainer: TeacherStep
    pseudo_labeling: PseudoLabeling | None = None  # stage 2's

    def __init__(self, cfg: CfgNode) -> None:
        # As in DefaultTrainer, but with our step, checkpointer and choice of devices.
        TrainerBase.__init__(self)
        self.cfg, self.max_iter = cfg, cfg.SOLVER.MAX_ITER
        self._evaluated = 0  # number of iterations at the last evaluation
        folder = os.path.join(cfg.OUTPUT_DIR, "bad_batches")
        self.bad_steps = hooks.BadSteps(cfg.S4M.MAX_BAD_STEPS, folder, cfg.SEED)
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        if comm.get_world_size() > 1:
            # Without device_ids: with them, samples would be copied to the device synchronously.
            model = DistributedDataParallel(model, broadcast_buffers=False)
        precision = PRECISIONS[cfg.S4M.AMP_PRECISION] if cfg.SOLVER.AMP.ENABLED else None
        self._trainer = self.build_step(model, data_loader, optimizer, self.bad_steps, precision)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        keep, state = cfg.SOLVER.CHECKPOINT_KEEP, weakref.proxy(self)
        classes = class_lists(cfg, cfg.MODEL.WEIGHTS)
        self.checkpointer = S4MCheckpointer(
            self.trained_model, cfg.OUTPUT_DIR, keep=keep, classes=classes, trainer=state
        )
        self.register_hooks(self.build_hooks())
        self._after_saving = self._hooks[self._hooks.index(self._stop_hook) :]

    def build_step(self, *parts: Any) -> TeacherStep:
        """Build the stage's step from the first arguments of its class."""
        return TeacherStep(*parts)

    def build_hooks(self):
        self._stop_hook = StopHook(self.checkpointer)
        own = [
            self._stop_hook,
            hooks.FinishedEvalHook(self.cfg.TEST.EVAL_PERIOD, self._evaluate_and_write),
            *figure_hooks(self.cfg, self.trained_model, self.pseudo_labeling),
        ]
        found: list[HookBase] = []
        for hook in super().build_hooks():
            found += own if isinstance(hook, EvalHook) else [hook]
        has_teacher = self.pseudo_labeling is not None
        settings = hooks.run_settings(self.cfg, comm.get_world_size(), has_teacher=has_teacher)
        self._run_state = hooks.RunStateHook(settings)
        return [
            self._run_state,
            hooks.UnwrittenMetricsHook(os.path.join(self.cfg.OUTPUT_DIR, stages.METRICS)),
            hooks.BufferSyncHook(self.trained_model),
            self.bad_steps,
            *found,
        ]

    def build_writers(self):
        return [hooks.ForgivingWriter(writer) for writer in super().build_writers()]

    def evaluate(self) -> Mapping[str, Any]:
        """Evaluate on DATASETS.TEST; results are nested as by Detectron2."""
        return self.test(self.cfg, self.trained_model)

    def _evaluate_and_write(self) -> Mapping[str, Any] | None:
        finished = min(self.iter + 1, self.max_iter)
        if self._stop_hook.stopping or self._evaluated == finished:
            return None
        with self._stop_hook.during_evaluation():
            self._last_eval_results = self.evaluate()
            self._evaluated = finished
            if finished < self.max_iter:
                self._write_results()
        return self._last_eval_results

    def _write_results(self) -> None:
        if comm.is_main_process():
            results = {stages.ITERATIONS: self._evaluated, **self._last_eval_results}
            write_results(results, f"{self.cfg.OUTPUT_DIR}/{stages.RESULTS}")

    def before_train(self) -> None:
        super().before_train()
        if self.start_iter == 0:
            return
        # Hooks after saving may not have run in its iteration. A complete evaluation is kept.
        self.iter = self.storage.iter = self.start_iter - 1
        path = os.path.join(self.cfg.OUTPUT_DIR, stages.RESULTS)
        results = comm.all_gather(stored_results(path))[0]
        if results.pop(stages.ITERATIONS, None) == self.start_iter and results:
            self._evaluated, self._last_eval_results = self.start_iter, results
            scalars = flatten_results_dict(results)
            scalars = {name: math.nan if v is None else v for name, v in scalars.items()}
            self.storage.put_scalars(**scalars, smoothing_hint=False)
        for hook in self._after_saving:
            hook.after_step()

    def after_train(self) -> None:
        super().after_train()
        if self._evaluated == self.max_iter:  # at last: with its results, the stage is finished
            self._write_results()

    @property
    def trained_model(self) -> nn.Module:
        """The trained and saved model, without wrappers."""
        model = self._trainer.model
        return model.module if isinstance(model, DistributedDataParallel) else model

    def resume_or_load(self, resume: bool = True) -> None:
        super().resume_or_load(resume)
        if self.start_iter > 0:
            self._run_state.check(self.start_iter)
            rates = self.scheduler.get_lr()  # the optimizer's state has those of the old length
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            logger.info("Continuing from iteration %d.", self.start_iter)
            comm.synchronize()  # all have read the file, which is renamed now
            if self.start_iter == self.max_iter:  # killed while writing the final checkpoint
                self.checkpointer.finish()
            else:  # a finished run may go on
                self.checkpointer.reopen(self.start_iter - 1)
            self._trainer.reset_data_loader(
                lambda: self.build_train_loader(self.cfg, self.start_iter)
            )

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(hooks.with_own_schedule(state_dict, self.scheduler))

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Build a model whose initial weights depend only on SEED; apply S4M.TF32."""
        torch.backends.cuda.matmul.allow_tf32 = cfg.S4M.TF32
        torch.manual_seed(derive_seed(cfg.SEED, "initial weights"))
        model = super().build_model(cfg)
        if cfg.S4M.DISTILL.ENABLED and getattr(model, "distillation", None) is None:
            raise ConfigError(
                f"S4M.DISTILL.ENABLED is True, but {type(model).__name__} has no attribute "
                "'distillation': it would train without. Set S4M.DISTILL.ENABLED False, or add "
                "the loss to the model as examples/distilled_mask2former does."
            )
        return model

    @classmethod
    def build_train_loader(cls, cfg: CfgNode, start_iter: int = 0):
        return build.build_labeled_loader(cfg, start_iter, held_out_records(cfg))

    build_optimizer = staticmethod(build.build_optimizer)  # type: ignore[assignment]
    build_lr_scheduler = staticmethod(build_lr_scheduler)  # type: ignore[assignment]

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, *args: Any, **kwargs: Any) -> Mapping[str, Any]:
        """As Detectron2's, with encoded masks, so that memory does not grow with image size."""
        with masks_as_rle(model):
            tiled = TiledModel(cfg, model) if cfg.INPUT.TILE.SIZE else model
            return super().test(cfg, tiled, *args, **kwargs)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        whole = {"is_train": False, "augmentations": [], "image_format": cfg.INPUT.FORMAT}
        mapper = _TestMapper(**whole) if cfg.INPUT.TILE.SIZE else _TestMapper(cfg, False)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str):
        most = cfg.TEST.DETECTIONS_PER_IMAGE if dataset_name == splits.OWN_VALIDATION else None
        if cfg.INPUT.TILE.SIZE:
            tiles = build_tiling(cfg).most(DatasetCatalog.get(dataset_name))
            most = tiles * cfg.TEST.DETECTIONS_PER_IMAGE
        folder = os.path.join(cfg.OUTPUT_DIR, "inference")
        return build_evaluator(dataset_name, folder, max_detections=most)


class _TestMapper(DatasetMapper):
    """Detectron2's, with errors that name the image."""

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        with open_image(dataset_dict["file_name"]):
            return super().__call__(dataset_dict)


class FineTuneTrainer(TeacherTrainer):
    """Last stage: stage 2's student (MODEL.WEIGHTS of the stage's config) on all labeled images."""

    def resume_or_load(self, resume: bool = True) -> None:
        if resume and self.checkpointer.has_checkpoint():
            super().resume_or_load(resume)
        else:
            self.checkpointer.load(self.cfg.MODEL.WEIGHTS, [], require=True)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode, start_iter: int = 0):
        return build.build_labeled_loader(cfg, start_iter)


class S4MTrainer(TeacherTrainer):
    """Stage 2: the student learns from labeled images and from the teacher's pseudo-labels.

    Args:
        cfg: config of the stage (:func:`~s4m_d2.engine.stages.stage_config`); its
            MODEL.META_ARCHITECTURE is any :class:`~s4m_d2.engine.labeling.protocol.S4MTrainable`.
        teacher_weights: checkpoint of stage 1 with every parameter of the model.
    """

    pseudo_labeling: PseudoLabeling

    def __init__(self, cfg: CfgNode, teacher_weights: str) -> None:
        model = self.build_model(cfg)
        check_model(model)
        self.teacher = EMATeacher(model, decay=cfg.S4M.EMA_DECAY)
        classes = class_lists(cfg, cfg.S4M.TEACHER_WEIGHTS)
        checkpointer = S4MCheckpointer(self.teacher.model, classes=classes)
        checkpointer.load(teacher_weights, branch="teacher", require=True)
        self.pseudo_labeling = PseudoLabeling(cfg, self.teacher)
        self._decision: Decision = {}  # of the gate
        self._skipped: dict[str, str] = {}  # unlabeled images skipped before resuming, and why
        super().__init__(cfg)

    def build_step(self, *parts: Any) -> TeacherStep:
        weight = self.cfg.S4M.UNSUP_LOSS_WEIGHT
        labeling = functools.partial(self.pseudo_labeling, learn=True)
        return StudentStep(*parts, labeling=labeling, unsup_loss_weight=weight)

    def run_step(self) -> None:
        super().run_step()
        skipped = len(self._trainer.data_loader.unlabeled.skipped_images)
        self.storage.put_scalar("data/skipped_images", skipped, smoothing_hint=False)

    def build_hooks(self):
        self._teacher_hook = hooks.EMATeacherHook(
            self.teacher, self.trained_model, self.cfg.S4M.BURN_IN, self.bad_steps
        )
        labels = self.cfg.S4M.PSEUDO_LABEL
        counts = hooks.PseudoLabelCountHook(labels.COUNT_BAND, labels.COUNT_BAND_ITERS)
        found = [self._teacher_hook, counts, *super().build_hooks()]
        if period := self.cfg.S4M.QUALITY.PERIOD:
            path = os.path.join(self.cfg.OUTPUT_DIR, quality.RECORDS)
            measurement = quality.QualityMeasurement(self.cfg, self.pseudo_labeling)
            around = self._stop_hook.during_evaluation
            hook = quality.PseudoLabelQualityHook(measurement, period, path, around)
            # After the stop, before the values are written.
            found.insert(found.index(self._stop_hook) + 1, hook)
        return found

    def resume_or_load(self, resume: bool = True) -> None:
        super().resume_or_load(resume)
        self._trainer.data_loader.unlabeled.skipped_images |= self._skipped
        if self.start_iter > self.cfg.S4M.BURN_IN and not self._teacher_hook.restored:
            raise WeightsError(
                f"Cannot continue from '{self.checkpointer.resumed_from}': past the burn-in it has "
                "to hold the EMA teacher. Start without --resume; give the file as MODEL.WEIGHTS."
            )
        if self.start_iter == 0:
            if self.cfg.S4M.STUDENT_FROM_TEACHER:
                self.trained_model.load_state_dict(self.teacher.model.state_dict())
            self._decision = compare_refinement(self.cfg, self.pseudo_labeling)
            apply_decision(self._decision, self.pseudo_labeling)
            if self._decision and comm.is_main_process():
                write_results(self._decision, f"{self.cfg.OUTPUT_DIR}/{RESULT}")

    def state_dict(self) -> dict[str, Any]:
        skipped = self._trainer.data_loader.unlabeled.skipped_images
        own = {"skipped_images": dict(skipped), "refinement_gate": self._decision}
        if self.pseudo_labeling.class_thresholds is not None:
            own["class_thresholds"] = self.pseudo_labeling.class_thresholds.state_dict()
        return {**super().state_dict(), **own}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._decision = state_dict.get("refinement_gate", {})
        apply_decision(self._decision, self.pseudo_labeling)
        if self.pseudo_labeling.class_thresholds is not None and "class_thresholds" in state_dict:
            self.pseudo_labeling.class_thresholds.load_state_dict(state_dict["class_thresholds"])
        if comm.is_main_process():  # whose they are
            self._skipped = state_dict.get("skipped_images", {})

    def evaluate(self) -> Mapping[str, Any]:
        """Evaluate the student and, after burn-in, the teacher (under "teacher").

        The teacher first: the predictions that stay in inference/ are the student's.
        """
        results = {}
        if self._teacher_hook.phase is not TeacherPhase.FROZEN:
            results["teacher"] = self.test(self.cfg, self.teacher.model)
        return OrderedDict({**super().evaluate(), **results})

    @classmethod
    def build_train_loader(cls, cfg: CfgNode, start_iter: int = 0):
        return build.PairedLoader(
            build.build_labeled_loader(cfg, start_iter),
            build.build_unlabeled_loader(cfg, start_iter),
        )
