"""The mathematics of a tile of pixels of class_kl and decoupled_kl (derivation: reference/decoupled_kl.py).

The logits of a tile are a tuple of K tensors [R, M]: M pixels, and class k·R + r in row r of the k-th. With R = 1 a thread
holds all classes of its pixels and no reduction leaves it; with R > 1 the classes are spread over threads as well. Logits come
multiplied by log2(e) / τ, so that an exponential is one instruction. A class at −inf in both networks is absent.
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
def over_rows(x, R: tl.constexpr):
    if R > 1:
        x = tl.sum(x, 0, keep_dims=True)
    return x


@triton.jit
def log1p_unit(x):
    """log(1 + x) for x in [0, 1]: what rounding 1 + x lost is put back to first order."""
    u = 1.0 + x
    return tl.log(u) + (x - (u - 1.0)) / u


@triton.jit
def target_term(d_s, d_t):
    """KL between the Bernoulli distributions {label, any other class}, and its gradient for d_s, from both log-odds.

    The divergence does not change when both signs flip; with the teacher's made non-positive, both its probability and the
    logarithms keep their relative accuracy in saturation.
    """
    flip = d_t > 0
    s, t = tl.where(flip, -d_s, d_s), tl.where(flip, -d_t, d_t)
    e_s, e_t = tl.exp(-tl.abs(s)), tl.exp(t)
    b_t = e_t / (1.0 + e_t)
    # what the student rules out and the teacher does not is infinitely far, even where the teacher's probability underflows
    ruled_out = (s == -float("inf")) & (t > -float("inf"))
    opposed = (1.0 - b_t) * s + tl.where(b_t > 0, b_t * t, 0.0)
    agreed = tl.where(ruled_out, float("inf"), tl.where(b_t > 0, -b_t * (s - t), 0.0))
    value = tl.where(s > 0, opposed, agreed) + (log1p_unit(e_s) - log1p_unit(e_t))
    gradient = tl.where(s > 0, 1.0, e_s) / (1.0 + e_s) - b_t
    return value, tl.where(flip, -gradient, gradient)


@triton.jit
def divergences(
    s, t, label, scale, target_weight, nontarget_weight,
    DECOUPLED: tl.constexpr, WANT_GRADIENT: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """The target and the non-target part of every pixel, [1, M], and the gradient for the logits, K times [R, M].

    Not decoupled: no class is the target, the first part is 0. The gradient is that of the two parts weighted, times `scale`
    [1, M].
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
    furthest = tl.zeros_like(s[0])
    e_s, e_t = (), ()
    for k in tl.static_range(K):
        x_s, x_t = other_s[k] - most_s, other_t[k] - most_t
        e_s += (tl.exp2(x_s),)
        e_t += (tl.exp2(x_t),)
        # what the teacher does not have contributes 0; what it has and the student has not is infinitely far, and that shows
        # in `furthest` where the teacher's exponential underflows and the product is no number
        difference = tl.where(x_t == none, 0.0, x_t - x_s)
        furthest = tl.maximum(furthest, difference)
        weighted += e_t[k] * difference
        sum_s += e_s[k]
        sum_t += e_t[k]
    sum_s, sum_t, weighted = over_rows(sum_s, R), over_rows(sum_t, R), over_rows(weighted, R)
    if R > 1:
        furthest = tl.max(furthest, 0, keep_dims=True)
    nontarget = tl.log(sum_s / sum_t) + LN2 * (weighted / sum_t)
    nontarget = tl.where(furthest == float("inf"), float("inf"), nontarget)
    nontarget = tl.where(sum_t == 0, 0.0, nontarget)
    if DECOUPLED:
        d_s = LN2 * (own_s - most_s) - tl.log(sum_s)
        d_t = LN2 * (own_t - most_t) - tl.log(sum_t)
        target, v_target = target_term(d_s, d_t)
        v_target *= target_weight
    else:
        target, v_target = tl.zeros_like(nontarget), tl.zeros_like(nontarget)

    gradient = ()
    if WANT_GRADIENT:
        # without any class in the teacher the non-target part is constantly 0
        v_nontarget = tl.where(sum_t == 0, 0.0, nontarget_weight)
        of_s = (v_nontarget - v_target) * tl.where(sum_s > 0, scale / sum_s, 0.0)
        of_t = -nontarget_weight * tl.where(sum_t > 0, scale / sum_t, 0.0)
        for k in tl.static_range(K):
            v = e_s[k] * of_s + e_t[k] * of_t
            if DECOUPLED:
                v = tl.where(rows + k * R == label, scale * v_target, v)
            gradient += (v,)
    return target, nontarget, gradient
