"""Labeled and unlabeled data sets, registered on import without reading any file, and the choice
of labeled images: a fixed share of a set, a list of file names, a validation split.

``$DETECTRON2_DATASETS`` (default: ``datasets``) is read whenever a set is loaded.
"""

import functools
import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field

from detectron2.data import DatasetCatalog, MetadataCatalog

from s4m_d2.data.annotations import Annotations, read_annotations
from s4m_d2.data.cityscapes import IMAGE_SUFFIX, INSTANCE_SUFFIX, CityscapesFormat
from s4m_d2.data.images import (
    IMAGE_EXTENSIONS,
    dataset_path,
    list_images,
    photograph,
    unlabeled_records,
)
from s4m_d2.errors import ConfigError, DatasetError, InputError, first_names, require
from s4m_d2.files import read_lines

CITYSCAPES_PERCENTS = (5, 10, 20, 30)
DEFAULT_SPLIT_SEED = 0
OWN_LABELED, OWN_UNLABELED, OWN_VALIDATION = "own_labeled", "own_unlabeled", "own_val"

_PERCENT_NAME = re.compile(r"(?P<base>.+)_(?P<percent>\d+)pct")

Choose = Callable[[Sequence[str]], list[str]]
Loaded = tuple[list[dict], dict]  # records and metadata


@dataclass(frozen=True)
class CocoFormat:
    """A data set in COCO's layout: a folder of images, and one json file of instances.

    Relative paths start at $DETECTRON2_DATASETS.
    """

    json_file: str
    image_root: str
    #: Known metadata (thing_classes, ...); empty: taken from the file.
    classes: dict = field(default_factory=dict, hash=False)
    #: End of the message if the data set is missing.
    remedy: str = "Set DETECTRON2_DATASETS to the folder that holds it."

    def metadata(self) -> dict:
        """Metadata for Detectron2's evaluators and visualizer, with the current paths."""
        root, json_file = dataset_path(self.image_root), dataset_path(self.json_file)
        paths = {"json_file": json_file, "image_root": root, "image_dir": root}
        return {**self.classes, "evaluator_type": "coco", **paths}

    def unlabeled_images(self) -> list[str]:
        """Paths of all images, sorted; the json file is not opened."""
        return list_images(dataset_path(self.image_root), IMAGE_EXTENSIONS, self.remedy)

    def load(self, choose: Choose) -> Loaded:
        """Read the images that ``choose`` picks from the paths of all, as
        :func:`~s4m_d2.data.annotations.read_annotations`; the metadata have the classes."""
        metadata, classes = self.metadata(), self.classes.get("thing_classes", ())
        files = metadata["json_file"], metadata["image_root"]
        found = read_annotations(*files, classes=classes, choose=choose, remedy=self.remedy)
        return list(found.records), {**metadata, **found.metadata()}


DatasetFormat = CityscapesFormat | CocoFormat
_FORMATS: dict[str, DatasetFormat] = {}  # of the labeled sets registered here
_UNLABELED: dict[str, DatasetFormat] = {}  # of the unlabeled ones, whose annotations stay unread


def register_splits(
    name: str, dataset: DatasetFormat, percents: Sequence[int], *, full: bool = False
) -> None:
    """Register ``{name}_{p}pct`` for each of ``percents``, whole percentages of the images, and
    ``{name}_unlabeled`` with all images; ``full``: also ``name`` itself, with all annotations."""
    if full:
        _register_labeled(name, dataset, sorted)
    for percent in percents:
        choose = functools.partial(stable_subset, fraction=percent / 100, seed=DEFAULT_SPLIT_SEED)
        _register_labeled(f"{name}_{percent}pct", dataset, choose)

    def load() -> Loaded:
        metadata = dataset.metadata()
        return unlabeled_records(dataset.unlabeled_images(), metadata["image_dir"]), metadata

    _register(f"{name}_unlabeled", load, dataset.metadata())
    _UNLABELED[f"{name}_unlabeled"] = dataset


