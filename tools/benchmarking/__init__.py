"""What tools/benchmark.py measures, with what, and how it is reported.

``ours`` and ``bench`` are the only modules that touch the project's step; ``plain`` and
``plain_step`` hold the straightforward forms that it is compared with.
"""
