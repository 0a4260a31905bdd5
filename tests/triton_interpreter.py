"""Triton's interpreter, mended where it is not what a GPU does: bfloat16, which it keeps as 16-bit integers.

It truncates what is stored to bfloat16, and in tl.dot multiplies the bits as integers. A comparison of two scalars becomes
integers when it is broadcast, and triton 3.9 takes no such mask.

And a third of its time: a call of one kernel function by another patches triton.language again each time, where once a launch
is enough; types and shapes are made anew for every tensor; and a sum of int32 comes with five operations that ask whether it
overflows, as no test's does.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def _widened(x: interpreter.TensorHandle) -> np.ndarray:
    if x.dtype.scalar == tl.bfloat16:
        return (x.data.astype(np.uint32) << 16).view(np.float32)
    return x.data


def _cast(self: Any, x: interpreter.TensorHandle, to: tl.dtype) -> interpreter.TensorHandle:
    data, to = _widened(x), to.scalar
    if to == tl.bfloat16:
        rounded = torch.from_numpy(np.ascontiguousarray(data)).to(torch.bfloat16)
        return interpreter.TensorHandle(rounded.view(torch.uint16).numpy(), to)
    return interpreter.TensorHandle(data.astype(interpreter._get_np_dtype(to)), to)


def _dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    # rounded once: a product that is taken twice has the same bits on a GPU, and with a BLAS that adds up in fp32 it depends on
    # the machine, and on where in the matrix a number lies
    product = np.matmul(_widened(a), np.ascontiguousarray(_widened(b)), dtype=np.float64).astype(d.data.dtype)
    return interpreter.TensorHandle(product + d.data, d.dtype.scalar)


def _splat(self: Any, block: Any, x: interpreter.TensorHandle) -> interpreter.TensorHandle:
    return interpreter.TensorHandle(np.full(block.shape, x.data, dtype=x.data.dtype), x.dtype.scalar)


_new_block_type = tl.block_type.__init__
_blocks: dict[Any, dict[str, Any]] = {}
_shapes: dict[Any, tuple[Any, Any]] = {}


def _block_type(self: Any, element_ty: tl.dtype, shape: Any) -> None:
    key = (element_ty.name, *(getattr(size, "value", size) for size in shape))
    if key not in _blocks:
        _new_block_type(self, element_ty, shape)
        _blocks[key] = dict(vars(self))
    vars(self).update(_blocks[key])


def _tensor(self: Any, handle: Any, type: tl.dtype) -> None:
    shape = tuple(type.shape) if type.is_block() else ()
    if shape not in _shapes:
        _shapes[shape] = tl.core.tuple([tl.constexpr(size) for size in shape]), tl.constexpr(math.prod(shape))
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _shapes[shape]


_new_np_dtype = interpreter._get_np_dtype
_np_dtypes: dict[str, np.dtype] = {}


def _np_dtype(of: tl.dtype) -> np.dtype:
    if of.name not in _np_dtypes:
        _np_dtypes[of.name] = _new_np_dtype(of)
    return _np_dtypes[of.name]


_broadcast = TritonSemantic.broadcast_impl_value


def _broadcast_unless_equal(self: Any, lhs: tl.tensor, rhs: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    if lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape.values == rhs.type.shape.values:
        return lhs, rhs
    return _broadcast(self, lhs, rhs)


def mend() -> None:
    builder = interpreter.InterpreterBuilder
    builder.cast_impl = _cast
    builder.create_fp_to_fp = lambda self, x, to, rounding_mode: _cast(self, x, to)
    builder.create_dot = _dot
    builder.create_splat = _splat
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    TritonSemantic.broadcast_impl_value = _broadcast_unless_equal
    interpreter._get_np_dtype = _np_dtype
    tl.block_type.__init__, tl.tensor.__init__ = _block_type, _tensor
    patch_language, modules = interpreter._patch_lang, SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    interpreter._patch_lang = lambda kernel: patch_language(modules)
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)
