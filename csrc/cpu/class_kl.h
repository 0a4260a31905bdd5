// class_kl over a tile of pixels: three sweeps over the classes and one over their gradients.
#pragma once

#include "../math/class_kl.h"
#include "pixel_loss.h"

namespace medkd {
namespace MEDKD_ISA {

struct ClassKL {
  static constexpr int terms = 1;
  static constexpr bool uses_target = false;  // the target only says which pixels to leave out

  template <typename A>
  static void tile(const PixelLoss& loss, Tile<A>& tile) {
    const int64_t classes = loss.classes, padded = tile.padded;
    A max_s[max_tile], max_t[max_tile], sum_s[max_tile], sum_t[max_tile], weighted[max_tile];
    for (int64_t p = 0; p < padded; ++p) {
      max_s[p] = max_t[p] = -infinity<A>();
      sum_s[p] = sum_t[p] = weighted[p] = A(0);
    }
    for (int64_t c = 0; c < classes; ++c) {
      const A* __restrict s = tile.student + c * tile.student_ld;
      const A* __restrict t = tile.teacher + c * tile.teacher_ld;
      for (int64_t p = 0; p < padded; ++p) {
        max_s[p] = s[p] > max_s[p] ? s[p] : max_s[p];
        max_t[p] = t[p] > max_t[p] ? t[p] : max_t[p];
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
        const A x_s = s[p] - max_s[p];
        const A x_t = t[p] - max_t[p];
        const A e_s = exp_nonpositive(x_s);
        const A e_t = exp_nonpositive(x_t);
        weighted[p] += weighted_difference(e_t, x_t, x_s);
        sum_s[p] += e_s;
        sum_t[p] += e_t;
        s[p] = e_s;
        t[p] = e_t;
      }
    }

    const A temperature = static_cast<A>(loss.temperature);
    A* __restrict scale_s = max_s;
    A* __restrict scale_t = max_t;
    for (int64_t p = 0; p < padded; ++p) {
      const A weight = tile.weight[p] * temperature;
      const bool valid = tile.label[p] >= 0;
      const A inverse_t = inverse_of_sum(sum_t[p]);
      tile.value[0][p] = valid ? weight * temperature * divergence(sum_s[p], sum_t[p], inverse_t, weighted[p]) : A(0);
      // no class in the teacher: the value is constantly 0
      scale_s[p] = inverse_t == A(0) ? A(0) : weight * inverse_of_sum(sum_s[p]);
      scale_t[p] = weight * inverse_t;
    }
    if (!tile.want_gradient) return;
    for (int64_t c = 0; c < classes; ++c) {
      A* __restrict s = tile.student + c * tile.student_ld;
      const A* __restrict t = tile.teacher + c * tile.teacher_ld;
      for (int64_t p = 0; p < padded; ++p)
        s[p] = tile.label[p] < 0 ? A(0) : s[p] * scale_s[p] - t[p] * scale_t[p];
    }
  }
};

}  // namespace MEDKD_ISA
}  // namespace medkd
