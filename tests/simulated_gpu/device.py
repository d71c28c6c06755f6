"""A GPU that is none: tensors that say "cuda:0" and hold their values on the CPU.

PyTorch takes its CUDA paths with them (autocast, loss scaling, autograd, branches on ``is_cuda``).
What a GPU refuses is refused: tensors or generators of two devices, NumPy's views of the device,
operators without a CUDA kernel. ``torch.cuda.set_sync_debug_mode`` works as on a GPU: where the
host would wait, there is a warning or an error. More than on a GPU: a page-locked tensor that is
written to before its copy is sure to have arrived is an error.

Not simulated: speed, memory, streams, NCCL, torch.compile, and CUDA's kernels, those of Triton
among them, in whose place the CPU's compute.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torchvision  # noqa: F401  (its operators)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
NOT_OURS = ("site-packages", __file__)  # in the names of files
CPUGenerator = torch.Generator
OTHER_DRAWS = 0x5EED  # of the same seed, a GPU's generator draws other numbers than a CPU's
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
INDEXING |= {aten._index_put_impl_.default}
TAKES_BOTH = INDEXING | {aten.copy_.default, aten._to_copy.default, aten._foreach_copy_.default}
# The host waits to learn the size of the result, or its value.
WAITS = {
    aten._local_scalar_dense.default,
    aten._unique2.default,
    aten.bincount.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
    torch.ops.torchvision.nms.default,
}
KERNELS = ("CUDA", "CompositeExplicitAutograd", "CompositeImplicitAutograd", "BackendSelect")
KERNELS += ("CompositeExplicitAutogradNonFunctional",)


class GPUTensor(torch.Tensor):
    """A tensor on the simulated GPU, whose values are ``held``, a tensor of the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> GPUTensor:
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=CUDA,
        )
        self.held = held
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return GPU.compute(func, args, kwargs or {})

    def tolist(self) -> Any:
        GPU.wait("tolist")
        return self.held.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.__reduce_ex__(protocol)

    # With these two Module.to() exchanges parameters for those of the device.
    def __tensor_flatten__(self):
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, outer_size, outer_stride):
        return GPUTensor(inner["held"])


class Generator(CPUGenerator):
    """A generator of either device. PyTorch does not tell operators which: seeds tell."""

    devices: dict[int, set[str]] = {}  # of the generators with a seed

    def __new__(cls, device="cpu"):
        self = super().__new__(cls)
        self.simulated = torch.device(device)
        return self

    def __init__(self, device="cpu"):
        pass

    @property
    def device(self):
        return self.simulated

    def manual_seed(self, seed):
        super().manual_seed(seed ^ OTHER_DRAWS if self.simulated.type == "cuda" else seed)
        self.devices.setdefault(self.initial_seed(), set()).add(self.simulated.type)
        return self


