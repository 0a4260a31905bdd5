"""Triton's interpreter, mended where it is not what a GPU does: bfloat16, which it keeps as 16-bit integers.

It truncates what is stored to bfloat16, and in tl.dot multiplies the bits as integers. A comparison of two scalars becomes
integers when it is broadcast, and triton 3.9 takes no such mask. And a call of one kernel function by another patches
triton.language again each time, a third of its time, where once a launch is enough.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl
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


def mend() -> None:
    builder = interpreter.InterpreterBuilder
    builder.cast_impl = _cast
    builder.create_fp_to_fp = lambda self, x, to, rounding_mode: _cast(self, x, to)
    builder.create_dot = _dot
    builder.create_splat = _splat
    patch_language, modules = interpreter._patch_lang, SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    interpreter._patch_lang = lambda kernel: patch_language(modules)
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)
