// The vectorised loops of every operator and the choice among their builds.
//
// loops.cpp is compiled once for each instruction set, with nothing of torch or the C++ library's templates in it, and
// hands out a table of functions; isa.cpp picks the table for the machine when the library is loaded. Everything that
// crosses this border is plain data.
#pragma once

#include "../types.h"

namespace medkd {

// One spatial axis along which the student is upsampled (linear, align_corners=False): full[i] lies between
// low[lower[i]] and low[lower[i] + 1] with weight upper_weight[i] for the latter.
struct Axis {
  int64_t full, low;
  const int32_t* lower;        // [full]
  const double* upper_weight;  // [full]
};

// A band matrix by 16 outputs at a time: output 16 q + o is the sum over k of weight[q][k][o] * input[first[q] + k].
struct Band {
  int64_t chunks, depth;
  const int32_t* first;   // [chunks]
  const double* weight;   // [chunks, depth, 16]
};

constexpr int max_terms = 3;  // decoupled_kl: loss, target part, non-target part; class_kl: loss

struct PixelLoss {
  Planes student;   // [B, C, N], or [B, C, low pixels] when it is upsampled
  Planes teacher;   // [B, C, N]
  Planes gradient;  // like the student; data == nullptr: only the value is wanted
  const void* target;  // [B, N] or nullptr
  Type target_type;
  const void* weight;  // [B, N] in the type of the arithmetic, or nullptr
  void* per_pixel[max_terms];  // [B, N] each, in the type of the arithmetic, or nullptr
  double target_weight, nontarget_weight, temperature;
  int64_t ignore_index, images, classes, pixels;
  // Upsampling only. Lines run along the last axis; a line has index z * H + y.
  bool upsampled;
  Axis z, y;
  int64_t width, low_width;
  Band along, back;  // from a low-resolution line to a line, and the adjoint
};

struct PixelSums {
  double term[max_terms];
  double denominator;      // sum of the valid pixels' weights
  int64_t bad_label;       // a label outside [0, C) that is not ignore_index
  bool has_bad_label;
};

// A range of pixels of one image.
struct PixelRange {
  int64_t image, begin, end;
};

// A range of full-resolution indices along the slab axis (z in 3-D, y in 2-D) and the low-resolution lines it touches.
struct Slab {
  int64_t image, begin, end, low_begin, low_end;
  void* gradient;  // [low lines, C, low x] in the type of the arithmetic; nullptr: only the value is wanted
};

struct PixelLoops {
  void (*range)(const PixelLoss&, const PixelRange&, PixelSums&);
  void (*slab)(const PixelLoss&, const Slab&, PixelSums&);
};

// channel_relation and pixel_relation. A mask of 0 takes a pixel out.
struct Relation {
  Planes student;       // [B, student channels, N]
  Planes teacher;       // [B, teacher channels, N]
  Planes gradient;      // like the student; in the backward only
  const uint8_t* mask;  // [B, N] or nullptr
  int64_t student_channels, teacher_channels, pixels;
  PixelRows rows;  // pixel_relation only
  // channel relations only; the shifts are [B, C] in the type of the arithmetic, and only in the forward
  Features features;
  const void* student_shift;
  const void* teacher_shift;
  double inverse_temperature;  // and of spatial_kl
};

// A range of one image's pixels, taken `block` at a time, and a range of the rows of the matrix of sums.
struct RelationPart {
  int64_t image, begin, end, block, first_row, last_row;
};

template <typename A>
struct RelationLoops {
  // sums += products of every two rows, summed over the pixels
  void (*sums)(const Relation&, const RelationPart&, double* sums);
  // gradient = factor * what the matrix makes of the pixels; it uses no rows
  void (*gradient)(const Relation&, const RelationPart&, const A* matrix, A factor);
};

// Normalised features in panels of 64 pixels, zeros behind the last pixel and at those that the mask leaves out, and
// what they came from.
constexpr int64_t panel_pixels = 64;

template <typename A>
struct Panels {
  A* rows;       // [images, panels, channels, 64]
  A* inverse;    // [images, panels, 64] and turns: see PixelNorm
  A* turns;
  int64_t channels;
};

// Two ranges of panels, counted over all images; every pair of their pixels is looked at once. The same range twice: every
// pair of panels in it.
struct PanelPair {
  int64_t first_i, last_i, first_j, last_j;
};

// What a row of relations leaves behind, one array of each for the rows of a range of pixels: the logits' maxima, the
// sums of e^(logit - maximum), and the sum of the teacher's e^(..) times the logits' differences.
struct RowSums {
  double *max_s, *sum_s, *max_t, *sum_t, *weighted;
};

// The factors of a row's softmax in the gradient: the logits' maxima and (upstream factor) / (sum of exponentials).
template <typename A>
struct RowFactors {
  const A *max_s, *inverse_s, *max_t, *inverse_t;
  A factor;
};

template <typename A>
struct PixelPairs {
  const A* student;  // Panels::rows
  const A* teacher;
  const A* valid;  // [images, panels, 64]: 1 or 0
  int64_t student_channels, teacher_channels;
  A scale;           // 1 / temperature
  bool bounded;      // logits are at most `scale`, and e^(-2 scale) is a normal number: `scale` serves as every maximum
};

template <typename A>
struct PixelPairLoops {
  // panels [first, last) of an image
  void (*load)(const Relation&, const Planes& x, const Panels<A>&, int64_t image, int64_t first, int64_t last);
  // rows_i and rows_j start at the pixels of first_i and first_j
  void (*sums)(const PixelPairs<A>&, const PanelPair&, const RowSums& rows_i, const RowSums& rows_j);
  // adds to the gradient of the normalised student, laid out as Panels::rows
  void (*gradient)(const PixelPairs<A>&, const PanelPair&, const RowFactors<A>& rows_i, const RowFactors<A>& rows_j,
                   A* gradient);
  // the relations of a range of pairs of one image, [pixels, pixels], and from a gradient of that shape the one for the
  // normalised features
  void (*relations)(const A* rows, int64_t channels, int64_t pixels, const PanelPair&, A* out);
  void (*relations_gradient)(const A* rows, int64_t channels, int64_t pixels, const PanelPair&, const A* v_relations,
                             A* gradient);
  // takes the gradient through the normalisation and stores it
  void (*store)(const Relation&, const Panels<A>&, int64_t image, int64_t first, int64_t last, A* gradient);
};

template <typename A>
struct ChannelLoops : RelationLoops<A> {
  // What the channels of x, the student or the teacher, are shifted by, [C]: nearly their means over the `valid` pixels
  // that count, or their maxima over a part.
  void (*sample_mean)(const Relation&, const Planes& x, int64_t image, int64_t valid, A* shift);
  void (*highest)(const Relation&, const Planes& x, const RelationPart&, A* highest);
};

template <typename A>
struct SpatialLoops {
  // what a part of the pixels leaves behind of every channel, five numbers each
  void (*sums)(const Relation&, const RelationPart&, double* pieces);
  // from four factors a channel, [images, C, 4], and the upstream gradient of each or, where the step is 0, of all
  void (*gradient)(const Relation&, const RelationPart&, const A* rows, const A* upstream, int64_t upstream_step);
};

template <typename A>
struct PearsonLoops {
  void (*sums)(const PixelLoss&, const PixelRange&, double* sums);
  void (*gradient)(const PixelLoss&, const PixelRange&, const double* coefficients, A factor);
};

// class_means and class_similarity.
struct ClassFeatures {
  PixelLoss map;  // student: the features; their gradient; the labels, of `classes` classes
  int64_t channels;
};

// Tables of classes and of sums by class, see class_sums.h: where behind the channels of a row the other numbers of the class
// are, and how long a row is.
constexpr int64_t class_columns(int64_t channels) { return (channels + 15) / 16 * 16; }
constexpr int64_t class_ld(int64_t channels) { return class_columns(channels) + 16; }

template <typename A>
struct ClassMeansLoops {
  void (*sums)(const ClassFeatures&, const PixelRange&, double* sums, PixelSums& bad);
  void (*gradient)(const ClassFeatures&, const PixelRange&, const A* table);
};

// What class_similarity keeps of pixels, and what arrives for them; each [B, N].
template <typename A>
struct SimilarityMaps {
  const A *similarity, *inverse, *upstream;
};

template <typename A>
struct ClassSimilarityLoops {
  void (*similarity)(const ClassFeatures&, const PixelRange&, const A* prototypes, A* similarity, A* inverse);
  void (*sums)(const ClassFeatures&, const PixelRange&, const SimilarityMaps<A>&, double* sums);
  void (*gradient)(const ClassFeatures&, const PixelRange&, const A* prototypes, const A* rest, const SimilarityMaps<A>&);
};

template <typename A>
struct StandardisedLoops {
  // adds to five sums of every channel from first_row to last_row, [5, C]
  void (*sums)(const Relation&, const RelationPart&, double* sums);
  // from three factors a channel, [3, C]
  void (*gradient)(const Relation&, const RelationPart&, const double* of_channels);
};

// attention_map. A mask of 0 takes a pixel out.
struct Attention {
  Planes x;             // [B, C, N]
  Planes gradient;      // like x; in the backward only
  const uint8_t* mask;  // [B, N] or nullptr
  int64_t channels, pixels;
  double power;
};

constexpr int64_t attention_block = 1024;  // the most pixels of a range

template <typename A>
struct AttentionLoops {
  // the energies of a range's pixels, and the sum of their squares
  void (*energies)(const Attention&, const PixelRange&, A* energies, double* squares);
  // x[k] = factor * x[k]
  void (*normalise)(A* x, int64_t count, double factor);
  // sum of a[k] * b[k]
  void (*product)(const A* a, const A* b, int64_t count, double* sum);
  // of the image's map and the gradient that arrives for it, [N] each, and their product
  void (*gradient)(const Attention&, const PixelRange&, const A* map, const A* upstream, double norm, double product);
};

// importance_and_affinity: of class_means' features, in their terms.
template <typename A>
struct ImportanceLoops {
  void (*sums)(const ClassFeatures&, double power, const PixelRange&, A* energies, double* squares, double* sums,
               PixelSums& bad);
  // the student's energies become its map: times a factor, as the teacher's, of which only their difference is wanted; of_map =
  // twice that times `share`, squares: the sum of its squares
  void (*compare)(A* student, double of_student, const A* teacher, double of_teacher, int64_t count, double share, A* of_map,
                  double* squares);
  // `weight`: what `upstream` is multiplied by; `product` is without it
  void (*gradient)(const ClassFeatures&, double power, const PixelRange&, const A* map, const A* upstream, double weight,
                   double norm, double product, const A* table);
};

// max_pool and average_pool. Sizes are along z, y and x; 1 along an axis that is not there.
struct Pool {
  Planes x;               // [B, C, N]; its gradient in the backward
  void* pooled;           // [B, C, windows]; the upstream gradient in the backward
  int16_t* place;         // [B, C, windows], of a maximum
  int32_t* number;        // [B, windows], of the pixels that an average is of
  const uint8_t* mask;    // [B, N] or nullptr
  const int64_t* offset;  // in pixels from a window's first, by place; in max_pool's backward only
  int64_t channels, pixels, windows;
  int64_t size[3], window[3], pooled_size[3];
  bool channels_inside;  // in memory
  int64_t part;          // windows along x that are worked on at a time
};

// Parts [begin, end) of all images' lines of windows.
using PoolLoop = void (*)(const Pool&, int64_t begin, int64_t end);

struct MaxPoolLoops {
  PoolLoop values, gradient;
};

struct AveragePoolLoops {
  PoolLoop number;  // of the images' windows alone, whatever the channels
  PoolLoop values, gradient;
};

template <typename A>
struct Loops {
  PixelLoops decoupled_kl, class_kl;
  ChannelLoops<A> channel_relation;
  RelationLoops<A> pixel_relation;
  PixelPairLoops<A> pixel_pairs;
  SpatialLoops<A> spatial_kl;
  PearsonLoops<A> class_pearson;
  StandardisedLoops<A> standardised_mse;
  ClassMeansLoops<A> class_means;
  ClassSimilarityLoops<A> class_similarity;
  AttentionLoops<A> attention_map;
  ImportanceLoops<A> importance_and_affinity;
  // x[image, :, first + p] = in[:, p]
  void (*store_line)(const Planes& x, int64_t image, int64_t first, int64_t channels, int64_t length, const A* in);
  // x[k] *= factor over `count` elements in memory order
  void (*scale)(void* x, Type type, int64_t count, A factor);
};

struct LoopTable {
  const char* name;
  Loops<float> single;
  Loops<double> twice;
  MaxPoolLoops max_pool;
  AveragePoolLoops average_pool;
};

const LoopTable& loop_table();

template <typename A>
const Loops<A>& loops();
template <>
inline const Loops<float>& loops<float>() {
  return loop_table().single;
}
template <>
inline const Loops<double>& loops<double>() {
  return loop_table().twice;
}

}  // namespace medkd
