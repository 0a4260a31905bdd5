#include "pixel_loss_driver.h"

namespace medkd {

static std::tuple<Tensor, Tensor, Tensor> class_kl(
    const Tensor& student,                 // [B, C, *S] or [B, C, *smaller]
    const Tensor& teacher,                 // [B, C, *S]
    const std::optional<Tensor>& target,   // [B, *S], contiguous: says which pixels to leave out
    const std::optional<Tensor>& weight,   // [B, *S], contiguous, in the type of the arithmetic
    double temperature, int64_t ignore_index, const std::string& reduction, bool need_gradient) {
  const PixelLossSettings settings{0, 1, temperature, ignore_index};
  PixelLossTensors out = pixel_loss<false>(settings, 1, student, teacher, target, weight, reduction, need_gradient);
  return {out.term[0], out.scale, out.gradient};
}

}  // namespace medkd

MEDKD_IMPLEMENTS { m.impl("class_kl_cuda", TORCH_BOX(&medkd::class_kl)); }
