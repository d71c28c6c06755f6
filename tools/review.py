#!/usr/bin/env python
"""Rank the images that tools/label.py labeled: those to correct first."""

from s4m_d2.commands.review import main

if __name__ == "__main__":
    raise SystemExit(main())
