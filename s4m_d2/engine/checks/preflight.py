"""The check before training: all predictable problems in one report."""

import os
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from tabulate import tabulate

from s4m_d2.data import DATASET_MAPPER_REGISTRY, LabeledDatasetMapper, labeled_dataset_names
from s4m_d2.data.annotations import targets
from s4m_d2.data.images import check_size, read_sizes
from s4m_d2.data.splits import OWN_LABELED, load_records
from s4m_d2.engine.checkpointing.checkpoint import FINAL_CHECKPOINT, saved_state
from s4m_d2.engine.checks import resource_checks as resources
from s4m_d2.engine.checks.config_checks import config_errors
from s4m_d2.engine.config_file import config_items, load_config
from s4m_d2.engine.labeling.quality import quality_findings
from s4m_d2.engine.labeling.sam_adaptation import WEIGHTS
from s4m_d2.engine.labeling.sam_quality import sam_findings
from s4m_d2.engine.stages import STAGES, is_fixed, runs_stage, stage_config, stages_to_run
from s4m_d2.engine.training.hooks import MAX_ITER, changes, continuation_errors, run_settings
from s4m_d2.errors import (
    ConfigError,
    DatasetError,
    Finding,
    S4MError,
    attempt,
    first_names,
    first_of,
    numbered,
    printable,
)
from s4m_d2.report.run import CONFIG
from s4m_d2.visualization import evenly_spaced

_NOT_TRAINED_WITH = (  # beginnings of keys that a continued run may change
    "DATALOADER.NUM_WORKERS", "DATASETS.", "MODEL.DEVICE", "MODEL.WEIGHTS", "OUTPUT_DIR",
    "S4M.DATA.", "S4M.EVAL", "S4M.FIGURES.", "S4M.FINETUNE.", "S4M.QUALITY.", "S4M.STAGE",
    "S4M.TEACHER", "SOLVER.CHECKPOINT", "TEST.",
)  # fmt: skip
_MAPPED_IMAGES = 8  # of each data set, as in training
_DECODED_IMAGES = 1000  # of each set with annotations, whose images no loader skips
_LISTED_CLASSES = 10  # with more, only the rarest and the most frequent are listed
_MANY_EMPTY = 0.5  # of a data set's images
_WIDTH = 76  # characters of the table's middle column


@dataclass(frozen=True)
class PreflightReport:
    """Findings in the order of the checks; ``str`` gives a table, then every problem."""

    findings: Sequence[Finding]

    @property
    def errors(self) -> list[S4MError]:
        return [error for finding in self.findings for error in finding.errors]

    def __str__(self) -> str:
        rows = [(f.item, textwrap.fill(printable(f.text), _WIDTH), f.status) for f in self.findings]
        warnings = dict.fromkeys(w for f in self.findings for w in f.warnings)  # each once
        problems = [f"Error: {error}" for error in self.errors]
        problems += [f"Warning: {printable(warning)}" for warning in warnings]
        return "\n".join([tabulate(rows, ("item", "finding", "status")), *numbered(problems)])


def preflight(
    cfg: CfgNode,
    *,
    resume: bool = False,
    num_processes: int = 1,
    num_local: int | None = None,
    with_sam: bool = False,
) -> PreflightReport:
    """Check a training run without starting it; nothing is written.

    Data sets are loaded, and their labeled images decoded; weight files (remote ones are
    downloaded) are compared with the models by names and shapes; sizes of checkpoints and models
    are estimated. What needs a part that is wrong (settings, data, the model) is left out.

    Args:
        num_processes: that share a batch, on all machines; of these ``num_local`` (default: all)
            are on this one.
        with_sam: also measure SAM on labeled images, where that takes seconds.
    """
    num_local = num_processes if num_local is None else num_local
    errors = config_errors(cfg, num_processes=num_processes)
    stages = stages_to_run(cfg, resume=resume)
    findings = [Finding("settings", _schedule(cfg, stages), errors)]
    findings += [resume_finding(cfg, stages, num_processes)] if resume else []
    findings.append(_device_finding(cfg, num_processes, num_local))
    where = " and ".join(f"{stage}/" for stage in stages) or "nothing, every stage is finished"
    refused = list(resources.output_dir_errors(cfg, resume=resume))
    findings.append(Finding("output", f"{cfg.OUTPUT_DIR}: {where}", refused))
    if errors:
        return PreflightReport(findings)
    of_data = list(dataset_findings(cfg))
    findings += of_data
    data_are_right = not any(finding.errors for finding in of_data)
    if data_are_right:
        findings += quality_findings(cfg)
    model, of_model = resources.model_finding(cfg)
    sam, of_sam = resources.sam_finding(cfg)
    findings += [of_model, of_sam]
    findings += sam_findings(cfg, sam) if with_sam and data_are_right else []
    if model is not None:
        findings += resources.weight_findings(cfg, model, stages, resume=resume)
        findings.append(resources.disk_finding(cfg, model, stages))
        needs = {s: resources.stage_memory(cfg, s, model, sam, num_processes) for s in stages}
        findings.append(resources.memory_finding(cfg, needs, num_local))
    return PreflightReport(findings)


