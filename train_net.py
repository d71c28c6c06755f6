#!/usr/bin/env python
"""Train S4M, or evaluate a checkpoint: s4m-train in a clone (`python train_net.py --help`)."""

import signal
import sys

if __name__ in ("__main__", "__mp_main__"):
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until a training listens, Ctrl-C just ends it

from s4m_d2.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
