"""What each part of S4M adds, measured on toyscapes: all runs, a table and a chart.

    python tools/ablation.py --output output/ablation               # all, hours; or: make ablation
    python tools/ablation.py --list                                 # done, missing, estimated time
    python tools/ablation.py --max-minutes 30                       # a piece; again for the next
    python tools/ablation.py --only 10pct-seed0-gd 10pct-seed0-gd-sd-pr-arp
    python tools/ablation.py --report                               # table and chart again

Each run is a training in a folder of its own (OUTPUT/runs/NAME), below 10 minutes on 2 CPU cores.
They train on a small toyscapes (OUTPUT/data), of which they see each labeled image a few hundred
times (the paper's runs: thousands). A finished one leaves OUTPUT/results/NAME.json and is not
trained again; to train it anew, remove both. Stage-1 teachers are runs that others share. A killed
run continues where it stopped; one that failed is tried again the next time, the others go on, and
the exit status is 1. OUTPUT/ablation.md and ablation.png are made from the results. Overrides
(-- KEY VALUE ...) apply to all runs; an output folder holds runs of one configuration only.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "datasets")]

from ablation_study import chart, report  # noqa: E402
from ablation_study.plan import (  # noqa: E402
    chosen_runs,
    left_to_train,
    listing,
    remaining_seconds,
)
from ablation_study.report import NONE  # noqa: E402
from ablation_study.results import read_results  # noqa: E402
from ablation_study.runs import REPORTED_SEEDS, Run, all_runs  # noqa: E402
from ablation_study.setup import Study  # noqa: E402
from ablation_study.times import Clock, minutes  # noqa: E402
from ablation_study.training import FAILED, Outcome, Trainer, has_weights  # noqa: E402

from s4m_d2.engine.training.stop_signals import EXIT_STOPPED  # noqa: E402
from s4m_d2.errors import DatasetError, S4MError  # noqa: E402
from s4m_d2.files import atomic_write  # noqa: E402

TRAIN_NET = ROOT / "train_net.py"
MINUTE = 60


def train_runs(
    runs: Sequence[Run],
    trainer: Trainer,
    results: dict[str, dict[str, Any]],
    iterations: tuple[int, int],
    max_minutes: float | None = None,
) -> int:
    """Train what is missing of ``runs``; ``results`` get what is done. The exit status.

    Args:
        iterations: of the stage-1 teachers, and of all other runs.
        max_minutes: runs that would not be done by then are not begun, and one that is not done
            then is saved and ended.
    """
    end = None if max_minutes is None else time.monotonic() + MINUTE * max_minutes
    left = left_to_train(runs, results, trainer.has_weights)
    failed: dict[str, str] = {}
    later: dict[str, str] = {}
    for number, run in enumerate(left, start=1):
        needed = "" if run.teacher is None else run.teacher.name
        if needed in {**failed, **later}:
            (failed if needed in failed else later)[run.name] = f"it needs {needed}"
            continue
        expected = remaining_seconds(run, trainer.runs, Clock(iterations, results))
        remaining = None if end is None else end - time.monotonic()
        if remaining is not None and expected > remaining:
            later[run.name] = f"about {minutes(expected)}"
            continue
        print(f"[{number}/{len(left)}] {run.name}: about {minutes(expected)}", flush=True)
        outcome = trainer.train(run, results.get(needed), remaining)
        if outcome.result is not None:
            results[run.name] = outcome.result
        elif outcome.state == FAILED:
            failed[run.name] = "failed"
        else:
            later[run.name] = outcome.message
        print(f"    {outcome.state}: {_figures(outcome)}", flush=True)
    for title, runs_of in (("Failed", failed), ("Left for the next time", later)):
        if runs_of:
            found = "".join(f"\n    {name}: {why}" for name, why in runs_of.items())
            print(f"{title}:{found}")
    return 1 if failed else 0


def _figures(outcome: Outcome) -> str:
    if outcome.result is None:
        return outcome.message
    models = outcome.result["models"].items()
    found = (f"{name} {NONE if f['AP'] is None else round(f['AP'], 1)}" for name, f in models)
    return f"{', '.join(found)} AP; {minutes(outcome.result['seconds'])}"


def write_report(output: Path, seeds: Sequence[int]) -> str:
    """Make ablation.md and ablation.png from the results there are; returns the tables."""
    results = read_results(output / "results", all_runs(seeds))
    if not results:
        shown = ", ".join(map(str, seeds))
        raise DatasetError(f"'{output}' holds no results of the seeds {shown}; train some first.")
    text = report.markdown(results, seeds)
    with atomic_write(output / "ablation.md") as file:
        file.write(text)
    chart.draw_chart(results, seeds, output / "ablation.png")
    return text


def _seed(text: str) -> int:
    if int(text) < 0:
        raise ValueError(text)
    return int(text)


def _minutes(text: str) -> float:
    if not 0 < float(text) < float("inf"):
        raise ValueError(text)
    return float(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "ablation")
    parser.add_argument("--data", type=Path, metavar="FOLDER",
                        help="that holds the toyscapes to train on; else one is made")  # fmt: skip
    parser.add_argument("--config-file", default=str(ROOT / "configs" / "toyscapes_ablation.yaml"))
    parser.add_argument("--seeds", type=_seed, nargs="+", default=REPORTED_SEEDS)
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME",
                        help="these runs and their teachers; * stands for anything")  # fmt: skip
    parser.add_argument("--max-minutes", type=_minutes, metavar="M",
                        help="end by then; begin no run that would not be done")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="what is done and missing; train none")
    parser.add_argument("--report", action="store_true", help="table and chart alone; train none")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="config, of all runs")
    return parser


def _run(args: argparse.Namespace) -> int:
    seeds = tuple(dict.fromkeys(args.seeds))
    if args.report:
        print(write_report(args.output, seeds))
        return 0
    runs = chosen_runs(seeds, args.only)
    study = Study.read(args.output, args.data, args.config_file, args.overrides)
    results = read_results(study.output / "results", all_runs(seeds))
    if args.list:
        folder = study.output / "runs"
        left = left_to_train(runs, results, lambda run: has_weights(folder, run))
        print(listing(runs, left, results, folder, Clock(study.iterations, results)))
        return 0
    trainer = study.trainer(TRAIN_NET)
    try:
        return train_runs(runs, trainer, results, study.iterations, args.max_minutes)
    finally:
        if results:
            write_report(study.output, seeds)
            print(f"{args.output}: ablation.md, ablation.png")


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    args = _parser().parse_args(arguments)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _run(args)
    except S4MError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped; the same command continues.", file=sys.stderr)
        return EXIT_STOPPED
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
