"""Label maps, CAM scores, masks, names of classes and images: each format, each damaged file."""

import gzip
import io
import json
import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from helpers import rle_of
from PIL import Image
from pycocotools import mask as mask_utils
from segment_anything.utils.amg import mask_to_rle_pytorch
from sepl_folders import save_png

from s4m_d2.data.images import IMAGE_EXTENSIONS
from s4m_d2.errors import DatasetError
from s4m_d2.sepl.files import (
    class_names,
    files_by_name,
    image_list,
    kept_masks,
    palette,
    read_label,
    read_masks,
    write_label,
)

LABEL = np.array([[0, 1, 20], [255, 7, 0]], dtype=np.uint8)


def test_what_is_written_is_read_again_and_has_vocs_colors(tmp_path):
    path = tmp_path / "below" / "label.png"
    for values in (LABEL.T, np.arange(256, dtype=np.uint8)[None]):
        write_label(path, values)
        np.testing.assert_array_equal(read_label(path), values)
        with Image.open(path) as image:
            assert image.mode == "P"
            np.testing.assert_array_equal(np.array(image.convert("RGB")), palette()[values])
    known = {0: (0, 0, 0), 1: (128, 0, 0), 8: (64, 0, 0), 15: (192, 128, 128)}  # the devkit's
    known |= {20: (0, 64, 128), 255: (224, 224, 192)}
    assert {index: tuple(palette()[index].tolist()) for index in known} == known


def test_gray_color_and_palette_files(tmp_path):
    save_png(tmp_path / "gray.png", LABEL)
    save_png(tmp_path / "color.png", np.stack([LABEL] * 3, axis=-1))
    foreign = Image.fromarray(LABEL)
    foreign.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    foreign.save(tmp_path / "palette.png")
    for name in ("gray", "color", "palette"):
        np.testing.assert_array_equal(read_label(tmp_path / f"{name}.png"), LABEL)
    few = Image.fromarray(np.minimum(LABEL, 3))  # of four colors: two bits a pixel
    few.putpalette(bytes(12))
    few.save(tmp_path / "few.png", bits=2)
    np.testing.assert_array_equal(read_label(tmp_path / "few.png"), np.minimum(LABEL, 3))


def test_arrays_of_indices_and_classes_beyond_the_count(tmp_path):
    path = tmp_path / "label.npy"
    for dtype, values in (("u1", LABEL), ("<i8", LABEL.T), (">u4", LABEL)):
        np.save(path, values.astype(dtype))
        read = read_label(path, 21)  # 20 is the last one, 255 is void
        assert read.dtype == np.uint8 and (read == values).all()
    with pytest.raises(DatasetError, match=r"label\.\w+ .*\[7, 20\]"):
        read_label(path, 7)


def damaged(change):
    def make(path):
        write_label(path, np.random.default_rng(0).integers(0, 20, (50, 50), dtype=np.uint8))
        path.write_bytes(change(path.read_bytes()))

    return make


def larger(path):
    """An array of more than its file holds is not allocated."""
    np.save(path, LABEL)
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"(2, 3), }" + b" " * 9, b"(200000000, 30), }", 1))


def saved(content) -> bytes:
    np.save(buffer := io.BytesIO(), content, allow_pickle=True)
    return buffer.getvalue()


def four_bits(path):
    """Gray, which Pillow would scale: index 1 would be 17."""

    def chunk(kind, data):
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    head = struct.pack(">IIBBBBB", 3, 2, 4, 0, 0, 0, 0)
    rows = zlib.compress(b"\0\x01\x20" * 2)
    parts = chunk(b"IHDR", head), chunk(b"IDAT", rows), chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


