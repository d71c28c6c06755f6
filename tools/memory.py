"""The peak memory of a training step on a GPU, planned without one.

    python tools/memory.py --shapes cityscapes --stage 2 --images 2 4
    python tools/memory.py --shapes coco --stage 2 --images 4 -- MODEL.BACKBONE.FREEZE_AT 2

The step's own code runs at real shapes on the simulated GPU of tests/simulated_gpu, whose tensors
have no values here; what the host would read is made up. Counted are the bytes of the tensors that
are alive at a time, in PyTorch's blocks of 512: no workspaces of libraries, no fragments, and no
CUDA context (0.5 to 1 GB).
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("", "tests")]
import numpy as np  # noqa: E402
import torch  # noqa: E402
from simulated_gpu import device, environment  # noqa: E402
from torch import Tensor  # noqa: E402

GIB, BLOCK = 2**30, 512
TOTAL = 80 * GIB  # of the GPU: SAM takes what is free
META = torch.device("meta")
AREA = 1000  # px of every mask that the host asks about


class Ledger:
    """Which storages are alive, and the most that were in each phase of a step."""

    def __init__(self) -> None:
        self.live, self.peak = 0, 0
        self.phase, self.peaks = "", Counter()
        self._users: Counter[int] = Counter()

    def add(self, tensor: device.GPUTensor) -> None:
        storage = tensor.held.untyped_storage()
        tensor.entry = Entry(self, storage)
        self.peak = max(self.peak, self.live)
        self.peaks[self.phase] = max(self.peaks[self.phase], self.live)


class Entry:
    """A tensor's use of a storage, for as long as the tensor lives."""

    def __init__(self, ledger: Ledger, storage: torch.UntypedStorage) -> None:
        self.ledger, self.storage = ledger, storage
        self.bytes = -(-storage.nbytes() // BLOCK) * BLOCK
        self._count(1)

    def _count(self, change: int) -> None:
        users = self.ledger._users
        users[self.storage._cdata] += change
        if users[self.storage._cdata] == max(change, 0):
            self.ledger.live += change * self.bytes

    def __del__(self) -> None:
        self._count(-1)


def without_values(func, args: tuple, kwargs: dict, target: str | None):
    """An operator's result on the simulated GPU, shapes alone; takes the place of ``computed``."""
    name = func._schema.name
    if name == "aten::_local_scalar_dense":
        return 0.0
    if name == "aten::_amp_foreach_non_finite_check_and_unscale_":
        return None
    if target == "cpu":
        return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
    if name in ("aten::copy_", "aten::_amp_update_scale_"):
        return args[0]

    def plain(x):
        if isinstance(x, device.GPUTensor):
            return x.held
        if isinstance(x, torch.Generator):
            return None
        return x.to(META) if isinstance(x, Tensor) and x.dim() else x

    inputs, options = device.with_leaves(plain, (args, kwargs))
    options.pop("non_blocking" if name == "aten::_to_copy" else "pin_memory", None)
    if target == "cuda":
        options["device"] = META
    return device.on_device(func, args, kwargs, func(*inputs, **options))


def attention(query, key, value, attn_mask=None, *_, **options) -> Tensor:
    """PyTorch's choice on a GPU, where its own would ask the driver: a kernel without weights."""
    if torch.is_autocast_enabled("cuda"):
        low = torch.get_autocast_dtype("cuda")
        query, key, value = query.to(low), key.to(low), value.to(low)
    bias = None
    if attn_mask is not None:
        bias = torch.zeros_like(attn_mask, dtype=query.dtype)
        bias = bias.expand(*query.shape[:-1], key.shape[-2])
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(query, key, value, bias, torch.is_grad_enabled())[0]


def make_up(queries: int, instances: int) -> None:
    """Replace what the step fetches from the device."""
    from s4m_d2 import structures
    from s4m_d2.engine.training import step
    from s4m_d2.losses import matcher
    from s4m_d2.semi import pseudo_labels, refinement

    verdict = np.ones((6, queries), dtype=np.int64)  # see select_pseudo_labels
    verdict[3:5, instances:] = 0
    verdict[5] = AREA
    draws = np.random.default_rng(0)
    areas = lambda *tensors: [np.full(x.shape, AREA) for x in tensors]  # noqa: E731
    structures.to_host = refinement.to_host = areas
    pseudo_labels.to_host = lambda *tensors: [verdict for _ in tensors]
    matcher.to_host = lambda costs, labels: [
        draws.random(costs.shape, dtype=np.float32),
        np.zeros(labels.shape, dtype=np.int64),
    ]
    step.to_host = lambda *tensors: [np.zeros(x.shape) for x in tensors]


def simulate() -> Ledger:
    """A GPU without values, whose memory is counted."""
    from s4m_d2.layers import deform_attn_triton

    device.install()
    ledger = Ledger()
    make = device.GPUTensor.__new__

    def counted(cls, held):
        tensor = make(cls, held)
        ledger.add(tensor)
        return tensor

    device.GPUTensor.__new__ = staticmethod(counted)
    device.computed = without_values
    device.GPU.note_waits = lambda *args: None
    deform_attn_triton._launch = lambda *args, **options: None
    torch.nn.functional.scaled_dot_product_attention = attention
    cuda = torch.cuda
    cuda.memory_allocated = cuda.memory_reserved = lambda *_: ledger.live
    cuda.max_memory_allocated = lambda *_: ledger.peak
    cuda.reset_peak_memory_stats = lambda *_: setattr(ledger, "peak", ledger.live)
    cuda.mem_get_info = lambda *_: (max(0, TOTAL - ledger.live), TOTAL)
    return ledger


def watch(ledger: Ledger, owner, name: str) -> None:
    """Count the memory of a method as its own phase."""
    part = getattr(owner, name)

    def watched(*args, **kwargs):
        before, ledger.phase = ledger.phase, name
        try:
            return part(*args, **kwargs)
        finally:
            ledger.phase = before

    setattr(owner, name, watched)


def plan(case, stage: int) -> tuple[int, Ledger]:
    """Bytes of models and optimizer's state, and what the second step of the case holds."""
    from benchmarking import ours
    from benchmarking.bench import Bench

    ledger = simulate()
    with device.GPU:
        bench = Bench(case, stage)
        make_up(bench.cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES, case.instances)
        if bench.teacher is not None:
            watch(ledger, bench.teacher.model, "predict_queries")
            watch(ledger, bench, "labeling")
        watch(ledger, bench.sam, "encode")
        watch(ledger, bench.sam, "prompt")
        watch(ledger, bench.student, "forward")
        step = ours.training_step(bench)
        step()
        fixed = ledger.live
        ledger.peaks.clear()
        step()
    return fixed, ledger


def main() -> int:
    from benchmarking.bench import CASES, CONFIG_SAM

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", choices=sorted(CASES), default="cityscapes")
    parser.add_argument("--stage", type=int, choices=(1, 2), default=2)
    words = "labeled ones of a process, and unlabeled"
    parser.add_argument("--images", type=int, default=2, help=words)
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="of the config")
    args = parser.parse_args()
    if "libcuda.so.1" not in os.environ.get("LD_PRELOAD", ""):
        with tempfile.TemporaryDirectory() as folder:
            again = subprocess.run([sys.executable, *sys.argv], env=environment(Path(folder)))
        return again.returncode
    case = CASES[args.shapes]
    case = replace(case, images=args.images, device="cuda", sam=CONFIG_SAM, opts=tuple(args.opts))
    fixed, ledger = plan(case, args.stage)
    print(f"{args.shapes}, stage {args.stage}, {args.images} images (and as many unlabeled)")
    print(f"{fixed / GIB:8.2f} GiB  models, gradients, optimizer")
    for phase, peak in ledger.peaks.items():
        print(f"{peak / GIB:8.2f} GiB  {phase or 'backward and update'}")
    print(f"{max(ledger.peaks.values()) / GIB:8.2f} GiB  peak")
    return 0


if __name__ == "__main__":
    sys.exit(main())
