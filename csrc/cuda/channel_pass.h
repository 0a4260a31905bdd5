// The passes over the pixels that channel_relation and channel_gram are made of. What is between them is C×C.
#pragma once

#include "../math/channel_relation.h"
#include "images.h"
#include "room.h"
#include "team.h"

namespace medkd {

// The tensors of one call. One network or two; gradient and matrix are those of the backward.
struct ChannelCall {
  ChannelKind kind;
  int64_t images, channels, pixels, networks;
  int64_t rows;  // a row of ones more than channels where they are shifted
  double temperature;
  Planes network[2];
  const uint8_t* mask;  // [B, N] or nullptr
  ScalarType type;      // of the arithmetic
  std::vector<Tensor> holder;

  ChannelCall(const Tensor& student, const Tensor* teacher, const std::optional<Tensor>& mask,
              const std::string& relation, double temperature, ScalarType type);
};

// Left by the forward in memory of the room: everything of [images, networks].
struct ChannelProducts {
  Images counts;
  double* products;  // [images, networks, rows, rows]
  void* shifts;      // [images, networks, channels] in the type of the arithmetic, or nullptr
};

// Takes its memory from the room along with what was asked for before.
ChannelProducts channel_products(const ChannelCall& call, bool mean, Room& room, const Tensor& like, cudaStream_t stream);

// gradient = factor * matrix [images, rows, rows] times the features of the first network. The factors are those of the
// images, at `factor_stride`, or 1.
void channel_gradient(const ChannelCall& call, const Planes& gradient, const void* matrix, const void* factors,
                      int64_t factor_stride, cudaStream_t stream);

}  // namespace medkd
