// Runs the loops of a relation loss over the threads. The work is cut by shape alone, never by the number of threads:
// every slot of sums takes the same pixels in the same order, and the slots of an image are added in order.
#pragma once

#include <algorithm>
#include <memory>

#include "tensor.h"

namespace medkd {

struct RelationPlan {
  int64_t images, pixels;
  int64_t squares, n;  // an image's sums are [squares, n, n], symmetric
  int64_t block_rows;  // rows of a block of pixels in scratch memory
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tasks that are worth waking a thread for, when one is `operations` multiply-adds. What a task does stays the same.
inline int64_t grain(int64_t operations) { return ceil_div(1 << 20, std::max<int64_t>(operations, 1)); }

// Ranges of images' pixels that are worked on one by one.
struct PixelRanges {
  int64_t images, pixels, block, blocks;  // pixels of a range, and ranges of an image

  PixelRanges(int64_t images, int64_t pixels, int64_t block)
      : images(images), pixels(pixels), block(block), blocks(ceil_div(pixels, block)) {}

  // visit(range, number of the range), where a pixel costs about as much as that many multiply-adds
  template <typename Visit>
  void over_ranges(int64_t operations, const Visit& visit) const {
    torch::stable::parallel_for(0, images * blocks, grain(std::min(block, pixels) * operations),
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t i = begin; i < end; ++i) {
                                    const int64_t first = i % blocks * block;
                                    visit(PixelRange{i / blocks, first, std::min(first + block, pixels)}, i);
                                  }
                                });
  }
};

// Adds the other slots of an image to its first, and copies the upper triangles to the lower ones.
inline void finish_sums(double* sums, int64_t slots, const RelationPlan& plan) {
  const int64_t n = plan.n, size = plan.squares * n * n;
  for (int64_t slot = 1; slot < slots; ++slot)
    for (int64_t k = 0; k < size; ++k) sums[k] += sums[slot * size + k];
  for (double* square = sums; square < sums + size; square += n * n)
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < i; ++j) square[i * n + j] = square[j * n + i];
}

// Calls finish(image, sums) for every image, on any thread.
template <typename A, typename Finish>
void sum_over_pixels(const Relation& relation, const RelationLoops<A>& loops, const RelationPlan& plan,
                     const Finish& finish) {
  constexpr int64_t most_slots = 64;
  if (plan.images == 0) return;
  // all slots together take a quarter of the student's memory in fp32, or what a single one needs
  const int64_t elements = plan.images * plan.pixels * relation.student_channels;
  const int64_t slot_memory = std::clamp<int64_t>(elements / 8, 1 << 16, 1 << 20);
  const int64_t rows = plan.squares * plan.n, size = rows * plan.n;
  // a block fits the second-level cache; long ones make the sums at their end cheap
  const int64_t block = std::clamp<int64_t>((1 << 17) / plan.block_rows / 64 * 64, 256, 1024);
  const int64_t blocks = std::max<int64_t>(ceil_div(plan.pixels, block), 1);
  const int64_t slots = std::clamp<int64_t>(slot_memory / size, 1, most_slots);
  const int64_t images_at_once = std::min(slots, plan.images);
  const int64_t blocks_per_slot = ceil_div(blocks, std::min(blocks, slots / images_at_once));
  const int64_t slots_per_image = ceil_div(blocks, blocks_per_slot);
  // many channels: the rows, too, are shared out, at the price of loading the pixels again for each part
  const int64_t part_rows = rows <= 128 ? rows : 64;
  const int64_t parts = ceil_div(rows, part_rows);

  const std::unique_ptr<double[]> sums(new double[static_cast<std::size_t>(images_at_once * slots_per_image * size)]);
  for (int64_t first_image = 0; first_image < plan.images; first_image += images_at_once) {
    const int64_t images = std::min(images_at_once, plan.images - first_image);
    const int64_t tasks = images * slots_per_image * parts;
    const int64_t operations = std::min(blocks_per_slot * block, plan.pixels) * part_rows * plan.n / 2;
    torch::stable::parallel_for(0, tasks, grain(operations), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t slot = task / parts, turn = task % parts;
        // early rows have more entries than late ones: from both ends in turn, so that any half is half of the work
        const int64_t first_row = part_rows * (turn % 2 == 0 ? turn / 2 : parts - 1 - turn / 2);
        const int64_t last_row = std::min(first_row + part_rows, rows);
        const int64_t first = slot % slots_per_image * blocks_per_slot * block;
        const int64_t last = std::min(first + blocks_per_slot * block, plan.pixels);
        double* mine = sums.get() + slot * size;
        std::fill(mine + first_row * plan.n, mine + last_row * plan.n, 0.0);
        loops.sums(relation, {first_image + slot / slots_per_image, first, last, block, first_row, last_row}, mine);
      }
    });
    // an entry costs about as much as 16 of the vectorised multiply-adds
    torch::stable::parallel_for(0, images, grain(16 * size), [&](int64_t begin, int64_t end) {
      for (int64_t image = begin; image < end; ++image) {
        double* total = sums.get() + image * slots_per_image * size;
        finish_sums(total, slots_per_image, plan);
        finish(first_image + image, total);
      }
    });
  }
}

