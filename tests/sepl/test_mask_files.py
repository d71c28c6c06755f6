"""Files of SAM's masks: each format read as its masks, each damaged file refused by its name."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_utils

from s4m_d2.errors import DatasetError, InputError
from s4m_d2.sepl.mask_files import cached_masks, find_masks, read_masks, write_masks

SIZE = (7, 11)
COUNT = 12
FINGERPRINT = "a fingerprint"


def masks_of(count=COUNT, size=SIZE, seed=0):
    """(count, H, W) bool; the first is empty, the second full."""
    masks = np.random.default_rng(seed).random((count, *size)) < 0.4
    masks[:1], masks[1:2] = False, True
    return masks


def compressed(mask):
    rle = mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": rle["counts"].decode()}


def uncompressed(mask):
    """COCO's counts, found pixel by pixel."""
    counts, value = [0], False
    for pixel in mask.T.ravel().tolist():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return {"size": list(mask.shape), "counts": counts}


def records(masks, encode=compressed):
    return [
        {"segmentation": encode(mask), "area": int(mask.sum()), "predicted_iou": 0.9}
        for mask in masks
    ]


def decoded(rles, size=SIZE):
    for rle in rles:
        assert set(rle) == {"size", "counts"} and isinstance(rle["counts"], str)
        assert rle["size"] == list(size)
    return np.array([mask_utils.decode(rle) for rle in rles]).astype(bool).reshape(-1, *size)


def save_png(path, values, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint8)).convert(mode).save(path, "PNG")


def save_json(path, content):
    text = content if isinstance(content, str) else json.dumps(content)
    (gzip.open if path.name.endswith(".gz") else open)(path, "wt").write(text)
    return path


def as_annotations(masks):
    image = {"image_id": 1, "height": SIZE[0], "width": SIZE[1], "file_name": "a.jpg"}
    return {"image": image, "annotations": records(masks)}


JSON_FORMATS = {
    "records": records,
    "records of uncompressed RLEs": lambda masks: records(masks, uncompressed),
    "RLEs": lambda masks: [compressed(mask) for mask in masks],
    "uncompressed RLEs": lambda masks: [uncompressed(mask) for mask in masks],
    "SA-1B": as_annotations,
    "masks": lambda masks: {"masks": records(masks)},
}


@pytest.mark.parametrize("ending", [".json", ".json.gz"])
@pytest.mark.parametrize("form", JSON_FORMATS)
@pytest.mark.parametrize("count", [0, COUNT])
def test_each_json_format_is_read_as_its_masks(tmp_path, form, ending, count):
    masks = masks_of(count)
    path = save_json(tmp_path / f"a{ending}", JSON_FORMATS[form](masks))
    np.testing.assert_array_equal(decoded(read_masks(path, SIZE)), masks)


def test_pngs_are_read_in_the_order_of_their_numbers(tmp_path):
    masks = masks_of()
    for number, mask in enumerate(masks):
        save_png(tmp_path / f"{number}.png", mask * 255)
    (tmp_path / "metadata.csv").write_text("id,area\n")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "._0.png").write_bytes(b"what a copy from a Mac leaves")
    np.testing.assert_array_equal(decoded(read_masks(tmp_path, SIZE)), masks)


def test_numbers_within_names_count_by_value_too(tmp_path):
    names = ["a.png", "mask_2.png", "mask_10.PNG", "mask_10b.png", "mask_011.png"]
    masks = masks_of(len(names))
    for name, mask in zip(names, masks, strict=True):
        save_png(tmp_path / name, mask * 255)
    np.testing.assert_array_equal(decoded(read_masks(tmp_path, SIZE)), masks)


@pytest.mark.parametrize("value, mode", [(255, "L"), (1, "L"), (127, "L"), (255, "1"), (3, "P")])
def test_whatever_is_not_zero_is_set(tmp_path, value, mode):
    mask = masks_of()[5]
    if mode == "P":
        image = Image.fromarray((mask * value).astype(np.uint8))
        image.putpalette(list(range(256)) * 3)
        image.save(tmp_path / "0.png")
    else:
        save_png(tmp_path / "0.png", mask * value, mode)
    with Image.open(tmp_path / "0.png") as image:
        assert image.mode == mode
    np.testing.assert_array_equal(decoded(read_masks(tmp_path, SIZE))[0], mask)


