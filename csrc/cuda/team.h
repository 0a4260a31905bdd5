// A block as a team (csrc/math/team.h).
#pragma once

#include "../math/team.h"
#include "launch.h"

namespace medkd {

// A warp takes a row.
struct BlockTeam {
  int64_t first_row = warp_index(), row_step = blockDim.x / warp_size, lane = lane_index(), lanes = warp_size;
  __device__ __forceinline__ double sum(double x) const { return warp_sum(x); }
  __device__ __forceinline__ double most(double x) const { return warp_max(x); }
  __device__ __forceinline__ void wait() const { __syncthreads(); }
};

}  // namespace medkd