class SimulatedGPU(TorchDispatchMode):
    """The mode in which programs have the device."""

    def __init__(self) -> None:
        super().__init__()
        self.sync_debug_mode = "default"
        self.on_their_way: list[tuple[weakref.ref, Tensor]] = []  # pinned sources, values then

    def set_sync_debug_mode(self, mode: int | str) -> None:
        self.sync_debug_mode = ("default", "warn", "error")[mode] if isinstance(mode, int) else mode

    def wait(self, reason: str) -> None:
        """The host waits, and all copies arrive."""
        for source, values in self.on_their_way:
            now = source()
            if now is not None and not torch.equal(now, values):
                raise RuntimeError("a page-locked tensor was written to before its copy arrived")
        self.on_their_way.clear()
        if self.sync_debug_mode == "default":
            return
        frames = reversed(traceback.extract_stack())
        ours = (f for f in frames if not any(part in f.filename for part in NOT_OURS))
        places = " < ".join(f"{f.filename}:{f.lineno}" for f in itertools.islice(ours, 3))
        message = f"called a synchronizing CUDA operation ({reason}): {places}"
        if self.sync_debug_mode == "error":
            raise RuntimeError(message)
        warnings.warn(message, stacklevel=2)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.compute(func, args, kwargs or {})

    def compute(self, func, args: tuple, kwargs: dict) -> Any:
        """An operator, on whichever device it is."""
        leaves = list(leaves_of((args, kwargs)))
        there = [x for x in leaves if isinstance(x, GPUTensor)]
        target = torch.device(kwargs["device"]).type if kwargs.get("device") else None
        device = "cuda" if there or target == "cuda" else "cpu"
        for generator in (x for x in leaves if isinstance(x, CPUGenerator)):
            if device not in Generator.devices.get(generator.initial_seed(), ("cpu", "cuda")):
                raise RuntimeError(f"{func}: expected a generator of device '{device}'")
        if device == "cpu":
            return func(*args, **kwargs)
        here = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, GPUTensor)]
        mixed = func not in TAKES_BOTH and any(x.dim() for x in here)
        if there and (mixed or func in INDEXING and not isinstance(args[0], GPUTensor)):
            raise RuntimeError(f"{func}: expected all tensors to be on the same device")
        check_kernel(func)
        self.note_waits(func, args, kwargs, target)
        return computed(func, args, kwargs, target)

    def note_waits(self, func, args: tuple, kwargs: dict, target: str | None) -> None:
        if func in WAITS or (
            func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None
        ):
            self.wait(str(func))
        elif func in INDEXING:
            indices = [index for index in args[1] if index is not None]
            number = len(args) > 2 and args[2].numel() == 1 and not isinstance(args[2], GPUTensor)
            if number and len(indices) == 1 and indices[0].dtype == torch.bool:
                return  # masked_fill
            for index in indices:
                if index.dtype in (torch.bool, torch.uint8) or not isinstance(index, GPUTensor):
                    self.wait(f"{func} with a mask, or with an index on the host")
        elif func is aten.copy_.default:
            there, source, *blocking = args
            wanted = "cuda" if isinstance(there, GPUTensor) else "cpu"
            self.note_copy(source, wanted, *blocking, **kwargs)
        elif func is aten._to_copy.default and target is not None:
            self.note_copy(args[0], target, kwargs.get("non_blocking", False))

    def note_copy(self, source: Tensor, target: str, non_blocking: bool = False) -> None:
        if isinstance(source, GPUTensor):
            if target == "cpu":
                self.wait("copy to the host")
        elif not non_blocking:
            self.wait("blocking copy to the device")
        elif source.is_pinned():
            self.on_their_way.append((weakref.ref(source), source.clone()))


GPU = SimulatedGPU()


def leaves_of(x: Any) -> Iterator[Any]:
    """The values in lists, tuples and dicts of an operator's arguments; PyTorch's way is slow."""
    if type(x) in (list, tuple):
        for part in x:
            yield from leaves_of(part)
    elif type(x) is dict:
        yield from leaves_of(list(x.values()))
    else:
        yield x


def with_leaves(change: Callable[[Any], Any], x: Any) -> Any:
    """The same with changed values."""
    if type(x) in (list, tuple):
        return type(x)(with_leaves(change, part) for part in x)
    if type(x) is dict:
        return {key: with_leaves(change, part) for key, part in x.items()}
    return change(x)


@functools.cache
def check_kernel(func) -> None:
    overload = func._overloadname
    name = func._schema.name + (f".{overload}" if overload != "default" else "")
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    if not any(has(name, key) for key in KERNELS):
        raise NotImplementedError(f"{name} has no CUDA kernel")


def computed(func, args: tuple, kwargs: dict, target: str | None) -> Any:
    """The operator's result by the CPU's kernel, on the device where it belongs."""
    plain, options = with_leaves(
        lambda x: x.held if isinstance(x, GPUTensor) else x, (args, kwargs)
    )
    if target is not None:
        options = {**options, "device": torch.device("cpu")}
        options.pop("pin_memory", None)
        options.pop("non_blocking", None)
    result = func(*plain, **options)
    if func is aten._to_copy.default and result is plain[0]:
        result = result.clone()
    return result if target == "cpu" else on_device(func, args, kwargs, result)


