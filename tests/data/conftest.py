import uuid

import pytest
from data_scenes import write_cityscapes, write_coco
from detectron2.data import DatasetCatalog, MetadataCatalog


@pytest.fixture
def data_root(tmp_path, monkeypatch):
    """$DETECTRON2_DATASETS with 20 train and 3 val images of toyscapes."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    write_cityscapes(tmp_path / "toyscapes", {"train": 20, "val": 3})
    return tmp_path


@pytest.fixture
def coco_root(tmp_path):
    """A folder with images/ and instances.json, 10 images."""
    write_coco(tmp_path, 10)
    return tmp_path


@pytest.fixture
def name():
    """A prefix of data set names; what is registered under it is removed again."""
    prefix = f"test_{uuid.uuid4().hex[:8]}"
    yield prefix
    for catalog in (DatasetCatalog, MetadataCatalog):
        for key in [key for key in catalog.list() if key.startswith(prefix)]:
            catalog.remove(key)
