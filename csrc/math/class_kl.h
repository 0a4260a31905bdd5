// The mathematics of one pixel of KL(softmax(teacher), softmax(student)) is that of decoupled_kl's non-target part over
// all classes: `weighted_difference` and `divergence` with maxima and sums over every class; the gradient with respect
// to a logit is scale * (e_s / sum_s - e_t / sum_t).
#pragma once

#include "decoupled_kl.h"
