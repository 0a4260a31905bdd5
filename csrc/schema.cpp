// The list of what exists. Every backend has its own operator names, because two of them can share one device; it compiles
// this with its name as MEDKD_BACKEND, for example "cpp".
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(medkd_fast, m) {
  // Outputs: loss, its parts, 1 / denominator (or 1), and the gradient of the loss times the denominator.
  m.def(
      "decoupled_kl_" MEDKD_BACKEND "(Tensor student, Tensor teacher, Tensor target, Tensor? weight, float target_weight, "
      "float nontarget_weight, float temperature, int ignore_index, str reduction, bool need_gradient) "
      "-> (Tensor loss, Tensor target_term, Tensor nontarget_term, Tensor scale, Tensor gradient)");
  m.def(
      "class_kl_" MEDKD_BACKEND "(Tensor student, Tensor teacher, Tensor? target, Tensor? weight, float temperature, "
      "int ignore_index, str reduction, bool need_gradient) -> (Tensor loss, Tensor scale, Tensor gradient)");
  // Outputs: loss [] or [B], and the matrix [B, C, C] whose product with the student is the gradient; the backward
  // multiplies by upstream [] or [B]. For pearson and softmax the matrix is [B, C + 1, C + 1]: the last column goes
  // with a row of ones, the last row is what the channels are shifted by.
  m.def(
      "channel_relation_" MEDKD_BACKEND "(Tensor student, Tensor teacher, Tensor? mask, str relation, str divergence, "
      "float temperature, str reduction) -> (Tensor loss, Tensor matrix)");
  m.def(
      "channel_relation_backward_" MEDKD_BACKEND "(Tensor student, Tensor? mask, Tensor matrix, Tensor upstream, str relation, "
      "float temperature) -> Tensor gradient");
  // Outputs: the relation, and what the backward needs beside it: what the rows were multiplied by, what was left of
  // the channels' means, and what they were shifted by, in double.
  m.def(
      "channel_gram_" MEDKD_BACKEND "(Tensor x, Tensor? mask, str relation, float temperature) "
      "-> (Tensor matrix, Tensor state)");
  m.def(
      "channel_gram_backward_" MEDKD_BACKEND "(Tensor x, Tensor? mask, Tensor matrix, Tensor state, Tensor upstream, str relation, "
      "float temperature) -> Tensor gradient");
  // As channel_relation, with a matrix [B, student channels, 2 * max(channels)] for the stacked difference and sum of
  // normalised features. Across images the loss is [] or [B, B], and the backward mixes the images' matrices.
  m.def(
      "pixel_relation_" MEDKD_BACKEND "(Tensor student, Tensor teacher, Tensor? mask, str relation, bool across_images, "
      "str reduction) -> (Tensor loss, Tensor matrix)");
  m.def(
      "pixel_relation_backward_" MEDKD_BACKEND "(Tensor student, Tensor teacher, Tensor? mask, Tensor matrix, Tensor upstream, "
      "str relation, bool across_images, str reduction) -> Tensor gradient");
  // Outputs: loss [], [B] or [B, B], and what the backward needs of every row's softmax, [B, 1 or B, 4, N rounded up].
  m.def(
      "pixel_relation_kl_" MEDKD_BACKEND "(Tensor student, Tensor teacher, Tensor? mask, str relation, float temperature, "
      "bool across_images, str reduction) -> (Tensor loss, Tensor rows)");
  m.def(
      "pixel_relation_kl_backward_" MEDKD_BACKEND "(Tensor student, Tensor teacher, Tensor? mask, Tensor rows, Tensor upstream, "
      "str relation, float temperature, bool across_images, str reduction) -> Tensor gradient");
  // Outputs: loss [] or [B, C], and of every channel [B, C, 4] what its gradient takes: max_s, ratio, max_t, scale.
  m.def(
      "spatial_kl_" MEDKD_BACKEND "(Tensor student, Tensor teacher, Tensor? mask, float temperature, str reduction) "
      "-> (Tensor loss, Tensor rows)");
  m.def(
      "spatial_kl_backward_" MEDKD_BACKEND "(Tensor student, Tensor teacher, Tensor? mask, Tensor rows, Tensor upstream, "
      "float temperature) -> Tensor gradient");
  // Sums over all pixels [2 + 5C]; from them the loss, its parts, in float if `single`, and what the gradient takes,
  // [1 + 4C]. All else is double.
  m.def(
      "class_pearson_" MEDKD_BACKEND "(Tensor student, Tensor teacher, Tensor? target, float temperature, "
      "int ignore_index) -> Tensor sums");
  m.def(
      "class_pearson_terms_" MEDKD_BACKEND "(Tensor sums, float inter_weight, float intra_weight, float temperature, "
      "bool single) -> (Tensor loss, Tensor inter, Tensor intra, Tensor coefficients)");
  m.def(
      "class_pearson_backward_" MEDKD_BACKEND "(Tensor student, Tensor teacher, Tensor? target, Tensor coefficients, "
      "Tensor upstream, float temperature, int ignore_index) -> Tensor gradient");
  // The relation matrix itself, [B, N, N], in the type of the arithmetic.
  m.def("pixel_affinity_" MEDKD_BACKEND "(Tensor x, str relation) -> Tensor affinity");
  m.def("pixel_affinity_backward_" MEDKD_BACKEND "(Tensor x, Tensor upstream, str relation) -> Tensor gradient");
  // Outputs: the map [B, *S] in the type of the arithmetic, and the norms that its images were divided by, [B], double.
  m.def(
      "attention_map_" MEDKD_BACKEND "(Tensor x, Tensor? mask, float power) -> (Tensor map, Tensor norms)");
  m.def(
      "attention_map_backward_" MEDKD_BACKEND "(Tensor x, Tensor? mask, Tensor map, Tensor norms, Tensor upstream, float power) "
      "-> Tensor gradient");
  // Outputs: means [B, K, C] in the type of the arithmetic, and the numbers of pixels [B, K], int64.
  m.def(
      "class_means_" MEDKD_BACKEND "(Tensor x, Tensor target, int num_classes, int ignore_index) "
      "-> (Tensor means, Tensor counts)");
  m.def(
      "class_means_backward_" MEDKD_BACKEND "(Tensor x, Tensor target, Tensor counts, Tensor upstream, int ignore_index) "
      "-> Tensor gradient");
  // Outputs: both numbers, []; the student's map [B, *S], the norms of its energies [B], double, and the numbers of pixels [B, K],
  // int64; the gradients of the numbers for the map [B, *S] and for the student's class means [B, K, C], in the type of the
  // arithmetic. Student and teacher are both double, or neither is.
  m.def(
      "importance_and_affinity_" MEDKD_BACKEND "(Tensor student, Tensor teacher, Tensor target, int num_classes, float power, "
      "int ignore_index) -> (Tensor importance, Tensor affinity, Tensor map, Tensor norms, Tensor counts, Tensor of_map, "
      "Tensor of_means)");
  m.def(
      "importance_and_affinity_backward_" MEDKD_BACKEND "(Tensor student, Tensor target, Tensor map, Tensor norms, "
      "Tensor counts, Tensor of_map, Tensor of_means, Tensor v_importance, Tensor v_affinity, float power, int ignore_index) "
      "-> Tensor gradient");
  // Outputs: the map [B, *S]; prototypes [B, K, C], numbers of pixels [B, K] and 1 / max(norm, 1e-8) of every pixel [B, *S].
  m.def(
      "class_similarity_" MEDKD_BACKEND "(Tensor x, Tensor target, int num_classes, int ignore_index) "
      "-> (Tensor similarity, Tensor means, Tensor counts, Tensor inverse)");
  m.def(
      "class_similarity_backward_" MEDKD_BACKEND "(Tensor x, Tensor target, Tensor similarity, Tensor means, Tensor counts, "
      "Tensor inverse, Tensor upstream, int ignore_index) -> Tensor gradient");
  // Sums over all pixels [1 + 5C]; from them the loss, in float if `single`, and what the gradient takes, [4C]: factors of the
  // student and the teacher, and their means. All else is double.
  m.def("standardised_mse_" MEDKD_BACKEND "(Tensor student, Tensor teacher, Tensor? mask) -> Tensor sums");
  m.def(
      "standardised_mse_terms_" MEDKD_BACKEND "(Tensor sums, bool single) -> (Tensor loss, Tensor coefficients)");
  m.def(
      "standardised_mse_backward_" MEDKD_BACKEND "(Tensor student, Tensor teacher, Tensor? mask, Tensor coefficients, "
      "Tensor upstream) -> Tensor gradient");
  // Outputs: the maxima [B, C, *P] in x's type, and of each its pixel's place in the window, in the order of a contiguous
  // window, or -1 where no pixel counts, int16.
  m.def("max_pool_" MEDKD_BACKEND "(Tensor x, Tensor? mask, int[] window) -> (Tensor pooled, Tensor place)");
  m.def(
      "max_pool_backward_" MEDKD_BACKEND "(Tensor x, Tensor place, Tensor upstream, int[] window) -> Tensor gradient");
  // Outputs: the averages [B, C, *P] in the type of the arithmetic, and of each window the number of pixels that count, int32.
  m.def("average_pool_" MEDKD_BACKEND "(Tensor x, Tensor? mask, int[] window) -> (Tensor pooled, Tensor number)");
  m.def(
      "average_pool_backward_" MEDKD_BACKEND "(Tensor x, Tensor? mask, Tensor number, Tensor upstream, int[] window) "
      "-> Tensor gradient");
  // gradient *= upstream * scale, in place, in the type of the arithmetic.
  m.def("scale_gradient_" MEDKD_BACKEND "(Tensor(a!) gradient, Tensor upstream, Tensor scale) -> ()");
}