def test_16_bits_are_read_whole(tmp_path):
    mask = masks_of()[5]
    Image.fromarray((mask * 256).astype(np.uint16)).save(tmp_path / "0.png")
    np.testing.assert_array_equal(decoded(read_masks(tmp_path, SIZE))[0], mask)


@pytest.mark.parametrize("names", [[], ["metadata.csv"], [".DS_Store"]])
def test_a_folder_without_pngs_is_that_of_an_image_without_masks(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text("")
    assert read_masks(tmp_path, SIZE) == []


def test_the_union_of_masks_with_runs_of_length_0_is_whole(tmp_path):
    """COCO's API ends a union where two masks have such runs, or does not come to an end."""
    size = (5, 2)
    counts = [[2, 0, 3, 4, 1], [0, 0, 2, 0, 3, 0, 0, 1, 4], [10, 0], [0, 4, 0, 6], [0, 0, 0, 10]]
    path = save_json(tmp_path / "a.json", [{"size": size, "counts": runs} for runs in counts])
    # The same, compressed.
    whole = [mask_utils.frPyObjects({"size": size, "counts": runs}, *size) for runs in counts]
    texts = [{"size": size, "counts": rle["counts"].decode()} for rle in whole]
    expected = np.array(
        [
            [0, 0, 0, 0, 0, 1, 1, 1, 1, 0],
            [0, 0, 0, 0, 0, 1, 0, 0, 0, 0],
            [0] * 10,
            [1] * 10,
            [1] * 10,
        ]
    )
    for source in (path, save_json(tmp_path / "b.json", texts)):
        rles = read_masks(source, size)
        columns = decoded(rles, size).transpose(0, 2, 1).reshape(len(counts), -1)
        np.testing.assert_array_equal(columns, expected)
        assert rles == [compressed(mask) for mask in decoded(rles, size)]
        union = mask_utils.decode(mask_utils.merge(rles[:3]))
        np.testing.assert_array_equal(union.T.ravel(), expected[:3].max(axis=0))


def test_masks_are_found_by_the_images_name(tmp_path):
    assert find_masks(tmp_path / "missing", "a") is None
    save_png(tmp_path / "a.b" / "0.png", np.zeros(SIZE))
    save_json(tmp_path / "c.json", [])
    save_json(tmp_path / "d.json.gz", [])
    (tmp_path / "e").touch()
    assert find_masks(tmp_path, "a.b") == tmp_path / "a.b"
    assert find_masks(tmp_path, "c") == tmp_path / "c.json"
    assert find_masks(tmp_path, "d") == tmp_path / "d.json.gz"
    assert find_masks(tmp_path, "e") is None and find_masks(tmp_path, "a") is None


@pytest.mark.parametrize("others", [("a/", "a.json"), ("a/", "a.json.gz"), ("a.json", "a.json.gz")])
def test_masks_in_two_places_are_refused(tmp_path, others):
    for name in others:
        (tmp_path / name).mkdir() if name.endswith("/") else save_json(tmp_path / name, [])
    with pytest.raises(DatasetError, match=r"a(\.json)? and .*a\.json.* both hold.*Remove"):
        find_masks(tmp_path, "a")


GOOD = {"size": list(SIZE), "counts": "0]2"}  # 77 pixels from the first on
BAD_JSON = {
    "is cut": ('[{"size": [7, 11]', "cannot be read as JSON"),
    "is empty": ("", "cannot be read as JSON"),
    "nested too deep": ("[" * 100_000, "cannot be read as JSON"),
    "is text": ('"masks"', "has no list of masks"),
    "is another dict": ({"info": {}}, "has no list of masks"),
    "has a dict of masks": ({"masks": {"0": GOOD}}, "has no list of masks"),
    "is of several images": ({"images": [], "annotations": [GOOD]}, "of a single image"),
    "has numbers": ([GOOD, 3], "mask 1 of 2: a segmentation is of type int"),
    "has null": ([{"segmentation": None}], "mask 0 of 1: a segmentation is of type NoneType"),
    "has polygons": (
        [GOOD, GOOD, {"segmentation": [[0, 0, 5, 0, 5, 5]]}],
        "mask 2 of 3: a segmentation is of type list; expected an RLE",
    ),
    "has no segmentations": ([{"area": 4, "bbox": [0, 0, 1, 1]}], "keys 'size' and 'counts'"),
    "has no counts": ([{"size": list(SIZE)}], "keys 'size' and 'counts'"),
    "is of another size": ([{**GOOD, "size": [11, 7]}], r"\(11, 7\), but the image has \(7, 11\)"),
    "has a size of text": ([{**GOOD, "size": "7x11"}], r"but the image has \(7, 11\)"),
    "has a number as its size": ([{**GOOD, "size": 77}], r"size must be \[height, width\]"),
    "has counts of too few pixels": ([{**GOOD, "counts": [70, 6]}], "counts sum to 76; expected"),
    "has text of too few pixels": ([{**GOOD, "counts": "0[2"}], "counts sum to 75; expected"),
    "has text that ends early": ([{**GOOD, "counts": "0]"}], "counts must be COCO's text"),
    "has text of other characters": ([{**GOOD, "counts": "0\x00\xff"}], "must be COCO's text"),
    "has half a character": ([{**GOOD, "counts": "0]2\ud800"}], "must be COCO's text"),
    "has no text": ([{**GOOD, "counts": ""}], "must be COCO's text"),
    "has negative counts": ([{**GOOD, "counts": [80, -3]}], "whole numbers from 0 on"),
    "has fractions": ([{**GOOD, "counts": [70.5, 6.5]}], "whole numbers from 0 on"),
    "has a huge count": ([{**GOOD, "counts": [10**30, 7]}], "expected height"),
    "has no list of counts": ([{**GOOD, "counts": {"0": 77}}], "must be COCO's text"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_a_bad_json_file_is_refused_by_its_name(tmp_path, case):
    content, message = BAD_JSON[case]
    path = save_json(tmp_path / "2007_000032.json", content)
    with pytest.raises(DatasetError, match=rf"2007_000032\.json.*{message}"):
        read_masks(path, SIZE)
    assert decoded(read_masks(save_json(path, [GOOD]), SIZE)).all()  # what the rows are made of


@pytest.mark.parametrize("damage", [lambda raw: raw[:-9], lambda raw: b"[]", lambda raw: b""])
def test_a_damaged_archive_is_refused_by_its_name(tmp_path, damage):
    path = save_json(tmp_path / "a.json.gz", records(masks_of()))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DatasetError, match=r"a\.json\.gz cannot be read as JSON"):
        read_masks(path, SIZE)


def test_a_file_that_is_not_there_is_refused_by_its_name(tmp_path):
    with pytest.raises(DatasetError, match=r"a\.json does not exist; expected a folder"):
        read_masks(tmp_path / "a.json", SIZE)


def save_cut_png(path):
    save_png(path, masks_of(size=(40, 40))[5] * 255)
    path.write_bytes(path.read_bytes()[:-60])


BAD_PNGS = {
    "is no PNG": (lambda path: path.write_text("text"), "cannot be read"),
    "is cut": (save_cut_png, "cannot be read"),
    "is empty": (lambda path: path.write_bytes(b""), "cannot be read"),
    "is larger": (lambda path: save_png(path, np.zeros((40, 41))), r"\(40, 41\), but the image"),
    "is turned": (lambda path: save_png(path, np.zeros((11, 7))), r"\(11, 7\), but the image has"),
    "is a picture": (lambda path: save_png(path, np.zeros(SIZE), "RGB"), "channels R, G, B; expec"),
    "has alpha": (lambda path: save_png(path, np.zeros(SIZE), "LA"), "channels L, A; expected"),
}


@pytest.mark.parametrize("case", BAD_PNGS)
def test_a_bad_png_is_refused_by_its_name(tmp_path, case):
    save, message = BAD_PNGS[case]
    save_png(tmp_path / "1.png", masks_of()[5] * 255)
    save(tmp_path / "12.png")
    size = (40, 40) if case == "is cut" else SIZE
    if size != SIZE:
        save_png(tmp_path / "1.png", np.zeros(size))
    with pytest.raises(DatasetError, match=rf"12\.png .*{message}"):
        read_masks(tmp_path, size)


def test_masks_of_another_format_are_not_taken_for_none(tmp_path):
    np.save(tmp_path / "0.npy", masks_of())
    with pytest.raises(DatasetError, match=r"has no PNG, but '0\.npy'"):
        read_masks(tmp_path, SIZE)


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
@pytest.mark.parametrize("form", ["records", "RLEs", "uncompressed RLEs"])
@pytest.mark.parametrize("count", [0, COUNT])
def test_masks_that_are_written_are_read(tmp_path, name, form, count):
    masks = masks_of(count)
    path = tmp_path / "new" / name
    written = write_masks(path, JSON_FORMATS[form](masks), SIZE, FINGERPRINT)
    assert written == read_masks(path, SIZE)
    for read in (cached_masks(path, SIZE, FINGERPRINT), read_masks(path, SIZE)):
        np.testing.assert_array_equal(decoded(read), masks)
    assert find_masks(tmp_path / "new", "a") == path
    assert [file.name for file in path.parent.iterdir()] == [name]
    if name.endswith(".gz"):
        assert path.read_bytes()[4:8] == bytes(4)  # no time: equal masks make equal files


def test_a_written_file_keeps_all_that_sam_said_of_a_mask(tmp_path):
    given = records(masks_of())
    write_masks(tmp_path / "a.json", given, SIZE, FINGERPRINT)
    content = json.loads((tmp_path / "a.json").read_text())
    assert content == {"size": [7, 11], "fingerprint": FINGERPRINT, "masks": given}


def test_counts_as_bytes_are_written_as_text(tmp_path):
    (mask,) = masks_of()[5:6]
    rle = mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))
    write_masks(tmp_path / "a.json", [{"segmentation": rle}], SIZE, FINGERPRINT)
    np.testing.assert_array_equal(decoded(read_masks(tmp_path / "a.json", SIZE))[0], mask)


