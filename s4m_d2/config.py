"""Every config key of the project. Mask2Former's keys keep their names; ours stand under S4M."""

from __future__ import annotations

from detectron2.config import CfgNode as CN
from detectron2.projects.deeplab import add_deeplab_config


def add_s4m_config(cfg: CN) -> None:
    """Add Mask2Former's keys and ours to a Detectron2 config, in place."""
    add_deeplab_config(cfg)  # WarmupPolyLR and the keys that Mask2Former's configs mention
    _add_mask2former_config(cfg)
    _add_pixel_decoder_config(cfg)
    cfg.S4M = _s4m_config()


def _add_mask2former_config(cfg: CN) -> None:
    cfg.INPUT.DATASET_MAPPER_NAME = "mask_former_instance"
    cfg.INPUT.COLOR_AUG_SSD = False  # SSD distortion: weak view, labeled images but LSJ's
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 1.0  # 1.0: plain random crop
    cfg.INPUT.SIZE_DIVISIBILITY = -1
    cfg.INPUT.IMAGE_SIZE = 1024  # side of the large-scale-jitter crop, px
    cfg.INPUT.MIN_SCALE = 0.1  # range of the large-scale jitter
    cfg.INPUT.MAX_SCALE = 2.0

    cfg.DATASETS.UNLABELED = ()  # names of the unlabeled sets; their annotations are never read

    cfg.SOLVER.WEIGHT_DECAY_EMBED = 0.0
    cfg.SOLVER.OPTIMIZER = "ADAMW"  # ADAMW or SGD
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1  # learning rate of the backbone relative to the rest

    cfg.MODEL.MASK_FORMER = CN()
    former = cfg.MODEL.MASK_FORMER
    former.DEEP_SUPERVISION = True
    former.NO_OBJECT_WEIGHT = 0.1
    former.CLASS_WEIGHT = 2.0
    former.DICE_WEIGHT = 5.0
    former.MASK_WEIGHT = 5.0
    former.NHEADS = 8
    former.DROPOUT = 0.0
    former.DIM_FEEDFORWARD = 2048
    former.ENC_LAYERS = 0
    former.DEC_LAYERS = 10  # decoder layers plus one: the learnable queries are supervised too
    former.PRE_NORM = False
    former.HIDDEN_DIM = 256
    former.NUM_OBJECT_QUERIES = 100
    former.TRANSFORMER_IN_FEATURE = "multi_scale_pixel_decoder"
    former.ENFORCE_INPUT_PROJ = False
    former.SIZE_DIVISIBILITY = 32
    former.TRANSFORMER_DECODER_NAME = "MultiScaleMaskedTransformerDecoder"
    former.TRAIN_NUM_POINTS = 12544  # points of the mask losses and of the matcher, per mask
    former.OVERSAMPLE_RATIO = 3.0
    former.IMPORTANCE_SAMPLE_RATIO = 0.75
    former.TEST = CN()
    former.TEST.SEMANTIC_ON = False  # instance segmentation only: True is refused
    former.TEST.INSTANCE_ON = True
    former.TEST.PANOPTIC_ON = False
    former.TEST.OBJECT_MASK_THRESHOLD = 0.8  # panoptic only; kept so that published configs load
    former.TEST.OVERLAP_THRESHOLD = 0.8
    former.TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE = False


def _add_pixel_decoder_config(cfg: CN) -> None:
    head = cfg.MODEL.SEM_SEG_HEAD
    head.MASK_DIM = 256
    head.TRANSFORMER_ENC_LAYERS = 6
    head.PIXEL_DECODER_NAME = "MSDeformAttnPixelDecoder"
    head.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES = ["res3", "res4", "res5"]
    head.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS = 4
    head.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS = 8


