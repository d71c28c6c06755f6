#!/usr/bin/env python
"""Write the student's or the teacher's weights of a checkpoint as a plain Mask2Former file."""

import sys

from s4m_d2.commands.export import main

if __name__ == "__main__":
    sys.exit(main())
