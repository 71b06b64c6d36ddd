"""A device that is not there: code runs on it as on a GPU, and what would fail or wait there shows.

    with PretendedDevice("cuda") as device:
        adaptor = adaptor.to("cuda")
        adaptor(z.to("cuda"), z.to("cuda"))
    device.operations  # how many computed something there
    device.waits       # where the program would have waited for the device

Values are computed, on the CPU, so everything runs to its end: ranking, export, a whole training.
Tensors are `PretendedTensor`s. They say that they are on the device; to torch's C++ code they are
on "meta", so that autograd needs neither a driver nor a stub. Within the block

- operations of tensors there and on the CPU raise WrongDevice. As on a GPU, a number on the CPU (a
  tensor without dimensions) may be mixed in, and rows on the CPU may index a tensor there.
- float64 raises WrongDevice on a device that has none ("mps").
- every operation that makes the program wait is listed: results whose size depends on values
  (`nonzero`), values that Python asks for (`item`), and copies from and to the CPU.

What it cannot show: autocast, which C++ code does not apply to "meta"; operations that a device
lacks; its rounding. Code in the block cannot use "meta" itself, as `load_adaptor` does.
"""

import sys
from collections import Counter
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

REPOSITORY = Path(__file__).resolve().parent.parent
WITHOUT_FLOAT64 = ("mps",)
META = torch.device("meta")  # where C++ code takes the tensors to be

