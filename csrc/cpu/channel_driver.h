// What channel_relation and channel_gram share: the features that their relation multiplies, and those products.
#pragma once

#include "../math/channel_relation.h"
#include "relation_driver.h"

namespace medkd {

using portable::ChannelKind;

struct ChannelCall : RelationCall {
  ChannelKind kind;
  double temperature;      // of the softmax over pixels, or of that over a relation's rows
  int64_t channels, rows;  // a row more than channels where they are shifted

  ChannelCall(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& mask,
              const std::string& relation_name, double temperature)
      : RelationCall(student, teacher, mask),
        kind(portable::kind_named(relation_name)),
        temperature(temperature),
        channels(relation.student_channels),
        rows(channels + (portable::is_shifted(kind) ? 1 : 0)) {
    relation.features = kind == ChannelKind::pearson   ? Features::centred
                        : kind == ChannelKind::softmax ? Features::exponential
                                                       : Features::plain;
    relation.inverse_temperature = 1 / temperature;
  }
};

// What the channels of x are shifted by, [B, C]; empty where they are not.
template <typename A>
std::vector<A> channel_shifts(const ChannelCall& call, const Planes& x, const std::vector<int64_t>& valid) {
  if (!portable::is_shifted(call.kind)) return {};
  const ChannelLoops<A>& channel = loops<A>().channel_relation;
  const int64_t images = call.images, channels = call.channels, pixels = call.relation.pixels;
  std::vector<A> shifts(images * channels);
  if (call.kind == ChannelKind::pearson) {
    torch::stable::parallel_for(0, images, grain(64 * 16 * channels), [&](int64_t begin, int64_t end) {
      for (int64_t image = begin; image < end; ++image)
        channel.sample_mean(call.relation, x, image, valid[image], shifts.data() + image * channels);
    });
    return shifts;
  }
  constexpr int64_t part = 4096;
  const int64_t block = std::clamp<int64_t>((1 << 15) / channels / 64 * 64, 64, 1024);
  const int64_t parts = std::max<int64_t>(ceil_div(pixels, part), 1);
  std::vector<A> highest(images * parts * channels);
  torch::stable::parallel_for(0, images * parts, grain(part * channels), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % parts * part, last = std::min(first + part, pixels);
      channel.highest(call.relation, x, {task / parts, first, last, block, 0, 0}, highest.data() + task * channels);
    }
  });
  for (int64_t image = 0; image < images; ++image)
    for (int64_t c = 0; c < channels; ++c) {
      A& shift = shifts[image * channels + c] = highest[image * parts * channels + c];
      for (int64_t k = 1; k < parts; ++k) shift = std::max(shift, highest[(image * parts + k) * channels + c]);
    }
  return shifts;
}

// The last row of a matrix [C + 1, C + 1] for the backward.
template <typename S, typename A>
void end_with_shift(const S* shift, int64_t channels, A* matrix) {
  A* row = matrix + channels * (channels + 1);
  std::transform(shift, shift + channels, row, [](S x) { return static_cast<A>(x); });
  row[channels] = 0;
}

// In channel_relation.cpp, as operators.
std::tuple<Tensor, Tensor> channel_relation(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& mask,
                                            const std::string& relation, const std::string& divergence, double temperature,
                                            const std::string& reduction);
Tensor channel_relation_backward(const Tensor& student, const std::optional<Tensor>& mask, const Tensor& matrix,
                                 const Tensor& upstream, const std::string& relation, double temperature);

inline double pixels_that_count(int64_t valid) { return static_cast<double>(std::max<int64_t>(valid, 1)); }

}  // namespace medkd
