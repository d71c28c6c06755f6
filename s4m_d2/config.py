"""Every config key of the project. Mask2Former's keys keep their names; ours stand under S4M."""

from detectron2.config import CfgNode as CN
from detectron2.projects.deeplab import add_deeplab_config


def add_s4m_config(cfg: CN) -> None:
    """Add Mask2Former's keys and ours to a Detectron2 config, in place."""
    add_deeplab_config(cfg)  # WarmupPolyLR and the keys that Mask2Former's configs mention
    _add_mask2former_config(cfg)
    _add_model_config(cfg)
    _add_run_config(cfg)
    _add_data_config(cfg)
    _add_sam_config(cfg)
    _add_pseudo_label_config(cfg)
    _add_refine_config(cfg)
    _add_measurement_config(cfg)
    cfg.register_deprecated_key("S4M.UNLABELED_SAMPLER")  # in files of earlier runs


def _add_mask2former_config(cfg: CN) -> None:
    cfg.INPUT.DATASET_MAPPER_NAME = "mask_former_instance"  # or coco_instance_lsj (scale jitter)
    cfg.INPUT.COLOR_AUG_SSD = False  # SSD color distortion of labeled images and weak views
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 1.0  # plain random crop; smaller values are refused
    cfg.INPUT.SIZE_DIVISIBILITY = -1  # not used; Mask2Former's configs set it
    cfg.INPUT.IMAGE_SIZE = 1024  # side of the large-scale-jitter crop, px
    cfg.INPUT.MIN_SCALE = 0.1  # smallest scale of the large-scale jitter
    cfg.INPUT.MAX_SCALE = 2.0  # largest scale of it

    cfg.DATASETS.UNLABELED = ()  # names of the unlabeled sets; their annotations are never read

    cfg.SOLVER.WEIGHT_DECAY_EMBED = 0.0  # weight decay of learned embeddings
    cfg.SOLVER.OPTIMIZER = "ADAMW"  # ADAMW or SGD
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1  # learning rate of the backbone, relative to BASE_LR
    # number of model_<iteration>.pth files that are kept, and one more while one is written; 0: all
    cfg.SOLVER.CHECKPOINT_KEEP = 0

    former = cfg.MODEL.MASK_FORMER = CN()
    former.DEEP_SUPERVISION = True  # losses on every decoder layer, not only on the last
    former.NO_OBJECT_WEIGHT = 0.1  # weight of the class "no object" in the class loss
    former.CLASS_WEIGHT = 2.0  # weight of the class loss, also in matching
    former.DICE_WEIGHT = 5.0  # weight of the masks' dice loss, also in matching
    former.MASK_WEIGHT = 5.0  # weight of the masks' cross-entropy, also in matching
    former.NHEADS = 8  # attention heads
    former.DROPOUT = 0.0  # in the pixel decoder's encoder; the decoder has none
    former.DIM_FEEDFORWARD = 2048  # width of the decoder's feed-forward layers
    former.ENC_LAYERS = 0  # not used; Mask2Former's configs set it
    former.DEC_LAYERS = 10  # decoder layers plus one: the learnable queries are supervised too
    former.PRE_NORM = False  # layer norms follow the layers; True is refused
    former.HIDDEN_DIM = 256  # channels of queries
    former.NUM_OBJECT_QUERIES = 100  # maximum number of instances found per image
    former.TRANSFORMER_IN_FEATURE = "multi_scale_pixel_decoder"  # the only value
    former.ENFORCE_INPUT_PROJ = False  # a projection even if the channels are equal
    former.SIZE_DIVISIBILITY = 32  # images are padded to multiples of it, px
    # a name of TRANSFORMER_DECODER_REGISTRY
    former.TRANSFORMER_DECODER_NAME = "MultiScaleMaskedTransformerDecoder"
    former.TRAIN_NUM_POINTS = 12544  # points of the mask losses and of the matcher, per mask
    former.OVERSAMPLE_RATIO = 3.0  # candidates per point, of which the most uncertain are kept
    former.IMPORTANCE_SAMPLE_RATIO = 0.75  # share of points chosen so; the others are random


