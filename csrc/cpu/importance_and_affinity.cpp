#include "attention_driver.h"
#include "channel_driver.h"
#include "class_driver.h"

namespace medkd {

// A layer's energies and the norms of its images; class means [B, K, some columns], zeros behind the channels, and numbers of pixels.
template <typename A>
static void read_layer(const ClassCall& call, double power, A* energies, double* norms, const Tensor& means,
                       const Tensor& counts) {
  const AttentionMaps maps(call.images, call.features.map.pixels, call.part);
  auto squares = slots<double>(maps.images * maps.blocks);
  call.by_class(
      "importance_and_affinity",
      [&](const PixelRange& range, double* sums, PixelSums& bad) {
        loops<A>().importance_and_affinity.sums(call.features, power, range, energies + range.image * maps.pixels + range.begin,
                                                &squares[range.image * maps.blocks + range.begin / maps.block], sums, bad);
      },
      call.means_into<A>(means, counts));
  maps.norms(squares, norms);
}

// What squared differences are multiplied by: those of maps, and of every image the mean over all K * K pairs of classes.
struct Shares {
  double of_maps;
  std::vector<double> of_pairs;
};

static Shares shares_of(const int64_t* counts, int64_t images, int64_t classes) {
  std::vector<double> pairs(images);
  int64_t with_class = 0, with_pair = 0;
  for (int64_t image = 0; image < images; ++image) {
    const int64_t there = classes - std::count(counts + image * classes, counts + (image + 1) * classes, int64_t{0});
    pairs[image] = static_cast<double>(there * (there - 1));
    with_class += there > 0;
    with_pair += there > 1;
  }
  const double all = static_cast<double>(classes * classes);
  for (double& of_image : pairs) of_image = of_image > 0 ? all / (of_image * static_cast<double>(with_pair)) : 0.0;
  return {1 / static_cast<double>(std::max<int64_t>(with_class, 1)), pairs};
}

// The student's energies become its map. Returns the sum of the squared differences, and of_map is its gradient, times `share`.
template <typename A>
static double compare_maps(const AttentionMaps& maps, A* student, const double* norms_s, const A* teacher,
                           const double* norms_t, double share, A* of_map) {
  auto squares = slots<double>(maps.images * maps.blocks);
  maps.over_ranges(2 * AttentionMaps::map_operations, [&](const PixelRange& range, int64_t i) {
    const int64_t first = range.image * maps.pixels + range.begin;
    loops<A>().importance_and_affinity.compare(student + first, inverse_norm(norms_s[range.image]), teacher + first,
                                               inverse_norm(norms_t[range.image]), range.end - range.begin, share,
                                               of_map + first, &squares[i]);
  });
  double sum = 0;
  for (double square : squares) sum += square;
  return sum * share;
}

// The sum of the squared differences of cosines between class means, in the shares of the images, and its gradient for the
// student's, which has so many channels.
template <typename A>
static std::tuple<double, Tensor> compare_means(Tensor means_s, const Tensor& means_t, const Shares& shares,
                                                int64_t channels) {
  const auto [squared, matrix] = channel_relation(means_s, means_t, std::nullopt, "cosine", "mse_of_pairs", 1.0, "none");
  Tensor weights = new_like(squared, {squared.size(0)}, squared.scalar_type());
  std::copy(shares.of_pairs.begin(), shares.of_pairs.end(), static_cast<A*>(weights.data_ptr()));
  const A* values = static_cast<const A*>(squared.data_ptr());
  double sum = 0;
  for (std::size_t image = 0; image < shares.of_pairs.size(); ++image)
    sum += shares.of_pairs[image] * static_cast<double>(values[image]);
  if (channels < means_s.size(2)) means_s = torch::stable::narrow(means_s, 2, 0, channels);
  return {sum, channel_relation_backward(means_s, std::nullopt, matrix, weights, "cosine", 1.0)};
}

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename A>
static Forward forward(const ClassCall& student, const ClassCall& teacher, const Tensor& x, double power) {
  const int64_t images = student.images, classes = student.classes;
  const AttentionMaps maps(images, student.features.map.pixels, student.part);
  Tensor map = new_like(x, map_size(x), student.type), of_map = new_like(x, map_size(x), student.type);
  Tensor norms = new_like(x, {images}, ScalarType::Double), counts = new_like(x, {images, classes}, ScalarType::Long);
  const std::vector<int64_t> means_size{images, classes, std::max(student.channels, teacher.channels)};
  const Tensor means_s = new_like(x, means_size, student.type), means_t = new_like(x, means_size, student.type);
  const std::unique_ptr<A[]> of_teacher(new A[static_cast<std::size_t>(images * maps.pixels)]);
  std::vector<double> norms_t(images);
  A* values = static_cast<A*>(map.data_ptr());
  double* norms_s = static_cast<double*>(norms.data_ptr());
  read_layer(teacher, power, of_teacher.get(), norms_t.data(), means_t, counts);
  read_layer(student, power, values, norms_s, means_s, counts);
  const Shares shares = shares_of(static_cast<const int64_t*>(counts.data_ptr()), images, classes);
  const double importance = compare_maps(maps, values, norms_s, of_teacher.get(), norms_t.data(), shares.of_maps,
                                         static_cast<A*>(of_map.data_ptr()));
  const auto [affinity, of_means] = compare_means<A>(means_s, means_t, shares, student.channels);
  return {scalar<A>(x, importance, student.type), scalar<A>(x, affinity, student.type), map, norms, counts, of_map, of_means};
}

static Forward importance_and_affinity(
    const Tensor& student,  // [B, C, *S]
    const Tensor& teacher,  // [B, other C, *S]
    const Tensor& target,   // [B, *S], contiguous
    int64_t num_classes, double power, int64_t ignore_index) {
  const ClassCall of_student(student, target, num_classes, ignore_index);
  const ClassCall of_teacher(teacher, target, num_classes, ignore_index);
  return of_student.type == ScalarType::Double ? forward<double>(of_student, of_teacher, student, power)
                                               : forward<float>(of_student, of_teacher, student, power);
}

template <typename A>
static void backward(const ClassCall& call, const Tensor& map, const Tensor& norms, const Tensor& counts,
                     const Tensor& of_map, const Tensor& of_means, const Tensor& v_importance, const Tensor& v_affinity,
                     double power) {
  const A* q = static_cast<const A*>(map.data_ptr());
  const A* v = static_cast<const A*>(of_map.data_ptr());
  const double* norm = static_cast<const double*>(norms.data_ptr());
  const double weight = static_cast<double>(*static_cast<const A*>(v_importance.data_ptr()));
  const AttentionMaps maps(call.images, call.features.map.pixels, call.part);
  const std::vector<double> products = maps.products(q, v);
  const auto table = call.shares<A>(counts, of_means, *static_cast<const A*>(v_affinity.data_ptr()));
  call.over_parts([&](const PixelRange& range, int64_t) {
    const int64_t image = range.image, first = image * maps.pixels;
    loops<A>().importance_and_affinity.gradient(call.features, power, range, q + first, v + first, weight, norm[image],
                                                products[image], table.data() + call.table(image));
  });
}

static Tensor importance_and_affinity_backward(
    const Tensor& student,       // [B, C, *S]
    const Tensor& target,        // [B, *S], contiguous
    const Tensor& map,           // [B, *S], contiguous, in the type of the arithmetic
    const Tensor& norms,         // [B], double, contiguous
    const Tensor& counts,        // [B, K], int64, contiguous
    const Tensor& of_map,        // [B, *S], contiguous, in the type of the arithmetic
    const Tensor& of_means,      // [B, K, C], contiguous, in the type of the arithmetic
    const Tensor& v_importance,  // [], in the type of the arithmetic
    const Tensor& v_affinity,    // [], in the type of the arithmetic
    double power, int64_t ignore_index) {
  ClassCall call(student, target, counts.size(1), ignore_index);
  const HostGradient gradient(student);
  call.features.map.gradient = planes_of(gradient.written, call.holder);
  (call.type == ScalarType::Double ? backward<double> : backward<float>)(call, map, norms, counts, of_map, of_means,
                                                                         v_importance, v_affinity, power);
  return gradient.finish();
}

}  // namespace medkd

STABLE_TORCH_LIBRARY_IMPL(medkd_fast, CPU, m) {
  m.impl("importance_and_affinity_cpp", TORCH_BOX(&medkd::importance_and_affinity));
  m.impl("importance_and_affinity_backward_cpp", TORCH_BOX(&medkd::importance_and_affinity_backward));
}
