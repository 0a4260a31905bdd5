#include "../math/class_pearson.h"
#include "pixel_loss_driver.h"

namespace medkd {

struct PearsonCall {
  PixelLoss loss{};
  int64_t block, blocks;  // pixels at a time, and how many times in an image
  std::vector<Tensor> holder;

  PearsonCall(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& target, double temperature,
              int64_t ignore_index) {
    holder.reserve(3);
    loss.images = teacher.size(0);
    loss.classes = teacher.size(1);
    loss.pixels = pixels_of(teacher);
    loss.student = planes_of(student, holder);
    loss.teacher = planes_of(teacher, holder);
    loss.target = target ? target->data_ptr() : nullptr;
    if (target) loss.target_type = type_of(*target);
    loss.temperature = temperature;
    loss.ignore_index = ignore_index;
    block = std::max<int64_t>(65536 / loss.classes / 256 * 256, 256);
    blocks = (loss.pixels + block - 1) / block;
  }

  // visit(range, number of the block)
  template <typename Visit>
  void over_blocks(const Visit& visit) const {
    torch::stable::parallel_for(0, loss.images * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % blocks * block;
        visit(PixelRange{i / blocks, first, std::min(first + block, loss.pixels)}, i);
      }
    });
  }
};

static Tensor class_pearson(
    const Tensor& student,                // [B, C, *S]
    const Tensor& teacher,                // [B, C, *S]
    const std::optional<Tensor>& target,  // [B, *S], contiguous
    double temperature, int64_t ignore_index) {
  const PearsonCall call(student, teacher, target, temperature, ignore_index);
  const bool twice = arithmetic_type(student, teacher) == ScalarType::Double;
  const int64_t size = 2 + 5 * call.loss.classes;
  auto partial = slots<double>(call.loss.images * call.blocks * size);
  call.over_blocks([&](const PixelRange& range, int64_t i) {
    (twice ? loops<double>().class_pearson.sums : loops<float>().class_pearson.sums)(call.loss, range,
                                                                                   partial.data() + i * size);
  });
  Tensor sums = new_like(student, {size}, ScalarType::Double);
  double* total = static_cast<double*>(sums.data_ptr());
  std::fill(total, total + size, 0.0);
  for (std::size_t k = 0; k < partial.size(); ++k) total[k % size] += partial[k];
  return sums;
}

static std::tuple<Tensor, Tensor, Tensor, Tensor> class_pearson_terms(
    const Tensor& sums,  // [2 + 5C], double, contiguous
    double inter_weight, double intra_weight, double temperature, bool single) {
  const int64_t classes = (sums.numel() - 2) / 5;
  const double* in = static_cast<const double*>(sums.data_ptr());
  const double exists = in[0] > 0 ? 1.0 : 0.0, number = std::max(in[0], 1.0), square = temperature * temperature;
  Tensor coefficients = new_like(sums, {1 + 4 * classes}, ScalarType::Double);
  double* out = static_cast<double*>(coefficients.data_ptr());
  out[0] = -square * inter_weight * exists / number;
  double correlations = 0;
  for (int64_t c = 0; c < classes; ++c) {
    const double* of = in + 2 + c;
    const portable::ClassTerms k = portable::class_terms(number, of[0], of[classes], of[2 * classes], of[3 * classes],
                                                         of[4 * classes]);
    const double share = -square * intra_weight / static_cast<double>(classes);
    correlations += k.correlation;
    out[1 + c] = share * k.of_t;
    out[1 + classes + c] = share * k.of_s;
    out[1 + 2 * classes + c] = k.mean_s;
    out[1 + 3 * classes + c] = k.mean_t;
  }
  const double inter = exists - in[1] / number, intra = exists - correlations / static_cast<double>(classes);
  auto term = [&](double value) {
    return single ? scalar<float>(sums, value, ScalarType::Float) : scalar<double>(sums, value, ScalarType::Double);
  };
  return {term(square * (inter_weight * inter + intra_weight * intra)), term(inter), term(intra), coefficients};
}

template <typename A>
static void gradient_of(const PearsonCall& call, const Tensor& coefficients, const Tensor& upstream) {
  const A factor = *static_cast<const A*>(upstream.data_ptr());
  call.over_blocks([&](const PixelRange& range, int64_t) {
    loops<A>().class_pearson.gradient(call.loss, range, static_cast<const double*>(coefficients.data_ptr()), factor);
  });
}

static Tensor class_pearson_backward(
    const Tensor& student,                // [B, C, *S]
    const Tensor& teacher,                // [B, C, *S]
    const std::optional<Tensor>& target,  // [B, *S], contiguous
    const Tensor& coefficients,           // [1 + 4C], double, contiguous, as class_pearson_terms gives them
    const Tensor& upstream,               // [], in the type of the arithmetic
    double temperature, int64_t ignore_index) {
  PearsonCall call(student, teacher, target, temperature, ignore_index);
  const HostGradient gradient(student);
  call.loss.gradient = planes_of(gradient.written, call.holder);
  if (arithmetic_type(student, teacher) == ScalarType::Double)
    gradient_of<double>(call, coefficients, upstream);
  else
    gradient_of<float>(call, coefficients, upstream);
  return gradient.finish();
}

}  // namespace medkd

STABLE_TORCH_LIBRARY_IMPL(medkd_fast, CPU, m) {
  m.impl("class_pearson_cpp", TORCH_BOX(&medkd::class_pearson));
  m.impl("class_pearson_terms_cpp", TORCH_BOX(&medkd::class_pearson_terms));
  m.impl("class_pearson_backward_cpp", TORCH_BOX(&medkd::class_pearson_backward));
}