def register_unlabeled_folder(name: str, image_dir: str) -> None:
    """Register all images below a folder, absolute or in $DETECTRON2_DATASETS, as unlabeled."""

    def load() -> Loaded:
        folder = dataset_path(image_dir)
        images = list_images(folder, IMAGE_EXTENSIONS, "Register the folder that holds them.")
        return unlabeled_records(images, folder), {"image_dir": folder}

    _register(name, load, {"image_dir": dataset_path(image_dir)})


def register_own_data(
    labeled: Annotations,
    validation: Annotations | None,
    ground_truth: str,
    image_dir: str,
    unlabeled: Sequence[str],
) -> None:
    """Register ``own_labeled``; ``own_val``, unless None, with the path of the evaluator's COCO
    file, which may be written later; ``own_unlabeled``, paths below ``image_dir``, if there are
    any: in place of earlier ones."""
    for name in (OWN_LABELED, OWN_UNLABELED, OWN_VALIDATION):
        for catalog in (DatasetCatalog, MetadataCatalog):
            if name in catalog.list():
                catalog.remove(name)
    _register_coco(OWN_LABELED, labeled, labeled.json_file)
    if validation is not None:
        _register_coco(OWN_VALIDATION, validation, ground_truth)
    if unlabeled:
        images = [os.path.join(image_dir, name) for name in unlabeled]

        @functools.cache  # headers are read once per process, for checks, loader and figures
        def load() -> Loaded:
            return unlabeled_records(images, image_dir), {}

        _register(OWN_UNLABELED, load, {"image_dir": image_dir})


def _register_coco(name: str, annotations: Annotations, json_file: str) -> None:
    paths = {"json_file": json_file, "image_root": annotations.image_root}
    metadata = {"evaluator_type": "coco", **paths, **annotations.metadata()}
    _register(name, lambda: (list(annotations.records), {}), metadata)


def labeled_dataset_names(
    names: Sequence[str], split_file: str = "", split_seed: int = DEFAULT_SPLIT_SEED
) -> tuple[str, ...]:
    """Apply S4M.SPLIT_FILE or S4M.SPLIT_SEED to the data sets to train on.

    Args:
        names: DATASETS.TRAIN.
        split_file: a list of file names (:func:`read_split_file`) that replaces the fraction in
            the single name, which is of any registered set.
        split_seed: seed of every ``..._train_Npct`` of ``names``.

    Returns:
        ``names`` themselves, or new ones (``..._train_10pct_seed3``, ``..._train_list_1f0e2d3c``)
        that are registered here.

    Raises:
        ConfigError: the two keys do not fit ``names`` or each other.
        DatasetError: the list is missing, empty or has duplicates.
    """
    if not split_file:
        is_default = split_seed == DEFAULT_SPLIT_SEED
        return tuple(name if is_default else _seeded_dataset(name, split_seed) for name in names)
    if split_seed != DEFAULT_SPLIT_SEED:
        raise ConfigError("S4M.SPLIT_FILE and S4M.SPLIT_SEED exclude each other; set only one.")
    if len(names) != 1:
        raise ConfigError(
            "S4M.SPLIT_FILE lists images of one data set, but DATASETS.TRAIN names "
            f"{len(names)}: {', '.join(names)}."
        )
    return (_listed_dataset(names[0], split_file),)


def _seeded_dataset(name: str, seed: int) -> str:
    match = _PERCENT_NAME.fullmatch(name)
    if match is None or name not in _FORMATS:
        raise ConfigError(
            f"S4M.SPLIT_SEED is {seed}, but '{name}' of DATASETS.TRAIN is not a drawn split; name "
            "a set of register_splits, such as cityscapes_fine_instance_seg_train_10pct."
        )
    seeded, fraction = f"{name}_seed{seed}", int(match["percent"]) / 100
    if seeded not in _FORMATS:
        choose = functools.partial(stable_subset, fraction=fraction, seed=seed)
        _register_labeled(seeded, _FORMATS[name], choose)
    return seeded


