#!/usr/bin/env python
"""Enhance CAM pseudo-labels with SAM's masks; measure and draw the result. As `s4m-sepl`.

python tools/sepl.py --pseudo-labels CAM --masks MASKS --output ENHANCED
python tools/sepl.py --pseudo-labels CAM --images IMAGES --sam tiny --output ENHANCED
python tools/sepl.py evaluate --help
python tools/sepl.py visualize --help
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from s4m_d2.commands.sepl import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
