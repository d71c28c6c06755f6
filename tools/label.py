#!/usr/bin/env python
"""Label a folder of images for an annotation tool, with a model and SAM."""

from s4m_d2.commands.label import main

if __name__ == "__main__":
    raise SystemExit(main())