// Valid pixels of every image.
inline std::vector<int64_t> count_valid(const Relation& relation, int64_t images) {
  std::vector<int64_t> valid(images, relation.pixels);
  if (relation.mask != nullptr)
    torch::stable::parallel_for(0, images, grain(relation.pixels), [&](int64_t begin, int64_t end) {
      for (int64_t image = begin; image < end; ++image) {
        const uint8_t* mask = relation.mask + image * relation.pixels;
        valid[image] = relation.pixels - std::count(mask, mask + relation.pixels, uint8_t{0});
      }
    });
  return valid;
}

// What an image's value is multiplied by in the loss: 1, or 1 / the images that count; 0 for those that do not.
inline std::vector<double> image_weights(const std::vector<int64_t>& valid, const std::string& reduction) {
  const int64_t counted = std::count_if(valid.begin(), valid.end(), [](int64_t pixels) { return pixels > 0; });
  const double weight = reduction == "mean" && counted > 0 ? 1.0 / static_cast<double>(counted) : 1.0;
  std::vector<double> weights;
  for (int64_t pixels : valid) weights.push_back(pixels > 0 ? weight : 0.0);
  return weights;
}

// The loss, [] or of `size`, from the weighted values of images or of pairs of images.
template <typename A>
Tensor reduce_values(const Tensor& like, const std::vector<double>& values, const std::string& reduction,
                     ScalarType type, const std::vector<int64_t>& size) {
  if (reduction != "none") {
    double sum = 0;
    for (double value : values) sum += value;
    return scalar<A>(like, sum, type);
  }
  Tensor out = new_like(like, size, type);
  std::transform(values.begin(), values.end(), static_cast<A*>(out.data_ptr()),
                 [](double value) { return static_cast<A>(value); });
  return out;
}

template <typename A>
Tensor reduce_images(const Tensor& like, const std::vector<double>& values, const std::string& reduction,
                     ScalarType type) {
  return reduce_values<A>(like, values, reduction, type, {static_cast<int64_t>(values.size())});
}

// The tensors of one call as the loops see them.
struct RelationCall {
  Relation relation{};
  int64_t images;
  ScalarType type;  // of the arithmetic
  std::vector<Tensor> holder;

  RelationCall(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& mask)
      : images(student.size(0)), type(arithmetic_type(student, teacher)) {
    holder.reserve(3);
    relation.student = planes_of(student, holder);
    relation.teacher = planes_of(teacher, holder);
    relation.mask = mask ? static_cast<const uint8_t*>(mask->data_ptr()) : nullptr;
    relation.student_channels = student.size(1);
    relation.teacher_channels = teacher.size(1);
    relation.pixels = pixels_of(student);
  }
};

// gradient [B, C, *S], laid out as the student.
template <typename A>
Tensor relation_gradient(RelationCall& call, const RelationLoops<A>& loops, const Tensor& student, const Tensor& matrix,
                         const Tensor& upstream) {
  // long enough for the memory that rows come from and go to, short enough for the second-level cache
  const int64_t block = std::clamp<int64_t>((1 << 15) / (matrix.size(1) + matrix.size(2)) / 64 * 64, 64, 256);
  constexpr int64_t part = 2048;
  const HostGradient gradient(student);
  call.relation.gradient = planes_of(gradient.written, call.holder);
  const A* matrices = static_cast<const A*>(matrix.data_ptr());
  const A* factors = static_cast<const A*>(upstream.data_ptr());
  const int64_t factor_stride = upstream.dim() == 0 ? 0 : upstream.stride(0);
  const int64_t matrix_size = matrix.size(1) * matrix.size(2);
  const int64_t parts = ceil_div(call.relation.pixels, part);
  const int64_t operations = std::min(part, call.relation.pixels) * matrix_size;
  torch::stable::parallel_for(0, call.images * parts, grain(operations), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / parts, first = task % parts * part;
      const int64_t last = std::min(first + part, call.relation.pixels);
      loops.gradient(call.relation, {image, first, last, block, 0, 0}, matrices + image * matrix_size,
                     factors[image * factor_stride]);
    }
  });
  return gradient.finish();
}

}  // namespace medkd
