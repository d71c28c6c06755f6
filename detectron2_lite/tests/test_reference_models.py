"""ResNets, points, structures and name matching against Detectron2's."""

import zlib

import numpy as np
import pytest
import torch
from detectron2.checkpoint.c2_model_loading import (
    align_and_update_state_dicts,
    convert_c2_detectron_names,
)
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone
from detectron2.projects.point_rend.point_features import (
    get_uncertain_point_coords_with_randomness,
    point_sample,
)
from detectron2.structures import BitMasks, Boxes, BoxMode, ImageList, PolygonMasks
from detectron2.structures.masks import polygons_to_bitmask

BACKBONES = {
    "r18": {"DEPTH": 18, "RES2_OUT_CHANNELS": 64, "NORM": "BN"},
    "r18_gn": {"DEPTH": 18, "RES2_OUT_CHANNELS": 64, "NORM": "GN"},
    "r50_msra": {"NORM": "FrozenBN"},
    "r50_torchvision": {"STRIDE_IN_1X1": False, "NORM": "BN"},
    "r50_dilated": {"RES5_DILATION": 2, "STRIDE_IN_1X1": False, "NORM": "FrozenBN"},
    "x50_groups": {"NUM_GROUPS": 8, "WIDTH_PER_GROUP": 4, "STRIDE_IN_1X1": False, "NORM": "BN"},
    "narrow": {"RES2_OUT_CHANNELS": 32, "STEM_OUT_CHANNELS": 32, "WIDTH_PER_GROUP": 8, "NORM": ""},
}


def backbone(options, freeze_at=0):
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    cfg.MODEL.RESNETS.OUT_FEATURES = ["stem", "res2", "res3", "res4", "res5"]
    for key, value in options.items():
        cfg.MODEL.RESNETS[key] = value
    return build_backbone(cfg)


def fill(model):
    """Weights that depend on their names and places only, of a scale that keeps signals alive."""
    for name, value in model.state_dict().items():
        if not value.is_floating_point():
            continue
        phase = zlib.crc32(name.encode()) % 1000
        wave = torch.sin(torch.arange(value.numel(), dtype=torch.float64) * 0.37 + phase)
        if value.dim() > 1:
            wave = wave / value[0].numel() ** 0.5
        else:
            wave = 0.1 * wave + float(name.endswith(("weight", "running_var")))
        value.copy_(wave.view_as(value))


def image():
    ramp = torch.arange(3 * 32 * 32, dtype=torch.float64)
    return torch.sin(ramp * 0.01).view(1, 3, 32, 32)


