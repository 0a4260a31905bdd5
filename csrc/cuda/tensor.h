// Tensors of the GPU: their device, their stream, and memory that stays there.
//
// The operator tests also compile the sources for the host, with USE_CUDA undefined: tests/cuda_host.
#pragma once

#include "../tensor.h"
#include "launch.h"

#if defined(USE_CUDA)
#include <torch/csrc/stable/accelerator.h>
#define MEDKD_DISPATCH_KEY CUDA
#else
#define MEDKD_DISPATCH_KEY CPU
#endif

// The operators of this backend: MEDKD_IMPLEMENTS { m.impl("class_kl_cuda", TORCH_BOX(&medkd::class_kl)); }
#define MEDKD_IMPLEMENTS STABLE_TORCH_LIBRARY_IMPL(medkd_fast, MEDKD_DISPATCH_KEY, m)

namespace medkd {

// While this lives, x's device is the current one; kernels go to that device's current stream.
class OnDevice {
 public:
#if defined(USE_CUDA)
  explicit OnDevice(const Tensor& x) : guard_(x.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
#else
  explicit OnDevice(const Tensor&) {}
#endif

  cudaStream_t stream() const { return stream_; }

 private:
#if defined(USE_CUDA)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  cudaStream_t stream_ = nullptr;
};

}  // namespace medkd
