// A channel's part of standardised_mse from its sums over pixels. Derivation: medkd_fast/reference/standardised_mse.py.
#pragma once

#include "elementary.h"

namespace medkd {
namespace MEDKD_ISA {

// Times 1 / (number of pixels and channels): the value; the gradient for s is of_s (s - mean_s) + of_t (t - mean_t).
struct StandardisedChannel {
  double value, of_s, of_t, mean_s, mean_t;
};

// What a sum of squares leaves around the mean; 0 where that is rounding.
MEDKD_INLINE double around_mean(double square, double sum, double number) {
  const double around = square - sum * sum / number;
  return around > 1e-14 * square ? around : 0.0;
}

MEDKD_INLINE StandardisedChannel standardised_channel(double number, double sum_s, double sum_t, double square_s,
                                                      double square_t, double product) {
  const double degrees = number > 2 ? number - 1 : 1.0;
  const double around_s = around_mean(square_s, sum_s, number), around_t = around_mean(square_t, sum_t, number);
  const double root_s = sqrt(around_s / degrees), a = root_s + 1e-6, b = sqrt(around_t / degrees) + 1e-6;
  const double together = around_s > 0 && around_t > 0 ? product - sum_s * sum_t / number : 0.0;
  const double through_a = around_s > 0 ? (around_s / a - together / b) / (a * a * degrees * root_s) : 0.0;
  return {around_s / (a * a) + around_t / (b * b) - 2 * together / (a * b), 2 * (1 / (a * a) - through_a), -2 / (a * b),
          sum_s / number, sum_t / number};
}

}  // namespace MEDKD_ISA
}  // namespace medkd
