#!/usr/bin/env python
"""Enhance CAM pseudo-labels with SAM's masks; measure and draw the result. As `s4m-sepl`."""

from s4m_d2.commands.sepl import main

if __name__ == "__main__":
    raise SystemExit(main())
