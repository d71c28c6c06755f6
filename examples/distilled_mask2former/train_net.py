#!/usr/bin/env python
"""Supervised Mask2Former training with Detectron2's DefaultTrainer, and structural distillation.

    python examples/distilled_mask2former/train_net.py \
        --config-file examples/distilled_mask2former/toyscapes.yaml
"""

import os

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data import build_detection_train_loader
from detectron2.engine import DefaultTrainer, default_argument_parser, default_setup, launch
from detectron2.projects.deeplab import build_lr_scheduler
from distillation import add_structural_distillation

from s4m_d2 import (
    LabeledDatasetMapper,
    StructuralDistillation,
    add_s4m_config,
    build_evaluator,
    build_sam_backend,
)
from s4m_d2.engine import build_optimizer


class Trainer(DefaultTrainer):
    @classmethod
    def build_model(cls, cfg):
        model = super().build_model(cfg)
        sam = build_sam_backend(cfg)  # frozen; neither a submodule of the model nor saved with it
        return add_structural_distillation(
            model,
            StructuralDistillation(cfg, sam),
            stride=cfg.MODEL.SEM_SEG_HEAD.COMMON_STRIDE,
            input_format=cfg.INPUT.FORMAT,
        )

    @classmethod
    def build_train_loader(cls, cfg):
        return build_detection_train_loader(cfg, mapper=LabeledDatasetMapper(cfg, True))

    @classmethod
    def build_optimizer(cls, cfg, model):
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg, optimizer):
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return build_evaluator(dataset_name, os.path.join(cfg.OUTPUT_DIR, "inference"))


def setup(args):
    cfg = get_cfg()
    add_s4m_config(cfg)  # Mask2Former's keys too
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    cfg.freeze()
    default_setup(cfg, args)
    return cfg


def main(args):
    cfg = setup(args)
    if args.eval_only:
        model = DefaultTrainer.build_model(cfg)  # SAM is for training only
        DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
        return Trainer.test(cfg, model)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    args = default_argument_parser(epilog=__doc__).parse_args()
    launch(main, args.num_gpus, dist_url=args.dist_url, args=(args,))
