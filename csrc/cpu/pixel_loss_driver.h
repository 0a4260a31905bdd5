// Runs the loops of a per-pixel loss over the threads: blocks of a size that does not depend on their number, one slot
// of partial sums a block, added up in the order of the blocks.
#pragma once

#include <algorithm>
#include <cmath>

#include "../math/interpolation.h"
#include "tensor.h"

namespace medkd {

struct AxisTables {
  std::vector<int32_t> lower;
  std::vector<double> upper_weight;

  AxisTables(int64_t full, int64_t low) : lower(full), upper_weight(full) {
    const portable::Interpolated<int64_t> places{full, low};
    for (int64_t i = 0; i < full; ++i) {
      lower[i] = static_cast<int32_t>(places.lower(i));
      upper_weight[i] = places.upper_weight<double>(i);
    }
  }

  Axis axis(int64_t low) const { return {static_cast<int64_t>(lower.size()), low, lower.data(), upper_weight.data()}; }
};

// Interpolation along an axis as a band matrix, or its adjoint.
struct BandTables {
  std::vector<int32_t> first;
  std::vector<double> weight;
  int64_t depth = 1;

  BandTables(const AxisTables& axis, int64_t low, bool adjoint) {
    const int64_t full = static_cast<int64_t>(axis.lower.size());
    const int64_t inputs = adjoint ? full : low, chunks = ((adjoint ? low : full) + 15) / 16;
    std::vector<int64_t> last(chunks, 0);
    first.assign(chunks, static_cast<int32_t>(inputs - 1));
    // every nonzero entry of the matrix: visit(output, input, weight)
    auto entries = [&](auto&& visit) {
      for (int64_t i = 0; i < full; ++i)
        for (int64_t upper = 0; upper < 2; ++upper) {
          const double w = upper ? axis.upper_weight[i] : 1 - axis.upper_weight[i];
          const int64_t j = axis.lower[i] + upper;
          if (w > 0) adjoint ? visit(j, i, w) : visit(i, j, w);
        }
    };
    entries([&](int64_t output, int64_t input, double) {
      first[output / 16] = static_cast<int32_t>(std::min<int64_t>(first[output / 16], input));
      last[output / 16] = std::max(last[output / 16], input);
    });
    for (int64_t q = 0; q < chunks; ++q) depth = std::max(depth, last[q] - first[q] + 1);
    for (int32_t& input : first) input = static_cast<int32_t>(std::max<int64_t>(std::min<int64_t>(input, inputs - depth), 0));
    weight.assign(chunks * depth * 16, 0.0);
    entries([&](int64_t output, int64_t input, double w) {
      const int64_t q = output / 16;
      weight[(q * depth + input - first[q]) * 16 + output % 16] += w;
    });
  }

  Band band() const { return {static_cast<int64_t>(first.size()), depth, first.data(), weight.data()}; }
};

struct PixelLossResult {
  double term[max_terms] = {};
  double denominator = 0;
};

inline void check_labels(const char* name, const std::vector<PixelSums>& sums, const PixelLoss& loss) {
  for (const PixelSums& block : sums)
    if (block.has_bad_label)
      throw std::runtime_error(std::string(name) + ": target holds the label " + std::to_string(block.bad_label) +
                               ", want 0 to " + std::to_string(loss.classes - 1) + " or ignore_index (" +
                               std::to_string(loss.ignore_index) +
                               "); remap the labels, or pass the value to leave out as ignore_index");
}

inline PixelLossResult add_up(const std::vector<PixelSums>& sums) {
  PixelLossResult result;
  for (const PixelSums& block : sums) {
    for (int term = 0; term < max_terms; ++term) result.term[term] += block.term[term];
    result.denominator += block.denominator;
  }
  return result;
}

inline PixelLossResult run_ranges(const char* name, const PixelLoss& loss, const PixelLoops& loops) {
  const int64_t block = std::max<int64_t>(32768 / loss.classes / 256 * 256, 256);
  const int64_t blocks = (loss.pixels + block - 1) / block;
  auto sums = slots<PixelSums>(loss.images * blocks);
  torch::stable::parallel_for(0, loss.images * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % blocks * block;
      loops.range(loss, {i / blocks, first, std::min(first + block, loss.pixels)}, sums[i]);
    }
  });
  check_labels(name, sums, loss);
  return add_up(sums);
}

