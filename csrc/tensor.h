// Between torch's stable tensors and the plain data of the kernels.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "types.h"

namespace medkd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Double: return Type::float64;
    case ScalarType::Float: return Type::float32;
    case ScalarType::BFloat16: return Type::bfloat16;
    case ScalarType::Half: return Type::float16;
    case ScalarType::Long: return Type::int64;
    case ScalarType::Int: return Type::int32;
    case ScalarType::Short: return Type::int16;
    case ScalarType::Char: return Type::int8;
    case ScalarType::Byte: return Type::uint8;
    case ScalarType::Bool: return Type::boolean;
    default: throw std::runtime_error("medkd_fast: a tensor of a type that no kernel takes");
  }
}

// Arithmetic is double as soon as one input is.
inline ScalarType arithmetic_type(const Tensor& student, const Tensor& teacher) {
  const bool twice = student.scalar_type() == ScalarType::Double || teacher.scalar_type() == ScalarType::Double;
  return twice ? ScalarType::Double : ScalarType::Float;
}

inline int64_t pixels_of(const Tensor& x, int64_t first_dim = 2) {
  int64_t pixels = 1;
  for (int64_t d = first_dim; d < x.dim(); ++d) pixels *= x.size(d);
  return pixels;
}

// The stride from pixel to pixel when the spatial dimensions lie one after another in memory, else 0.
inline int64_t pixel_stride(const Tensor& x) {
  int64_t stride = 0, expected = 0;
  for (int64_t d = x.dim() - 1; d >= 2; --d) {
    if (x.size(d) == 1) continue;
    if (stride == 0) stride = expected = x.stride(d);
    if (x.stride(d) != expected || expected == 0) return 0;
    expected *= x.size(d);
  }
  return stride == 0 ? 1 : stride;
}

// x [B, C, *S] as planes. Contiguous and channels_last tensors are taken as they lie; a crop or another layout whose
// pixels have no single stride is copied into `holder`, which must outlive the planes.
inline Planes planes_of(const Tensor& x, std::vector<Tensor>& holder) {
  holder.push_back(pixel_stride(x) == 0 ? torch::stable::contiguous(x) : x);
  const Tensor& kept = holder.back();
  return {kept.data_ptr(), type_of(kept), kept.stride(0), kept.stride(1), pixel_stride(kept)};
}

// A contiguous tensor on the device of x. By the shim: torch::stable::new_empty has the dispatcher look for the operator by
// its name, and boxes every argument.
inline Tensor new_like(const Tensor& x, const std::vector<int64_t>& size, ScalarType type) {
  std::vector<int64_t> strides(size.size());
  int64_t stride = 1;
  for (std::size_t d = size.size(); d-- > 0; stride *= std::max<int64_t>(size[d], 1)) strides[d] = stride;
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(size.size()), size.data(), strides.data(),
                                                  torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
                                                  device_type, x.get_device_index(), &made));
  return Tensor(made);
}

inline Tensor as_contiguous(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

inline std::vector<int64_t> sizes_of(const Tensor& x) { return {x.sizes().begin(), x.sizes().end()}; }

// A gradient laid out as x, and the planes that a kernel writes: its own, or, where x's pixels have no single stride, those
// of a contiguous tensor that is copied over in the end.
struct Gradient {
  Tensor result, written;

  explicit Gradient(const Tensor& x)
      : result(x.is_contiguous() ? new_like(x, sizes_of(x), x.scalar_type()) : torch::stable::empty_like(x)),
        written(result) {
    if (pixel_stride(result) == 0) written = new_like(x, sizes_of(x), x.scalar_type());
  }

  Tensor finish() const {
    if (written.get() != result.get()) {
      Tensor target = result;
      torch::stable::copy_(target, written);
    }
    return result;
  }
};

}  // namespace medkd