@pytest.mark.parametrize("name", BACKBONES)
def test_feature_maps_under_the_same_weights(reference, name):
    """In double precision, so that the tolerance can be small on any machine."""
    model = backbone(BACKBONES[name]).double().eval()
    fill(model)
    features = model(image())
    values = {}
    for key, feature in features.items():
        flat = feature.detach().flatten()
        some = flat[:: max(len(flat) // 12, 1)][:12]
        values[key] = [list(feature.shape), flat.mean(), flat.norm(), some]
    reference(f"resnet/features/{name}", values, rel=1e-6, abs=1e-9)
    shapes = {key: [spec.channels, spec.stride] for key, spec in model.output_shape().items()}
    reference(f"resnet/shapes/{name}", shapes)


@pytest.mark.parametrize("name", ["r18", "x50_groups"])
def test_gradients_and_running_statistics(reference, name):
    model = backbone(BACKBONES[name], freeze_at=2).double().train()
    fill(model)
    batch = torch.cat([image(), image().flip(3)])
    sum(f.pow(2).mean() for f in model(batch).values()).backward()
    gradients = {n: p.grad.norm() for n, p in model.named_parameters() if p.grad is not None}
    last = [key for key in gradients if key.startswith("res5")][-1]
    buffers = {n: b.norm() for n, b in model.named_buffers() if ".0.conv1.norm.run" in n}
    kept = {key: gradients[key] for key in ("res3.0.conv2.weight", last)}
    reference(f"resnet/training/{name}", [len(gradients), kept, buffers], rel=1e-5)


@pytest.mark.parametrize("name", BACKBONES)
def test_names_shapes_and_order_of_parameters(reference, name):
    """The order is that of an optimizer's state."""
    model = backbone(BACKBONES[name])
    state = [f"{key}{tuple(value.shape)}" for key, value in model.state_dict().items()]
    parameters = [key for key, _ in model.named_parameters()]
    sums = [zlib.crc32("\n".join(names).encode()) for names in (state, parameters)]
    listed = state[:: max(len(state) // 10, 1)]
    reference(f"resnet/names/{name}", [len(state), len(parameters), *sums, listed])


@pytest.mark.parametrize("name", ["r18", "r50_torchvision", "narrow"])
def test_one_seed_gives_the_same_initial_weights(reference, name):
    torch.manual_seed(11)
    state = backbone(BACKBONES[name]).state_dict()
    sums = {k: v.double().sum() for k, v in state.items() if v.dim() == 4}
    kept = dict(list(sums.items())[::7])
    reference(f"resnet/initial/{name}", [kept, torch.rand(1).item()], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("freeze_at", range(6))
def test_frozen_parts(reference, freeze_at):
    model = backbone(BACKBONES["r18"], freeze_at)
    frozen = sorted({n.split(".")[0] for n, p in model.named_parameters() if not p.requires_grad})
    norms = [type(getattr(model, part)[0].conv1.norm).__name__ for part in ("res2", "res5")]
    reference(f"resnet/frozen/{freeze_at}", [frozen, norms])


@pytest.mark.parametrize("ratio, share", [(3.0, 0.75), (1.0, 1.0), (2.5, 0.0), (4.0, 0.33)])
def test_uncertain_points(reference, ratio, share):
    y, x = torch.meshgrid(torch.arange(12.0), torch.arange(9.0), indexing="ij")
    logits = torch.stack([(x - 4) * 2 + y, (y - 5) * (x - 3)])[:, None]
    torch.manual_seed(3)
    points = get_uncertain_point_coords_with_randomness(
        logits, lambda value: -value.abs(), 10, ratio, share
    )
    sampled = point_sample(logits, points, align_corners=False)
    reference(f"points/{ratio}/{share}", [points, sampled, torch.rand(1)], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("options", [{}, {"align_corners": True}, {"padding_mode": "border"}])
def test_sampled_points(reference, options):
    maps = torch.sin(torch.arange(60.0)).view(2, 2, 3, 5)
    points = torch.linspace(-0.2, 1.2, 24).view(2, 6, 2)
    values = [point_sample(maps, p, **options) for p in (points, points.view(2, 3, 2, 2))]
    reference(f"points/sampled/{sorted(options)}", values, rel=1e-5, abs=1e-6)


def polygons(count):
    random = np.random.RandomState(5)
    return [
        [np.round(random.uniform(-4, 34, 2 * random.randint(3, 8)), 2) for _ in range(1 + i % 3)]
        for i in range(count)
    ]


def test_polygons(reference):
    masks = PolygonMasks(polygons(8))
    bits = BitMasks.from_polygon_masks(masks, 30, 28)
    reference(
        "structures/polygons",
        {
            "boxes": masks.get_bounding_boxes().tensor,
            "areas": bits.tensor.flatten(1).sum(1),
            "rows": [mask.sum(1) for mask in bits],
            "columns": [mask.sum(0) for mask in bits],
            "bit_boxes": bits.get_bounding_boxes().tensor,
            "nonempty": [masks.nonempty(), bits.nonempty(), masks[2:5].nonempty()],
            "one": polygons_to_bitmask(masks.polygons[0], 30, 28).sum(),
        },
    )


@pytest.mark.parametrize("modes", [(0, 1), (1, 0), (1, 1)])
def test_box_modes(reference, modes):
    box = [0.1, 2.7, 33.3, 1e6 + 0.5]
    modes = [BoxMode(mode) for mode in modes]
    doubles, integers = np.array([box]), np.array([[1, 2, 30, 40]])
    sources = [box, tuple(box), doubles, doubles.astype("f4"), integers, [1, 2, 30, 40]]
    sources += [torch.tensor([box]), torch.tensor([box], dtype=torch.float64)]
    converted = [BoxMode.convert(source, *modes) for source in sources]
    kinds = [[type(c).__name__, str(getattr(c, "dtype", type(c[0]).__name__))] for c in converted]
    reference(f"structures/box_mode/{modes[0]}/{modes[1]}", [kinds, converted], rel=1e-7)


def test_boxes(reference):
    random = np.random.RandomState(2)
    boxes = Boxes(random.uniform(-10, 50, (6, 4)))
    measured = [boxes.area(), boxes.nonempty(), boxes.nonempty(threshold=5.0)]
    boxes.clip((25, 40))
    reference("structures/boxes", [*measured, boxes.tensor, boxes.area()], rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("divisibility", [0, 1, 8, 32])
@pytest.mark.parametrize("constraints", [None, {}, {"square_size": 20}, {"size_divisibility": 6}])
def test_padded_images(reference, divisibility, constraints):
    images = [torch.ones(2, h, w) for h, w in [(5, 9), (17, 3), (8, 16)]]
    lists = [
        ImageList.from_tensors(some, divisibility, 0.5, constraints)
        for some in (images, images[:1], images[1:])
    ]
    values = [[x.tensor.shape, x.image_sizes, x.tensor.sum((1, 2, 3))] for x in lists]
    reference(f"structures/padded/{divisibility}/{constraints}", values)


MODEL_NAMES = [
    "backbone.stem.conv1.weight", "backbone.res2.0.conv1.weight", "backbone.res2.0.conv1.norm.bias",
    "backbone.res2.0.shortcut.weight", "head.res2.0.conv3.weight", "head.conv1.bias", "xconv1.bias",
    "head.layers.0.weight", "head.layers.10.weight", "weight", "a.b", "b",
]  # fmt: skip
FILE_NAMES = [
    "stem.conv1.weight", "conv1.weight", "res2.0.conv1.weight", "conv1.norm.bias", "0.conv3.weight",
    "shortcut.weight", "head.conv1.bias", "layers.0.weight", "extra.weight", "b", "ead.unused",
]  # fmt: skip


@pytest.mark.parametrize("size", [1, 2])
def test_names_that_match(reference, size):
    """``size`` 2: some shapes differ."""
    model = {n: torch.zeros(1 + i % size) for i, n in enumerate(MODEL_NAMES) if n != "a.b"}
    file = {name: torch.full((1,), float(i)) for i, name in enumerate(FILE_NAMES)}
    aligned = align_and_update_state_dicts(model, file, c2_conversion=False)
    values = {key: value.flatten()[0] for key, value in sorted(aligned.items())}
    reference(f"checkpoint/aligned/{size}", values)


def test_ambiguous_names():
    model = {name: torch.zeros(1) for name in ("a.b", "b")}
    with pytest.raises(ValueError, match="multiple keys"):
        align_and_update_state_dicts(model, {"b": torch.zeros(1)}, c2_conversion=False)


def test_all_caffe2_names_of_a_resnet(reference):
    names = ["conv1_w", "conv1_b", "res_conv1_bn_s", "res_conv1_bn_b", "fc1000_w", "pred_b"]
    for stage, blocks in zip((2, 3, 4, 5), (3, 4, 23, 3), strict=True):
        for block in range(blocks):
            for branch in ("1", "2a", "2b", "2c")[block > 0 :]:
                prefix = f"res{stage}_{block}_branch{branch}"
                names += [f"{prefix}_w", f"{prefix}_bn_s", f"{prefix}_bn_b"]
                names += [f"{prefix}_bn_riv", f"{prefix}_bn_rm", f"{prefix}_b"]
    file = {name: torch.tensor([float(i)]) for i, name in enumerate(names)}
    weights, originals = convert_c2_detectron_names(file)
    listed = "\n".join(f"{k} {originals[k]} {v.item():.0f}" for k, v in sorted(weights.items()))
    sample = {key: originals[key] for key in sorted(originals)[::60]}
    reference("checkpoint/caffe2", [len(names), zlib.crc32(listed.encode()), sample])
