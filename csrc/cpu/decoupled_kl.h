// decoupled_kl over a tile of pixels: four sweeps over the classes, each exponential computed once.
#pragma once

#include "../math/decoupled_kl.h"
#include "pixel_loss.h"

namespace medkd {
namespace MEDKD_ISA {

struct DecoupledKL {
  static constexpr int terms = 3;
  static constexpr bool uses_target = true;

  template <typename A>
  static void tile(const PixelLoss& loss, Tile<A>& tile) {
    const int64_t classes = loss.classes, padded = tile.padded;
    const int32_t* __restrict label = tile.label;
    A max_s[max_tile], max_t[max_tile], own_s[max_tile], own_t[max_tile];
    A sum_s[max_tile], sum_t[max_tile], weighted[max_tile];
    for (int64_t p = 0; p < padded; ++p) {
      max_s[p] = max_t[p] = -infinity<A>();
      own_s[p] = own_t[p] = A(0);
      sum_s[p] = sum_t[p] = weighted[p] = A(0);
    }
    for (int64_t c = 0; c < classes; ++c) {
      const A* __restrict s = tile.student + c * tile.student_ld;
      const A* __restrict t = tile.teacher + c * tile.teacher_ld;
      for (int64_t p = 0; p < padded; ++p) {
        const bool own = label[p] == static_cast<int32_t>(c);
        const A other_s = own ? -infinity<A>() : s[p];
        const A other_t = own ? -infinity<A>() : t[p];
        max_s[p] = other_s > max_s[p] ? other_s : max_s[p];
        max_t[p] = other_t > max_t[p] ? other_t : max_t[p];
        own_s[p] = own ? s[p] : own_s[p];
        own_t[p] = own ? t[p] : own_t[p];
      }
    }
    for (int64_t p = 0; p < padded; ++p) {
      max_s[p] = max_s[p] == -infinity<A>() ? A(0) : max_s[p];
      max_t[p] = max_t[p] == -infinity<A>() ? A(0) : max_t[p];
    }
    for (int64_t c = 0; c < classes; ++c) {
      A* __restrict s = tile.student + c * tile.student_ld;
      A* __restrict t = tile.teacher + c * tile.teacher_ld;
      for (int64_t p = 0; p < padded; ++p) {
        const bool own = label[p] == static_cast<int32_t>(c);
        const A x_s = s[p] - max_s[p];
        const A x_t = t[p] - max_t[p];
        const A e_s = own ? A(0) : exp_nonpositive(x_s);
        const A e_t = own ? A(0) : exp_nonpositive(x_t);
        weighted[p] += own ? A(0) : weighted_difference(e_t, x_t, x_s);
        sum_s[p] += e_s;
        sum_t[p] += e_t;
        s[p] = e_s;
        t[p] = e_t;
      }
    }

    const A target_weight = static_cast<A>(loss.target_weight);
    const A nontarget_weight = static_cast<A>(loss.nontarget_weight);
    const A temperature = static_cast<A>(loss.temperature);
    A* __restrict own_gradient = max_s;  // from here on the maxima and own logits are not needed
    A* __restrict scale_s = max_t;
    A* __restrict scale_t = weighted;
    for (int64_t p = 0; p < padded; ++p) {
      const A d_s = (own_s[p] - max_s[p]) - log_nonnegative(sum_s[p]);
      const A d_t = (own_t[p] - max_t[p]) - log_nonnegative(sum_t[p]);
      const TargetTerm<A> target = target_term(d_s, d_t, A(1), [](A x) { return exp_nonpositive(x); });
      const A inverse_s = inverse_of_sum(sum_s[p]), inverse_t = inverse_of_sum(sum_t[p]);
      const A nontarget = divergence(sum_s[p], sum_t[p], inverse_t, weighted[p]);
      const A weight = tile.weight[p] * temperature;
      const bool valid = label[p] >= 0;
      // a part of weight 0 is left out, even an infinite one
      const A total = (target_weight == A(0) ? A(0) : target_weight * target.value) +
                      (nontarget_weight == A(0) ? A(0) : nontarget_weight * nontarget);
      tile.value[0][p] = valid ? weight * temperature * total : A(0);
      tile.value[1][p] = valid ? weight * temperature * target.value : A(0);
      tile.value[2][p] = valid ? weight * temperature * nontarget : A(0);
      const Coefficients<A> k =
          decoupled_coefficients(inverse_s, inverse_t, target.gradient, target_weight, nontarget_weight, weight);
      own_gradient[p] = k.target;
      scale_s[p] = k.student;
      scale_t[p] = k.teacher;
    }
    if (!tile.want_gradient) return;
    for (int64_t c = 0; c < classes; ++c) {
      A* __restrict s = tile.student + c * tile.student_ld;
      const A* __restrict t = tile.teacher + c * tile.teacher_ld;
      for (int64_t p = 0; p < padded; ++p) {
        const A other = s[p] * scale_s[p] + t[p] * scale_t[p];
        const A any = label[p] == static_cast<int32_t>(c) ? own_gradient[p] : other;
        s[p] = label[p] < 0 ? A(0) : any;
      }
    }
  }
};

}  // namespace MEDKD_ISA
}  // namespace medkd