NO_LABELS = {
    "four.png": four_bits,
    "colors.png": lambda path: Image.new("RGB", (3, 2), (1, 1, 2)).save(path),
    "deep.png": lambda path: Image.fromarray(LABEL.astype(np.uint16)).save(path),
    "binary.png": lambda path: Image.new("1", (3, 2)).save(path),
    "jpeg.png": lambda path: Image.fromarray(LABEL).save(path, format="JPEG"),
    "absent.png": lambda path: None,
    "cut.png": damaged(lambda raw: raw[:-300]),
    # in the compressed pixels: the size of the map stays as it is
    "flipped.png": damaged(lambda raw: raw[:-400] + bytes([raw[-400] ^ 1]) + raw[-399:]),
    "larger.npy": larger,
    "cut.npy": lambda path: path.write_bytes(saved(FORMS["IRN"])[:200]),
    "bare.npy": lambda path: path.write_bytes(pickle.dumps(FORMS["arrays"])),
    **{
        f"{number}.npy": lambda path, values=values: np.save(path, values)
        for number, values in enumerate(
            (LABEL / 1, LABEL == 1, LABEL[None], LABEL[0], LABEL[:0])
            + (LABEL.astype(int) - 1, LABEL.astype(int) + 1)
        )
    },
}


def test_files_that_are_no_label_maps_are_named(tmp_path):
    for name, make in NO_LABELS.items():
        make(tmp_path / name)
        with pytest.raises(DatasetError, match=name):
            read_label(tmp_path / name)


# Of the classes 3 and 15 of label maps, which image labels count as 2 and 14.
SCORES = np.array([[[0.9, 0.1, 0.3, 0.15]], [[0.2, 0.14, 0.4, 0.0]]], dtype=np.float32)
COARSE = np.ones((2, 1, 2), dtype=np.float32)
FORMS = {
    "IRN": {"keys": torch.tensor([2, 14]), "cam": torch.tensor(COARSE), "high_res": SCORES},
    "arrays": {"keys": np.array([2, 14]), "high_res": SCORES, "cam": COARSE},
    "PuzzleCAM": {"keys": np.array([0, 3, 15]), "cam": torch.tensor(COARSE), "hr_cam": SCORES},
    "list": {"keys": [2, 14], "attn_highres": SCORES},
    "by class": dict(zip([2, 14], SCORES, strict=True)),
    "in another order": dict(zip([np.int64(14), np.int64(2)], SCORES[::-1], strict=True)),
}


def test_the_highest_score_above_the_background(tmp_path):
    for form in FORMS.values():
        np.save(tmp_path / "a.npy", form, allow_pickle=True)
        label = read_label(tmp_path / "a.npy", 21)
        assert label.dtype == np.uint8 and label.tolist() == [[3, 0, 15, 0]]  # more than 0.15
        assert read_label(tmp_path / "a.npy", background_score=0.5).tolist() == [[3, 0, 0, 0]]
        assert read_label(tmp_path / "a.npy", background_score=0.0).tolist() == [[3, 15, 15, 3]]


def test_probabilities_with_a_background_of_their_own_count_as_label_maps_do(tmp_path):
    maps = np.array([[[0.6, 0.3, 0.2]], [[0.3, 0.1, 0.7]], [[0.1, 0.6, 0.1]]], dtype=np.float32)
    for form in (dict(zip([0, 3, 15], maps, strict=True)), {"keys": [0, 3, 15], "crf": maps}):
        np.save(tmp_path / "a.npy", form, allow_pickle=True)
        assert read_label(tmp_path / "a.npy", 21).tolist() == [[0, 15, 3]]
    for keys in ([0, 3, 255], [0.0, 2.5, 15.0]):
        np.save(tmp_path / "a.npy", {"keys": keys, "crf": maps}, allow_pickle=True)
        with pytest.raises(DatasetError, match=r"a\.npy"):
            read_label(tmp_path / "a.npy", 21)


# The third has one more, but none is the background; 255 is void.
NO_KEYS = None, [2], [3, 15, 7], [2.5, 14.0], [[2, 14]], [-1, 14], [2, 254]
NO_CAMS = SCORES[0], SCORES.tolist() + [[0.5]], SCORES.astype(complex), SCORES * np.nan
NO_CAMS += (SCORES * 255,)


class Runs:
    def __reduce__(self):
        return open, ("ran", "w")


def test_other_content_is_refused_by_its_file_and_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content in (
        {},
        [SCORES],
        "text",
        {"keys": [2, 14]},
        *({"keys": keys, "cam": SCORES} for keys in NO_KEYS),
        *({"keys": [2, 14], "cam": cam} for cam in NO_CAMS),
        {2: SCORES[0], 14: SCORES[0, :, :2]},
        {2: SCORES, 14: SCORES},
        {2: 0.5},
        {"2": SCORES[0]},
        Runs(),
        {"keys": Runs(), "cam": SCORES},
    ):
        np.save("a.npy", content, allow_pickle=True)
        with pytest.raises(DatasetError, match=r"a\.npy"):
            read_label(tmp_path / "a.npy")
        assert not (tmp_path / "ran").exists()


