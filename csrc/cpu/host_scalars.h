// What the CPU's operators read from tensors of one element.
#pragma once

#include <optional>

#include "../arguments.h"

namespace pace {

inline float read_one(const std::optional<Tensor>& t, float otherwise) {
  return t ? *static_cast<const float*>(t->data_ptr()) : otherwise;
}

// What the gradient is multiplied with: clip coefficient / gradient scale, rounded once.
inline float grad_factor(const GradScaling& s) { return read_one(s.clip_coef, 1.0f) / read_one(s.grad_scale, 1.0f); }

inline bool skipped(const std::optional<Tensor>& found_inf) { return read_one(found_inf, 0.0f) != 0.0f; }

inline double read_lr(const std::optional<Tensor>& lr, double otherwise) { return lr ? read_number(*lr) : otherwise; }

}  // namespace pace
