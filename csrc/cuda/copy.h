// Copies of 16 bytes from global to shared memory that run while the thread goes on. Those since the last commit are a
// group; wait<n> returns when all of the thread's groups but the last n have arrived.
#pragma once

#include "launch.h"

namespace medkd {

template <typename A>
__device__ __forceinline__ void copy_pack(A* to, const A* from) {
#if MEDKD_DEVICE_CODE
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
#else
  store_pack(to, load_pack<pack_of<A>>(from));
#endif
}

__device__ __forceinline__ void commit_copies() {
#if MEDKD_DEVICE_CODE
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int groups>
__device__ __forceinline__ void wait_for_copies() {
#if MEDKD_DEVICE_CODE
  asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
#endif
}

}  // namespace medkd
