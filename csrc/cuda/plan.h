// From an operator's tensors to the launches of its kernels: plain C++ without CUDA and without torch, so that the
// tests run it too and give its launches to the kernels' PTX.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "launches.h"

namespace pace {

struct KernelCall {
  KernelId id;
  int32_t blocks, threads;
  std::vector<uint8_t> parameters;  // the bytes of the launch's struct
};
using Plan = std::vector<KernelCall>;

// Gives memory on the device, aligned to 16 bytes, that lives until the launches have run. It need not be cleared.
using Workspace = std::function<void*(size_t bytes)>;

// One tensor of a call: addresses on the device, of consecutive elements; null where an operand is not in play, and, as
// torch has it, where there are no elements.
struct PaceTensor {
  void* x;
  const void* g;
  float *m, *v, *e;
  Format x_format, g_format;
  int64_t numel;
  StepAddress step;
  double steps_taken;  // before this step, where the count is the host's
};

struct MadaTensor {
  void* x;
  const void* g;
  float *m, *n, *v, *w, *l, *last_g, *older_g, *e;
  Format x_format, g_format;
  int64_t numel;
  StepAddress step;
  double steps_taken;
  double* last;  // last_scalars
};

struct PullbackTensor {
  void* x;
  const void *before, *v;
  float* e;
  Format x_format, g_format;  // g_format: of v, or x_format without one
  int64_t numel;
  StepAddress step;
  double steps_taken;
};

struct ScheduleFreeTensor {
  void* y;
  const void* g;
  float *v, *z;
  Format x_format, g_format;  // of y and g
  int64_t numel;
  StepAddress step;
  double steps_taken;
};

// What the tensors of a call share. Addresses are on the device.
struct StepRequest {
  LrSource lr;
  FactorSource factor;
  const float* found_inf;
  double* result;  // of the sums: PACE's statistics, which may be null, or MADA's hypergradients

  bool on_device() const {
    return lr.address != nullptr || factor.grad_scale != nullptr || factor.clip_coef != nullptr || found_inf != nullptr;
  }
};

struct PaceRequest {
  StepRequest step;
  PaceOptions options;
  bool average;  // an average is kept
};

// Scalars are computed on the host, tensors of the same step count share a launch; or, where a step count, the learning
// rate, what scales the gradient or a coefficient is on the device, there, and launches are cut by formats alone.
Plan plan_pace(const std::vector<PaceTensor>& tensors, const PaceRequest& request, const Workspace& workspace);

struct MadaRequest {
  StepRequest step;
  MadaOptions options;
  const double* coefficients;     // on the device: those that `learn` names
  bool diff, second, lion, adam;  // what is in play
  bool roles_stay;                // see MadaLaunch
};

Plan plan_mada(const std::vector<MadaTensor>& tensors, const MadaRequest& request, const Workspace& workspace);

struct PullbackRequest {
  StepRequest step;
  PullbackOptions options;
  bool before, moment;  // what is in play
};

Plan plan_pullback(const std::vector<PullbackTensor>& tensors, const PullbackRequest& request,
                   const Workspace& workspace);

struct ScheduleFreeRequest {
  StepRequest step;
  ScheduleFreeOptions options;
  const double* schedule;  // on the device: in place of count and share; may be null
};

Plan plan_schedule_free(const std::vector<ScheduleFreeTensor>& tensors, const ScheduleFreeRequest& request,
                        const Workspace& workspace);

struct LearnRequest {
  std::vector<const double*> sums;
  double *coefficients, *momenta, *hypergradients, *hyper_step;
  const float* found_inf;
  HyperOptions options[kCoefficients];
  double warmup;
  int64_t learn;
};

Plan plan_learn(const LearnRequest& request);

}  // namespace pace
