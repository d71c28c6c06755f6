import json
import uuid

import pytest
from data_scenes import coco_content, scene
from detectron2.data import DatasetCatalog, MetadataCatalog
from helpers import save_image


@pytest.fixture
def data_root(tmp_path, monkeypatch):
    """$DETECTRON2_DATASETS with 20 train and 3 val images of toyscapes."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for split, count in (("train", 20), ("val", 3)):
        for index in range(count):
            city = ("alpha", "beta")[index % 2]
            stem = f"{split}/{city}/{city}_{index:06d}_000019"
            image, ids = scene(index)
            save_image(tmp_path / f"toyscapes/leftImg8bit/{stem}_leftImg8bit.png", image)
            save_image(tmp_path / f"toyscapes/gtFine/{stem}_gtFine_instanceIds.png", ids)
    return tmp_path


@pytest.fixture
def coco_root(tmp_path):
    """A folder with images/ and instances.json, 10 images."""
    content = coco_content(10)
    for image in content["images"]:
        save_image(tmp_path / "images" / image["file_name"], scene(image["id"])[0])
    (tmp_path / "instances.json").write_text(json.dumps(content))
    return tmp_path


@pytest.fixture
def name():
    """A prefix of data set names; what is registered under it is removed again."""
    prefix = f"test_{uuid.uuid4().hex[:8]}"
    yield prefix
    for catalog in (DatasetCatalog, MetadataCatalog):
        for key in [key for key in catalog.list() if key.startswith(prefix)]:
            catalog.remove(key)
