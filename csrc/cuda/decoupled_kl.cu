#include "pixel_loss_driver.h"

namespace medkd {

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> decoupled_kl(
    const Tensor& student,                 // [B, C, *S] or [B, C, *smaller]
    const Tensor& teacher,                 // [B, C, *S]
    const Tensor& target,                  // [B, *S], contiguous
    const std::optional<Tensor>& weight,   // [B, *S], contiguous, in the type of the arithmetic
    double target_weight, double nontarget_weight, double temperature, int64_t ignore_index,
    const std::string& reduction, bool need_gradient) {
  const PixelLossSettings settings{target_weight, nontarget_weight, temperature, ignore_index};
  PixelLossTensors out = pixel_loss<true>(settings, 3, student, teacher, target, weight, reduction, need_gradient);
  return {out.term[0], out.term[1], out.term[2], out.scale, out.gradient};
}

}  // namespace medkd

MEDKD_IMPLEMENTS { m.impl("decoupled_kl_cuda", TORCH_BOX(&medkd::decoupled_kl)); }
