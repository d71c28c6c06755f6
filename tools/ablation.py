"""What each part of S4M adds, measured on toyscapes or on real images: all runs, a table, a chart.

    python tools/ablation.py --output output/ablation               # all, hours; or: make ablation
    python tools/ablation.py --list                                 # done, missing, estimated time
    python tools/ablation.py --max-minutes 30                       # a piece; again for the next
    python tools/ablation.py --only 10pct-seed0-gd 10pct-seed0-gd-sd-pr-arp
    python tools/ablation.py --set nuclei --data FOLDER             # real; or: make ablation-real

Each run is a training in its own folder (OUTPUT/runs/NAME) of at most 15 minutes on a CPU core; of
real images, which datasets/README.md tells where to get, at most 45. Without --set the data set is
a small toyscapes (OUTPUT/data); each labeled image is used a few hundred times (in the paper's runs
thousands). Finished runs have OUTPUT/results/NAME.json and are not trained again; to repeat one,
remove both. Stage-1 teachers are shared by other runs. Killed runs are resumed, failed ones are
tried again the next time; after a failure the others are run, and the exit status is 1.
OUTPUT/ablation.md and ablation.png are made from the results. Overrides (-- KEY VALUE ...) apply to
all runs; an output folder contains runs of one configuration only.
"""

import argparse
import signal
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ablation_study import ROOT, runs
from ablation_study.data_sets import RealSet, Toyscapes
from ablation_study.report import Report, Summary, minutes
from ablation_study.runs import PLANS, REPORTED_SEEDS, Run
from ablation_study.training import RunFailed, RunStopped, Study, read_results

from s4m_d2.engine.command.arguments import command_parser, natural
from s4m_d2.engine.command.launch import exit_status
from s4m_d2.engine.training.stop_signals import EXIT_STOPPED
from s4m_d2.files import atomic_write

CONFIGS = {
    "toyscapes": ROOT / "configs" / "toyscapes_ablation.yaml",
    **{name: ROOT / "tools" / "ablation_study" / f"{name}.yaml" for name in ("nuclei", "facades")},
}
# Seconds an iteration of the quickstart's model on 2 cores of an AMD EPYC, 4 + 4 images, by the
# parts that take time, and around the iterations: to start, to check and to evaluate.
SUPERVISED, DISTILLING, LABELING, REFINING, AROUND = 0.25, 0.48, 0.55, 0.72, 30.0


def estimate(run: Run, study: Study, results: Mapping[str, Any]) -> float:
    """Seconds of a run: as others of its method took, or as measured once."""
    same = [r["seconds"] for r in results.values() if r["method"] == run.method.slug]
    if same:
        return statistics.mean(same)
    parts = run.method.parts
    if run.method.has_student:
        pace = REFINING if "pr" in parts else LABELING
    else:
        pace = DISTILLING if "sd" in parts else SUPERVISED
    return AROUND + pace * study.iterations(run)


def train_runs(
    left: Sequence[Run], study: Study, results: dict[str, Any], max_minutes: float | None
) -> int:
    """Train what is left; ``results`` get what is done. The exit status."""
    failed: dict[str, str] = {}
    end = None if max_minutes is None else time.monotonic() + 60 * max_minutes
    with study.begin() as handle:
        for number, run in enumerate(left, start=1):
            if run.teacher is not None and run.teacher.name in failed:
                failed[run.name] = f"it needs {run.teacher.name}"
                continue
            about = minutes(estimate(run, study, results))
            print(f"[{number}/{len(left)}] {run.name}: about {about}", flush=True)
            try:
                seconds = None if end is None else max(0.0, end - time.monotonic())
                result = results[run.name] = study.train(run, results, handle, seconds)
                ap = Summary({run.seed: result["models"][run.method.model]["AP"] or 0.0})
                print(f"    {ap} AP; {minutes(result['seconds'])}", flush=True)
            except RunStopped as stopped:
                print(f"    {stopped}; the same command continues", flush=True)
                break
            except RunFailed as error:
                failed[run.name] = "failed"
                print(f"    {error}", flush=True)
    for name, why in failed.items():
        print(f"{name}: {why}")
    return 1 if failed else 0


def listing(asked: Sequence[Run], left: Sequence[Run], study: Study, results: Mapping) -> str:
    """A line a run: done, or missing, with the time that it took or will take."""
    shown = [run for run in runs.with_teachers(asked) if run in left or run.name in results]
    times = {run: estimate(run, study, results) for run in left}
    lines = [
        f"missing  {run.name:32} about {minutes(times[run])}"
        if run in times
        else f"done     {run.name:32} {minutes(results[run.name]['seconds'])}"
        for run in shown
    ]
    total = minutes(sum(times.values()))
    return "\n".join([*lines, f"{len(shown) - len(left)} done, {len(left)} missing: about {total}"])


def parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--set", choices=PLANS, default="toyscapes", help="of images")
    add("--output", type=Path, help="default: output/ablation, output/ablation-SET of real images")
    add("--data", type=Path, metavar="FOLDER",
        help="that holds the set; a toyscapes is made if none is given")  # fmt: skip
    add("--dev", action="store_true",
        help="evaluate on the fifth of real training images that no run uses")  # fmt: skip
    add("--config-file", help="default: that of the set")
    add("--seeds", type=natural, nargs="+", default=REPORTED_SEEDS)
    add("--only", nargs="+", default=(), metavar="NAME",
        help="these runs and their teachers; * stands for anything")  # fmt: skip
    add("--max-minutes", type=float, metavar="M", help="save the run of then, and end")
    add("--list", action="store_true", help="what is done and missing; train none")
    add("overrides", nargs="*", metavar="KEY VALUE", help="config, of all runs")
    args = parser.parse_args(arguments)
    real = args.set != "toyscapes"
    if args.dev and not real:
        parser.error("--dev needs a set of real images")
    args.output = args.output or ROOT / "output" / ("ablation" + f"-{args.set}" * real)
    args.config_file = args.config_file or str(CONFIGS[args.set])
    return args


def run(args: argparse.Namespace) -> int:
    seeds, plan = tuple(dict.fromkeys(args.seeds)), PLANS[args.set]
    asked = runs.chosen_runs(plan, seeds, args.only)
    output = args.output.absolute()
    data = Toyscapes(args.data, output) if args.set == "toyscapes" else RealSet(
        args.set, args.data, output, dev=args.dev)  # fmt: skip
    study = Study(output, data, args.config_file, args.overrides)
    results = read_results(study.results, runs.all_runs(plan, seeds, every_seed=True))
    left = runs.left_to_train(asked, results, study.runs)
    if args.list:
        print(listing(asked, left, study, results))
        return 0
    try:
        return train_runs(left, study, results, args.max_minutes) if left else 0
    finally:
        if results:
            report = Report(results, plan, seeds)
            with atomic_write(output / "ablation.md") as file:
                file.write(report.markdown())
            report.draw(output / "ablation.png")
            print(f"{output}: ablation.md, ablation.png")


@exit_status
def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return run(args)
    except KeyboardInterrupt:
        print("Stopped; the same command continues.", file=sys.stderr)
        return EXIT_STOPPED


if __name__ == "__main__":
    sys.exit(main())
