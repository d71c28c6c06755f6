from unittest import mock

import cv2
import pytest

from s4m_d2.data import speed

RECORDS = [{"file_name": name} for name in "abc"]


def test_samples_are_counted_in_seconds_of_one_core():
    seen, threads = [], cv2.getNumThreads()

    def mapper(record):
        seen.append((record["file_name"], record["seeds"]["augment"], cv2.getNumThreads()))

    with mock.patch.object(speed.time, "process_time", side_effect=[10.0, 12.0]):
        assert speed.images_per_second(mapper, RECORDS, 5, start=2) == 2.5
    assert seen == [("c", 2, 1), ("a", 3, 1), ("b", 4, 1), ("c", 5, 1), ("a", 6, 1)]
    assert cv2.getNumThreads() == threads


def test_the_threads_come_back_after_an_error():
    threads = cv2.getNumThreads()
    with pytest.raises(KeyError, match="image"):
        speed.images_per_second(lambda record: record["image"], RECORDS, 1)
    assert cv2.getNumThreads() == threads
