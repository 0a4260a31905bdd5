// The loops of every operator for one instruction set: compiled with -DMEDKD_ISA=<namespace> and its flags.
#include "attention_map.h"
#include "average_pool.h"
#include "channel_relation.h"
#include "class_kl.h"
#include "class_means.h"
#include "class_pearson.h"
#include "class_similarity.h"
#include "decoupled_kl.h"
#include "importance_and_affinity.h"
#include "max_pool.h"
#include "pixel_pairs.h"
#include "pixel_relation.h"
#include "spatial_kl.h"
#include "standardised_mse.h"

namespace medkd {
namespace MEDKD_ISA {

#define MEDKD_STRING(x) #x
#define MEDKD_NAME(x) MEDKD_STRING(x)

template <typename A>
constexpr Loops<A> loops_of() {
  return {pixel_loops<DecoupledKL, A>(),
          pixel_loops<ClassKL, A>(),
          {{channel_sums<A>, channel_gradient<A>}, channel_sample_mean<A>, channel_highest<A>},
          {pixel_sums<A>, pixel_gradient<A>},
          {load_panels<A>, pair_sums<A>, pair_gradient<A>, pair_relations<A>, pair_relations_gradient<A>, store_panels<A>},
          {spatial_sums<A>, spatial_gradient<A>},
          {pearson_sums<A>, pearson_gradient<A>},
          {standardised_sums<A>, standardised_gradient<A>},
          {class_feature_sums<A>, class_means_gradient<A>},
          {similarity_of_pixels<A>, similarity_sums<A>, similarity_gradient_of_pixels<A>},
          {attention_energies<A>, attention_normalise<A>, attention_product<A>, attention_gradient<A>},
          {importance_and_class_sums<A>, importance_compare<A>, importance_and_affinity_gradient<A>},
          store_line<A>,
          scale<A>};
}

const LoopTable& table() {
  static constexpr LoopTable loops = {MEDKD_NAME(MEDKD_ISA), loops_of<float>(), loops_of<double>(),
                                      {max_pool<false>, max_pool<true>},
                                      {average_pool_number, average_pool<false>, average_pool<true>}};
  return loops;
}

}  // namespace MEDKD_ISA
}  // namespace medkd
