"""The images of pixel_relation: how many pixels of each count, its weight in the loss, and the loss from all values.

Made on the device, in double and in a fixed order, so that nothing waits for the mask to be counted.
"""

import torch
import triton
import triton.language as tl


def pixels_of(x: torch.Tensor) -> int:
    return x.shape[2:].numel()


@triton.jit
def image_pixels(pixels, i_b, N, HAS_MASK: tl.constexpr):
    """Pixels of an image that count, in double."""
    return (tl.load(pixels + i_b) if HAS_MASK else tl.full((), N, tl.int64)).to(tl.float64)


@triton.jit
def image_weight(pixels, i_b, B, N, HAS_MASK: tl.constexpr, MEAN: tl.constexpr):
    """What an image's value is multiplied by in the loss: 1, or 1 / the images that count; 0 for those that do not."""
    counted = tl.full((), B, tl.int32)
    if HAS_MASK and MEAN:
        counted = tl.full((), 0, tl.int32)
        for b in range(0, B, 128):
            o_b = b + tl.arange(0, 128)
            counted += tl.sum((tl.load(pixels + o_b, o_b < B, 0) > 0).to(tl.int32))
    weight = 1.0 / tl.maximum(counted, 1).to(tl.float64) if MEAN else tl.full((), 1.0, tl.float64)
    return tl.where(image_pixels(pixels, i_b, N, HAS_MASK) > 0, weight, 0.0)


@triton.jit
def image_share(pixels, i_b, B, N, HAS_MASK: tl.constexpr, MEAN: tl.constexpr):
    """An image's weight over its pixels."""
    count = image_pixels(pixels, i_b, N, HAS_MASK)
    return image_weight(pixels, i_b, B, N, HAS_MASK, MEAN) / tl.maximum(count, 1.0)


@triton.jit(do_not_specialize=["B", "N", "count", "blocks"])
def add_values_kernel(
    values,  # [B or B², blocks], double
    pixels,  # [B]
    loss,  # [], [B] or [B, B]
    B,
    N,
    count,  # of values, for each program
    blocks,
    OF: tl.constexpr,
    ACROSS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * count
    total = tl.full((), 0.0, tl.float64)
    for i in range(first, first + count):
        value = tl.zeros([BLOCK], tl.float64)
        for k in range(0, blocks, BLOCK):
            o_k = k + tl.arange(0, BLOCK)
            value += tl.load(values + i * blocks + o_k, o_k < blocks, 0.0)
        scale = tl.full((), 1.0, tl.float64)
        if OF != "weighed":
            i_a = i // B if ACROSS else i
            i_b = i % B if ACROSS else i
            scale = image_share(pixels, i_a, B, N, HAS_MASK, MEAN)
            if OF == "entries":
                scale = scale / tl.maximum(image_pixels(pixels, i_b, N, HAS_MASK), 1.0)
            if ACROSS:
                scale *= image_weight(pixels, i_b, B, N, HAS_MASK, MEAN)
        total += tl.sum(value) * scale
    tl.store(loss + tl.program_id(0), total.to(loss.dtype.element_ty))


def add_values(
    values: torch.Tensor,
    pixels: torch.Tensor | None,
    loss: torch.Tensor,
    B: int,
    N: int,
    of: str,
    across_images: bool,
    HAS_MASK: bool,
    MEAN: bool,
) -> None:
    """The loss from sums [images or pairs, blocks] over the "entries" of the relation's matrix or over its "rows", or from
    sums that are "weighed" already."""
    each = loss.dim() > 0
    items = 1 if of == "weighed" else B * B if across_images else B
    add_values_kernel[(items if each else 1,)](
        values,
        pixels,
        loss,
        B,
        N,
        1 if each else items,
        values.shape[1],
        OF=of,
        ACROSS=across_images,
        HAS_MASK=HAS_MASK,
        MEAN=MEAN,
        BLOCK=min(max(triton.next_power_of_2(values.shape[1]), 16), 1024),
    )
