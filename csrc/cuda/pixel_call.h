// What pixel_relation's divergences have in common: the tensors of a call, and the norms of their pixels.
#pragma once

#include <algorithm>

#include "images.h"
#include "pixel_norms.h"

namespace medkd {

struct PixelCall {
  int64_t images, channels, teacher_channels, widest, pixels;
  PixelRows kind;
  Planes student, teacher;
  const uint8_t* mask;  // [B, N] or nullptr
  ScalarType type;      // of the arithmetic
  std::vector<Tensor> holder;

  PixelCall(const Tensor& student_, const Tensor& teacher_, const std::optional<Tensor>& mask_,
            const std::string& relation)
      : images(student_.size(0)),
        channels(student_.size(1)),
        teacher_channels(teacher_.size(1)),
        widest(std::max(channels, teacher_channels)),
        pixels(pixels_of(student_)),
        kind(pixel_rows_of(relation)),
        mask(mask_ ? static_cast<const uint8_t*>(mask_->data_ptr()) : nullptr),
        type(arithmetic_type(student_, teacher_)) {
    holder.reserve(3);
    student = planes_of(student_, holder);
    teacher = planes_of(teacher_, holder);
  }
};

template <typename A>
struct NormMemory {
  A *mean_s = nullptr, *inverse_s = nullptr, *mean_t = nullptr, *inverse_t = nullptr;
  int64_t* valid = nullptr;

  void ask(Room& room, const PixelCall& call) {
    ask_norms(room, call.images, call.pixels, call.kind, mean_s, inverse_s);
    ask_norms(room, call.images, call.pixels, call.kind, mean_t, inverse_t);
    if (call.mask != nullptr) room.ask(valid, call.images);
  }

  // When the memory has been taken.
  Images count(const PixelCall& call, bool mean, cudaStream_t stream) const {
    if (valid != nullptr) count_valid(call.mask, call.images, call.pixels, valid, stream);
    return {valid, call.images, call.pixels, mean};
  }
  Normalised<A> student(const PixelCall& call, cudaStream_t stream) const {
    return find_norms(call.student, call.images, call.channels, call.pixels, call.mask, call.kind, mean_s, inverse_s,
                      stream);
  }
  Normalised<A> teacher(const PixelCall& call, cudaStream_t stream) const {
    return find_norms(call.teacher, call.images, call.teacher_channels, call.pixels, call.mask, call.kind, mean_t,
                      inverse_t, stream);
  }
};

}  // namespace medkd
