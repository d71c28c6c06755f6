"""What tests of several rooms share."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as mask_utils

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = str(ROOT / "configs" / "toyscapes_10pct.yaml")
# Of a small run on the fixture small_data, where pseudo-labels of an untrained teacher are kept.
SMALL_RUN = {
    "MODEL.DEVICE": "cpu",
    "DATASETS.TRAIN": "('toyscapes_train_30pct',)",
    "DATALOADER.NUM_WORKERS": 0,
    "INPUT.MIN_SIZE_TRAIN": "(64, 72)",
    "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.MAX_SIZE_TEST": 128,
    "INPUT.CROP.SIZE": "(64, 128)",
    "SOLVER.IMS_PER_BATCH": 2,
    "S4M.TEACHER.IMS_PER_BATCH": 2,
    "S4M.PSEUDO_LABEL.SCORE_THRESH": 0.0,
    "S4M.ARP.MIN_AREA_FRACTION": 0.0,
}
SMALL_HEAD = {
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "MODEL.SEM_SEG_HEAD.MASK_DIM": 32,
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 1,
    "MODEL.MASK_FORMER.HIDDEN_DIM": 32,
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD": 32,
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 8,
    "MODEL.MASK_FORMER.DEC_LAYERS": 2,
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": 64,
}
_LOGGERS = ("detectron2", "fvcore", "s4m_d2")


def key_values(settings: Mapping[str, Any], **changes: Any) -> list[str]:
    """KEY VALUE words; ``changes`` have __ for dots in their keys. None: the key is left out."""
    merged = {**settings, **{key.replace("__", "."): value for key, value in changes.items()}}
    return [str(word) for item in merged.items() if item[1] is not None for word in item]


def run_script(script: str, *arguments: Any, **environment: str) -> None:
    """Run a script of the project in a process of its own, which must succeed."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    subprocess.run(command, check=True, env=os.environ | environment)


@contextmanager
def signals_and_logging_kept() -> Iterator[None]:
    """Stop signals and loggers are afterwards as before; the block's log files are closed."""
    from s4m_d2.engine.training.stop_signals import STOP_SIGNALS  # takes seconds

    loggers = {name: logging.getLogger(name) for name in _LOGGERS}
    states = {n: (list(x.handlers), x.propagate, x.level) for n, x in loggers.items()}
    signals = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in signals.items():
            signal.signal(number, handler)
        for name, (handlers, propagate, level) in states.items():
            for handler in set(loggers[name].handlers) - set(handlers):
                handler.close()
            loggers[name].handlers[:] = handlers
            loggers[name].propagate, loggers[name].level = propagate, level


def json_lines(path: str | Path) -> list[Any]:
    """The records of a file of JSON lines."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def logged(folder: str | Path) -> dict[str, float]:
    """The last value of each scalar in a folder's metrics.json."""
    lines = json_lines(Path(folder, "metrics.json"))
    return {key: value for line in lines for key, value in line.items()}


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def save_image(path: Path, array: np.ndarray, **options: Any) -> Path:
    """Write an image, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def rle_of(mask: np.ndarray) -> dict:
    """The compressed RLE of an (H, W) mask, as JSON has it."""
    encoded = mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode()}
