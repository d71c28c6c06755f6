"""Files of SAM's masks: each format read as its masks, each damaged file refused by its name."""

import gzip
import json

import numpy as np
import pytest
import torch
from helpers import rle_of
from PIL import Image
from pycocotools import mask as mask_utils
from segment_anything.utils.amg import mask_to_rle_pytorch
from sepl_folders import save_png

from s4m_d2.errors import DatasetError
from s4m_d2.sepl.files import kept_masks, read_masks

SIZE = (7, 11)
MASKS = np.random.default_rng(0).random((12, *SIZE)) < 0.4
MASKS[0], MASKS[1] = False, True
GOOD = {"size": list(SIZE), "counts": "0]2"}  # 77 pixels from the first on


def uncompressed(mask):
    """COCO's counts, as SAM writes them."""
    return mask_to_rle_pytorch(torch.from_numpy(mask)[None])[0]


def records(masks, encode=rle_of):
    return [{"segmentation": encode(mask), "area": int(mask.sum())} for mask in masks]


def save_json(path, content):
    text = content if isinstance(content, str) else json.dumps(content)
    (gzip.open if path.name.endswith(".gz") else open)(path, "wt").write(text)
    return path


def decoded(rles):
    assert all(rle["size"] == list(SIZE) and isinstance(rle["counts"], str) for rle in rles)
    return np.array([mask_utils.decode(rle) for rle in rles]).reshape(-1, *SIZE) > 0


FORMS = {
    "records": records,
    "records of uncompressed RLEs": lambda masks: records(masks, uncompressed),
    "RLEs": lambda masks: [rle_of(mask) for mask in masks],
    "uncompressed RLEs": lambda masks: [uncompressed(mask) for mask in masks],
    "SA-1B": lambda masks: {"image": {"height": SIZE[0]}, "annotations": records(masks)},
    "masks": lambda masks: {"masks": records(masks)},
}


def test_each_json_format_is_read_as_its_masks(tmp_path):
    for form in FORMS.values():
        for ending, masks in ((".json", MASKS), (".json.gz", MASKS), (".json", MASKS[:0])):
            path = save_json(tmp_path / f"a.b{ending}", form(masks))
            np.testing.assert_array_equal(decoded(read_masks(tmp_path, "a.b", SIZE)), masks)
            path.unlink()


def test_folders_of_pngs(tmp_path):
    """In the order of their numbers, whatever is not zero is set, other files do not matter."""
    folder = tmp_path / "a"
    for number, mask in enumerate(MASKS):
        save_png(folder / f"{number}.png", mask * (255, 1, 127)[number % 3])
    save_png(folder / "3.png", MASKS[3] * 255, "1")
    palette = Image.fromarray(MASKS[4].astype(np.uint8) * 3)
    palette.putpalette(bytes(768))
    palette.save(folder / "4.png")
    Image.fromarray((MASKS[5] * 256).astype(np.uint16)).save(folder / "5.png")
    for name in ("metadata.csv", "notes.txt", "._0.png"):
        (folder / name).write_text("what a copy leaves")
    np.testing.assert_array_equal(decoded(read_masks(tmp_path, "a", SIZE)), MASKS)


def test_a_folder_without_pngs_is_that_of_an_image_without_masks(tmp_path):
    (tmp_path / "a").mkdir()
    assert read_masks(tmp_path, "a", SIZE) == []
    for name in ("metadata.csv", ".DS_Store"):
        (tmp_path / "a" / name).touch()
    assert read_masks(tmp_path, "a", SIZE) == []
    np.save(tmp_path / "a" / "0.npy", MASKS)  # of another format: not taken for none
    with pytest.raises(DatasetError, match=r"0\.npy"):
        read_masks(tmp_path, "a", SIZE)


def test_masks_that_are_missing_or_in_two_places(tmp_path):
    with pytest.raises(DatasetError, match="no folder a, a.json"):
        read_masks(tmp_path / "missing", "a", SIZE)
    save_json(tmp_path / "a.json", [GOOD])
    (tmp_path / "a").mkdir()
    with pytest.raises(DatasetError, match=r"a and .*a\.json"):
        read_masks(tmp_path, "a", SIZE)


BAD_JSON = {
    "cut": '[{"size": [7, 11]',
    "nested too deep": "[" * 100_000,
    "text": '"masks"',
    "another dict": {"info": {}},
    "a dict of masks": {"masks": {"0": GOOD}},
    "several images": {"images": [], "annotations": [GOOD]},
    "numbers": [GOOD, 3],
    "polygons": [GOOD, {"segmentation": [[0, 0, 5, 0, 5, 5]]}],
    "no segmentations": [{"area": 4, "bbox": [0, 0, 1, 1]}],
    "another size": [{**GOOD, "size": [11, 7]}],
    "counts of too few pixels": [{**GOOD, "counts": [70, 6]}],
    "a huge count": [{**GOOD, "counts": [10**30, 7]}],
    "half a character": [{**GOOD, "counts": "0]2\ud800"}],
}


def test_a_bad_json_file_is_refused_by_its_name(tmp_path):
    save_json(tmp_path / "good.json", [GOOD])
    assert decoded(read_masks(tmp_path, "good", SIZE)).all()
    for content in BAD_JSON.values():
        save_json(tmp_path / "2007_000032.json", content)
        with pytest.raises(DatasetError, match=r"2007_000032\.json"):
            read_masks(tmp_path, "2007_000032", SIZE)


def test_bad_archives_and_pngs_are_refused_by_their_names(tmp_path):
    archive = save_json(tmp_path / "a.json.gz", records(MASKS))
    for raw in (archive.read_bytes()[:-9], b"[]", b""):
        archive.write_bytes(raw)
        with pytest.raises(DatasetError, match=r"a\.json\.gz"):
            read_masks(tmp_path, "a", SIZE)
    archive.unlink()
    save_png(tmp_path / "a" / "1.png", MASKS[5] * 255)
    path = tmp_path / "a" / "12.png"
    for save in (
        lambda: path.write_text("text"),
        lambda: path.write_bytes(save_png(path, MASKS[5] * 255).read_bytes()[:-40]),
        lambda: save_png(path, np.zeros(SIZE[::-1])),
        lambda: save_png(path, np.zeros(SIZE), "RGB"),
        lambda: save_png(path, np.zeros(SIZE), "LA"),
    ):
        save()
        with pytest.raises(DatasetError, match=r"12\.png"):
            read_masks(tmp_path, "a", SIZE)


def test_masks_are_kept_until_what_they_depend_on_changes_or_their_file_is_damaged(tmp_path):
    path, made = tmp_path / "new" / "a.json.gz", []

    def keep(fingerprint="f"):
        def make():
            made.append(fingerprint)
            return records(MASKS)

        rles = kept_masks(path, SIZE, fingerprint, make)
        assert rles == read_masks(path.parent, "a", SIZE)
        np.testing.assert_array_equal(decoded(rles), MASKS)
        return len(made)

    assert keep() == keep() == 1
    whole = path.read_bytes()
    assert whole[4:8] == bytes(4)  # no time: equal masks make equal files
    content = json.loads(gzip.decompress(whole))
    assert content == {"size": [7, 11], "fingerprint": "f", "masks": records(MASKS)}
    assert keep("g") == keep("g") == 2
    changes = ({"size": [11, 7]}, {"masks": [{**GOOD, "counts": "0"}]}, {"masks": 3})
    for damaged in (*(content | change for change in changes), "[]", "{}", "text"):
        save_json(path, damaged)
        count = len(made)
        assert keep() == keep() == count + 1, damaged
    path.write_bytes(whole[:-20])
    assert keep() == count + 2