def _schedule(cfg: CfgNode, stages: Sequence[str]) -> str:
    parts = []
    for stage in stages:
        solver = stage_config(cfg, stage).SOLVER
        batch = f"{solver.IMS_PER_BATCH} labeled"
        if stage == "student":
            batch += f" + {cfg.S4M.UNLABELED_IMS_PER_BATCH or solver.IMS_PER_BATCH} unlabeled"
        parts.append(f"{stage} {solver.MAX_ITER:,} iterations of {batch}")
    return "; ".join(parts) or "every stage is finished"


def _device_finding(cfg: CfgNode, num_processes: int, num_local: int) -> Finding:
    text = cfg.MODEL.DEVICE + (f", {num_processes} processes" if num_processes > 1 else "")
    has_gpu = torch.cuda.is_available()
    if has_gpu and num_processes > 1 and cfg.MODEL.DEVICE != "cuda":
        refused = f"MODEL.DEVICE is {cfg.MODEL.DEVICE}; expected cuda, as each of several processes"
        remedy = "has a GPU. On the CPU: hide the GPUs with CUDA_VISIBLE_DEVICES=''."
        return Finding("device", text, [ConfigError(f"{refused} {remedy}")])
    if not cfg.MODEL.DEVICE.startswith("cuda") or not has_gpu:
        return Finding("device", text)  # a device that is not there is an error of the settings
    count = torch.cuda.device_count()
    error = ConfigError(f"--num-gpus is {num_local}; expected at most {count}, the GPUs here.")
    text += f", {count} x {torch.cuda.get_device_name(0)}"
    return Finding("device", text, [error] * (num_local > count))


def resume_finding(cfg: CfgNode, stages: Sequence[str], num_processes: int) -> Finding:
    """Where a run goes on with the stages that remain, and each setting that has changed."""
    texts: list[str] = []
    errors: list[S4MError] = []
    warnings: list[str] = []
    for stage in filter(lambda stage: runs_stage(cfg, stage), STAGES):
        of_stage = stage_config(cfg, stage)
        name, content = saved_state(of_stage.OUTPUT_DIR)
        if not isinstance(content.get("iteration"), int):
            continue
        try:
            before = dict(content["trainer"]["hooks"]["RunStateHook"]["settings"])
        except (LookupError, TypeError, ValueError):  # of another program or version
            before = {}
        if is_fixed(cfg, stage):
            errors += _fixed_length_errors(cfg, stage, before)
            continue
        finished = content["iteration"] + 1
        now = run_settings(of_stage, num_processes, has_teacher=stage == "student")
        refused = list(continuation_errors(finished, before, now))
        errors += refused
        if stage in stages and not refused:
            state = f"{stage} {'had ended' if name == FINAL_CHECKPOINT else 'was stopped'}"
            texts.append(f"{state} after {finished:,} iterations, goes on to {now[MAX_ITER]:,}")
            warnings += changes(before, now)
    if texts and (differing := _differing(cfg)):
        warnings.append(
            f"Not as when the run was last started: {first_names(differing, 8)}. Overrides "
            "have to be repeated."
        )
    nothing = "there is nothing to resume: training begins"
    if errors:
        nothing = "the run cannot continue with these settings"
    elif not stages:
        nothing = "every stage is finished; a larger SOLVER.MAX_ITER would train on"
    return Finding("resume", "; ".join(texts) or nothing, errors, warnings)


def _differing(cfg: CfgNode) -> list[str]:
    """Other settings of training than those in OUTPUT_DIR/config.yaml, with both values."""
    path = os.path.join(cfg.OUTPUT_DIR, CONFIG)
    before = attempt(load_config, path)[0] if os.path.isfile(path) else None
    if before is None:
        return []
    old, now = _leaves(before), _leaves(cfg)
    reported = run_settings(cfg, 1, has_teacher=True)
    if os.path.basename(str(old["S4M.SAM.CHECKPOINT"])).startswith(WEIGHTS):  # the run's own
        del old["S4M.SAM.CHECKPOINT"]
    return [
        f"{key} {value!r} (was {old[key]!r})"
        for key, value in now.items()
        if old.get(key, value) != value
        and not key.startswith(_NOT_TRAINED_WITH)
        and key not in reported
    ]


