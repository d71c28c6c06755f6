"""Write the student or the teacher of a checkpoint for other programs.

    python tools/export_weights.py output/student/model_final.pth student.pth
    python tools/export_weights.py --model teacher output/student/model_final.pth t.safetensors
    s4m-export --format transformers output/student/model_final.pth student-hf
    s4m-export --format onnx output/student/model_final.pth student.onnx

--format weights: a plain file, which Mask2Former, Detectron2 and MODEL.WEIGHTS here read; a .pth
contains only {"model": weights}. --format transformers: a folder that Hugging Face's
Mask2FormerForUniversalSegmentation.from_pretrained and AutoImageProcessor.from_pretrained load, for
models with a ResNet or a Swin. --format onnx: the model from an image of any size to its instances
(s4m_d2/modeling/onnx_file.py). Both are compared with our model on a random image.
"""

import argparse
import os
import tempfile
from collections import OrderedDict
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from s4m_d2.engine.checkpointing.weight_names import BRANCHES, model_weights
from s4m_d2.engine.command.arguments import command_parser, model_config
from s4m_d2.engine.command.launch import exit_status
from s4m_d2.engine.figures.predictor import class_names, load_model
from s4m_d2.engine.stages import last_weights
from s4m_d2.errors import ConfigError, OutputError, WeightsError
from s4m_d2.files import atomic_write
from s4m_d2.modeling.hugging_face import save_pretrained
from s4m_d2.modeling.onnx_file import write_onnx
from s4m_d2.modeling.timm_backbone import to_mask2former_names
from s4m_d2.pretrained import read_weight_file

HEAD = "sem_seg_head"
# By --format: endings of the file; (): a folder.
ENDINGS = {"onnx": (".onnx",), "transformers": (), "weights": (".pth", ".safetensors")}


@exit_status
def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = command_parser(__doc__)
    parser.add_argument("checkpoint", help="of one model, or of student and teacher; or OUTPUT_DIR")
    parser.add_argument("output", help="to write: .pth or .safetensors, .onnx, or a folder")
    parser.add_argument("--model", choices=sorted(BRANCHES), default="student")
    parser.add_argument("--format", choices=sorted(ENDINGS), default="weights")
    help = "of the run, not for weights (default: its config.yaml)"
    parser.add_argument("--config-file", metavar="FILE", help=help)
    parser.add_argument("--force", action="store_true", help="overwrite an existing file")
    args = parser.parse_args(arguments)
    args.checkpoint = last_weights(args.checkpoint)
    _check_output(args)
    print(f"{args.output}: {export(args) if args.format == 'weights' else export_model(args)}")
    return 0


def export(args: argparse.Namespace) -> str:
    """Write the weights of one model into a file of their own; returns what they are."""
    content = read_weight_file(args.checkpoint)
    weights, found = model_weights(content, args.model, args.checkpoint)
    _check_branch(found, args)
    if not any(name.startswith(f"{HEAD}.") for name in weights):
        raise WeightsError(f"Weights '{args.checkpoint}' are a backbone's: export a whole model's.")
    named = to_mask2former_names(weights)
    state = {name: tensor.detach().clone().contiguous() for name, tensor in named.items()}
    with atomic_write(args.output, "wb") as file:
        _write(state, file, Path(args.output).suffix)
    whose = f"the {args.model}" if found else "the only model"
    at = f" after iteration {content['iteration']}" if "iteration" in content else ""
    return f"{len(state)} tensors of {whose} in {args.checkpoint}{at}"


def export_model(args: argparse.Namespace) -> str:
    """Write one model for other libraries, or nothing; returns the comparison with our model."""
    cfg = model_config(args.config_file, args.checkpoint, ["MODEL.DEVICE", "cpu"])
    model: Any
    model, found = load_model(cfg, args.checkpoint, args.model)
    _check_branch(found, args)
    steps = {"largest_component": False, "duplicate_iou": 1.0}  # and their values if off
    omitted = [name.upper() for name, off in steps.items() if getattr(model, name, off) != off]
    for name, off in steps.items():
        setattr(model, name, off)
    note = f". Not in it: MODEL.MASK_FORMER.TEST.{' and '.join(omitted)}" if omitted else ""
    edges = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    write = write_onnx if args.format == "onnx" else save_pretrained
    parent = os.path.dirname(os.path.abspath(args.output))
    try:
        os.makedirs(parent, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix=".export.") as temporary:
            part = os.path.join(temporary, "model")
            result = write(model, part, class_names(cfg), edges)
            os.replace(part, args.output)
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"'{args.output}' cannot be written: {reason}.") from error
    return f"largest differences on a random image: {result}{note}"


def _check_branch(found: str | None, args: argparse.Namespace) -> None:
    if found not in (None, args.model):
        raise WeightsError(
            f"Weights '{args.checkpoint}' hold a {found} and no {args.model}: use --model {found}."
        )


def _check_output(args: argparse.Namespace) -> None:
    output, ending, expected = args.output, Path(args.output).suffix, ENDINGS[args.format]
    if not expected:
        if os.path.exists(output) and not (os.path.isdir(output) and not os.listdir(output)):
            raise ConfigError(f"The output '{output}' exists and is no empty folder. Name another.")
        return
    if ending not in expected:
        remedy = f" --format onnx writes {ending}." if ending in ENDINGS["onnx"] else ""
        wanted = f"expected {' or '.join(expected)}.{remedy}"
        raise ConfigError(f"The output '{output}' ends in '{ending}'; {wanted}")
    if ending == ".safetensors" and find_spec("safetensors") is None:
        raise ConfigError(f"The output '{output}' needs: pip install safetensors. Or write a .pth.")
    if not os.path.exists(output):
        return
    if os.path.exists(args.checkpoint) and os.path.samefile(args.checkpoint, output):
        raise ConfigError(f"The output '{output}' is the checkpoint itself; name another file.")
    if not args.force:
        raise ConfigError(f"The output '{output}' exists. Add --force to replace it.")


def _write(state: Mapping[str, Tensor], file: IO[bytes], ending: str) -> None:
    if ending == ".safetensors":
        from safetensors.torch import save

        file.write(save(dict(state), metadata={"format": "pt"}))
        return
    model: Any = OrderedDict(state)
    # PyTorch's place for modules' versions. Mask2Former renames weights of a head before 2.
    versions = {"": 1, HEAD: 2, f"{HEAD}.predictor": 2}
    model._metadata = OrderedDict((name, {"version": v}) for name, v in versions.items())
    torch.save({"model": model}, file)
