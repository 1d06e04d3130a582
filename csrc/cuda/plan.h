// From an operator's tensors to the launches of its kernels: plain C++ without CUDA and without torch, so that the
// tests run it too and give its launches to the kernels' PTX.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "rules.h"

namespace pace {

// Takes a launch: the kernel and its struct, which is filled anew for the next one.
using Emit = std::function<void(const KernelId&, int64_t blocks, int threads, const void* parameters, size_t bytes)>;

// Gives memory on the device, aligned to 16 bytes, that lives until the launches have run. It need not be cleared.
using Workspace = std::function<void*(size_t bytes)>;

// One tensor of a call. Addresses are on the device, of consecutive elements, in the order of the definition's
// operands; null where an operand is not in play, and, as torch has it, where there are no elements.
struct SweepTensor {
  static constexpr int kOperands = 10;
  void* array[kOperands];
  void* beside[kOperands];  // what lies beside operands in codes
  Formats formats;
  Format x, g;  // as KernelId has them
  int64_t numel;
  StepAddress step;
  double steps_taken;  // before this step, where the count is the host's
  double* row;         // the few numbers that it keeps; null: none
};

// Whether operand k in this format takes a sweep of codes: a state of a plain sweep is in float32.
template <class D>
bool lies_coded(int k, Format format) {
  const bool state = D::kLists[k].codec != Codec::none && D::kLists[k].role == Role::state;
  return state ? format != Format::kFloat32 : is_coded(format);
}

// What the tensors of a call share. Addresses are on the device.
template <class Rule>
struct StepRequest {
  typename Rule::D::Options options;
  unsigned lists;  // those that the call has, a bit an operand
  LrSource lr;
  FactorSource factor;
  const float* found_inf;
  const double* numbers;  // Rule::kNumbers; may be null
  double* result;         // of the sums, Rule::kResult; may be null
};

// Scalars are computed on the host, tensors of the same step count share a launch; or, where a step count, the learning
// rate, what scales the gradient or a coefficient is on the device, there, and launches are cut by formats alone.
template <class Rule>
void plan_step(const std::vector<SweepTensor>& tensors, const StepRequest<Rule>& request, const Workspace& workspace,
               const Emit& emit);

struct LearnRequest {
  std::vector<const double*> sums;
  double *coefficients, *momenta, *hypergradients, *hyper_step;
  const float* found_inf;
  HyperOptions options[kCoefficients];
  double warmup;
  int64_t learn;
};

void plan_learn(const LearnRequest& request, const Workspace& workspace, const Emit& emit);

}  // namespace pace
