"""CAM scores in files of np.save, and the label maps that they mean."""

import pickle

import numpy as np
import pytest
import torch

from s4m_d2.errors import DatasetError
from s4m_d2.sepl.cam_scores import label_of_scores
from s4m_d2.sepl.labels import read_label

# Of the classes 3 and 15 of label maps, which image labels count as 2 and 14.
SCORES = np.array([[[0.9, 0.1, 0.3, 0.15]], [[0.2, 0.14, 0.4, 0.0]]], dtype=np.float32)
LABEL = [[3, 0, 15, 0]]  # a class must exceed the background's 0.15
COARSE = np.ones((2, 1, 2), dtype=np.float32)
FORMS = {
    "IRN": {"keys": torch.tensor([2, 14]), "cam": torch.tensor(COARSE), "high_res": SCORES},
    "arrays": {"keys": np.array([2, 14]), "high_res": SCORES, "cam": COARSE},
    "PuzzleCAM": {"keys": np.array([0, 3, 15]), "cam": torch.tensor(COARSE), "hr_cam": SCORES},
    "list": {"keys": [2, 14], "attn_highres": SCORES},
    "by class": dict(zip([2, 14], SCORES, strict=True)),
    "in another order": dict(zip([np.int64(14), np.int64(2)], SCORES[::-1], strict=True)),
}


def saved(path, content):
    np.save(path, content, allow_pickle=True)
    return path


@pytest.mark.parametrize("form", FORMS)
def test_the_highest_score_above_the_background(form, tmp_path):
    label = read_label(saved(tmp_path / "a.npy", FORMS[form]), 21)
    assert label.dtype == np.uint8 and label.tolist() == LABEL
    assert read_label(tmp_path / "a.npy", background_score=0.35).tolist() == [[3, 0, 15, 0]]
    assert read_label(tmp_path / "a.npy", background_score=0.5).tolist() == [[3, 0, 0, 0]]
    assert read_label(tmp_path / "a.npy", background_score=0.0).tolist() == [[3, 15, 15, 3]]


@pytest.mark.parametrize("seed", range(3))
def test_any_scores(seed):
    """Against pixel by pixel."""
    rng = np.random.default_rng(seed)
    classes = rng.choice(20, size=rng.integers(1, 6), replace=False)
    scores = rng.integers(0, 5, (len(classes), 7, 9)) / 4  # with ties: the first one, as argmax
    expected = np.zeros((7, 9), dtype=int)
    for y, x in np.ndindex(expected.shape):
        best = max(scores[:, y, x])
        if best > 0.5:
            expected[y, x] = classes[list(scores[:, y, x]).index(best)] + 1
    np.testing.assert_array_equal(label_of_scores({"keys": classes, "cam": scores}, 0.5), expected)


def test_images_without_a_class_are_background():
    content = {"keys": np.zeros(0, int), "high_res": np.zeros((0, 2, 3))}
    assert label_of_scores(content).tolist() == [[0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    "content",
    [
        {},
        [SCORES],
        "text",
        {"keys": [2, 14]},
        {"keys": [2, 14], "cam": SCORES[0]},
        {"keys": [2], "cam": SCORES},
        {"keys": [3, 15, 7], "cam": SCORES},  # one more, but none is the background
        {"keys": None, "cam": SCORES},
        {"keys": [2.5, 14.0], "cam": SCORES},
        {"keys": [[2, 14]], "cam": SCORES},
        {"keys": [-1, 14], "cam": SCORES},
        {"keys": [2, 254], "cam": SCORES},  # 255 is void
        {"keys": [2, 14], "cam": SCORES.astype(complex)},
        {"keys": [2, 14], "cam": np.where(SCORES > 0.3, np.nan, SCORES)},
        {2: SCORES[0], 14: SCORES[0, :, :2]},
        {2: SCORES, 14: SCORES},
        {2: 0.5},
        {"2": SCORES[0]},
    ],
    ids=str,
)
def test_other_content_is_refused(content, tmp_path):
    with pytest.raises(DatasetError, match=r"a\.npy"):
        read_label(saved(tmp_path / "a.npy", content))


class Runs:
    def __reduce__(self):
        return open, ("ran", "w")


@pytest.mark.parametrize("content", [Runs(), {"keys": Runs(), "cam": SCORES}, {2: Runs()}])
def test_nothing_in_a_file_is_run(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DatasetError, match=r"a\.npy is refused"):
        read_label(saved(tmp_path / "a.npy", content))
    assert not (tmp_path / "ran").exists()


def test_damaged_files(tmp_path):
    path = saved(tmp_path / "a.npy", FORMS["IRN"])
    whole = path.read_bytes()
    for end in (0, 5, 60, 128, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(DatasetError, match=r"a\.npy"):
            read_label(path)
    path.write_bytes(pickle.dumps(FORMS["arrays"]))  # a pickle alone
    with pytest.raises(DatasetError, match=r"a\.npy"):
        read_label(path)
