"""What each part of S4M adds: the runs, their results, and the report on them."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "datasets"))  # modules that make and convert data sets
