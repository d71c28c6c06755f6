#!/usr/bin/env python
"""Run a checkpoint on images, folders and videos; write overlays and COCO's results."""

from s4m_d2.commands.predict import main

if __name__ == "__main__":
    raise SystemExit(main())
