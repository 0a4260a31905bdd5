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
    const Tensor& coefficients,           // [1 + 4C], double, contiguous
    const Tensor& upstream,               // [], in the type of the arithmetic
    double temperature, int64_t ignore_index) {
  PearsonCall call(student, teacher, target, temperature, ignore_index);
  const Gradient gradient(student);
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
  m.impl("class_pearson_backward_cpp", TORCH_BOX(&medkd::class_pearson_backward));
}
