"""``sepl enhance``: a folder of CAM pseudo-labels in, a folder of enhanced ones out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path

from tqdm import tqdm

from s4m_d2.command_line import positive, print_problems, share
from s4m_d2.errors import ConfigError, DatasetError
from s4m_d2.sepl.classes import add_class_arguments, classes_from
from s4m_d2.sepl.enhance_image import Enhancer, ImageFiles
from s4m_d2.sepl.enhance_report import REPORT, Report, locked
from s4m_d2.sepl.enhancement import BACKGROUND, VOID
from s4m_d2.sepl.labels import add_label_arguments
from s4m_d2.sepl.listing import content_of, image_files, image_list, label_files
from s4m_d2.sepl.mask_files import mask_names
from s4m_d2.sepl.mask_options import add_mask_arguments, mask_source_from
from s4m_d2.sepl.mask_sources import SamMasks
from s4m_d2.sepl.processes import outcomes
from s4m_d2.sepl.selection import O_P_THRESH, O_S_THRESH

EXIT_INTERRUPTED = 130  # as shells give it for Ctrl-C


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that :func:`run` reads."""
    parser.description = (
        "Redraw label maps with SAM's masks. Finished images are skipped, so that the "
        f"same command continues an interrupted run. OUTPUT/{REPORT} tells of each image. The exit "
        "status is 1 if any failed or lacks a file."
    )
    parser.add_argument(
        "--pseudo-labels",
        type=Path,
        required=True,
        metavar="DIR",
        help="class indices (PNG, .npy) or CAM scores (.npy)",
    )
    add_label_arguments(parser)
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="for --sam; with --masks sizes are compared"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--list", type=Path, metavar="FILE", help="names of images, a line each")
    parser.add_argument(
        "--o-s-thresh",
        type=share,
        default=O_S_THRESH,
        metavar="X",
        help="a mask is selected if more of it than this lies on its class; default: %(default)s",
    )
    parser.add_argument(
        "--o-p-thresh",
        type=share,
        default=O_P_THRESH,
        metavar="X",
        help="or if it holds more of its class than this; default: %(default)s",
    )
    parser.add_argument(
        "--keep-uncovered", action="store_true", help="pixels that no mask covers keep their label"
    )
    parser.add_argument(
        "--workers",
        type=positive,
        default=1,
        metavar="N",
        help="processes; default: %(default)s. One where SAM works on a GPU",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="make anew what the output folder holds"
    )
    add_mask_arguments(parser)
    add_class_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Enhance what is not finished yet; the exit status, 1 where an image failed or is missing.

    Raises:
        S4MError: the command line is at fault, or something that concerns all images.
    """
    classes = classes_from(args)
    source = mask_source_from(args)
    _check_output(args)
    jobs = _jobs(args)
    enhancer = Enhancer(
        args.output,
        source,
        classes.num_classes,
        args.o_s_thresh,
        args.o_p_thresh,
        args.keep_uncovered,
        needs_image=args.images is not None,
        background_score=args.background_score,
    )
    settings = {"pseudo_labels": str(args.pseudo_labels.resolve()), **enhancer.settings()}
    with locked(args.output):
        report = Report(args.output, settings, classes.names)
        if not args.overwrite:
            report.resume(jobs)
        on_gpu = isinstance(source, SamMasks) and source.device.startswith("cuda")
        return _enhance_all(enhancer, jobs, report, 1 if on_gpu else args.workers)


def _enhance_all(
    enhancer: Enhancer, jobs: Mapping[str, ImageFiles], report: Report, workers: int
) -> int:
    waiting = [files for name, files in jobs.items() if name not in report.records]
    skipped = len(jobs) - len(waiting)
    report.write()  # of other settings nothing counts any more
    with tqdm(total=len(jobs), initial=skipped, desc="sepl", unit="image") as bar:
        try:
            with closing(outcomes(enhancer, waiting, workers)) as stream:
                for outcome in stream:
                    report.add(outcome)
                    bar.update()
        except KeyboardInterrupt:
            bar.close()
            print("interrupted; the same command continues", file=sys.stderr)
            return EXIT_INTERRUPTED
        finally:
            report.write()
    _print_summary(report, skipped)
    return 1 if report.failed or report.missing else 0


def _jobs(args: argparse.Namespace) -> dict[str, ImageFiles]:
    """The files of each image that is to be enhanced, by name."""
    labels = label_files(args.pseudo_labels, args.suffix)
    images = image_files(args.images) if args.images is not None else {}
    names = image_list(args.list) if args.list is not None else list(labels)
    if args.images is not None:
        _check_names(labels, images, args.images, "NAME.jpg or another image")
    if args.masks is not None:
        masks = mask_names(args.masks)
        _check_names(labels, masks, args.masks, "a folder NAME of PNGs, NAME.json or NAME.json.gz")
    return {name: ImageFiles(name, labels.get(name), images.get(name)) for name in names}


def _check_names(labels: Iterable[str], others: Iterable[str], folder: Path, form: str) -> None:
    """Refuse a folder without a file of any image: it is another one, or names are amiss."""
    names = list(labels)
    if set(names).isdisjoint(others):
        raise DatasetError(
            f"'{folder}' has nothing of the {len(names)} images that have pseudo-labels (such as "
            f"'{names[0]}'), but {content_of(folder)}. Expected for the image NAME: {form}. Where "
            "the names of pseudo-labels have more than NAME, give --suffix."
        )


def _check_output(args: argparse.Namespace) -> None:
    """Refuse to write into a folder that is read from, or below one."""
    written = {"--output": args.output, "--mask-cache": args.mask_cache}
    read = {"--pseudo-labels": args.pseudo_labels, "--images": args.images, "--masks": args.masks}
    for option, folder in written.items():
        for input_option, input_folder in read.items():
            if folder is None or input_folder is None:
                continue
            place, source = folder.resolve(), input_folder.resolve()
            if source in (place, *place.parents):
                where = "is" if place == source else "lies in"
                raise ConfigError(
                    f"{option} '{folder}' {where} the folder of {input_option}, which must stay as "
                    "it is. Choose another one."
                )


def _print_summary(report: Report, skipped: int) -> None:
    print_problems(report.missing, "with a missing file")
    print_problems(report.failed, "failed")
    if report.records and not any(record["classes"] for record in report.records.values()):
        print(
            f"warning: no label map has a class: all pixels are background ({BACKGROUND}) or void "
            f"({VOID}). Labels need class indices; masks of 0 and 255 have none.",
            file=sys.stderr,
        )
    outdated = report.outdated()
    if outdated:
        print(f"{len(outdated)} of them have label maps from before, which stay", file=sys.stderr)
    print(
        f"{len(report.records)} images enhanced ({skipped} of them before), {len(report.failed)} "
        f"failed, {len(report.missing)} missing: see {report.folder / REPORT}",
        file=sys.stderr,
    )
