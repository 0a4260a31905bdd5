// Who works on the C×C mathematics of an image: a team shares out the rows, and the lanes that have a row share out its
// entries. On the device a block is a team (csrc/cuda/team.h).
#pragma once

#include "elementary.h"

namespace medkd {
namespace MEDKD_ISA {

// A thread of the CPU.
struct Alone {
  static constexpr int64_t first_row = 0, row_step = 1, lane = 0, lanes = 1;
  static double sum(double x) { return x; }   // over the lanes that have the row, in each of them
  static double most(double x) { return x; }  // likewise
  static void wait() {}                       // until the whole team has come
};

}  // namespace MEDKD_ISA
}  // namespace medkd
