"""Pages as tests read them, and folders of runs that no training made."""

import json
from html.parser import HTMLParser
from pathlib import Path

import yaml

VOID = {"meta", "img", "br", "link", "input", "hr"}
CONFIG = {
    "OUTPUT_DIR": "output/run",
    "DATASETS": {"TRAIN": ["a_10pct"], "UNLABELED": ["a_unlabeled"], "TEST": ["a_val"]},
    "MODEL": {"DEVICE": "cpu", "META_ARCHITECTURE": "S4MMaskFormer"},
    "SOLVER": {"MAX_ITER": 800, "IMS_PER_BATCH": 4, "BASE_LR": 0.001},
    "S4M": {
        "STAGE": "both",
        "BURN_IN": 400,
        "TEACHER_WEIGHTS": "",
        "TEACHER": {"MAX_ITER": 300, "IMS_PER_BATCH": 0},
        "ARP": {"ENABLED": False},
        "DISTILL": {"ENABLED": True, "WEIGHT": 1.0},
    },
}


class Page(HTMLParser):
    """Checks that elements are nested; collects tags, attributes, texts and rows of tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open and self._open[-1] == tag, (tag, self._open)
        self._open.pop()

    def handle_data(self, data):
        if "style" in self._open:
            return
        self.texts.append(data)
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def row(self, first: str) -> list[str]:
        [row] = [row for row in self.rows if row and row[0].split(" best")[0] == first]
        return row[1:]


def write_lines(path: Path, records, tail: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)


def student_record(iteration: int, **more) -> dict:
    record = {"iteration": iteration, "total_loss": 9.0, "loss_ce": 1.0, "loss_mask_0": 2.0}
    record |= {"unsup/loss_ce": 6.0, "pseudo_labels/per_image": 4.5, "lr": 0.001, "time": 0.5}
    return record | more


def make_run(folder: Path, config: dict | None = CONFIG, *, metrics: bool = False) -> Path:
    """A complete run of both stages; drawing the curves of ``metrics`` takes a second."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    teacher = {"segm": {"AP": 20.25, "AP50": 37.0, "AP-car": 30.0, "AP-bus": 10.5}}
    student = {
        "segm": {"AP": 27.0, "AP50": 46.9, "AP-car": 28.5, "AP-bus": None},
        "teacher": {"segm": {"AP": 26.6, "AP50": 45.8, "AP-car": 40.0, "AP-bus": 5.0}},
    }
    for name, results in (("teacher", teacher), ("student", student)):
        (folder / name).mkdir()
        (folder / name / "results.json").write_text(json.dumps(results))
        (folder / name / "model_final.pth").touch()
    if metrics:
        records = [{"iteration": i, "total_loss": 5.0, "loss_ce": 5.0} for i in range(19, 300, 20)]
        write_lines(folder / "teacher" / "metrics.json", records)
        records = [student_record(i) for i in range(19, 800, 20)]
        write_lines(folder / "student" / "metrics.json", records)
    return folder
