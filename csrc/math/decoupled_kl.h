// The mathematics of one pixel of the decoupled KL divergence (derivation: medkd_fast/reference/decoupled_kl.py).
//
// Logits arrive divided by the temperature and shifted by their own maximum over the non-target classes, so every
// exponential is at most 1. Student is _s, teacher is _t.
#pragma once

#include "elementary.h"

namespace medkd {
namespace MEDKD_ISA {

// One class's contribution e_t (x_t - x_s) to the numerator of KL(teacher, student). A class that the teacher does not
// have contributes 0; one that the teacher has and the student has not makes it infinite, or, where the teacher's exponential
// underflows, no number.
template <typename A>
MEDKD_INLINE A weighted_difference(A e_t, A x_t, A x_s) {
  return e_t * at_least(x_t - x_s, A(-3e38));
}

// 1 / x, and 0 where a sum of exponentials has no class.
template <typename A>
MEDKD_INLINE A inverse_of_sum(A x) {
  return x > A(0) ? near_reciprocal(x) : A(0);
}

// KL(teacher, student) over a set of classes from the two sums of exponentials and the summed weighted differences.
// No class in the set: 0.
template <typename A>
MEDKD_INLINE A divergence(A sum_s, A sum_t, A inverse_t, A weighted) {
  const A sum = log_of_quotient(sum_s, sum_t) + weighted * inverse_t;
  // infinite, unless a logit is no number; then the sums are none either
  const A finite = weighted < infinity<A>() ? sum : infinity<A>() + (sum_s + sum_t);
  return sum_t == A(0) ? A(0) : finite;
}

template <typename A>
struct TargetTerm {
  A value;     // KL between the Bernoulli distributions {target, not target}
  A gradient;  // with respect to the student's log-odds: b_s - b_t
};

// d = logit of the target minus logsumexp of the others, in multiples of `unit`, of which exp gives the exponential. The
// divergence does not change when both signs flip; with the teacher's made non-positive, both its probability and the
// logarithms keep their relative accuracy in saturation.
template <typename A, typename Exp>
MEDKD_INLINE TargetTerm<A> target_term(A d_s, A d_t, A unit, const Exp& exp) {
  const bool flip = d_t > A(0);
  const A s = flip ? -d_s : d_s;
  const A t = flip ? -d_t : d_t;
  const A e_s = exp(-absolute(s));
  const A e_t = exp(t);
  const A b_t = e_t * near_reciprocal(A(1) + e_t);
  const A b_s = (s > A(0) ? A(1) : e_s) * near_reciprocal(A(1) + e_s);
  const A lowest = A(-3e38);  // times a probability of 0 it is 0
  const A near_t = at_least(t, lowest);
  const A opposed = (A(1) - b_t) * s + b_t * near_t;
  // what the student rules out and the teacher does not is infinitely far, even where the teacher's probability underflows
  const bool ruled_out = s == -infinity<A>() && t > -infinity<A>();
  const A agreed = ruled_out ? infinity<A>() : b_t * (near_t - at_least(s, lowest));
  const A gradient = b_s - b_t;
  return {unit * (s > A(0) ? opposed : agreed) + log_of_shares(e_s, e_t), flip ? -gradient : gradient};
}

template <typename A>
struct Coefficients {
  A target;   // gradient of the target's logit
  A student;  // gradient of another class's logit: student * e_s + teacher * e_t
  A teacher;
};

// `scale` is the pixel's weight times the temperature (temperature^2 of the loss over temperature of the chain rule).
template <typename A>
MEDKD_INLINE Coefficients<A> decoupled_coefficients(A inverse_s, A inverse_t, A target_gradient, A target_weight,
                                                    A nontarget_weight, A scale) {
  const A nontarget = inverse_t == A(0) ? A(0) : nontarget_weight;  // no class in the teacher: that part is constantly 0
  return {scale * target_weight * target_gradient, scale * (nontarget - target_weight * target_gradient) * inverse_s,
          -scale * nontarget_weight * inverse_t};
}

}  // namespace MEDKD_ISA
}  // namespace medkd
