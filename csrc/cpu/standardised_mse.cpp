#include "../math/standardised_mse.h"
#include "relation_driver.h"

namespace medkd {

// Pixels of a slot of sums, which are added one after another; images that share one, and pixels at a time.
constexpr int64_t moments_part = 8192, moments_images = 32, moments_block = 512;

// Channels of a task. Where they lie side by side a few would make poor use of what comes with them from memory.
static int64_t channels_of_task(const Relation& relation) {
  return std::min<int64_t>(relation.student_channels, relation.student.stride_n == 1 ? 16 : 64);
}

// What a task is: pixels of an image, or some small images, of some channels.
struct MomentTasks {
  int64_t images, pixels, channels, images_of_slot, parts, slots, groups, channels_of_task;

  MomentTasks(const Relation& relation, int64_t images)
      : images(images),
        pixels(relation.pixels),
        channels(relation.student_channels),
        images_of_slot(std::clamp<int64_t>(moments_part / std::max<int64_t>(pixels, 1), 1, moments_images)),
        parts(ceil_div(pixels, moments_part)),
        slots(ceil_div(images, images_of_slot) * parts),
        channels_of_task(medkd::channels_of_task(relation)) {
    groups = ceil_div(channels, channels_of_task);
  }

  // visit(slot, part of an image), for every image of a slot
  template <typename Visit>
  void run(const Visit& visit) const {
    // converting, and five sums, are worth some 16 multiply-adds
    const int64_t operations = 16 * std::min(pixels * images_of_slot, moments_part) * channels_of_task;
    torch::stable::parallel_for(0, slots * groups, grain(operations), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t slot = task / groups, channel = task % groups * channels_of_task;
        const int64_t first_image = slot / parts * images_of_slot, first = slot % parts * moments_part;
        const int64_t last_image = std::min(first_image + images_of_slot, images);
        for (int64_t image = first_image; image < last_image; ++image)
          visit(slot, RelationPart{image, first, std::min(first + moments_part, pixels), moments_block, channel,
                                   std::min(channel + channels_of_task, channels)});
      }
    });
  }
};

static Tensor standardised_mse(
    const Tensor& student,                // [B, C, *S]
    const Tensor& teacher,                // [B, C, *S]
    const std::optional<Tensor>& mask) {  // [B, *S], boolean, contiguous
  const RelationCall call(student, teacher, mask);
  const MomentTasks tasks(call.relation, call.images);
  const int64_t size = 5 * tasks.channels;
  auto partial = slots<double>(tasks.slots * size);
  const auto add = call.type == ScalarType::Double ? loops<double>().standardised_mse.sums
                                                   : loops<float>().standardised_mse.sums;
  tasks.run([&](int64_t slot, const RelationPart& part) { add(call.relation, part, partial.data() + slot * size); });
  Tensor sums = new_like(student, {1 + size}, ScalarType::Double);
  double* total = static_cast<double*>(sums.data_ptr());
  std::fill(total, total + 1 + size, 0.0);
  for (int64_t valid : count_valid(call.relation, call.images)) total[0] += static_cast<double>(valid);
  // what an addition rounds off is kept: many slots must not blur a constant channel
  std::vector<double> lost(static_cast<std::size_t>(size));
  for (int64_t slot = 0; slot < tasks.slots; ++slot)
    for (int64_t k = 0; k < size; ++k) {
      const double before = total[1 + k], more = partial[slot * size + k], after = before + more, added = after - before;
      lost[k] += (before - (after - added)) + (more - added);
      total[1 + k] = after;
    }
  for (int64_t k = 0; k < size; ++k) total[1 + k] += lost[k];
  return sums;
}

static std::tuple<Tensor, Tensor> standardised_mse_terms(
    const Tensor& sums,  // [1 + 5C], double, contiguous
    bool single) {
  const int64_t channels = (sums.numel() - 1) / 5;
  const double* in = static_cast<const double*>(sums.data_ptr());
  const double number = std::max(in[0], 1.0), share = 1 / (number * static_cast<double>(channels));
  Tensor coefficients = new_like(sums, {4 * channels}, ScalarType::Double);
  double* out = static_cast<double*>(coefficients.data_ptr());
  double value = 0;
  for (int64_t c = 0; c < channels; ++c) {
    const double* of = in + 1 + c;
    const portable::StandardisedChannel k = portable::standardised_channel(
        number, of[0], of[channels], of[2 * channels], of[3 * channels], of[4 * channels]);
    value += k.value;
    out[c] = share * k.of_s;
    out[channels + c] = share * k.of_t;
    out[2 * channels + c] = k.mean_s;
    out[3 * channels + c] = k.mean_t;
  }
  value *= share;
  return {single ? scalar<float>(sums, value, ScalarType::Float) : scalar<double>(sums, value, ScalarType::Double),
          coefficients};
}

static Tensor standardised_mse_backward(
    const Tensor& student,              // [B, C, *S]
    const Tensor& teacher,              // [B, C, *S]
    const std::optional<Tensor>& mask,  // [B, *S], boolean, contiguous
    const Tensor& coefficients,         // [4C], double, contiguous, as standardised_mse_terms gives them
    const Tensor& upstream) {           // [], in the type of the arithmetic
  RelationCall call(student, teacher, mask);
  const HostGradient gradient(student);
  call.relation.gradient = planes_of(gradient.written, call.holder);
  const MomentTasks tasks(call.relation, call.images);
  const bool twice = call.type == ScalarType::Double;
  const double factor = twice ? *static_cast<const double*>(upstream.data_ptr())
                              : static_cast<double>(*static_cast<const float*>(upstream.data_ptr()));
  const double* of = static_cast<const double*>(coefficients.data_ptr());
  const int64_t channels = tasks.channels;
  std::vector<double> of_channels(static_cast<std::size_t>(3 * channels));
  for (int64_t c = 0; c < channels; ++c) {
    const portable::StandardisedGradient k = portable::standardised_gradient_of(of[c], of[channels + c], of[2 * channels + c],
                                                                                of[3 * channels + c], factor);
    of_channels[c] = k.of_both;
    of_channels[channels + c] = k.of_t;
    of_channels[2 * channels + c] = k.constant;
  }
  const auto write = twice ? loops<double>().standardised_mse.gradient : loops<float>().standardised_mse.gradient;
  tasks.run([&](int64_t, const RelationPart& part) { write(call.relation, part, of_channels.data()); });
  return gradient.finish();
}

}  // namespace medkd

STABLE_TORCH_LIBRARY_IMPL(medkd_fast, CPU, m) {
  m.impl("standardised_mse_cpp", TORCH_BOX(&medkd::standardised_mse));
  m.impl("standardised_mse_terms_cpp", TORCH_BOX(&medkd::standardised_mse_terms));
  m.impl("standardised_mse_backward_cpp", TORCH_BOX(&medkd::standardised_mse_backward));
}