def _listed_dataset(name: str, split_file: str) -> str:
    stems = read_split_file(split_file)
    digest = name_key("\n".join(sorted(stems))).hex()[:8]
    match = _PERCENT_NAME.fullmatch(name)
    listed = f"{match['base'] if match else name}_list_{digest}"
    choose = functools.partial(listed_subset, stems=stems, origin=split_file)

    def load() -> Loaded:
        records = {record["file_name"]: record for record in load_records(name)}
        return [records[file_name] for file_name in choose(list(records))], metadata()

    def metadata() -> dict:  # some of Detectron2's is known after loading
        found = MetadataCatalog.get(name).as_dict()
        return {key: value for key, value in found.items() if key != "name"}

    if listed in DatasetCatalog.list():
        return listed
    if name in _FORMATS:
        _register_labeled(listed, _FORMATS[name], choose)
    else:
        _register(listed, load, metadata())
    return listed


def _register_labeled(name: str, dataset: DatasetFormat, choose: Choose) -> None:
    _register(name, lambda: dataset.load(choose), dataset.metadata())
    _FORMATS[name] = dataset


def _register(name: str, load: Callable[[], Loaded], metadata: dict) -> None:
    """Register a set; ``load`` returns its records, and metadata that are known only then."""

    def records() -> list[dict]:
        try:
            found, current = load()
        except DatasetError as error:
            raise DatasetError(*f"Data set '{name}': {error}".split("\n")) from error
        vars(MetadataCatalog.get(name)).update(current)  # Detectron2's setter refuses changes
        return found

    DatasetCatalog.register(name, records)
    MetadataCatalog.get(name).set(**metadata)


def has_true_labels(name: str) -> bool:
    """Whether labels of an unlabeled set are known: it is one of :func:`register_splits`."""
    return name in _UNLABELED


def load_records(name: str) -> list[dict]:
    """Load a registered data set; DatasetError if that fails."""
    if name not in DatasetCatalog.list():
        known = ", ".join(sorted(DatasetCatalog.list()))
        raise DatasetError(f"The data set '{name}' is not registered. Registered are: {known}.")
    try:
        records = DatasetCatalog.get(name)
        paths = [record["file_name"] for record in records]
    except DatasetError:
        raise
    except Exception as error:  # of anyone's loader
        raise DatasetError(
            f"The data set '{name}' cannot be loaded: {error}. Correct its loader or its files, "
            "which lie under $DETECTRON2_DATASETS (datasets/README.md)."
        ) from error
    if not paths:
        raise DatasetError(f"The data set '{name}' has no images. Add some, or leave it out.")
    return records


def true_records(
    names: Sequence[str], max_images: int = 0, known: Collection[str] = ()
) -> list[dict]:
    """Records of images with their annotations, in an order that follows from the files' names
    alone and mixes folders: the first images are the same everywhere.

    Args:
        names: unlabeled sets with labels (:func:`has_true_labels`), or any labeled ones.
        max_images: of all sets together; 0: all.
        known: paths of images to leave out, such as those that a model was trained on.

    Raises:
        DatasetError: the labels of a set are missing or malformed, or nothing is left.
    """
    known = {os.path.abspath(path) for path in known}

    def choose(paths: Iterable[str]) -> list[str]:
        left = [path for path in paths if os.path.abspath(path) not in known]
        return sorted(left, key=_place)[: max_images or None]

    records: list[dict] = []
    for name in names:
        if dataset := _UNLABELED.get(name):
            found, metadata = dataset.load(choose)
            vars(MetadataCatalog.get(name)).update(metadata)
            records += found
        else:
            labeled = {r["file_name"]: r for r in load_records(name) if "annotations" in r}
            records += [labeled[path] for path in choose(labeled)]
    if not records:
        raise DatasetError(
            f"{', '.join(names)}: no image is left that has labels and is not trained on, to "
            "compare pseudo-labels with. Name other data sets in S4M.QUALITY.DATASETS."
        )
    return sorted(records, key=lambda record: _place(record["file_name"]))[: max_images or None]


