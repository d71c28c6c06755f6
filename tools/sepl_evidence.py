"""What SEPL gains, and where it hurts, on toyscapes with CAM-like labels.

    python tools/sepl_evidence.py --output output/sepl

Ground truth is spoilt with rising strength (datasets/cam_like.py) and enhanced with every
instance's exact mask and with the tiny SAM's automatic masks. At one strength: each failure alone,
other settings, masks over several objects, of background and of the whole image.

Writes results.json, results.md, gain.png and examples.png; with --refiners instead refiners.md: the
rule for instances beside the paper's three clicks, on masks of a teacher that errs.

Masks and the results of each seed and strength are kept beside them: a second run makes what is
missing, or was made by other code. The scenes are none that the tiny SAM was trained on (seed 1000,
other splits), but come from the same generator: the figures show the mechanism, they are no
benchmark.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "datasets")]

from sepl_study import cases, refiners, report, scenes  # noqa: E402

from s4m_d2.command_line import natural, positive, share  # noqa: E402
from s4m_d2.errors import S4MError  # noqa: E402
from s4m_d2.files import atomic_write  # noqa: E402
from s4m_d2.sam.automatic_masks import AutomaticMasks  # noqa: E402

STRENGTHS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.8)


class SeedStudy:
    """Scenes and masks of a seed, made when they are needed; results, kept in files."""

    def __init__(self, output: Path, seed: int, images: int, generator: AutomaticMasks) -> None:
        self.seed = seed
        self._output = output
        self._images = images
        self._generator = generator
        self._version = f"{cases.code_version()} masks {scenes.mask_version(generator)}"

    @cached_property
    def scenes(self) -> list[scenes.StudyScene]:
        return scenes.render_scenes(self.seed, self._images)

    @cached_property
    def sam_masks(self) -> list[list[dict]]:
        folder = self._output / "masks" / f"seed-{self.seed}"
        return scenes.sam_masks(self.scenes, self._generator, folder)

    @cached_property
    def _dense_masks(self) -> list[np.ndarray]:
        pairs = zip(self.scenes, self.sam_masks, strict=True)
        return [scenes.dense(masks, scene.size) for scene, masks in pairs]

    def at(self, strength: float) -> dict[str, Any]:
        """IoUs before and after at a strength."""

        def measure() -> dict[str, Any]:
            exact = [scenes.exact_masks(scene) for scene in self.scenes]
            masks = {cases.EXACT: exact, cases.TINY: self._dense_masks}
            return cases.measure(self.scenes, masks, cases.PAPER, self.seed, strength)

        return self._kept(f"seed-{self.seed}-strength-{strength}", measure)

    def studies(self) -> dict[str, Any]:
        """What is measured at one strength only."""
        return self._kept(
            f"seed-{self.seed}-studies",
            lambda: cases.measure_studies(self.scenes, self._dense_masks, self.seed),
        )

    def _kept(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The results in a file, made where it is missing, damaged or of another version."""
        path = self._output / "runs" / f"{name}.json"
        made_by = {"version": self._version, "images": self._images}
        try:
            content = json.loads(path.read_text())
            if content["made by"] == made_by:
                return content["results"]
        except (OSError, ValueError, LookupError, TypeError):
            pass
        results = make()
        with atomic_write(path) as file:
            json.dump({"made by": made_by, "results": results}, file, indent=1)
        return results


def run_study(
    output: Path, images: int, seeds: Sequence[int], strengths: Sequence[float]
) -> dict[str, Any]:
    """Measure what is missing, write the report, and return the content of results.json."""
    generator = scenes.tiny_sam()
    runs = [SeedStudy(output, seed, images, generator) for seed in dict.fromkeys(seeds)]
    by_strength = {
        str(strength): report.summarize([run.at(strength) for run in runs])
        for strength in sorted(set(strengths))
    }
    studies = [run.studies() for run in runs]
    masks = [study.pop("masks") for study in studies]
    results = {
        "parameters": {"images": images, "seeds": [run.seed for run in runs]},
        "strengths": by_strength,
        "studies": {
            name: report.summarize([study[name] for study in studies]) for name in studies[0]
        },
        "masks": {name: float(np.mean([of[name] for of in masks])) for name in masks[0]},
    }
    with atomic_write(output / "results.json") as file:
        json.dump(results, file, indent=1)
    with atomic_write(output / "results.md") as file:
        file.write(report.markdown(results))
    report.draw_gains(by_strength, output / "gain.png")
    report.draw_examples(runs[0].scenes, runs[0].sam_masks, runs[0].seed, output / "examples.png")
    return results


def run_refiners(output: Path, images: int, seed: int) -> int:
    """Measure both refiners on a seed's scenes and write refiners.md; the exit status."""
    found = refiners.measure_refiners(scenes.render_scenes(seed, images), scenes.tiny_sam().backend)
    table = refiners.refiner_table(found)
    with atomic_write(output / "refiners.md") as file:
        file.write(table)
    print(table)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("output/sepl"))
    parser.add_argument("--images", type=positive, default=60, help="scenes a seed")
    parser.add_argument("--seeds", type=natural, nargs="+", default=[0, 1, 2])
    parser.add_argument("--strengths", type=share, nargs="+", default=STRENGTHS, help="0 to 1")
    parser.add_argument("--refiners", action="store_true", help="of instances, on the first seed")
    args = parser.parse_args(arguments)
    if args.refiners:
        return run_refiners(args.output, args.images, args.seeds[0])
    try:
        results = run_study(args.output, args.images, args.seeds, args.strengths)
    except S4MError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report.markdown(results))
    print(f"{args.output}: results.json, results.md, gain.png, examples.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