def _leaves(cfg: CfgNode) -> dict[str, Any]:
    """Values by dotted key, sequences as lists, as YAML returns them."""
    return {key: _lists(v) for key, v in config_items(cfg).items() if not isinstance(v, CfgNode)}


def _lists(value: Any) -> Any:
    return [*map(_lists, value)] if isinstance(value, list | tuple) else value


def _fixed_length_errors(cfg: CfgNode, stage: str, before: Mapping[str, Any]) -> Iterator[S4MError]:
    """Refuse another length of a stage after the next one has begun."""
    of_teacher = cfg.S4M.TEACHER.MAX_ITER, "S4M.TEACHER.MAX_ITER"
    asked, key = of_teacher if stage == "teacher" else (cfg.SOLVER.MAX_ITER, MAX_ITER)
    trained = before.get(MAX_ITER, asked)
    if asked not in (0, trained):
        yield ConfigError(
            f"{key} is {asked}, but the next stage has begun with a {stage} of {trained} "
            f"iterations, which stays what it is. Leave it at {trained}, or start a new run."
        )


def dataset_findings(cfg: CfgNode) -> Iterator[Finding]:
    """Lines on data sets: for each one, and for its classes. Labeled images are decoded.

    Images in two sets, or twice in one, are errors too. Unreadable unlabeled images are one only if
    all of the sample are: training skips them.
    """
    train = cfg.DATASETS.TRAIN
    labeled, errors = attempt(labeled_dataset_names, train, cfg.S4M.SPLIT_FILE, cfg.S4M.SPLIT_SEED)
    if errors:
        yield Finding("labeled data", f"{', '.join(train)}: cannot be loaded", errors)
    unlabeled = cfg.DATASETS.UNLABELED if runs_stage(cfg, "student") else ()
    roles = {"labeled": labeled or (), "unlabeled": unlabeled, "test": cfg.DATASETS.TEST}
    owners: dict[str, tuple[str, str]] = {}
    for role, name in ((role, name) for role, names in roles.items() for name in names):
        records, errors = attempt(load_records, name)
        if records is None:
            yield Finding(f"{role} data", f"{name}: cannot be loaded", errors)
            continue
        errors = _shared_images(owners, role, name, records)
        if role == "unlabeled":
            yield _unlabeled_finding(cfg, name, records, errors)
        else:
            yield from _annotated_findings(cfg, role, name, records, errors)


def _shared_images(
    owners: dict[str, tuple[str, str]], role: str, name: str, records: Sequence[dict]
) -> list[S4MError]:
    """Errors of images twice in a role, or in test and training; labeled ones may be unlabeled too.

    ``owners`` maps earlier images to (role, data set), and is updated.
    """
    shared = []
    for record in records:
        path = os.path.abspath(record["file_name"])
        other_role, other = owners.get(path, (None, None))
        if other_role == role or (other_role and role == "test"):
            both = f"'{other}' ({other_role}) and in '{name}' ({role})"
            shared.append(f"{path} is in {both}. Remove it from one, or name other data sets.")
        owners[path] = role, name
    return [DatasetError(first_of(shared))] if shared else []


def _look_at(cfg: CfgNode, role: str, records: Sequence[dict]) -> tuple[int, list[str]]:
    """Map some images as in training; of a test set, or with annotations, decode most of them.

    Returns the number of decoded images, and messages on all that cannot be used.
    """
    if role == "test":
        plain = {"geometry": (), "color": None, "image_format": cfg.INPUT.FORMAT}
        mapper = LabeledDatasetMapper(**plain, num_classes=cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)
    else:
        name = cfg.INPUT.DATASET_MAPPER_NAME if role == "labeled" else cfg.S4M.UNLABELED_MAPPER
        mapper = DATASET_MAPPER_REGISTRY.get(name)(cfg, True)
    sample = evenly_spaced(records, _MAPPED_IMAGES)
    refused = {}
    for seed, record in enumerate(sample):
        try:
            mapper({**record, "seeds": {"augment": seed}})
        except DatasetError as error:
            refused[record["file_name"]] = str(error)
    decoded = len(sample) - len(refused)
    if role == "unlabeled":
        refused |= {r["file_name"]: r["unreadable"] for r in records if "unreadable" in r}
    else:
        names = [record["file_name"] for record in records]
        read = {*evenly_spaced(names, _DECODED_IMAGES)}
        sizes = read_sizes(names, read)
        decoded = len(read) - sum(size is None for size, _ in sizes)
        for record, (size, errors) in zip(records, sizes, strict=True):
            if problems := errors or attempt(check_size, record, size)[1]:
                refused[record["file_name"]] = str(problems[0])
    alike: dict[str, list[str]] = {}  # messages that differ in the image alone
    for file_name, reason in refused.items():
        alike.setdefault(reason.replace(file_name, ""), []).append(reason)
    return decoded, [first_of(reasons) for reasons in alike.values()]


