import cv2
import numpy as np
import pytest
from data_scenes import HEIGHT, WIDTH, scene
from detectron2.config import get_cfg

from s4m_d2.config import add_s4m_config
from s4m_d2.data import ColorDistortion
from s4m_d2.data.transforms import apply_geometry, build_geometry, seeded_numpy
from s4m_d2.errors import ConfigError

SEEDS = range(20)


def config(**inputs):
    cfg = get_cfg()
    add_s4m_config(cfg)
    cfg.INPUT.MIN_SIZE_TRAIN = (32, 48, 64)
    cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = "choice"
    cfg.INPUT.CROP.ENABLED = True
    cfg.INPUT.CROP.TYPE = "absolute"
    cfg.INPUT.CROP.SIZE = (24, 48)
    for key, value in inputs.items():
        cfg.INPUT[key] = value
    return cfg


def test_numpy_s_global_generator_is_seeded_and_restored():
    np.random.seed(5)
    expected = np.random.random(4)
    np.random.seed(5)
    draws = []
    for seed in (1, 2**62, 1):
        with seeded_numpy(seed):
            draws.append(np.random.random())
    assert draws[0] == draws[2] != draws[1]
    assert np.array_equal(np.random.random(4), expected)
    with pytest.raises(ZeroDivisionError), seeded_numpy(1):
        raise ZeroDivisionError
    np.random.seed(5)
    assert np.array_equal(np.random.random(4), expected)


def test_geometry_is_a_function_of_the_seed():
    image = scene(0)[0]
    geometry = build_geometry(config())
    views = [apply_geometry(geometry, image, seed)[0] for seed in (*SEEDS, *SEEDS)]
    assert all(np.array_equal(views[i], views[i + len(SEEDS)]) for i in range(len(SEEDS)))
    assert {view.shape for view in views} == {(24, 48, 3)}
    assert len({view.tobytes() for view in views}) > len(SEEDS) // 2


def test_large_scale_jitter_returns_content_only():
    """Each side is that of the resized image, at most the crop's; nothing is padded."""
    image = np.full((HEIGHT, WIDTH, 3), 77, dtype=np.uint8)
    cfg = config(DATASET_MAPPER_NAME="coco_instance_lsj", IMAGE_SIZE=40)
    geometry = build_geometry(cfg)
    sizes = set()
    for seed in SEEDS:
        view, _ = apply_geometry(geometry, image, seed)
        height, width = view.shape[:2]
        sizes.add((height, width))
        assert (view == 77).all()
        assert height <= 40 and width <= 40
        assert width == 40 or abs(width - 2 * height) <= 1
    assert any(width < 40 for _, width in sizes) and any(width == 40 for _, width in sizes)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"DATASET_MAPPER_NAME": "mine"}, "'mine'.*coco_instance_lsj.*mask_former_instance"),
        ({"RANDOM_FLIP": "diagonal"}, "diagonal"),
    ],
)
def test_bad_geometry(inputs, message):
    with pytest.raises(ConfigError, match=message):
        build_geometry(config(**inputs))


def test_crops_that_depend_on_categories_are_refused():
    cfg = config()
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 0.75
    with pytest.raises(ConfigError, match="SINGLE_CATEGORY_MAX_AREA is 0.75"):
        build_geometry(cfg)


def test_color_distortion_is_deterministic_and_leaves_its_input():
    image = scene(0)[0]
    before = image.copy()
    distort = ColorDistortion("RGB")
    first, second, other = (distort(image, np.random.default_rng(s)) for s in (3, 3, 4))
    assert np.array_equal(first, second) and not np.array_equal(first, other)
    assert np.array_equal(image, before) and first is not image


def test_rgb_and_bgr_images_are_distorted_alike():
    image = scene(1)[0]
    for seed in SEEDS:
        rgb = ColorDistortion("RGB")(image, np.random.default_rng(seed))
        bgr = ColorDistortion("BGR")(image[..., ::-1].copy(), np.random.default_rng(seed))
        assert np.array_equal(rgb, bgr[..., ::-1])


def only(**ranges):
    """Distortion of one kind, always applied."""
    neutral = {"brightness": 0, "contrast": (1, 1), "saturation": (1, 1), "hue": 0}
    return ColorDistortion("RGB", **{**neutral, **ranges}, probability=1)


def hsv_of(image):
    return cv2.cvtColor(image, cv2.COLOR_RGB2HSV).astype(int)


