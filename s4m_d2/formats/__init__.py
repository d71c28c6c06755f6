"""Labeled images as annotation tools read them, one module per format.

A row is a labeled image: "file_name" below the folder of images, "height", "width", "instances";
an instance has "class" (index), "score" and "segmentation", COCO's compressed RLE as text, and, if
SAM drew its mask, "sam_iou", the IoU that SAM predicts.
"""

from s4m_d2.formats import coco, label_studio, labelme

#: ``write(rows, names, folder, image_root)`` by the name of the format; ``rows()`` gives all rows,
#: any number of times. Returns the path that a user opens.
FORMATS = {"coco": coco.write, "labelme": labelme.write, "label-studio": label_studio.write}

__all__ = ["FORMATS"]