def _add_model_config(cfg: CN) -> None:
    # From queries to instances.
    test = cfg.MODEL.MASK_FORMER.TEST = CN()
    test.LARGEST_COMPONENT = False  # keep only that of predicted masks and pseudo-labels
    test.DUPLICATE_IOU = 1.0  # of two predictions of a class with a larger IoU, the best is kept
    test.SEMANTIC_ON = False  # instance segmentation only: True is refused
    test.INSTANCE_ON = True  # False is refused
    test.PANOPTIC_ON = False  # True is refused
    test.OBJECT_MASK_THRESHOLD = 0.8  # panoptic only; kept so that published configs load
    test.OVERLAP_THRESHOLD = 0.8  # panoptic only
    test.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE = False  # semantic only

    # Square tiles of images that are large or have many small instances.
    tile = cfg.INPUT.TILE = CN()
    tile.SIZE = 0  # side, px of the image before it is resized; 0: no tiles
    tile.OVERLAP = 0.2  # minimum overlap of neighboring tiles, as a share of the side

    head = cfg.MODEL.SEM_SEG_HEAD
    head.MASK_DIM = 256  # channels of the mask features
    head.TRANSFORMER_ENC_LAYERS = 6  # of the pixel decoder
    head.PIXEL_DECODER_NAME = "MSDeformAttnPixelDecoder"  # a name of SEM_SEG_HEADS_REGISTRY
    # maps of the backbone that go through the pixel decoder's encoder
    head.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES = ["res3", "res4", "res5"]
    head.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS = 4  # sampling points per head and map
    head.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS = 8  # attention heads

    # The backbone "build_timm_backbone" of MODEL.BACKBONE.NAME.
    timm = cfg.MODEL.TIMM = CN()
    timm.NAME = "resnet50"  # a timm model, or model.tag with the tag of its weights
    timm.PRETRAINED = False  # timm's weights, downloaded once; not used if MODEL.WEIGHTS is set
    timm.OUT_INDICES = ()  # four maps of strides 4 to 32, or one of a plain ViT; (): the last
    timm.OUT_NORM = False  # a layer norm over the channels of each map (Mask2Former's Swin)
    timm.NORM = "BN"  # kind of the model's batch norms: BN, FrozenBN or SyncBN
    timm.DROP_PATH = 0.0  # rate of stochastic depth at the last block, rising from 0
    timm.FROZEN = False  # the model's weights are not trained; added layers are
    timm.GRAD_CHECKPOINT = False  # gradient checkpointing: less memory, more time
    timm.PYRAMID_CHANNELS = 256  # of the maps of a plain ViT


def _add_run_config(cfg: CN) -> None:
    s4m = cfg.S4M = CN()
    s4m.STAGE = "both"  # both: teacher, then student; teacher: stage 1 only; student: stage 2 only
    s4m.TEACHER_WEIGHTS = ""  # stage-1 checkpoint; when set, stage 1 is skipped
    s4m.EVAL = "student"  # what --eval-only evaluates: student, teacher or both

    # Stage 1 (teacher). 0 or (): as in SOLVER.
    s4m.TEACHER = CN()
    s4m.TEACHER.IMS_PER_BATCH = 0  # labeled images
    s4m.TEACHER.MAX_ITER = 0  # iterations
    s4m.TEACHER.STEPS = ()  # iterations at which the learning rate falls
    s4m.TEACHER.SAMPLER = "TrainingSampler"  # or RepeatFactorTrainingSampler

    # Stage 2 (student), as in Guided Distillation, with S4M's published settings.
    s4m.UNLABELED_IMS_PER_BATCH = 0  # 0: as many as labeled ones (SOLVER.IMS_PER_BATCH)
    s4m.UNLABELED_MAPPER = "ARPDatasetMapper"  # a name of DATASET_MAPPER_REGISTRY
    # the student starts as a copy of the stage-1 teacher, not from MODEL.WEIGHTS as in the paper
    s4m.STUDENT_FROM_TEACHER = False
    s4m.BURN_IN = 15000  # iterations during which the stage-1 teacher is frozen
    s4m.EMA_DECAY = 0.9996  # half-life 1,730 iterations; short schedules need a smaller one
    s4m.UNSUP_LOSS_WEIGHT = 2.0  # weight of all losses on pseudo-labels

    s4m.AMP_PRECISION = "float16"  # of SOLVER.AMP, ignored on a CPU; or bfloat16: no loss scaling
    # TF32 for matrix products of float32 on a GPU: faster, with 10 instead of 23 bits. The default
    # of PyTorch before 1.12, and of Mask2Former; convolutions always use it. Not measured yet.
    s4m.TF32 = True

    # Splits: `..._10pct` is a fixed 10 % of its set, unless a list of file names is given.
    s4m.SPLIT_SEED = 0  # seed of the choice of labeled images
    s4m.SPLIT_FILE = ""  # text file with one image file name per line: the labeled set
    # labeled instances outside the crop are kept, with empty masks (released code on Cityscapes)
    s4m.KEEP_EMPTY_INSTANCES = False

    # Limits of a run:
    s4m.MAX_SKIPPED_IMAGES = 100  # unreadable unlabeled images per process before a run stops
    s4m.MAX_BAD_STEPS = 10  # consecutive steps skipped, as not finite, before a run stops

    # Last stage, after stage 2: its student learns from the labeled images alone.
    finetune = cfg.S4M.FINETUNE = CN()
    finetune.MAX_ITER = 0  # iterations of SOLVER.IMS_PER_BATCH images; 0: none, as in the paper
    finetune.BASE_LR = 0.0  # learning rate; 0.0: a tenth of SOLVER.BASE_LR