template <typename A>
PixelLossResult run_slabs(const char* name, PixelLoss& loss, const PixelLoops& loops, const Tensor& student,
                          const Tensor& teacher) {
  // a 2-D image is a 3-D one of depth 1, a line a 2-D one of height 1
  auto extent = [](const Tensor& x, int64_t from_last) {
    return x.dim() - 1 - from_last >= 2 ? x.size(x.dim() - 1 - from_last) : 1;
  };
  const int64_t low_x = extent(student, 0), low_y = extent(student, 1), low_z = extent(student, 2);
  const AxisTables x(extent(teacher, 0), low_x), y(extent(teacher, 1), low_y), z(extent(teacher, 2), low_z);
  const BandTables along(x, low_x, false), back(x, low_x, true);
  loss.width = extent(teacher, 0);
  loss.low_width = low_x;
  loss.along = along.band();
  loss.back = back.band();
  loss.y = y.axis(low_y);
  loss.z = z.axis(low_z);

  // slabs along the outermost axis; each holds the gradient of the low-resolution lines that it touches
  const bool volume = loss.z.full > 1;
  const Axis& outer = volume ? loss.z : loss.y;
  const int64_t full_lines = volume ? loss.y.full : 1, low_lines = volume ? loss.y.low : 1;
  const int64_t wanted = std::clamp<int64_t>(64 / std::max<int64_t>(loss.images, 1), 1, (outer.low + 3) / 4);
  const int64_t thickness = (outer.full + wanted - 1) / wanted;
  const int64_t count = (outer.full + thickness - 1) / thickness;
  const bool want_gradient = loss.gradient.data != nullptr;
  const int64_t line_size = loss.classes * low_x;

  std::vector<Slab> slabs;
  int64_t gradient_lines = 0;
  for (int64_t image = 0; image < loss.images; ++image)
    for (int64_t s = 0; s < count; ++s) {
      const int64_t begin = s * thickness, end = std::min(begin + thickness, outer.full);
      const int64_t low_begin = outer.lower[begin] * low_lines;
      const int64_t low_end = std::min<int64_t>(outer.lower[end - 1] + 2, outer.low) * low_lines;
      slabs.push_back({image, begin * full_lines, end * full_lines, low_begin, low_end, nullptr});
      gradient_lines += low_end - low_begin;
    }
  auto partial = slots<A>(want_gradient ? gradient_lines * line_size : 0);
  int64_t offset = 0;
  for (Slab& slab : slabs) {
    slab.gradient = want_gradient ? partial.data() + offset : nullptr;
    offset += (slab.low_end - slab.low_begin) * line_size;
  }
  auto sums = slots<PixelSums>(static_cast<int64_t>(slabs.size()));
  torch::stable::parallel_for(0, static_cast<int64_t>(slabs.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) loops.slab(loss, slabs[i], sums[i]);
  });
  check_labels(name, sums, loss);
  if (want_gradient) {
    const int64_t lines = loss.z.low * loss.y.low;
    torch::stable::parallel_for(0, loss.images * lines, 16, [&](int64_t begin, int64_t end) {
      auto total = slots<A>(line_size);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t image = i / lines, line = i % lines;
        std::fill(total.begin(), total.end(), A(0));
        for (int64_t s = image * count; s < (image + 1) * count; ++s) {
          if (line < slabs[s].low_begin || line >= slabs[s].low_end) continue;
          const A* from = static_cast<const A*>(slabs[s].gradient) + (line - slabs[s].low_begin) * line_size;
          for (int64_t k = 0; k < line_size; ++k) total[k] += from[k];
        }
        medkd::loops<A>().store_line(loss.gradient, image, line * low_x, loss.classes, low_x, total.data());
      }
    });
  }
  return add_up(sums);
}