def _s4m_config() -> CN:
    s4m = CN()
    s4m.STAGE = "both"  # both: teacher, then student; teacher: stage 1 only; student: stage 2 only
    s4m.TEACHER_WEIGHTS = ""  # stage-1 checkpoint; when set, stage 1 is skipped
    s4m.EVAL = "student"  # what --eval-only evaluates: student, teacher or both

    # Stage 1 (teacher). 0 or () means: as in SOLVER.
    s4m.TEACHER = CN()
    s4m.TEACHER.IMS_PER_BATCH = 0
    s4m.TEACHER.MAX_ITER = 0
    s4m.TEACHER.STEPS = ()

    # Stage 2 (student). Guided Distillation, and METHOD's "published settings".
    s4m.UNLABELED_IMS_PER_BATCH = 0  # 0: as many as labeled ones (SOLVER.IMS_PER_BATCH)
    s4m.UNLABELED_MAPPER = "ARPDatasetMapper"
    s4m.UNLABELED_SAMPLER = "TrainingSampler"
    s4m.BURN_IN = 15000  # iterations for which the stage-1 teacher stays frozen
    s4m.EMA_DECAY = 0.9996  # half-life 1,730 iterations; short schedules need a smaller one
    s4m.UNSUP_LOSS_WEIGHT = 2.0

    s4m.SAM = CN()
    s4m.SAM.BACKEND = "segment_anything"  # a name of SAM_BACKEND_REGISTRY
    s4m.SAM.MODEL_TYPE = "vit_l"  # vit_b, vit_l or vit_h
    s4m.SAM.CHECKPOINT = "models/sam_vit_l_0b3195.pth"  # "": the packaged weights (tiny only)
    s4m.SAM.MAX_PROMPTS = 256  # prompts that go through SAM's decoder together (memory)

    # Structural distillation (paper, section 3.2), stage 1.
    s4m.DISTILL = CN()
    s4m.DISTILL.ENABLED = True
    s4m.DISTILL.NAME = "StructuralDistillation"  # a name of DISTILLATION_REGISTRY
    s4m.DISTILL.WEIGHT = 1.0
    s4m.DISTILL.NUM_POINTS = 128  # query points an image
    s4m.DISTILL.FOREGROUND_FRACTION = 0.5  # of them, drawn from the ground-truth masks
    s4m.DISTILL.HUBER_DELTA = 1.0

    # Selection of the teacher's predictions, at the prediction's 1/4 resolution.
    s4m.PSEUDO_LABEL = CN()
    s4m.PSEUDO_LABEL.SCORE_THRESH = 0.7  # class probability
    s4m.PSEUDO_LABEL.MIN_AREA = 5.0  # sum of mask probabilities, px at 1/4 resolution
    s4m.PSEUDO_LABEL.MASK_THRESH = 0.5  # mask probability

    # Pseudo-label refinement (paper, section 3.3).
    s4m.REFINE = CN()
    s4m.REFINE.ENABLED = True
    s4m.REFINE.METHOD = "points"  # a name of REFINER_REGISTRY
    s4m.REFINE.NUM_POINTS = 3  # clicks a mask

    # Augmentation with refined pseudo-labels (paper, section 3.4).
    s4m.ARP = CN()
    s4m.ARP.ENABLED = True
    s4m.ARP.MIN_AREA_FRACTION = 0.0057  # of the training crop's area; smaller ones are not pasted
    s4m.ARP.PAIR_FRACTION = 0.25  # pairs an unlabeled image of the batch
    s4m.ARP.RANDOM_PLACEMENT = False  # False: pasted in place (static); True: dynamic
    s4m.ARP.SCALE_RANGE = (0.8, 1.2)  # dynamic variant only

    # Strong view of the student's unlabeled images.
    s4m.STRONG_VIEW = CN()
    s4m.STRONG_VIEW.JITTER = (0.4, 0.4, 0.4, 0.1)  # brightness, contrast, saturation, hue
    s4m.STRONG_VIEW.JITTER_PROB = 0.8
    s4m.STRONG_VIEW.GRAYSCALE_PROB = 0.2
    s4m.STRONG_VIEW.BLUR_SIGMA = (0.1, 2.0)  # px
    s4m.STRONG_VIEW.BLUR_PROB = 0.5

    # Splits: `..._10pct` names a stable 10 % of its set, drawn with this seed, unless a list of
    # file names is given.
    s4m.SPLIT_SEED = 0
    s4m.SPLIT_FILE = ""  # text file, one image file name a line: the labeled set

    s4m.MAX_SKIPPED_IMAGES = 100  # unreadable unlabeled images a process skips before it stops
    return s4m
