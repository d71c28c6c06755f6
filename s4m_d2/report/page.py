"""A run as one HTML file: it needs no network, no script and no other file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from s4m_d2.report import tables
from s4m_d2.report.charts import ap_chart, stage_charts
from s4m_d2.report.pictures import Picture
from s4m_d2.report.run import Run, Stage, finite, stage_title
from s4m_d2.report.style import STYLE
from s4m_d2.report.svg import escape, number

#: The browser fetches nothing, runs nothing and sends nothing, whatever the page holds.
POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'"
)
OPEN_PICTURES = 2  # the others are folded away
_MINUTE = 60


def render_page(run: Run) -> str:
    """The whole page. Every text of the run is escaped."""
    models = tables.models_of(run)
    sections = [
        ("results", "Results", _results(run, models)),
        ("gallery", "Gallery", _gallery(run.pictures)),
        *((s.name, s.title, _stage(s)) for s in reversed(run.stages)),
        *((name, stage_title(name), _say(_absent(name, run))) for name in _missing(run)),
        ("settings", "Settings", _settings(run)),
    ]
    links = "".join(f"<a href='#{key}'>{escape(title)}</a>" for key, title, _ in sections)
    body = "".join(
        f"<section id='{key}'><h2>{escape(title)}</h2>{content}</section>"
        for key, title, content in sections
    )
    title = f"S4M run: {run.name}"
    return (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<header><h1>{escape(title)}</h1><p class='state'>{_state(run)}</p>"
        f"<nav aria-label='Sections'>{links}</nav></header>"
        f"<main>{_cards(run, models)}{body}</main>"
        f"<footer>Written {escape(run.written)} by tools/report.py or at the end of training. "
        "Iterations count from 0, as in metrics.json, and most values are medians of the last 20. "
        "Where a point stands for several records, the line is their mean, and the band spans "
        "the least and the greatest.</footer></body></html>\n"
    )


def _state(run: Run) -> str:
    """How far the run is."""
    if run.problem:
        return f"<span class='tag open'>ended early</span> {escape(run.problem)}"
    if run.complete:
        return "<span class='tag'>complete</span> Every stage was trained to its end."
    if not any(stage.curves.records for stage in run.stages):
        return "<span class='tag open'>no records yet</span> No iteration has been logged."
    said = "; ".join(f"{s.title}: {_progress(s)}" for s in run.stages)
    return f"<span class='tag open'>not complete</span> Under way, or stopped. {escape(said)}"


def _progress(stage: Stage) -> str:
    whole = f" of {stage.iterations:,}" if stage.iterations else ""
    return f"{stage.done:,}{whole} iterations{', finished' if stage.finished else ''}"


def _cards(run: Run, models: tables.Models) -> str:
    cards = [*_ap_cards(models), *(card for stage in run.stages for card in _stage_cards(stage))]
    inside = "".join(
        f"<div class='card'><b>{escape(value)}</b><span>{escape(what)}</span></div>"
        for value, what in cards
    )
    return f"<div class='cards'>{inside}</div>" if inside else ""


def _ap_cards(models: tables.Models) -> Iterator[tuple[str, str]]:
    aps = {name: finite(values.get("AP")) for name, values in models.items()}
    best = tables.best_model(models)
    if best is not None:
        yield f"{aps[best]:.1f}", f"mask AP of the best model, the {best}"
    first, student = aps.get("stage-1 teacher"), aps.get("student")
    if first is not None and student is not None:
        yield tables.signed(student - first), "AP of the student against the stage-1 teacher"


def _stage_cards(stage: Stage) -> Iterator[tuple[str, str]]:
    whole = f" of {stage.iterations:,}" if stage.done < stage.iterations else ""
    seconds = stage.curves.mean("time")
    if 0 < seconds * stage.done < math.inf:
        speed = f"{number(1 / seconds, 3)} a second"
        what = f"training of the {stage.name}: {stage.done:,}{whole} iterations, {speed}"
        yield f"≈ {duration(seconds * stage.done)}", what
    elif stage.done:
        yield f"{stage.done:,}{whole}", f"iterations of the {stage.name}"
    _, count = stage.curves.get("pseudo_labels/per_image").last
    if math.isfinite(count):
        yield number(count, 3), "pseudo-labels an image, at the end"


def duration(seconds: float) -> str:
    """A time for people.

    >>> duration(42), duration(425), duration(93_600)
    ('42 s', '7 min', '26 h 0 min')
    """
    if seconds < 2 * _MINUTE:
        return f"{seconds:.0f} s"
    minutes = round(seconds / _MINUTE)
    return f"{minutes} min" if minutes < 2 * _MINUTE else f"{minutes // 60:,} h {minutes % 60} min"


def _results(run: Run, models: tables.Models) -> str:
    parts = []
    if models:
        parts += [tables.results_html(models), tables.classes_html(models)]
    elif run.settings.values and not run.settings.get("DATASETS.TEST", True):
        parts.append(_say("No AP: the config names no validation set (DATASETS.TEST)."))
    else:
        parts.append(_say("No AP yet: no model of this run has been evaluated."))
    reference = finite(models.get("stage-1 teacher", {}).get("AP"))
    charts = [
        ap_chart(stage, reference if stage.name == "student" else None)
        for stage in reversed(run.stages)
    ]
    parts.append(f"<div class='charts'>{''.join(charts)}</div>" if any(charts) else "")
    if models and not any(charts):
        parts.append(
            _say(
                "No model was evaluated twice, so there is no curve of AP: TEST.EVAL_PERIOD sets "
                "how often it is measured while training."
            )
        )
    return "".join(parts)


def _gallery(pictures: Sequence[Picture]) -> str:
    if not pictures:
        return _say(
            "No pictures. S4M.FIGURES.PERIOD draws some while training, tools/visualize.py later."
        )
    first, more = pictures[:OPEN_PICTURES], pictures[OPEN_PICTURES:]
    content = f"<div class='gallery'>{''.join(map(_figure, first))}</div>"
    if more:
        content += (
            f"<details><summary>{len(more)} more pictures</summary>"
            f"<div class='gallery'>{''.join(map(_figure, more))}</div></details>"
        )
    return content


def _figure(picture: Picture) -> str:
    title, (width, height) = escape(picture.title), picture.size
    return (
        f"<figure><figcaption>{title}</figcaption><div><img loading='lazy' width='{width}' "
        f"height='{height}' alt='{title}' src='{picture.uri}'></div></figure>"
    )


def _stage(stage: Stage) -> str:
    said = [f"{_progress(stage)}."]
    if (mean := stage.curves.mean("pseudo_labels/per_image")) == mean:
        said.append(f"{number(mean, 3)} pseudo-labels an image on average.")
    for name, text in (
        ("train/bad_steps", "steps skipped, whose losses or gradients were not finite"),
        ("data/skipped_images", "unreadable unlabeled images skipped"),
    ):
        count = stage.curves.get(name).last[1]
        if math.isfinite(count) and count > 0:
            said.append(f"{count:,.0f} {text}.")
    if lines := stage.curves.unreadable:
        said.append(f"{lines:,} line{'s' * (lines != 1)} of metrics.json could not be read.")
    said += stage.problems
    charts = stage_charts(stage)
    if not charts:
        said.append("There are no metrics yet.")
    return f"{_say(' '.join(said))}<div class='charts'>{charts}</div>"


def _missing(run: Run) -> list[str]:
    present = {stage.name for stage in run.stages}
    return [name for name in reversed(run.expected) if name not in present]


def _absent(name: str, run: Run) -> str:
    return f"There is no folder {name} in '{run.name}': this stage has not begun."


def _settings(run: Run) -> str:
    parts = [tables.pairs_html(tables.settings_rows(run.settings))]
    if not run.config:
        parts.append(_say("There is no readable config.yaml in the output folder."))
    if run.facts:
        inside = tables.pairs_html(run.facts)
        parts.append(f"<details open><summary>Data, model, versions</summary>{inside}</details>")
    if run.config:
        config = "\n".join(map(escape, run.config.split("\n")))
        parts.append(
            "<details><summary>The whole config</summary>"
            f"<div class='scroll'><pre>{config}</pre></div></details>"
        )
    return "".join(parts)


def _say(text: str) -> str:
    return f"<p class='say'>{escape(text)}</p>"