struct PixelLossOutputs {
  std::vector<Tensor> term;  // [] or [B, *S]
  Tensor scale, gradient;
};

struct PixelLossSettings {
  const char* name;
  int terms;
  double target_weight, nontarget_weight, temperature;
  int64_t ignore_index;
};

template <typename A>
PixelLossOutputs run_pixel_loss(const PixelLossSettings& settings, const PixelLoops& loops, const Tensor& student,
                                const Tensor& teacher, const std::optional<Tensor>& target,
                                const std::optional<Tensor>& weight, const std::string& reduction,
                                bool need_gradient) {
  std::vector<Tensor> holder;
  holder.reserve(3);
  PixelLoss loss{};
  loss.images = teacher.size(0);
  loss.classes = teacher.size(1);
  loss.pixels = pixels_of(teacher);
  loss.student = planes_of(student, holder);
  loss.teacher = planes_of(teacher, holder);
  const HostGradient gradient(need_gradient ? student : new_like(student, {0}, student.scalar_type()));
  if (need_gradient) loss.gradient = planes_of(gradient.written, holder);
  loss.target = target ? target->data_ptr() : nullptr;
  if (target) loss.target_type = type_of(*target);
  loss.weight = weight ? weight->data_ptr() : nullptr;
  loss.target_weight = settings.target_weight;
  loss.nontarget_weight = settings.nontarget_weight;
  loss.temperature = settings.temperature;
  loss.ignore_index = settings.ignore_index;

  const ScalarType type = arithmetic_type(student, teacher);
  PixelLossOutputs outputs;
  if (reduction == "none") {
    std::vector<int64_t> size = {loss.images};
    for (int64_t d = 2; d < teacher.dim(); ++d) size.push_back(teacher.size(d));
    for (int term = 0; term < settings.terms; ++term) {
      outputs.term.push_back(new_like(student, size, type));
      loss.per_pixel[term] = outputs.term.back().data_ptr();
    }
  }

  for (int64_t d = 2; d < teacher.dim(); ++d) loss.upsampled |= student.size(d) != teacher.size(d);
  const PixelLossResult result = loss.upsampled && loss.images * loss.pixels > 0
                                     ? run_slabs<A>(settings.name, loss, loops, student, teacher)
                                     : run_ranges(settings.name, loss, loops);
  const double scale = reduction != "mean" ? 1.0 : result.denominator != 0 ? 1.0 / result.denominator : 0.0;
  outputs.scale = scalar<A>(student, scale, type);
  outputs.gradient = gradient.finish();
  if (reduction != "none")
    for (int term = 0; term < settings.terms; ++term)
      outputs.term.push_back(scalar<A>(student, scale == 0 ? 0.0 : result.term[term] * scale, type));
  return outputs;
}

// The arithmetic's type chosen from the inputs'.
inline PixelLossOutputs pixel_loss(const PixelLossSettings& settings, PixelLoops Loops<float>::*single,
                                   PixelLoops Loops<double>::*twice, const Tensor& student, const Tensor& teacher,
                                   const std::optional<Tensor>& target, const std::optional<Tensor>& weight,
                                   const std::string& reduction, bool need_gradient) {
  if (arithmetic_type(student, teacher) == ScalarType::Double)
    return run_pixel_loss<double>(settings, loops<double>().*twice, student, teacher, target, weight, reduction,
                                  need_gradient);
  return run_pixel_loss<float>(settings, loops<float>().*single, student, teacher, target, weight, reduction,
                               need_gradient);
}

}  // namespace medkd
