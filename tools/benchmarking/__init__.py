"""What tools/benchmark.py measures: ``ours``, with ``bench``, and ``plain`` forms of the same."""