def _add_data_config(cfg: CN) -> None:
    # Own data in files and folders (docs/own-data.md), instead of the names in DATASETS.
    data = cfg.S4M.DATA = CN()
    data.LABELED = ()  # COCO json files of instances; of an image in several the last counts
    data.IMAGES = ()  # folder of their file names, or one for each; (): the json's folder
    data.UNLABELED = ""  # folder of images and videos, searched recursively; or a video
    data.EVERY = 10  # of a video, every n-th frame is an unlabeled image
    data.VAL = ""  # COCO json for evaluation; "": a share of LABELED's images is used
    data.VAL_IMAGES = ""  # folder of its file names; "": as IMAGES if that is one, or VAL's
    data.VAL_FRACTION = 0.2  # that share; 0.0: no validation

    # Strong view of the student's unlabeled images. Probabilities are per image.
    strong_view = cfg.S4M.STRONG_VIEW = CN()
    strong_view.JITTER = (0.4, 0.4, 0.4, 0.1)  # brightness, contrast, saturation, hue
    strong_view.JITTER_PROB = 0.8  # probability of color jitter
    strong_view.GRAYSCALE_PROB = 0.2  # probability of conversion to gray
    strong_view.BLUR_SIGMA = (0.1, 2.0)  # px
    strong_view.BLUR_PROB = 0.5  # probability of the blur

    # Augmentation with refined pseudo-labels (paper, section 3.4).
    arp = cfg.S4M.ARP = CN()
    arp.ENABLED = True  # False: no instances are exchanged
    # no ARP if S4M.REFINE.GATE auto switches refinement off; False once you set ENABLED yourself
    arp.GATED = True
    arp.MIN_AREA_FRACTION = 0.0057  # smallest pasted instance, as a share of the crop's area
    arp.PAIR_FRACTION = 0.25  # number of pairs, as a share of the unlabeled images of a batch
    arp.RANDOM_PLACEMENT = False  # False: pasted at the same position (static); True: dynamic
    arp.SCALE_RANGE = (0.8, 1.2)  # dynamic only


def _add_sam_config(cfg: CN) -> None:
    # The frozen SAM.
    sam = cfg.S4M.SAM = CN()
    sam.BACKEND = "segment_anything"  # a name of SAM_BACKEND_REGISTRY
    # segment_anything: vit_b, vit_l, vit_h, or vit_t (MobileSAM; needs timm). sam2: hiera_t,
    # hiera_s, hiera_b+ or hiera_l. transformers: not used, the model is CHECKPOINT's.
    sam.MODEL_TYPE = "vit_l"  # the paper uses hiera_l
    # A file. "": packaged weights (tiny, tiny_toyscapes). transformers: a folder with config.json
    # and model.safetensors, or a name on the Hugging Face hub that was downloaded before.
    sam.CHECKPOINT = "models/sam_vit_l_0b3195.pth"
    sam.MAX_PROMPTS = 256  # in one pass of SAM's decoder; on a GPU fewer if memory is short
    # images in one pass of SAM's encoder; 0: those that half of a GPU's free memory takes; CPU: one
    sam.MAX_IMAGES = 0
    # float32, bfloat16 or float16; auto: float32 on the CPU, bfloat16 or else float16 on a GPU
    sam.PRECISION = "auto"
    # Iterations of fine-tuning SAM's decoder (and a small encoder) on the labeled images before
    # stage 1; used if it segments held-out labeled images better. 0: none, as in the paper.
    sam.ADAPT = 0

    # Structural distillation (paper, section 3.2), stage 1.
    distill = cfg.S4M.DISTILL = CN()
    distill.ENABLED = True  # False: stage 1 learns from labels alone
    distill.NAME = "StructuralDistillation"  # a name of DISTILLATION_REGISTRY
    distill.WEIGHT = 1.0  # weight of the loss
    distill.NUM_POINTS = 128  # query points per image
    distill.FOREGROUND_FRACTION = 0.5  # share of them drawn from the ground-truth masks
    distill.HUBER_DELTA = 1.0  # difference at which the loss changes from quadratic to linear


