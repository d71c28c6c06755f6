"""Printing and checking of evaluation results."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from detectron2.config import CfgNode


def print_csv_format(results: Mapping[str, Any]) -> None:
    """Log the main metrics of {task: {metric: score}}, not those of a class (with "-")."""
    assert isinstance(results, Mapping), f"not a dict of results: {results!r}"
    logger = logging.getLogger(__name__)
    for task, scores in results.items():
        if not isinstance(scores, Mapping):
            logger.info(f"copypaste: {task}={scores}")
            continue
        main = {name: score for name, score in scores.items() if "-" not in name}
        logger.info(f"copypaste: Task: {task}")
        logger.info("copypaste: " + ",".join(main))
        logger.info("copypaste: " + ",".join(f"{score:.4f}" for score in main.values()))


def verify_results(cfg: CfgNode, results: Mapping[str, Mapping[str, float]]) -> bool:
    """Compare with TEST.EXPECTED_RESULTS, a list of (task, metric, expected, tolerance).

    Exits with status 1 if a score is missing, not finite, or out of tolerance.
    """
    expected_results = cfg.TEST.EXPECTED_RESULTS
    for task, metric, expected, tolerance in expected_results:
        actual = results[task].get(metric, np.nan)
        if not (np.isfinite(actual) and abs(actual - expected) <= tolerance):
            message = f"Result verification failed! Expected {expected_results}, got {results}"
            logging.getLogger(__name__).error(message)
            sys.exit(1)
    return True


def flatten_results_dict(results: Mapping[str, Any]) -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a/b": 1}, at any depth."""
    flat = {}
    for key, value in results.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}/{k}": v for k, v in flatten_results_dict(value).items()})
        else:
            flat[key] = value
    return flat