def on_device(func, args: tuple, kwargs: dict, result: Any) -> Any:
    """A result, with the same objects where the operator changed or viewed its arguments.

    tools/memory.py has it from kernels of its own.
    """
    known = {id(x.held): x for x in leaves_of((args, kwargs)) if isinstance(x, GPUTensor)}

    def there(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        same = known.get(id(x)) if func._schema.is_mutable else None
        return GPUTensor(x) if same is None else same

    result = with_leaves(there, result)
    aliases = any(returned.alias_info is not None for returned in func._schema.returns)
    if known and aliases and not func._schema.is_mutable:
        return return_and_correct_aliasing(func, args, kwargs, result)
    return result


def install() -> None:
    """Make this process, which runs with library.c, believe in one GPU."""
    torch._C._ensureCUDADeviceGuardSet()  # while there is no device: a guard that does nothing
    ctypes.CDLL(None).set_device_count(127)  # whatever PyTorch takes for the current device
    torch.autograd.set_multithreading_enabled(False)
    torch.backends.cudnn.enabled = False  # the CPU's kernels compute
    for kind in ("flash", "mem_efficient", "cudnn"):
        getattr(torch.backends.cuda, f"enable_{kind}_sdp")(False)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.accelerator.is_available = lambda *args: True
    torch.Generator = Generator
    for name in ("tensor", "as_tensor"):
        setattr(torch, name, _on_host_first(getattr(torch, name)))
    torch.Tensor.pin_memory = _pin_memory
    torch.Tensor.is_pinned = lambda self, device=None: getattr(self, "_pinned", False)
    _replace_cuda()
    _replace_kernels()


def _on_host_first(original):
    def make(data, *args, device=None, **kwargs):
        if device is None or torch.device(device).type != "cuda":
            kwargs |= {} if device is None else {"device": device}
            return original(data, *args, **kwargs)
        return original(data, *args, **kwargs).to(device)

    return make


def _pin_memory(self, device=None):
    if isinstance(self, GPUTensor):
        raise RuntimeError("cannot pin 'torch.cuda' tensors: only CPU tensors can be pinned")
    if self.is_pinned():
        return self
    pinned = torch.empty_strided(self.size(), self.stride(), dtype=self.dtype)
    pinned.copy_(self.detach())  # fails where elements share memory, as on a GPU
    pinned._pinned = True
    return pinned


def _replace_cuda() -> None:
    about = SimpleNamespace(
        name="simulated", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30
    )
    state = torch.zeros(16, dtype=torch.uint8)
    constants = {
        "current_device": 0,
        "device_count": 1,
        "get_device_capability": (about.major, about.minor),
        "get_device_name": about.name,
        "get_device_properties": about,
        "get_rng_state": state,
        "get_rng_state_all": [state],
        "is_available": True,
        "is_bf16_supported": True,
        "is_initialized": True,
        "max_memory_allocated": 0,
        "max_memory_reserved": 0,
        "mem_get_info": (64 << 30, about.total_memory),
        "memory_allocated": 0,
        "memory_reserved": 0,
    }
    nothing = "_lazy_init empty_cache manual_seed manual_seed_all reset_peak_memory_stats"
    nothing += " set_device set_rng_state synchronize"
    for name, value in {**constants, **dict.fromkeys(nothing.split())}.items():
        setattr(torch.cuda, name, lambda *args, value=value, **kwargs: value)
    torch.cuda.set_sync_debug_mode = GPU.set_sync_debug_mode


def _replace_kernels() -> None:
    """The Triton functions run up to the launch, and the plain form computes."""
    from s4m_d2.layers import deform_attn_triton
    from s4m_d2.layers.deform_attn_plain import PlainDeformableSampling, gradients

    def launch(kernel, level_sizes, value, locations, weights, *tensors):
        value, locations, weights = (x.held.float() for x in (value, locations, weights))
        inputs = value, level_sizes, locations, weights
        if len(tensors) == 1:  # forward
            results = [PlainDeformableSampling.apply(*inputs)]
        else:
            grad_output, *tensors = tensors
            results = gradients(*inputs, grad_output.held.float())
        for tensor, result in zip(tensors, results, strict=True):
            tensor.held.copy_(result)

    deform_attn_triton._launch = launch