def _place(path: str) -> tuple[bytes, str]:
    return name_key(photograph(os.path.basename(path))), path  # copies in a row


def name_key(name: str, key: bytes = b"") -> bytes:
    """Sort key of a name for a fixed pseudo-random order."""
    return hashlib.blake2b(name.encode(), key=key, digest_size=16).digest()


def _share(fraction: float, count: int) -> int:
    """fraction * count, rounded half up, at least 1."""
    return max(1, math.floor(round(fraction * count, 6) + 0.5))  # 0.145 * 100 < 14.5


def stable_subset(names: Sequence[str], fraction: float, seed: int) -> list[str]:
    """Choose a share of a data set by ``seed``, sorted, the same on every machine.

    The names whose base names have the smallest BLAKE2b hashes, keyed with the seed, are chosen,
    whatever their folder and order. A smaller fraction, in (0, 1], is a subset of a larger one;
    fraction * len(names) is rounded half up, to at least 1. DatasetError: ``names`` is empty or two
    base names are equal.

    >>> stable_subset(["a/1.png", "a/2.png", "b/3.png", "b/4.png"], 0.5, seed=0)
    ['a/1.png', 'b/3.png']
    """
    if not 0 < fraction <= 1:
        raise InputError(f"fraction must be in (0, 1], got {fraction}.")
    if not names:
        raise DatasetError("There are no images to draw a labeled split from.")
    _refuse_duplicates([os.path.basename(name) for name in names], "The data set")
    seed_bytes = str(seed).encode()
    ordered = sorted(names, key=lambda name: name_key(os.path.basename(name), seed_bytes))
    return sorted(ordered[: _share(fraction, len(names))])


def read_split_file(path: str) -> list[str]:
    """Read the stems of the file names in a text file, one per line, with or without folder,
    extension and Cityscapes' suffixes; ``#`` starts a comment. DatasetError: the file is missing,
    empty or not text, or lists a name twice."""
    lines = (line.split("#")[0].strip() for line in read_lines(path))
    stems = [stem(line) for line in lines if line]
    if not stems:
        raise DatasetError(f"The list {path} is empty; write one image file name per line.")
    _refuse_duplicates(stems, f"The list {path}")
    return stems


def listed_subset(names: Sequence[str], stems: Sequence[str], origin: str) -> list[str]:
    """Choose the names whose stem is listed in ``origin``, sorted; DatasetError: a listed name is
    not in the data set, or fits more than one image."""
    wanted = set(stems)
    chosen = {name: found for name in names if (found := stem(name)) in wanted}
    if missing := sorted(wanted - set(chosen.values())):
        raise DatasetError(
            f"{len(missing)} of the {len(stems)} images that {origin} lists are not in the data "
            f"set: {first_names(missing)}. Correct the list, or name its data set in "
            "DATASETS.TRAIN."
        )
    _refuse_duplicates(list(chosen.values()), "The data set")
    return sorted(chosen)


def stem(name: str) -> str:
    """Remove folder, image extension and Cityscapes' suffixes from a file name.

    >>> stem("train/aachen/aachen_000000_000019_leftImg8bit.png")
    'aachen_000000_000019'
    """
    base = os.path.basename(name)
    root, extension = os.path.splitext(base)
    root = root if extension.lower() in IMAGE_EXTENSIONS else base
    for suffix in (IMAGE_SUFFIX, INSTANCE_SUFFIX):
        root = root.removesuffix(os.path.splitext(suffix)[0])
    return root


def _refuse_duplicates(names: Sequence[str], owner: str) -> None:
    if twice := sorted(name for name, count in Counter(names).items() if count > 1):
        raise DatasetError(
            f"{owner} has {len(twice)} names more than once: {first_names(twice)}. "
            "Images are told apart by their file names: make these unique."
        )


