#include <algorithm>

#include "tensor.h"

namespace medkd {

template <typename A>
static void scale_in_place(const Tensor& gradient, double factor) {
  constexpr int64_t block = 1 << 16;
  char* values = static_cast<char*>(gradient.data_ptr());
  const int64_t count = gradient.numel(), size = static_cast<int64_t>(gradient.element_size());
  const Type type = type_of(gradient);
  torch::stable::parallel_for(0, (count + block - 1) / block, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * block, last = std::min(end * block, count);
    loops<A>().scale(values + first * size, type, last - first, static_cast<A>(factor));
  });
}

static double item(const Tensor& x) {
  return type_of(x) == Type::float64 ? *static_cast<const double*>(x.data_ptr())
                                     : static_cast<double>(*static_cast<const float*>(x.data_ptr()));
}

static void scale_gradient(Tensor gradient,          // dense, any layout
                           const Tensor& upstream,   // [], gradient that arrives for the loss
                           const Tensor& scale) {    // []
  const double factor = item(upstream) * item(scale);
  if (type_of(gradient) == Type::float64)
    scale_in_place<double>(gradient, factor);
  else
    scale_in_place<float>(gradient, factor);
}

static std::string instruction_set() { return loop_table().name; }

}  // namespace medkd

STABLE_TORCH_LIBRARY_IMPL(medkd_fast, CPU, m) { m.impl("scale_gradient_cpp", TORCH_BOX(&medkd::scale_gradient)); }
// The instruction set that the CPU loops were chosen for.
STABLE_TORCH_LIBRARY_FRAGMENT(medkd_fast, m) { m.def("instruction_set() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(medkd_fast, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&medkd::instruction_set));
}
