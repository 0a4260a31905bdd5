// Memory that a call needs beside its outputs, in one allocation.
#pragma once

#include <vector>

#include "tensor.h"

namespace medkd {

class Room {
 public:
  // `where` gets its address from take().
  template <typename T>
  void ask(T*& where, int64_t count) {
    wanted_.push_back({reinterpret_cast<void**>(&where), bytes_});
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
  }

  void take(const Tensor& like) {
    memory_.emplace_back(new_like(like, {bytes_}, ScalarType::Byte));
    unsigned char* start = static_cast<unsigned char*>(memory_.back().data_ptr());
    for (const Wanted& each : wanted_) *each.where = start + each.at;
    wanted_.clear();
    bytes_ = 0;
  }

 private:
  struct Wanted {
    void** where;
    int64_t at;
  };
  std::vector<Wanted> wanted_;
  std::vector<Tensor> memory_;
  int64_t bytes_ = 0;
};

}  // namespace medkd
