"""What tools/benchmark.py measures, with what, and how it is reported.

``ours`` is the only module that touches the project's step; ``plain*`` hold the straightforward
forms that it is compared with.
"""