def _unlabeled_finding(
    cfg: CfgNode, name: str, records: Sequence[dict], shared: list[S4MError]
) -> Finding:
    decoded, reasons = _look_at(cfg, "unlabeled", records)
    item, text = "unlabeled data", f"{name}: {len(records):,} images; {decoded} decoded"
    damaged, most = sum("unreadable" in record for record in records), cfg.S4M.MAX_SKIPPED_IMAGES
    if decoded and damaged <= most:
        return Finding(item, text, shared, [f"Unlabeled data set '{name}': {r}" for r in reasons])
    which = f"{damaged:,} images cannot be used, more than S4M.MAX_SKIPPED_IMAGES, {most}, allows"
    which = which if decoded else "none of the sampled images can be used"
    error = DatasetError(f"The unlabeled data set '{name}': {which}. {reasons[0]}")
    return Finding(item, text, [*shared, error])


def _annotated_findings(
    cfg: CfgNode, role: str, name: str, records: Sequence[dict], shared: list[S4MError]
) -> Iterator[Finding]:
    """Lines on the instances per image (minimum / mean / maximum), and on the classes."""
    num_classes, metadata = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, MetadataCatalog.get(name)
    classes = metadata.get("thing_classes") or [str(label) for label in range(num_classes)]
    rows = (targets({"annotations": (), **record}) for record in records)
    labels: list[list[Any]] = [[a.get("category_id") for a in of_image] for of_image in rows]
    error: S4MError | None = None  # that would be every image's, too
    if len(classes) != num_classes:
        error = ConfigError(
            f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {num_classes}; expected {len(classes)}, the number "
            f"of classes of '{name}'."
        )
    elif not any(labels):
        remedy = "Choose a larger split, or check its annotations."
        error = DatasetError(f"'{name}' has {len(records)} images and no instance. {remedy}")
    elif wrong := [
        f"Data set '{name}': an annotation of {record['file_name']} has the class id {label}; "
        f"expected 0 to {num_classes - 1}. Correct it, or the map of the data set's ids."
        for record, of_image in zip(records, labels, strict=True)
        for label in of_image
        if label not in range(num_classes)
    ]:
        error = DatasetError(first_of(wrong))
    decoded, reasons = (0, []) if error else _look_at(cfg, role, records)
    errors = [*shared, *([error] if error else map(DatasetError, reasons))]
    counts = [len(of_image) for of_image in labels]
    found = metadata.get("findings")  # of our reader
    text = (
        f"{name}: {len(records):,} images, {sum(counts):,} instances ({min(counts)} / "
        f"{sum(counts) / len(counts):.1f} / {max(counts)} per image); {decoded} decoded"
    )
    text += f"; {found.summary}" if found and found.summary else ""
    warnings = [*(found.warnings if found else ())]
    if (empty := counts.count(0)) > _MANY_EMPTY * len(counts):
        warnings.append(
            f"{empty:,} of the {len(counts):,} images of '{name}' have no instance. They are no "
            "unlabeled images, and DATALOADER.FILTER_EMPTY_ANNOTATIONS keeps them out of training. "
            "Remove those that nobody has labeled yet from the json, and they are unlabeled."
        )
    yield Finding(f"{role} data", text, errors, warnings)
    if not errors:
        number = Counter(dict.fromkeys(classes, 0))
        number.update(classes[label] for of_image in labels for label in of_image)
        yield _class_finding(role, name, number)


def _class_finding(role: str, name: str, number: Mapping[str, int]) -> Finding:
    text = ", ".join(f"{label} {count:,}" for label, count in number.items())
    if len(number) > _LISTED_CLASSES:
        low, high = min(number, key=number.__getitem__), max(number, key=number.__getitem__)
        text = f"{len(number)} classes, from {low} {number[low]:,} to {high} {number[high]:,}"
    absent = [label for label in number if not number[label] and role == "labeled"]
    warning = (
        f"'{name}' has no instance of {first_names(absent, _LISTED_CLASSES)}: the model cannot "
        "learn it. Label images of it, or remove the category"
        + ", or choose another split (S4M.SPLIT_SEED, S4M.SPLIT_FILE)" * (name != OWN_LABELED)
        + "."
    )
    return Finding(f"{role} classes", text, (), [warning] if absent else [])
