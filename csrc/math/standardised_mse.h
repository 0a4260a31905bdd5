// A channel's part of standardised_mse from its sums over pixels. Derivation: medkd_fast/reference/standardised_mse.py.
#pragma once

#include "elementary.h"

namespace medkd {
namespace MEDKD_ISA {

// Times 1 / (number of pixels and channels): the value; the gradient for s is of_s (s - mean_s) + of_t (t - mean_t).
struct StandardisedChannel {
  double value, of_s, of_t, mean_s, mean_t;
};

// What a sum of squares leaves around the mean; 0 where that is rounding, and NaN where a feature is no number.
MEDKD_INLINE double around_mean(double square, double sum, double number) {
  const double around = square - sum * sum / number;
  return around <= 1e-14 * square ? 0.0 : around;
}

MEDKD_INLINE StandardisedChannel standardised_channel(double number, double sum_s, double sum_t, double square_s,
                                                      double square_t, double product) {
  const double degrees = number > 2 ? number - 1 : 1.0;
  const double around_s = around_mean(square_s, sum_s, number), around_t = around_mean(square_t, sum_t, number);
  const bool constant_s = around_s == 0, constant_t = around_t == 0;
  const double root_s = sqrt(around_s / degrees), a = root_s + 1e-6, b = sqrt(around_t / degrees) + 1e-6;
  const double together = constant_s || constant_t ? 0.0 : product - sum_s * sum_t / number;
  const double of_s = 1 / (a * a) - (around_s / a - together / b) / (a * a * degrees * root_s);
  return {around_s / (a * a) + around_t / (b * b) - 2 * together / (a * b), constant_s ? 0.0 : 2 * of_s,
          constant_t ? 0.0 : -2 / (a * b), sum_s / number, sum_t / number};
}

// The same gradient of a pixel, from s and t as they are: exactly 0 for equal networks.
struct StandardisedGradient {
  double of_both, of_t, constant;

  MEDKD_INLINE double at(double s, double t) const { return of_t * (t - s) + (of_both * s + constant); }
};

MEDKD_INLINE StandardisedGradient standardised_gradient_of(double of_s, double of_t, double mean_s, double mean_t,
                                                           double upstream) {
  const double of_both = of_s + of_t;
  return {upstream * of_both, upstream * of_t, -upstream * (of_t * (mean_t - mean_s) + of_both * mean_s)};
}

}  // namespace MEDKD_ISA
}  // namespace medkd
