"""Write the student or the teacher of a checkpoint for other programs.

    python tools/export_weights.py output/student/model_final.pth student.pth
    python tools/export_weights.py --model teacher output/student/model_final.pth t.safetensors
    s4m-export --format transformers output/student/model_final.pth student-hf
    s4m-export --format onnx output/student/model_final.pth student.onnx

--format weights: a plain Mask2Former file. A .pth file contains only {"model": weights};
Mask2Former and Detectron2 read it, as does MODEL.WEIGHTS here. Every kind of checkpoint that this
project reads can be exported. --format transformers: a folder that Hugging Face's
Mask2FormerForUniversalSegmentation.from_pretrained and AutoImageProcessor.from_pretrained load, for
models with a ResNet or a Swin. --format onnx: the model from an image of any size to its instances
(s4m_d2/modeling/onnx_file.py). Both are compared with our model on a random image.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from s4m_d2.engine.checkpointing.checkpoint_files import read_weight_file
from s4m_d2.engine.checkpointing.weight_names import BRANCHES, model_weights
from s4m_d2.engine.command.arguments import config_of_run, model_config
from s4m_d2.engine.figures.predictor import class_names, load_model
from s4m_d2.errors import ConfigError, OutputError, S4MError, WeightsError
from s4m_d2.files import atomic_write
from s4m_d2.modeling.backbones.weight_names import to_mask2former_names
from s4m_d2.modeling.hugging_face import save_pretrained
from s4m_d2.modeling.onnx_file import write_onnx

# Mask2Former renames weights of a head without version, or with an earlier one.
HEAD, HEAD_VERSION = "sem_seg_head", 2


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="file with one model, or with a student and a teacher")
    parser.add_argument("output", help="to write: .pth or .safetensors, .onnx, or a folder")
    parser.add_argument("--model", choices=sorted(BRANCHES), default="student")
    parser.add_argument("--format", choices=("weights", "transformers", "onnx"), default="weights")
    parser.add_argument(
        "--config-file",
        metavar="FILE",
        help="of the run, not for weights (default: its config.yaml)",
    )
    parser.add_argument("--force", action="store_true", help="overwrite an existing file")
    args = parser.parse_args(arguments)
    try:
        if args.format == "weights":
            print(export(args.checkpoint, args.output, args.model, overwrite=args.force))
        else:
            paths = args.checkpoint, args.output, args.model
            print(export_model(*paths, args.format, args.config_file, overwrite=args.force))
    except S4MError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def export(checkpoint: str, output: str, branch: str, *, overwrite: bool = False) -> str:
    """Write the weights of one model of a checkpoint into a file of their own.

    Args:
        checkpoint: path of the file to read.
        output: path of the file to write; its ending determines the format.
        branch: "student" or "teacher".
        overwrite: replace an existing file.

    Returns:
        A line on the written model.

    Raises:
        ConfigError: the output has another ending, exists, or is the checkpoint.
        WeightsError: the checkpoint cannot be read, or does not contain that model.
        OutputError: the file cannot be written.
    """
    _check_output(checkpoint, output, overwrite)
    content = read_weight_file(checkpoint)
    weights, found = model_weights(content, branch, checkpoint)
    _check_branch(found, branch, checkpoint)
    if not any(name.startswith(f"{HEAD}.") for name in weights):
        raise WeightsError(
            f"Weights '{checkpoint}' are those of a backbone: there is no whole model to export."
        )
    named = to_mask2former_names(weights)
    state = {name: tensor.detach().clone().contiguous() for name, tensor in named.items()}
    with atomic_write(output, "wb") as file:
        _write(state, file, Path(output).suffix)
    whose = f"the {branch}" if found else "the only model"
    at = f" after iteration {content['iteration']}" if "iteration" in content else ""
    numbers = sum(tensor.numel() for tensor in state.values())
    return f"{output}: {len(state)} tensors ({numbers:,} numbers) of {whose} in {checkpoint}{at}"


def export_model(
    checkpoint: str,
    output: str,
    branch: str,
    form: str,
    config_file: str | None = None,
    *,
    overwrite: bool = False,
) -> str:
    """Write one model of a checkpoint for other libraries.

    Args:
        checkpoint, branch: as in :func:`export`.
        output: path of an .onnx file, or of a folder for transformers, new or empty.
        form: "onnx" or "transformers".
        config_file: None: config.yaml of the checkpoint's run.
        overwrite: replace an existing file.

    Returns:
        A line on the comparison with our model.

    Raises:
        S4MError: the model cannot be loaded, or not be written; nothing is.
    """
    if form == "onnx":
        _check_output(checkpoint, output, overwrite, (".onnx",))
    elif os.path.exists(output) and not (os.path.isdir(output) and not os.listdir(output)):
        raise ConfigError(f"The output '{output}' exists and is no empty folder. Name another.")
    cfg = model_config(config_of_run(config_file, checkpoint), ["MODEL.DEVICE", "cpu"])
    model: Any
    model, found = load_model(cfg, checkpoint, branch)
    _check_branch(found, branch, checkpoint)
    steps = {"largest_component": False, "duplicate_iou": 1.0}  # and their values if off
    omitted = [name.upper() for name, off in steps.items() if getattr(model, name, off) != off]
    for name, off in steps.items():
        setattr(model, name, off)
    note = f". Not in it: MODEL.MASK_FORMER.TEST.{' and '.join(omitted)}" if omitted else ""
    edges = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    write = write_onnx if form == "onnx" else save_pretrained
    parent = os.path.dirname(os.path.abspath(output))
    try:
        os.makedirs(parent, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix=".export.") as temporary:
            part = os.path.join(temporary, "model")
            result = write(model, part, class_names(cfg), edges)
            os.replace(part, output)
    except OSError as error:
        raise OutputError(f"'{output}' cannot be written: {error.strerror or error}.") from error
    return f"{output}: largest differences on a random image: {result}{note}"


def _check_branch(found: str | None, branch: str, checkpoint: str) -> None:
    if found not in (None, branch):
        raise WeightsError(
            f"Weights '{checkpoint}' hold a {found} and no {branch}: use --model {found}."
        )


def _check_output(
    checkpoint: str,
    output: str,
    overwrite: bool,
    endings: tuple[str, ...] = (".pth", ".safetensors"),
) -> None:
    ending = Path(output).suffix
    if ending not in endings:
        raise ConfigError(
            f"The output '{output}' ends in {ending or 'nothing'!r}; expected "
            f"{' or '.join(endings)}."
        )
    if ending == ".safetensors":
        try:
            import safetensors.torch  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"The output '{output}' needs the package that writes it: pip install "
                "safetensors. A .pth file needs none."
            ) from error
    if os.path.exists(output) and os.path.exists(checkpoint):
        if os.path.samefile(checkpoint, output):
            raise ConfigError(f"The output '{output}' is the checkpoint itself; name another file.")
    if os.path.exists(output) and not overwrite:
        raise ConfigError(f"The output '{output}' exists. Add --force to replace it.")


def _write(state: Mapping[str, Tensor], file: IO[bytes], ending: str) -> None:
    if ending == ".safetensors":
        from safetensors.torch import save

        file.write(save(dict(state), metadata={"format": "pt"}))
        return
    model: Any = OrderedDict(state)
    versions = {"": 1, HEAD: HEAD_VERSION, f"{HEAD}.predictor": HEAD_VERSION}
    model._metadata = OrderedDict(  # where PyTorch keeps modules' versions
        (name, {"version": version}) for name, version in versions.items()
    )
    torch.save({"model": model}, file)
