"""How a process with the simulated GPU of device.py is started."""

import os
import subprocess
from pathlib import Path

HERE = Path(__file__).parent


def environment(folder: Path) -> dict[str, str]:
    """Of a process that imports ``simulated_gpu``; library.c is compiled into ``folder``."""
    library = folder / "libcuda.so.1"
    options = ("-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", library)
    subprocess.run(["cc", *options, HERE / "library.c"], check=True)
    paths = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": paths}
