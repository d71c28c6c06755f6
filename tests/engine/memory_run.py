"""Stage 2 of the quickstart, with a record of the memory that it resides in. Linux only.

    python memory_run.py OUTPUT.json [KEY VALUE ...]

The stage-1 checkpoint is S4M.TEACHER_WEIGHTS. OUTPUT.json maps iterations to bytes, of the process
itself and of each loader's worker.
"""

import json
import os
import sys
from pathlib import Path

from detectron2.engine import HookBase

from s4m_d2.engine import S4MTrainer, run_config, stage_config
from s4m_d2.engine.config_file import load_config

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "toyscapes_10pct.yaml"
PERIOD = 10  # iterations between two records


def resident_bytes(pid: int | str = "self") -> list[int]:
    """Resident memory of a process and of all processes that it started (loaders' workers)."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    found = [int(fields["VmRSS"].split()[0]) * 1024]
    for task in sorted(Path(f"/proc/{pid}/task").iterdir()):
        for child in (task / "children").read_text().split():
            found += resident_bytes(child)
    return found


class RecordMemory(HookBase):
    """Resident memory after every PERIOD-th iteration, by the count of iterations done."""

    def __init__(self) -> None:
        self.record: dict[int, list[int]] = {}

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % PERIOD == 0:
            self.record[done] = resident_bytes()


def main(output: str, options: list[str]) -> None:
    cfg = stage_config(run_config(load_config(str(CONFIG), options)), "student")
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    trainer = S4MTrainer(cfg, cfg.S4M.TEACHER_WEIGHTS)
    trainer.resume_or_load(resume=False)
    memory = RecordMemory()
    trainer.register_hooks([memory])
    trainer.train()
    Path(output).write_text(json.dumps(memory.record))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