def test_names_of_classes(tmp_path):
    voc, coco = class_names(), class_names("coco")
    assert len(voc) == 21 and len(coco) == 81
    assert (voc[0], voc[1], voc[15], voc[20]) == ("background", "aeroplane", "person", "tvmonitor")
    # COCO's ids have gaps, the indices have none: traffic light is 10 in both, stop sign is not.
    assert (coco[10], coco[12], coco[80]) == ("traffic light", "stop sign", "toothbrush")
    assert class_names(count=3) == ("background", "class 1", "class 2")
    with pytest.raises(DatasetError, match="256"):
        class_names(count=256)
    path = tmp_path / "names.txt"
    path.write_text("background\n Käse \r\ntraffic light\n\n", encoding="utf-8")
    assert class_names(file=path) == ("background", "Käse", "traffic light")
    wrong = b"cat\ndog\n", b"background\n\ndog\n", b"background\ndog\ndog\n", b"background\n", b""
    for text in (*wrong, b"\xff\xfe\x00", None):
        path.unlink() if text is None else path.write_bytes(text)
        with pytest.raises(DatasetError, match="names.txt"):
            class_names(file=path)


def test_files_by_the_names_of_their_images(tmp_path):
    (tmp_path / "below").mkdir()
    for name in ("b.png", "a.PNG", "below/v1.2.npy", "a.jpg", "notes.txt", ".b.png.abcdefgh.tmp",
                 ".hidden.png", "c_ps.png", "d_ps.npy", "e_ps_.png", "_ps.png"):  # fmt: skip
        (tmp_path / name).touch()
    labels = files_by_name(tmp_path)
    assert set(labels) == {"a", "b", "v1.2", "c_ps", "d_ps", "e_ps_", "_ps"}
    assert labels["a"] == tmp_path / "a.PNG"
    with_suffix = files_by_name(tmp_path, suffix="_ps")
    assert {name: path.name for name, path in with_suffix.items()} == {
        "c": "c_ps.png", "d": "d_ps.npy",
    }  # fmt: skip
    with pytest.raises(DatasetError, match="a.PNG and .*a.jpg"):
        files_by_name(tmp_path, IMAGE_EXTENSIONS)
    with pytest.raises(DatasetError, match="_other"):
        files_by_name(tmp_path, suffix="_other")


def test_lists_of_names(tmp_path):
    path = tmp_path / "train.txt"
    for text, expected in (
        (b"b\r\n\r\n  a  \r\n", ["b", "a"]),
        (b"2007_000032 1\n2007_000033 -1\n", ["2007_000032", "2007_000033"]),
        (b"/JPEGImages/a.jpg /SegmentationClassAug/a.png\n", ["a"]),
        (b"deep\\a.png\nv1.2\na.b.JPG", ["a", "v1.2", "a.b"]),
        (b"a\nb\na\n", ["a", "b"]),
        (b"\xef\xbb\xbfa\n", ["a"]),
        (b"../../a\n", ["a"]),
    ):
        path.write_bytes(text)
        assert image_list(path) == expected
    for text in (b"", b"\n \n", b"/\n", b"\xff\xd8\xff"):
        path.write_bytes(text)
        with pytest.raises(DatasetError, match="train.txt"):
            image_list(path)


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


JSON_FORMS = {
    "records": records,
    "records of uncompressed RLEs": lambda masks: records(masks, uncompressed),
    "RLEs": lambda masks: [rle_of(mask) for mask in masks],
    "uncompressed RLEs": lambda masks: [uncompressed(mask) for mask in masks],
    "SA-1B": lambda masks: {"image": {"height": SIZE[0]}, "annotations": records(masks)},
    "masks": lambda masks: {"masks": records(masks)},
}


def test_each_json_format_is_read_as_its_masks(tmp_path):
    for form in JSON_FORMS.values():
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
