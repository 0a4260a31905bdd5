"""The mathematics of a tile of pixels of class_kl and decoupled_kl (derivation: reference/decoupled_kl.py).

The logits of a tile are a tuple of K tensors [R, M]: M pixels, and class k·R + r in row r of the k-th. With R = 1 a thread
holds all classes of its pixels and no reduction leaves it; with R > 1 the classes are spread over threads as well. Differences
from the maximum are multiplied by log2(e) / τ, so that the exponential is one instruction. A class at −inf in both networks is absent.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def highest(x, K: tl.constexpr, R: tl.constexpr):
    """The largest logit of every pixel, [1, M]; 0 where there is no class."""
    most = x[0]
    for k in tl.static_range(1, K):
        most = tl.maximum(most, x[k])
    if R > 1:
        most = tl.max(most, 0, keep_dims=True)
    return tl.where(most == -float("inf"), 0.0, most)


@triton.jit
def scaled(x, factor):
    """A product that is rounded: fused into a later difference it would leave something where both are equal."""
    return tl.fma(x, tl.zeros_like(x) + factor, tl.zeros_like(x))


@triton.jit
def over_rows(x, R: tl.constexpr):
    if R > 1:
        x = tl.sum(x, 0, keep_dims=True)
    return x


@triton.jit
def target_term(d_s, d_t):
    """KL between the Bernoulli distributions {label, any other class}, and its gradient for d_s, from both log-odds.

    The divergence does not change when both signs flip; with the teacher's made non-positive, both its probability and the
    logarithms keep their relative accuracy in saturation.
    """
    flip = d_t > 0
    s, t = tl.where(flip, -d_s, d_s), tl.where(flip, -d_t, d_t)
    e_s, e_t = tl.exp(-tl.abs(s)), tl.exp(t)
    one_over = 1.0 / (1.0 + e_t)
    b_t = e_t * one_over
    # what the student rules out and the teacher does not is infinitely far, even where the teacher's probability underflows
    ruled_out = (s == -float("inf")) & (t > -float("inf"))
    opposed = (1.0 - b_t) * s + tl.where(b_t > 0, b_t * t, 0.0)
    agreed = tl.where(ruled_out, float("inf"), tl.where(b_t > 0, -b_t * (s - t), 0.0))
    # log((1 + e_s) / (1 + e_t)) as log(1 + z): what rounding 1 + z lost is put back to first order
    z = (e_s - e_t) * one_over
    u = 1.0 + z
    value = tl.where(s > 0, opposed, agreed) + (tl.log(u) + (z - (u - 1.0)) / u)
    gradient = tl.where(s > 0, 1.0, e_s) / (1.0 + e_s) - b_t
    return value, tl.where(flip, -gradient, gradient)


@triton.jit
def divergences(
    s, t, label, label_again, scale, to_base_2, target_weight, nontarget_weight,
    DECOUPLED: tl.constexpr, WANT_GRADIENT: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """The target and the non-target part of every pixel, [1, M], and the gradient for the logits, K times [R, M].

    Not decoupled: no class is the target, the first part is 0. The gradient is that of the two parts weighted, times `scale`
    [1, M]. `label_again` is the label for the gradient: where it was loaded a second time, no register holds, from the first
    comparisons to the last, which class is whose.
    """
    LN2: tl.constexpr = 0.6931471805599453
    rows = tl.arange(0, R)[:, None]
    none = -float("inf")
    if DECOUPLED:
        other_s, other_t = (), ()
        own_s, own_t = tl.zeros_like(s[0]), tl.zeros_like(t[0])
        for k in tl.static_range(K):
            own = rows + k * R == label
            own_s, own_t = tl.where(own, s[k], own_s), tl.where(own, t[k], own_t)
            other_s += (tl.where(own, none, s[k]),)
            other_t += (tl.where(own, none, t[k]),)
        own_s, own_t = over_rows(own_s, R), over_rows(own_t, R)
    else:
        other_s, other_t = s, t

    most_s, most_t = highest(other_s, K, R), highest(other_t, K, R)
    sum_s, sum_t, weighted = tl.zeros_like(s[0]), tl.zeros_like(s[0]), tl.zeros_like(s[0])
    e_s, e_t = (), ()
    for k in tl.static_range(K):
        x_s, x_t = scaled(other_s[k] - most_s, to_base_2), scaled(other_t[k] - most_t, to_base_2)
        e_s += (tl.exp2(x_s),)
        e_t += (tl.exp2(x_t),)
        # what the teacher does not have contributes 0
        weighted += e_t[k] * tl.where(x_t == none, 0.0, x_t - x_s)
        sum_s += e_s[k]
        sum_t += e_t[k]
    sum_s, sum_t, weighted = over_rows(sum_s, R), over_rows(sum_t, R), over_rows(weighted, R)
    log_s, log_t = tl.log(sum_s), tl.log(sum_t)
    one_over_s, one_over_t = 1.0 / sum_s, 1.0 / sum_t
    nontarget = (log_s - log_t) + LN2 * (weighted * one_over_t)
    # what the teacher has and the student has not is infinitely far. Where the teacher's exponential underflows, `weighted` is 0
    # times infinity, no number; so it is where a logit is none, but then the sums are none either
    far = (sum_s + sum_t < float("inf")) & ~(weighted < float("inf"))
    nontarget = tl.where(sum_t == 0, 0.0, tl.where(far, float("inf"), nontarget))
    if DECOUPLED:
        d_s = LN2 * scaled(own_s - most_s, to_base_2) - log_s
        d_t = LN2 * scaled(own_t - most_t, to_base_2) - log_t
        target, v_target = target_term(d_s, d_t)
        v_target *= target_weight
    else:
        target, v_target = tl.zeros_like(nontarget), tl.zeros_like(nontarget)

    gradient = ()
    if WANT_GRADIENT:
        # without any class in the teacher the non-target part is constantly 0
        v_nontarget = tl.where(sum_t == 0, 0.0, nontarget_weight)
        of_s = tl.where(sum_s > 0, (v_nontarget - v_target) * scale * one_over_s, 0.0)
        of_t = tl.where(sum_t > 0, -nontarget_weight * scale * one_over_t, 0.0)
        v_target *= scale
        for k in tl.static_range(K):
            v = e_s[k] * of_s + e_t[k] * of_t
            if DECOUPLED:
                v = tl.where(rows + k * R == label_again, v_target, v)
            gradient += (v,)
    return target, nontarget, gradient
