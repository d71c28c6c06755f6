"""Files by the names of their images."""

import pytest

from s4m_d2.errors import DatasetError
from s4m_d2.sepl.listing import image_files, image_list, label_files


def folder_of(root, *names):
    for name in names:
        (root / name).touch()
    return root


def test_label_maps_by_stem_and_sorted(tmp_path):
    folder_of(tmp_path, "b.png", "a.PNG", "v1.2.npy", "a.jpg", "notes.txt", ".b.png.abcdefgh.tmp")
    folder_of(tmp_path, ".hidden.png")
    (tmp_path / "deeper.png").mkdir()
    files = label_files(tmp_path)
    assert list(files) == ["a", "b", "v1.2"]
    assert files["a"] == tmp_path / "a.PNG"


def test_a_suffix_of_label_maps(tmp_path):
    folder_of(tmp_path, "a_pseudo.png", "b_pseudo.npy", "b.png", "c_pseudo_.png", "_pseudo.png")
    files = {name: path.name for name, path in label_files(tmp_path, "_pseudo").items()}
    assert files == {"a": "a_pseudo.png", "b": "b_pseudo.npy"}
    with pytest.raises(DatasetError, match=r"label maps.*_cam.*4 \.png files, 1 \.npy file"):
        label_files(tmp_path, "_cam")


def test_images_of_several_formats(tmp_path):
    folder_of(tmp_path, "a.jpg", "b.JPEG", "c.png", "d.json")
    assert {name: path.name for name, path in image_files(tmp_path).items()} == {
        "a": "a.jpg", "b": "b.JPEG", "c": "c.png",
    }  # fmt: skip


def test_two_files_of_one_name(tmp_path):
    folder_of(tmp_path, "a.jpg", "a.png", "b.png")
    with pytest.raises(DatasetError, match="has both a.jpg and a.png.*Take one away"):
        image_files(tmp_path)
    assert list(label_files(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize("list_files", [label_files, image_files])
def test_folders_without_files(list_files, tmp_path):
    with pytest.raises(DatasetError, match=f"'{tmp_path}' has no .*folders below are not searched"):
        list_files(folder_of(tmp_path, "a.txt"))
    for name in ("none", "a.txt"):
        with pytest.raises(DatasetError, match=f"{name}' cannot be listed.*Give the folder"):
            list_files(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\nb\n", ["a", "b"]),
        ("b\r\n\r\n  a  \r\n", ["b", "a"]),
        ("2007_000032 1\n2007_000033 -1\n", ["2007_000032", "2007_000033"]),
        ("/JPEGImages/a.jpg /SegmentationClassAug/a.png\n", ["a"]),
        ("deep\\a.png\nv1.2\na.b.JPG", ["a", "v1.2", "a.b"]),
        ("a\nb\na\n", ["a", "b"]),
        ("\ufeffa\n", ["a"]),
        ("../../a\n", ["a"]),
    ],
)
def test_lists_of_names(text, expected, tmp_path):
    path = tmp_path / "train.txt"
    path.write_bytes(text.encode())
    assert image_list(path) == expected


@pytest.mark.parametrize("text", [b"", b"\n \n", b"/\n"])
def test_lists_without_names(text, tmp_path):
    (tmp_path / "train.txt").write_bytes(text)
    with pytest.raises(DatasetError, match="train.txt names no image. Write"):
        image_list(tmp_path / "train.txt")


def test_lists_that_cannot_be_read(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xd8\xff")
    for name in ("none", "binary"):
        with pytest.raises(DatasetError, match=f"{name} cannot be read.*Give a text file"):
            image_list(tmp_path / name)
