"""What code that is being compiled cannot see in a tensor: whether torch.func takes derivatives of it."""

from __future__ import annotations

import torch


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def differentiated() -> bool:
    """Whether what is compiled is inside torch.func.grad or the like."""
    transforms = torch._C._functorch.get_interpreter_stack() or ()
    return any(transform.key() != torch._C._functorch.TransformType.Vmap for transform in transforms)
