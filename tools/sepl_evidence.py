"""Measure gains and failures of SEPL on toyscapes with CAM-like labels.

    python tools/sepl_evidence.py --output output/sepl

The ground truth is corrupted with increasing strength (datasets/cam_like.py) and enhanced with each
instance's exact mask, or with the tiny SAM's automatic masks. At one strength: each failure alone,
other settings, masks over several objects, of background and of the whole image.

Writes results.json, results.md, gain.png and examples.png; with --refiners instead refiners.md: the
rule for instances compared with the paper's three points, on corrupted masks.

SAM's masks are cached there for the next run. The tiny SAM was not trained on these scenes (seed
1000, other splits), but on the same generator: the figures show the mechanism, they are no
benchmark.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "datasets")]

from cam_like import FAILURES  # noqa: E402
from make_cam_labels import CLASS_NAMES  # noqa: E402
from sepl_study import refiners, report, scenes  # noqa: E402
from sepl_study.report import BEFORE, EXACT, TINY  # noqa: E402
from sepl_study.scenes import StudyScene  # noqa: E402

from s4m_d2.engine.command.arguments import natural, positive, share  # noqa: E402
from s4m_d2.engine.command.launch import exit_status  # noqa: E402
from s4m_d2.files import atomic_write, write_json  # noqa: E402
from s4m_d2.sepl import enhance  # noqa: E402
from s4m_d2.sepl.results import confusion, iou  # noqa: E402
from s4m_d2.structures import RLEMasks  # noqa: E402

STRENGTHS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.8)
FUSED_SHARES = (0.0, 0.25, 0.5, 1.0)
SETTINGS: dict[str, dict[str, Any]] = {
    "keep_uncovered": {"keep_uncovered": True},
    "without o_p": {"o_p_thresh": 1.0},
    "without o_s": {"o_s_thresh": 1.0},
}
# By name: masks of each scene, as enhance() takes them, and its options.
Cases = Mapping[str, tuple[Sequence[Any], Mapping[str, Any]]]


def measure(
    scenes: Sequence[StudyScene], cases: Cases, seed: int, **spoilt: Any
) -> dict[str, np.ndarray]:
    """(C,) IoUs over all scenes, of the CAM-like labels (``BEFORE``) and of each case."""
    counts: dict[str, Any] = dict.fromkeys((BEFORE, *cases), 0)
    for number, scene in enumerate(scenes):
        label = scene.cam_label(seed, **spoilt)
        labels = {BEFORE: label}
        for name, (masks, options) in cases.items():
            labels[name] = enhance(label, masks[number], **options)
        for name, of in labels.items():
            counts[name] = counts[name] + confusion(scene.truth, of, len(CLASS_NAMES))
    return {name: iou(of) for name, of in counts.items()}


def measure_studies(
    of: Sequence[StudyScene], masks: Mapping[str, Sequence[np.ndarray]], seed: int
) -> dict[str, dict[str, Any]]:
    """By table what :func:`measure` returns at one strength, with (N, H, W) masks of each scene.

    ``masks``: the tiny SAM's masks per image, shares of the instances that have one of a large IoU,
    share of those that ``fused_masks`` fuses.
    """
    paper = {kind: (masks[kind], {}) for kind in masks}
    studies = {f"{failure} only": measure(of, paper, seed, failures=(failure,))
               for failure in FAILURES}  # fmt: skip
    settings = {
        f"{kind}, {name}": (masks[kind], options)
        for name, options in SETTINGS.items()
        for kind in masks
    }
    studies["settings"] = measure(of, paper | settings, seed)
    fused = {size: [scenes.fused_masks(s, size, seed) for s in of] for size in FUSED_SHARES}
    bad: dict[str, Any] = {
        f"{size:.0%} of touching pairs fused": (made, {}) for size, made in fused.items()
    }
    off: dict[str, Any] = {}
    for kind in masks:
        pairs = list(zip(of, masks[kind], strict=True))
        stuff = [np.concatenate([m, scenes.background_masks(s)]) for s, m in pairs]
        whole = [np.concatenate([m, np.ones_like(s.truth, dtype=bool)[None]]) for s, m in pairs]
        bad[f"{kind} and background regions"] = stuff, {}
        bad[f"{kind} and the whole image"] = whole, {}
        off[f"{kind} and the whole image, without o_p"] = whole, SETTINGS["without o_p"]
    studies["bad masks"] = measure(of, bad | off, seed)
    found = np.concatenate(list(map(scenes.best_ious, of, masks[TINY])))
    fused_all = zip(masks[EXACT], fused[1.0], strict=True)
    lost = [not (all_of == mask).all((1, 2)).any() for own, all_of in fused_all for mask in own]
    studies["masks"] = {
        "masks an image": np.mean([len(m) for m in masks[TINY]]),
        "IoU > 0.5": np.mean(found > 0.5),
        "IoU > 0.75": np.mean(found > 0.75),
        "fused": np.mean(lost),
    }
    return studies


def run_study(
    output: Path, images: int, seeds: Sequence[int], strengths: Sequence[float]
) -> dict[str, Any]:
    """Measure, write the report, and return the content of results.json."""
    generator, seeds = scenes.tiny_sam(), list(dict.fromkeys(seeds))
    by_strength: dict[float, list] = {strength: [] for strength in sorted(set(strengths))}
    studies = []
    for seed in seeds:
        of = scenes.render_scenes(seed, images)
        rles = scenes.sam_masks(of, generator, output / "masks" / f"seed-{seed}")
        masks = {
            EXACT: [scenes.exact_masks(scene) for scene in of],
            TINY: [np.asarray(RLEMasks(m, s.truth.shape)) for s, m in zip(of, rles, strict=True)],
        }
        cases = {kind: (masks[kind], {}) for kind in masks}
        for strength, runs in by_strength.items():
            runs.append(measure(of, cases, seed, strength=strength))
        studies.append(measure_studies(of, masks, seed))
        if seed == seeds[0]:
            report.draw_examples(of, rles, seed, output / "examples.png")
    facts = [study.pop("masks") for study in studies]
    results = {
        "parameters": {"images": images, "seeds": seeds},
        "strengths": {str(s): report.summarize(runs) for s, runs in by_strength.items()},
        "studies": {name: report.summarize([s[name] for s in studies]) for name in studies[0]},
        "masks": {name: float(np.mean([fact[name] for fact in facts])) for name in facts[0]},
    }
    write_json(output / "results.json", results, indent=1)
    with atomic_write(output / "results.md") as file:
        file.write(report.markdown(results))
    report.draw_gains(results["strengths"], output / "gain.png")
    return results


@exit_status
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("output/sepl"))
    parser.add_argument("--images", type=positive, default=60, help="scenes per seed")
    parser.add_argument("--seeds", type=natural, nargs="+", default=[0, 1, 2])
    parser.add_argument("--strengths", type=share, nargs="+", default=STRENGTHS, help="0 to 1")
    parser.add_argument("--refiners", action="store_true", help="of instances, on the first seed")
    args = parser.parse_args(arguments)
    if args.refiners:
        of, backend = scenes.render_scenes(args.seeds[0], args.images), scenes.tiny_sam().backend
        table = refiners.measure_refiners(of, backend)
        with atomic_write(args.output / "refiners.md") as file:
            file.write(table)
        print(table)
        return 0
    results = run_study(args.output, args.images, args.seeds, args.strengths)
    print(report.markdown(results))
    print(f"{args.output}: results.json, results.md, gain.png, examples.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
