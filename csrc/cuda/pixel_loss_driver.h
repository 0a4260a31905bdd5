// Chooses and launches the kernels of a per-pixel loss: one that leaves the blocks' sums, and one that adds them up.
#pragma once

#include <algorithm>
#include <type_traits>

#include "pixel_loss_direct.h"
#include "pixel_loss_lines.h"
#include "tensor.h"

namespace medkd {

struct PixelLossSettings {
  double target_weight, nontarget_weight, temperature;
  int64_t ignore_index;
};

struct PixelLossTensors {
  std::vector<Tensor> term;  // [] or [B, *S]
  Tensor scale, gradient;
};

constexpr int finish_threads = 1024, gather_threads = 256;
// A block that takes more tiles begins and ends less often; there should be some for every place that a large GPU has for one.
constexpr int64_t enough_tile_blocks = 2048, most_tiles_of_block = 4;
constexpr std::size_t scratch_bytes(int threads) { return sums * (threads / warp_size) * sizeof(double); }

inline Access access_of(const Planes& x, const PixelLoss& loss, int count) {
  const int size = x.type == Type::float32 ? 4 : 2;
  const auto aligned = [&](int elements) {
    return reinterpret_cast<uintptr_t>(x.data) % static_cast<uintptr_t>(elements * size) == 0 &&
           (loss.images == 1 || x.stride_b % elements == 0);
  };
  if (x.stride_c == 1 && x.stride_n == loss.classes && aligned(4 / size)) return Access::rows;
  const bool packed = x.stride_n == 1 && x.stride_c % count == 0 && loss.pixels % count == 0 && aligned(count);
  return packed ? Access::packed : Access::strided;
}

// Without a gradient the student's access is its.
inline DirectLoss direct_loss(const PixelLoss& loss, int count) {
  const int64_t tiles = ceil_div(loss.pixels, direct_threads * count);
  DirectLoss direct{loss, access_of(loss.student, loss, count), access_of(loss.teacher, loss, count), Access::rows, false, tiles, 1};
  direct.gradient = loss.gradient.data != nullptr ? access_of(loss.gradient, loss, count) : direct.student;
  Access* const all[] = {&direct.student, &direct.teacher, &direct.gradient};
  const auto any = [&](Access access) { return std::any_of(all, all + 3, [&](Access* a) { return *a == access; }); };
  if (any(Access::strided))  // then lanes take neighbouring pixels everywhere
    for (Access* access : all) *access = *access == Access::packed ? Access::strided : *access;
  direct.neighbours = any(Access::packed);
  return direct;
}

template <bool decoupled, int max_classes>
void launch_registers(const DirectLoss& direct, int64_t blocks, cudaStream_t stream) {
  const std::size_t rows =
      direct_threads * pixels_per_thread(max_classes) * row_pitch(direct.loss.classes) * sizeof(float);
  const bool student_rows = direct.student == Access::rows || direct.gradient == Access::rows;
  const std::size_t shared =
      scratch_bytes(direct_threads) + (student_rows ? rows : 0) + (direct.teacher == Access::rows ? rows : 0);
  launch<register_kernel<decoupled, max_classes>>({blocks}, direct_threads, shared, stream, direct);
}

inline Axis axis_of(int64_t full, int64_t low, int64_t tiles) {
  if (full >= int64_t{1} << 30) throw std::runtime_error("an axis of 2^30 pixels or more is too long to upsample to");
  const int64_t tile = ceil_div(full, tiles);
  const int64_t touched = std::min<int64_t>(ceil_div((tile - 1) * low, full) + 2, low);
  return {{static_cast<int>(full), static_cast<int>(low)},
          static_cast<int>(tile),
          static_cast<int>(ceil_div(full, tile)),
          static_cast<int>(touched)};
}

// How the pixels of an upsampled student are cut, for blocks of up to `threads`. `bytes` is what a pixel needs of shared memory
// for one class; a block of at least 64 threads has `budget` of it.
inline LinesLoss lines_of(const PixelLoss& loss, const Tensor& student, const Tensor& teacher, int64_t threads, int64_t bytes) {
  constexpr int64_t budget = most_shared_bytes - 4 * 1024, enough_blocks = 512;  // enough: two waves of the largest GPU
  const int64_t dims = teacher.dim();
  const auto sizes = [&](const Tensor& x, int64_t from_last) { return dims - from_last < 2 ? 1 : x.size(dims - from_last); };
  while (threads > 64 && (threads + 1) * loss.classes * bytes > budget) threads /= 2;
  LinesLoss lines{loss, axis_of(sizes(teacher, 3), sizes(student, 3), sizes(teacher, 3)), {}, {}, nullptr, 0};
  lines.x = axis_of(sizes(teacher, 1), sizes(student, 1), ceil_div(sizes(teacher, 1), threads));
  const int64_t strips = ceil_div(enough_blocks, loss.images * lines.z.full * lines.x.tiles);
  lines.y = axis_of(sizes(teacher, 2), sizes(student, 2), std::min(strips, sizes(student, 2)));
  lines.chunk = static_cast<int>(std::min<int64_t>(budget / ((threads + 1) * bytes), loss.classes));
  return lines;
}

template <bool decoupled, typename A>
void launch_lines(const LinesLoss& lines, int64_t blocks, cudaStream_t stream) {
  const PixelLoss& loss = lines.loss;
  const int threads = static_cast<int>(ceil_div(lines.x.tile, warp_size)) * warp_size;
  const bool want_gradient = loss.gradient.data != nullptr;
  if constexpr (std::is_same_v<A, float>) {
    if (loss.classes <= most_register_classes)
      return with_classes(loss.classes, RegisterClasses(), [&](auto max_classes) {
        constexpr int most = decltype(max_classes)::value;
        const std::size_t shared = line_memory_bytes(lines, threads, loss.classes, line_arrays(most), line_pitch(most), sizeof(A));
        launch<line_register_kernel<decoupled, most>>({blocks}, threads, shared, stream, lines);
      });
  }
  const std::size_t shared =
      want_gradient ? line_memory_bytes(lines, threads, lines.chunk, 2, threads + 1, sizeof(A)) : scratch_bytes(threads);
  const int64_t chunks = want_gradient ? ceil_div(loss.classes, lines.chunk) : 1;
  launch<line_sweep_kernel<decoupled, A>>({blocks, chunks}, threads, shared, stream, lines);
}

// `term_count` of the terms are wanted.
template <bool decoupled, typename A>
PixelLossTensors run_pixel_loss(const PixelLossSettings& settings, int term_count, const Tensor& student,
                                const Tensor& teacher, const std::optional<Tensor>& target,
                                const std::optional<Tensor>& weight, const std::string& reduction, bool need_gradient) {
  constexpr ScalarType type = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
  const OnDevice device(student);
  const cudaStream_t stream = device.stream();
  std::vector<Tensor> holder;
  holder.reserve(3);
  PixelLoss loss{};
  loss.images = teacher.size(0);
  loss.classes = static_cast<int>(teacher.size(1));
  loss.pixels = pixels_of(teacher);
  loss.student = planes_of(student, holder);
  loss.teacher = planes_of(teacher, holder);
  const Gradient gradient(need_gradient ? student : new_like(student, {0}, student.scalar_type()));
  if (need_gradient) loss.gradient = planes_of(gradient.written, holder);
  loss.target = target ? target->data_ptr() : nullptr;
  if (target) loss.target_type = type_of(*target);
  loss.weight = weight ? weight->data_ptr() : nullptr;
  loss.set_numbers(settings.target_weight, settings.nontarget_weight, settings.temperature);
  loss.ignore_index = settings.ignore_index;

  const bool reduced = reduction != "none";
  PixelLossTensors tensors;
  PixelLossOutputs outputs{};
  std::vector<int64_t> size;
  if (!reduced) {
    size.push_back(loss.images);
    for (int64_t d = 2; d < teacher.dim(); ++d) size.push_back(teacher.size(d));
  }
  for (int k = 0; k < term_count; ++k) {
    tensors.term.push_back(new_like(student, size, type));
    (reduced ? outputs.term[k] : loss.per_pixel[k]) = tensors.term.back().data_ptr();
  }
  tensors.scale = new_like(student, {}, type);
  outputs.scale = tensors.scale.data_ptr();
  outputs.mean = reduction == "mean";

  std::optional<Tensor> block_sums, partial;
  const auto make_sums = [&](int64_t blocks) {
    if (!reduced) return;
    block_sums = new_like(student, {blocks, sums}, ScalarType::Double);
    loss.block_sums = static_cast<double*>(block_sums->data_ptr());
  };
  bool upsampled = false, finished = false;
  for (int64_t d = 2; d < teacher.dim(); ++d) upsampled |= student.size(d) != teacher.size(d);
  int64_t blocks = 0;
  if (loss.images * loss.pixels > 0) {
    if (upsampled) {
      const bool in_registers = sizeof(A) == sizeof(float) && loss.classes <= most_register_classes;
      const int arrays = in_registers ? line_arrays(loss.classes) : 2;
      LinesLoss lines = lines_of(loss, student, teacher, in_registers ? line_threads(loss.classes) : most_line_threads,
                                 arrays * sizeof(A));
      blocks = loss.images * lines.z.full * lines.y.tiles * lines.x.tiles;
      make_sums(blocks);
      lines.loss = loss;
      if (need_gradient) {
        partial = new_like(student, {blocks, lines.y.touched, loss.classes, lines.x.touched}, type);
        lines.partial = partial->data_ptr();
      }
      launch_lines<decoupled, A>(lines, blocks, stream);
      if (need_gradient) {
        const int64_t groups = ceil_div(loss.classes, gathered_classes);
        const int64_t gathering = ceil_div(student.numel() / loss.classes * groups, gather_threads);
        launch<gather_kernel<A>>({gathering + 1}, gather_threads, scratch_bytes(gather_threads), stream, lines,
                                 reduced ? blocks : 0, outputs);
        finished = true;
      }
    } else if (std::is_same_v<A, float> && loss.classes <= most_register_classes) {
      with_classes(loss.classes, RegisterClasses(), [&](auto max_classes) {
        constexpr int most = decltype(max_classes)::value;
        DirectLoss direct = direct_loss(loss, pixels_per_thread(most));
        const int64_t tiles = loss.images * direct.tiles;
        direct.tiles_of_block = std::clamp<int64_t>(tiles / enough_tile_blocks, 1, most_tiles_of_block);
        make_sums(blocks = ceil_div(tiles, direct.tiles_of_block));
        direct.loss = loss;
        launch_registers<decoupled, most>(direct, blocks, stream);
      });
    } else {
      // double is there to be right, not to be fast
      constexpr int lanes = std::is_same_v<A, float> ? warp_size : 1;
      const bool rows = loss.student.stride_c == 1 && loss.teacher.stride_c == 1;
      make_sums(blocks = ceil_div(loss.images * loss.pixels * (rows ? lanes : 1), direct_threads));
      const std::size_t shared = scratch_bytes(direct_threads);
      if (rows)
        launch<sweep_kernel<decoupled, lanes, A>>({blocks}, direct_threads, shared, stream, loss);
      else
        launch<sweep_kernel<decoupled, 1, A>>({blocks}, direct_threads, shared, stream, loss);
    }
  }
  if (!finished)
    launch<finish_kernel<A>>({1}, finish_threads, scratch_bytes(finish_threads), stream, loss.block_sums,
                             reduced ? blocks : 0, outputs);
  tensors.gradient = gradient.finish();
  return tensors;
}

template <bool decoupled>
PixelLossTensors pixel_loss(const PixelLossSettings& settings, int term_count, const Tensor& student,
                            const Tensor& teacher, const std::optional<Tensor>& target,
                            const std::optional<Tensor>& weight, const std::string& reduction, bool need_gradient) {
  if (arithmetic_type(student, teacher) == ScalarType::Double)
    return run_pixel_loss<decoupled, double>(settings, term_count, student, teacher, target, weight, reduction, need_gradient);
  return run_pixel_loss<decoupled, float>(settings, term_count, student, teacher, target, weight, reduction, need_gradient);
}

}  // namespace medkd
