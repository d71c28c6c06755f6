"""The Slurm script with stand-ins for Slurm's commands: what it starts, and when it requeues."""

import os
import signal
import subprocess
import time

import pytest
from helpers import ROOT

SCRIPT = ROOT / "tools" / "slurm" / "train.sbatch"
LIMIT = 30.0  # seconds

STAND_INS = {
    "srun": """#!/bin/bash
echo "$@" > "$RECORDS/srun"
while [[ $1 == --* ]]; do shift; done
exec "$@"
""",
    "scontrol": """#!/bin/bash
if [[ $1 == show ]]; then printf '%s\\n' node7 node8; else echo "$@" >> "$RECORDS/requeued"; fi
""",
    # Ends with $STATUS, or with 75 if USR1 comes first.
    "python": """#!/bin/bash
for word in "$@"; do echo "$word" >> "$RECORDS/arguments"; done
trap 'exit 75' USR1
touch "$RECORDS/started"
while [[ -z $STATUS ]]; do read -r -t 0.05 <> <(:); done
exit "$STATUS"
""",
}
ARGUMENTS = ["--config-file", "a file.yaml", "SOLVER.MAX_ITER", "9", "DATASETS.TEST", "('a', 'b')"]


@pytest.fixture
def submit(tmp_path):
    """(status of train_net.py; "": it waits for USR1) → the running job."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in STAND_INS.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)

    def submit(status):
        slurm = "JOB_ID=4711 JOB_NODELIST=node[7-8] JOB_NUM_NODES=2 NODEID=1 GPUS_ON_NODE=4"
        pairs = (f"SLURM_{pair}".split("=") for pair in f"{slurm} CPUS_PER_TASK=32".split())
        own = {"PATH": f"{folder}:{os.environ['PATH']}", "RECORDS": str(tmp_path), "STATUS": status}
        environment = os.environ | own | dict(pairs)
        return subprocess.Popen(["bash", str(SCRIPT), *ARGUMENTS], env=environment)

    return submit


def test_the_arguments_reach_the_training_which_always_resumes(submit, tmp_path):
    assert submit("0").wait(LIMIT) == 0
    words = (tmp_path / "arguments").read_text().splitlines()
    assert words[:2] == ["train_net.py", "--resume"]
    assert words[-len(ARGUMENTS) :] == ARGUMENTS
    options = dict(zip(words[2:10:2], words[3:10:2], strict=True))
    assert options == {
        "--num-gpus": "4",
        "--num-machines": "2",
        "--machine-rank": "1",
        "--dist-url": f"tcp://node7:{29000 + 4711 % 4000}",
    }
    assert "--cpus-per-task=32" in (tmp_path / "srun").read_text()


@pytest.mark.parametrize("status", ["0", "1", "143"])
def test_a_job_that_is_done_or_failed_is_not_requeued(submit, tmp_path, status):
    assert submit(status).wait(LIMIT) == int(status)
    assert not (tmp_path / "requeued").exists()


def test_a_job_whose_time_runs_out_is_stopped_and_requeued(submit, tmp_path):
    job = submit("")
    end = time.monotonic() + LIMIT
    while not (tmp_path / "started").exists() and time.monotonic() < end:
        time.sleep(0.01)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(LIMIT) == 75
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n"
