// Operators that importance_and_affinity is made of. Arguments and results as those in csrc/schema.cpp.
#pragma once

#include "tensor.h"

namespace medkd {

std::tuple<Tensor, Tensor> attention_map(const Tensor& x, const std::optional<Tensor>& mask, double power);

// class_means, with zeros behind the last channel: means [B, K, width].
std::tuple<Tensor, Tensor> wide_class_means(const Tensor& x, const Tensor& target, int64_t num_classes, int64_t ignore_index,
                                            int64_t width);

std::tuple<Tensor, Tensor> channel_relation(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& mask,
                                            const std::string& relation, const std::string& divergence, double temperature,
                                            const std::string& reduction);

}  // namespace medkd
