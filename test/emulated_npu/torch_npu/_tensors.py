"""Tensors of the emulated device wrap host tensors; a few kernels make them."""

import torch
from torch.utils._pytree import tree_flatten, tree_map

from torch_npu._record import record
from torch_npu._streams import current_stream
from torch_npu.npu import utils

COPIES = ("aten::copy_", "aten::_copy_from", "aten::_to_copy")
# an index of the host is copied to the device first
TAKES_HOST_TENSORS = (*COPIES, "aten::index.Tensor", "aten::index_put_")
_kept = []  # kernels are registered as long as these objects exist


class NpuTensor(torch.Tensor):
    """A tensor whose data is in a host tensor, which operators of the host may not use.

    Its device is always npu:0, because torch allows one device of a kind made in Python.
    """

    @staticmethod
    def __new__(cls, host):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            layout=host.layout,
            device=torch.device("npu", 0),
            requires_grad=False,
        )
        made._host = host.detach()
        stream = current_stream()
        made._made, made._recorded = (stream, stream._begin()), set()
        record.result(made)
        return made

    def __repr__(self):
        return f"{repr(self._host)[:-1]}, device='{self.device}')"

    def numpy(self, *_, **__):
        raise TypeError("can't convert npu device type tensor to numpy. Use Tensor.cpu() first.")

    def __array__(self, *_):
        self.numpy()

    def __reduce_ex__(self, protocol):
        raise TypeError("what is saved shall lie on the host")

    def tolist(self):
        record.to_host("tolist", self.numel())
        return self._host.tolist()

    def record_stream(self, stream):
        record.operator(torch.ops.aten.record_stream.default, [self], False)
        self._recorded.add(stream.number)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        record.operator(function, tensors, kwargs.get("output_size") is not None)
        _check(function, tensors)
        to_host = _note_copies(function, args, kwargs)
        wrapped = {id(x._host): x for x in tensors if isinstance(x, NpuTensor)}
        args, kwargs = tree_map(_unwrapped, args), tree_map(_unwrapped, kwargs)
        result = function(*args, **kwargs)
        if to_host:  # a copy, even if no type changes
            return result.clone() if any(result is x for x in args) else result
        return tree_map(lambda x: _wrapped(x, wrapped), result)


def _check(function, tensors):
    """Raise if devices are mixed, or a stream uses what another one is still making."""
    name = function._schema.name
    for one in tensors:
        if isinstance(one, NpuTensor):
            current_stream()._check_ready(one._made, one._recorded, name)
        elif one.dim() > 0 and name not in TAKES_HOST_TENSORS:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices,"
                f" npu:0 and cpu! ({function.name()})"
            )
        elif one.dim() > 0 and name not in COPIES:
            record.to_device(name, False)


def _note_copies(function, args, kwargs):
    """Record copies between host and device; returns whether the result is on the host."""
    name = function._schema.name
    if name == "aten::_to_copy":
        device = kwargs.get("device")
        if device is None or torch.device(device).type == "npu":
            return False
        record.to_host(name, args[0].numel())
        return True
    if name != "aten::copy_":
        return False
    target, source = args[:2]
    if not isinstance(target, NpuTensor):
        record.to_host(name, source.numel())
        return True
    if not isinstance(source, NpuTensor):
        record.to_device(name, is_pinned(source))
    return False


def _unwrapped(x):
    if isinstance(x, NpuTensor):
        return x._host
    if isinstance(x, torch.device) and x.type == "npu":
        return torch.device("cpu")
    return x


def _wrapped(x, wrapped):
    if not isinstance(x, torch.Tensor) or isinstance(x, NpuTensor):
        return x
    if x.dtype == torch.float16 and not utils.is_support_inf_nan():
        _saturate(x)
    return wrapped[id(x)] if id(x) in wrapped else NpuTensor(x)


# ---------------------------------------------------------------- a chip without infinity

_status = {"overflow": False}


def _saturate(x):
    if not torch.isfinite(x).all():
        _status["overflow"] = True
        largest = torch.finfo(x.dtype).max
        torch.nan_to_num(x, nan=0.0, posinf=largest, neginf=-largest, out=x)


def npu_clear_float_status(self):
    _status["overflow"] = False
    return torch.zeros_like(self)


def npu_get_float_status(self):
    return torch.full_like(self, float(_status["overflow"]))


def flattened(tensors):
    """One tensor with all elements, of which the given ones become views."""
    host = torch.cat([one._host.reshape(-1) for one in tensors])
    for one, part in zip(tensors, host.split([one.numel() for one in tensors]), strict=True):
        one._host = part.view(one._host.shape)
        if isinstance(one, torch.nn.Parameter):
            one.data._host = one._host
    return NpuTensor(host)


# ---------------------------------------------------------------- kernels


def _empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    record.operator(torch.ops.aten.empty.memory_format, [], False)
    return NpuTensor(torch.empty(size, dtype=dtype))


def _empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
    record.operator(torch.ops.aten.empty_strided.default, [], False)
    return NpuTensor(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(self, target, non_blocking=False):
    """Reached by torch.tensor(..., device="npu")."""
    record.to_device("aten::_copy_from", is_pinned(self))
    target._host.copy_(_unwrapped(self))
    return target


def _to(self, *, dtype=None, non_blocking=False, device=None, **_):
    """Copy a host tensor to the device: no wrapper takes part in that."""
    record.to_device("aten::_to_copy", is_pinned(self) and non_blocking)
    return NpuTensor(self.to(dtype=dtype, copy=True))


def _not_reached(*_, **__):
    raise AssertionError("NpuTensor runs its operators itself")


def is_pinned(tensor, device=None):
    return getattr(tensor, "_is_pinned", False)


def _pin_memory(self, device=None):
    """Mark a copy as pinned; torch itself would ask the device for an allocator."""
    if is_pinned(self):
        return self
    pinned = self.clone()
    pinned._is_pinned = True
    return pinned


class _Generator(torch.Generator):
    """A generator of any device, whose numbers the host draws."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")


def install():
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", _empty, "PrivateUse1")
    library.impl("empty_strided", _empty_strided, "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    # torch_npu has a kernel for it; without one it would be split into two other operators
    library.impl("repeat_interleave.self_Tensor", _not_reached, "PrivateUse1")
    _kept.append(library)
    torch.Tensor.pin_memory, torch.Tensor.is_pinned = _pin_memory, is_pinned
    torch.Generator = _Generator