# Operations that wait for the device: Python asks for a value, or the size of the result is one.
WAITING = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose"),
    *("nonzero", "masked_select", "bincount", "repeat_interleave"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"),
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
COPYING = {"_to_copy", "copy_", "copy"}
OF_LISTS = {"cat", "stack"}  # these take no number on the CPU either


class WrongDevice(AssertionError):
    """What a device would refuse. No code catches it by accident, as it might a RuntimeError."""


class PretendedTensor(torch.Tensor):
    """A tensor that says it is on another device; `held` is a CPU tensor with its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    is_meta = False  # torch's Python code loads no weights into a tensor on "meta"

    @staticmethod
    def __new__(cls, held, device):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        return torch.Tensor._make_wrapper_subclass(
            cls, held.size(), **layout, dtype=held.dtype, device=META
        )

    def __init__(self, held, device):
        self.held = held
        self.claimed = device

    @property
    def device(self):
        return self.claimed

    def tolist(self):
        return self.cpu().tolist()  # torch's own refuses subclasses

    def __repr__(self):
        return f"PretendedTensor({tuple(self.shape)}, {self.dtype}, {self.claimed})"

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        raise WrongDevice(f"{function} of a pretended tensor outside of its device's block")


class PretendedDevice:
    """A device for the duration of a block. Within the block, its name can be used as any other.

    Args:
        name: "cuda" or "mps".
    Attributes:
        operations: Counter by name of the operations on it, without views.
        waits: "operation at file:line" for every time that the program would have waited for it.
    """

    def __init__(self, name):
        self.device = torch.device(name, 0)
        self.has_float64 = name not in WITHOUT_FLOAT64
        self._modes = (_Names(self.device), _Operations(self))
        self.forget()

    def forget(self):
        """Count from 0 again."""
        self.operations = Counter()
        self.waits = []

    def __enter__(self):
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error):
        for mode in reversed(self._modes):
            mode.__exit__(*error)


class _Names(TorchFunctionMode):
    """Turns the name of the device into "meta" before torch looks for a driver."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = dict(options or {})
        if function in (torch.tensor, torch.as_tensor) and self._is_named(options.get("device")):
            del options["device"]  # on "meta" the values would be lost
            return function(*arguments, **options).to(META)
        if self._is_named(options.get("device")):
            options["device"] = META
        if function is torch.Tensor.pin_memory:
            return arguments[0]  # only a driver can pin memory
        if function is torch.Tensor.to:
            arguments = [META if self._is_named(argument) else argument for argument in arguments]
        return function(*arguments, **options)

    def _is_named(self, value):
        if not isinstance(value, str | torch.device):
            return False
        return torch.device(value).type == self.device.type


class _Operations(TorchDispatchMode):
    """Computes what is on the device on the CPU, and refuses what the device would refuse."""

    def __init__(self, pretended):
        super().__init__()
        self.pretended = pretended

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = dict(options or {})
        # In inference mode torch hands over whole functions. Their parts are what is looked at.
        with self:
            result = function.decompose(*arguments, **options)
        if result is not NotImplemented:
            return result

        name = function.overloadpacket.__name__
        tensors = [x for x in tree_leaves((arguments, options)) if isinstance(x, torch.Tensor)]
        there = [x for x in tensors if isinstance(x, PretendedTensor)]
        here = [x for x in tensors if not isinstance(x, PretendedTensor)]
        stays_here = not _goes_there(name, arguments, options, there)
        for tensor in here:
            need(tensor.device != META, name, "a tensor without values")
        if there:
            check_devices(name, arguments, here)
        if there or not stays_here:
            if not function.is_view:
                self.pretended.operations[name] += 1
            reason = reason_to_wait(name, arguments, options, there, here, stays_here)
            if reason is not None:
                self.pretended.waits.append(f"{reason} at {place()}")

        if options.get("device") is not None:
            options["device"] = torch.device("cpu")
        held_arguments, held_options = tree_map(_held, (arguments, options))
        result = function(*held_arguments, **held_options)
        if stays_here:
            return result
        # A view is an inference tensor only if what it is a view of is one.
        is_inference = torch.is_inference_mode_enabled()
        if function.is_view and there:
            is_inference = there[0].is_inference()
        wrapper_of = {id(x.held): x for x in there}  # what is changed in place stays the same
        with torch.inference_mode(is_inference):
            return tree_map(lambda x: self._pretend(name, x, wrapper_of), result)

    def _pretend(self, name, result, wrapper_of):
        """A result of the CPU as a tensor on the device."""
        if not isinstance(result, torch.Tensor):
            return result
        is_refused = result.dtype == torch.float64 and not self.pretended.has_float64
        need(not is_refused, name, f"float64 on {self.pretended.device.type}")
        if id(result) not in wrapper_of:
            return PretendedTensor(result, self.pretended.device)
        wrapper = wrapper_of[id(result)]
        need(wrapper.shape == result.shape, name, "a change of shape in place")
        return wrapper


def _held(x):
    return x.held if isinstance(x, PretendedTensor) else x


def _goes_there(name, arguments, options, there):
    """Whether the result of an operation is on the device."""
    if options.get("device") is not None:
        return options["device"] == META
    if name == "copy_":
        return isinstance(arguments[0], PretendedTensor)
    return bool(there)


def check_devices(name, arguments, here):
    """Refuse tensors on the CPU beside those on the device, as torch does.

    Args:
        here: the tensors on the CPU.
    """
    if name in COPYING:
        return
    if name in INDEXING:  # index(x, rows) and index_put(x, rows, values)
        is_there = isinstance(arguments[0], PretendedTensor)
        need(is_there, name, "a tensor on the CPU, and rows on the device")
        here = [x for x in here if any(x is value for value in arguments[2:])]
    if name not in OF_LISTS:
        here = [x for x in here if x.ndim > 0]
    shapes = [tuple(x.shape) for x in here]
    need(not here, name, f"tensors on the device, and on the CPU of shapes {shapes}")


def reason_to_wait(name, arguments, options, there, here, stays_here):
    """Why the program waits for the device in an operation, or None.

    Args:
        there, here: the tensors on the device and on the CPU.
        stays_here: whether the result is on the CPU.
    """
    if name in WAITING:
        return name
    if name in COPYING and there and stays_here:
        return "copy to the CPU"
    if name in COPYING and here and not stays_here:
        is_non_blocking = options.get("non_blocking") or True in arguments[2:]
        return None if is_non_blocking else "copy from the CPU"
    if name in INDEXING:
        rows = [x for x in arguments[1] if x is not None]
        if any(x.dtype in (torch.bool, torch.uint8) for x in rows):
            return f"{name} by truth values"
        if not all(isinstance(x, PretendedTensor) for x in rows):
            return f"{name} by rows on the CPU"
    return None


def place():
    """The innermost line of the repository that is being run: file:line."""
    frame = sys._getframe()
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        is_ours = file.is_relative_to(REPOSITORY) and "site-packages" not in file.parts
        if is_ours and file != Path(__file__).resolve():
            return f"{file.relative_to(REPOSITORY)}:{frame.f_lineno}"
        frame = frame.f_back
    return "unknown"


def need(condition, name, problem):
    """Raise WrongDevice unless the condition holds."""
    if not condition:
        raise WrongDevice(f"{name}: {problem}, at {place()}")