@pytest.mark.parametrize(
    "name, masks, size, message",
    [
        ("a.json", [GOOD, {**GOOD, "size": [11, 7]}], SIZE, "mask 1 of 2: the mask has"),
        ("a.json", [{"segmentation": np.zeros(SIZE, bool)}], SIZE, "is of type ndarray"),
        ("a.txt", [GOOD], SIZE, r"a\.txt must end with \.json"),
        ("a.json", [], (0, 4), r"size is \(0, 4\)"),
    ],
)
def test_what_could_not_be_read_is_not_written(tmp_path, name, masks, size, message):
    (tmp_path / name).write_text("as it was")
    with pytest.raises(InputError, match=message):
        write_masks(tmp_path / name, masks, size, FINGERPRINT)
    assert (tmp_path / name).read_text() == "as it was"


def test_a_cache_that_does_not_fit_is_made_anew(tmp_path):
    path = tmp_path / "a.json"
    assert cached_masks(path, SIZE, FINGERPRINT) is None
    write_masks(path, [], SIZE, FINGERPRINT)
    assert cached_masks(path, SIZE, FINGERPRINT) == []
    assert cached_masks(path, SIZE[::-1], FINGERPRINT) is None
    assert cached_masks(path, SIZE, "another") is None
    save_json(path, records(masks_of()))  # another program's masks
    assert cached_masks(path, SIZE, FINGERPRINT) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-20],
        lambda text: text.replace('"masks"', '"mask"'),
        lambda text: text.replace('"counts":"', '"counts":"o', 1),
    ],
)
def test_a_damaged_cache_is_made_anew(tmp_path, damage):
    path = tmp_path / "a.json"
    write_masks(path, records(masks_of()), SIZE, FINGERPRINT)
    assert len(cached_masks(path, SIZE, FINGERPRINT)) == COUNT
    changed = damage(path.read_text())
    assert changed != path.read_text()
    path.write_text(changed)
    assert cached_masks(path, SIZE, FINGERPRINT) is None
