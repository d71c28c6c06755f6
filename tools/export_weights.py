#!/usr/bin/env python
"""Write the student or the teacher of a checkpoint for other programs."""

from s4m_d2.commands.export import main

if __name__ == "__main__":
    raise SystemExit(main())