def test_the_default_distortion_stays_in_ssd_s_bounds():
    """A flat color shows the amount of each distortion: all of SSD's range is used, no more."""
    flat = np.full((4, 4, 3), (150, 100, 100), dtype=np.uint8)
    gray = np.full((4, 4, 3), 100, dtype=np.uint8)
    defaults = ColorDistortion("RGB")
    seen = {"brightness": [], "contrast": [], "saturation": [], "hue": []}
    for seed in range(200):
        for kind in seen:
            distort = only(**{kind: getattr(defaults, kind)})
            image = flat if kind in ("saturation", "hue") else gray
            output = distort(image, np.random.default_rng(seed))
            if kind == "hue":
                amount = (hsv_of(output)[0, 0, 0] - hsv_of(image)[0, 0, 0] + 90) % 180 - 90
            elif kind == "saturation":
                amount = hsv_of(output)[0, 0, 1] / hsv_of(image)[0, 0, 1]
            elif kind == "contrast":
                amount = output[0, 0, 0] / 100
            else:
                amount = int(output[0, 0, 0]) - 100
            seen[kind].append(amount)
    bounds = {
        "brightness": (-32, 32, 2),
        "contrast": (0.5, 1.5, 0.03),
        "saturation": (0.5, 1.5, 0.05),
        "hue": (-18, 18, 1),
    }
    for kind, (low, high, slack) in bounds.items():
        assert low - slack <= min(seen[kind]) <= low + 2 * slack, kind
        assert high - 2 * slack <= max(seen[kind]) <= high + slack, kind


def test_each_distortion_is_applied_half_of_the_time():
    flat = np.full((2, 2, 3), (150, 100, 100), dtype=np.uint8)
    unchanged = sum(
        np.array_equal(ColorDistortion("RGB")(flat, np.random.default_rng(seed)), flat)
        for seed in range(800)
    )
    assert unchanged / 800 == pytest.approx(1 / 16, abs=0.03)  # none of four


def test_contrast_comes_before_or_after_saturation():
    """Clipping makes the order visible: bright red, more contrast and less saturation."""
    image = np.full((1, 1, 3), (250, 60, 60), dtype=np.uint8)
    distort = ColorDistortion(
        "RGB", brightness=0, contrast=(1.5, 1.5), saturation=(0.5, 0.5), hue=0, probability=0.5
    )
    outputs = {distort(image, np.random.default_rng(s)).tobytes() for s in range(200)}
    assert len(outputs) == 5  # nothing, one, the other, both in either order


def slowly_distorted(settings, image_format, image, rng):
    """The same distortion, without tables: every value is computed in float32."""

    def scaled(values, factor, shift):
        return np.clip(values.astype(np.float32) * factor + shift, 0, 255).astype(np.uint8)

    contrast_first, *chosen = rng.random(5) < settings.probability
    shift = rng.uniform(-settings.brightness, settings.brightness)
    contrast, saturation = rng.uniform(*settings.contrast), rng.uniform(*settings.saturation)
    hue = int(rng.integers(-settings.hue, settings.hue, endpoint=True))
    if chosen[0]:
        image = scaled(image, 1, shift)
    if chosen[1] and contrast_first:
        image = scaled(image, contrast, 0)
    hsv = cv2.cvtColor(image, getattr(cv2, f"COLOR_{image_format}2HSV"))
    if chosen[2]:
        hsv[..., 1] = scaled(hsv[..., 1], saturation, 0)
    if chosen[3]:
        hsv[..., 0] = (hsv[..., 0].astype(int) + hue) % 180
    if chosen[2] or chosen[3]:
        image = cv2.cvtColor(hsv, getattr(cv2, f"COLOR_HSV2{image_format}"))
    return scaled(image, contrast, 0) if chosen[1] and not contrast_first else image


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_tables_of_levels_give_every_value_exactly(image_format):
    image = np.random.default_rng(0).integers(0, 256, (61, 83, 3), dtype=np.uint8)
    image.flags.writeable = False
    for probability in (0.5, 1.0):
        distort = ColorDistortion(image_format, probability=probability)
        for seed in range(60):
            expected = slowly_distorted(distort, image_format, image, np.random.default_rng(seed))
            assert np.array_equal(distort(image, np.random.default_rng(seed)), expected)


def test_unknown_channel_order():
    with pytest.raises(ConfigError, match="'HSV'"):
        ColorDistortion("HSV")