def draw_validation(classes_of: Mapping[str, Set[str]], fraction: float) -> list[str]:
    """Choose the images for validation, sorted, the same on every machine.

    Images are ordered by the BLAKE2b hash of their names. From the rarest class to the most
    frequent, the first image of a class that has none yet is chosen; then the first images of all,
    up to the fraction (rounded half up, at least one). Each class keeps an image to train on. To
    contain each class, the split may have up to twice the fraction's images, but not more than half
    of all.

    Args:
        classes_of: image name -> names of the classes of its instances.
        fraction: in (0, 1).

    Raises:
        ConfigError, DatasetError: the fraction is out of range; no image can be chosen.

    >>> classes_of = {"1.png": {"cat"}, "2.png": {"cat"}, "3.png": {"dog"}, "4.png": {"dog"}}
    >>> draw_validation(classes_of, 0.25)
    ['2.png', '4.png']
    """
    require("S4M.DATA.VAL_FRACTION", fraction, 0 < fraction < 1, "above 0 and below 1")
    ordered = sorted(classes_of, key=name_key)
    left = Counter(name for classes in classes_of.values() for name in classes)
    wanted = _share(fraction, len(ordered))
    most = max(wanted, min(2 * wanted, len(ordered) // 2))
    chosen: set[str] = set()

    def take_first(images: Iterable[str]) -> None:  # that leaves one of each class
        for image in images:
            if image not in chosen and all(left[name] > 1 for name in classes_of[image]):
                chosen.add(image)
                left.subtract(classes_of[image])
                return

    for rare in sorted(left, key=lambda name: (left[name], name)):
        if len(chosen) < most and not any(rare in classes_of[image] for image in chosen):
            take_first(image for image in ordered if rare in classes_of[image])
    for image in ordered:
        if len(chosen) < min(wanted, len(ordered) - 1):
            take_first([image])
    if not any(classes_of[image] for image in chosen):
        some = sum(map(bool, classes_of.values()))
        raise DatasetError(
            f"No validation split can be drawn from {len(ordered)} labeled image(s), {some} with "
            "instances. Label more, give --val, or set S4M.DATA.VAL_FRACTION 0.0."
        )
    return sorted(chosen)


def _register_builtin() -> None:
    check = "Run datasets/prepare_{}.py: it says what is missing and where to get it."
    make = "Make it with: python datasets/make_toyscapes.py (DETECTRON2_DATASETS names its parent)."

    def in_layout(root: str, remedy: str) -> list[CityscapesFormat]:
        return [
            CityscapesFormat(f"{root}/leftImg8bit/{split}", f"{root}/gtFine/{split}", remedy)
            for split in ("train", "val")
        ]

    train, val = in_layout("cityscapes", check.format("cityscapes"))
    register_splits("cityscapes_fine_instance_seg_train", train, CITYSCAPES_PERCENTS)
    # Detectron2 registers "..._val" itself, but its newest loader imports a module that only its
    # authors have; this one reads the same images with the masks of instanceIds.
    _register_labeled("cityscapes_fine_instance_seg_val_ids", val, sorted)
    train, val = in_layout("toyscapes", make)
    register_splits("toyscapes_train", train, CITYSCAPES_PERCENTS, full=True)
    _register_labeled("toyscapes_val", val, sorted)
    coco = MetadataCatalog.get("coco_2017_train")
    keys = ("thing_classes", "thing_colors", "thing_dataset_id_to_contiguous_id")
    json_file, image_root = "coco/annotations/instances_train2017.json", "coco/train2017"
    classes = {key: coco.get(key) for key in keys}
    dataset = CocoFormat(json_file, image_root, classes, check.format("coco"))
    register_splits("coco_2017_train", dataset, (1, 2, 5, 10))


_register_builtin()