def _add_pseudo_label_config(cfg: CN) -> None:
    # Selection of the teacher's predictions, at the prediction's 1/4 resolution.
    pseudo_label = cfg.S4M.PSEUDO_LABEL = CN()
    pseudo_label.SCORE_THRESH = 0.7  # minimum class probability
    pseudo_label.MIN_AREA = 5.0  # minimum sum of mask probabilities, px at 1/4 resolution
    pseudo_label.MASK_THRESH = 0.5  # mask probability above which a pixel is part of the mask
    # IoU of refined masks above which only that with the highest product of score and mask quality
    # is kept; 1.0: all are, as in the paper
    pseudo_label.DUPLICATE_IOU = 1.0
    # The same if they share more than this part of the smaller mask, which catches parts of an
    # instance, but also instances in front of others. 1.0: all are kept.
    pseudo_label.DUPLICATE_OVERLAP = 1.0
    # Minimum quality of the refined mask: the teacher's mean probability inside its mask, times the
    # IoU of both masks, times the IoU that SAM predicts. 0.0: all are kept, as in the paper.
    pseudo_label.MASK_QUALITY_THRESH = 0.0
    # auto: SCORE_THRESH is lowered, down to half of it, for classes of which the teacher is less
    # sure than of its surest one. fixed: one threshold for all classes, as in the paper.
    pseudo_label.CLASS_THRESH = "fixed"
    pseudo_label.LABEL_WEIGHT = False  # that quality weights a pseudo-label in its losses
    pseudo_label.PIXEL_WEIGHT = False  # the teacher's certainty weights pixels' cross-entropy
    # float32: the teacher labels outside autocast; amp: as SOLVER.AMP. For SAM: S4M.SAM.PRECISION
    pseudo_label.PRECISION = "float32"
    # Range (low, high) of the smoothed number of pseudo-labels per image. A warning is logged if
    # it is outside for COUNT_BAND_ITERS iterations. COCO has 7 instances per image, Cityscapes 18.
    pseudo_label.COUNT_BAND = (0.1, 60.0)
    pseudo_label.COUNT_BAND_ITERS = 200  # 0: no warning


def _add_refine_config(cfg: CN) -> None:
    # Pseudo-label refinement (paper, section 3.3).
    refine = cfg.S4M.REFINE = CN()
    refine.ENABLED = True  # False: the teacher's masks are used unchanged
    refine.METHOD = "points"  # a name of REFINER_REGISTRY
    # warn or auto: stage 1 leaves out a fifth of the labeled images, on which the masks of its
    # teacher are measured before and after refinement; auto switches off what makes them worse, and
    # S4M.DISTILL if SAM's masks on labeled images, measured before, have an IoU below 0.6
    refine.GATE = "off"

    # METHOD points only; the defaults are the paper's.
    refine.NUM_POINTS = 3  # prompt points per mask
    refine.PROMPT = "points"  # points, the mask's box, or both; auto: the best measured by GATE
    refine.MIN_AGREEMENT = 0.0  # the teacher's mask is kept if SAM's has a smaller IoU with it
    refine.NEGATIVE_POINTS = 0  # per mask, one in each of the nearest other masks
    refine.MASK_PROMPT = False  # mask logits too, for a SAM trained so (no packaged one is)
    refine.TRIES = 1  # prompts per mask, with points of their own; the highest predicted IoU wins

    # METHOD sepl: SAM's automatic masks of the unlabeled image, selected by SEPL's rule.
    sepl = cfg.S4M.REFINE.SEPL = CN()

    # A mask is selected for an instance if more than O_S_THRESH of its pixels are the instance's,
    # or if it covers more than O_P_THRESH of the instance's pixels (arXiv 2305.05803, section 3).
    sepl.O_S_THRESH = 0.5  # share of the mask's pixels
    sepl.O_P_THRESH = 0.85  # share of the instance's pixels

    # Automatic masks; the defaults are those of SAM's generator. Each point is a prompt: the time
    # grows with the square of POINTS_PER_SIDE.
    sepl.POINTS_PER_SIDE = 32  # of the grid of points over the image
    sepl.PRED_IOU_THRESH = 0.88  # minimum predicted IoU
    sepl.STABILITY_SCORE_THRESH = 0.95  # minimum IoU of the masks at a lower and higher threshold
    sepl.BOX_NMS_THRESH = 0.7  # box IoU above which the worse of two masks is removed
    sepl.MIN_MASK_REGION_AREA = 0  # px; smaller holes and islands are removed, 0: none


def _add_measurement_config(cfg: CN) -> None:
    # Pictures of fixed images during training, in figures/ of the stage's folder and TensorBoard.
    figures = cfg.S4M.FIGURES = CN()
    figures.PERIOD = 0  # iterations between pictures; 0: none
    figures.IMAGES = 4  # images per figure
    # each stage draws those that it has; labeled and views once, as they do not change
    figures.WHAT = ("labeled", "views", "pseudo_labels", "arp", "similarity", "predictions")

    # Measuring pseudo-labels against true labels in stage 2 (paper, figure 1).
    quality = cfg.S4M.QUALITY = CN()
    quality.PERIOD = 0  # iterations between measurements; 0: never
    quality.DATASETS = ()  # never trained on; (): of DATASETS.UNLABELED those with known labels
    quality.MAX_IMAGES = 100  # the first ones in a fixed order that mixes folders; 0: all
