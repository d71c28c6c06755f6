"""Files of annotation tools, one module per format that is read, and COCO's, which is written."""
