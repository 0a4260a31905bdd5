#include "pixel_loss_driver.h"

namespace medkd {

static std::tuple<Tensor, Tensor, Tensor> class_kl(
    const Tensor& student,                 // [B, C, *S] or [B, C, *smaller]
    const Tensor& teacher,                 // [B, C, *S]
    const std::optional<Tensor>& target,   // [B, *S], contiguous
    const std::optional<Tensor>& weight,   // [B, *S], contiguous, in the type of the arithmetic
    double temperature, int64_t ignore_index, const std::string& reduction, bool need_gradient) {
  const PixelLossSettings settings{"class_kl", 1, 0, 0, temperature, ignore_index};
  PixelLossOutputs out = pixel_loss(settings, &Loops<float>::class_kl, &Loops<double>::class_kl, student, teacher,
                                    target, weight, reduction, need_gradient);
  return {out.term[0], out.scale, out.gradient};
}

}  // namespace medkd

STABLE_TORCH_LIBRARY_IMPL(medkd_fast, CPU, m) { m.impl("class_kl_cpp", TORCH_BOX(&medkd::class_kl)); }
