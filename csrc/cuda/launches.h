// What the kernels are launched with: plain structs, passed by value. A launch does a table of tensors; block b finds
// its tensor by the running count of blocks. The plan (plan.h) fills them, the kernels (*.cu) read them, and the tests
// pass their bytes to the kernels' PTX.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../scalars.h"
#include "../stats.h"

namespace pace {

constexpr int kThreads = 128;
// Elements of a block: 8 rounds of 128 threads x 4 float32, 4 rounds of 8 of a 16-bit format. 32 M parameters are 8,192
// blocks, some 15 waves of an H100's 132 SMs with 4 blocks each, so that the last wave costs little; and finding its
// tensor and its scalars costs a block little beside 150 to 260 KB of operands.
constexpr int64_t kChunk = 4096;
// The parameters of a kernel since CUDA 12.1 (driver 530) on compute capability 7.0 and up.
constexpr size_t kParameterBytes = 32764;
constexpr int32_t kMaxBlocks = 1 << 30;  // of a launch, below the grid's 2^31 - 1

// A learning rate: a number, or on the device.
struct LrSource {
  double value;
  const void* address;  // null: the number
  int32_t is_double;    // what lies there: float64 or float32
};

// Multiplies the gradient: *clip_coef / *grad_scale, each 1 where it is null.
struct FactorSource {
  const float* grad_scale;
  const float* clip_coef;
};

// A step count: on the device, where the lowest bit of the address says that it is float64, not float32; or, with none,
// the host's, which comes beside it.
struct StepAddress {
  uintptr_t tagged;

  bool on_device() const { return tagged != 0; }
};

// ---- scalars on the device ------------------------------------------------------------------------------------------

struct PaceStepScalars {
  PaceScalars rule;
  PaceStatScalars stat;
};

struct MadaStepScalars {
  MadaScalars now, last;  // of the new step, and of the one that is redone, where there is one
  PaceScalars pull;
  MadaCoefficients factors;
  int32_t first;  // no last gradient was kept yet
};

struct PullbackStepScalars {
  PullbackScalars rule;
  PaceStatScalars stat;
};

// One thread a tensor: advances its step count and computes its scalars.
struct PaceScalarsLaunch {
  static constexpr int kCapacity = 4000;
  StepAddress step[kCapacity];
  PaceStepScalars* out;  // of the first of these tensors
  const float* found_inf;
  FactorSource factor;
  LrSource lr;
  PaceOptions options;
  double steps_taken;  // of those on the host
  int32_t tensors;
};
static_assert(sizeof(PaceScalarsLaunch) <= kParameterBytes);

struct MadaScalarsLaunch {
  static constexpr int kCapacity = 2000;
  StepAddress step[kCapacity];
  double* last[kCapacity];  // last_scalars; null where no gradient is kept
  MadaStepScalars* out;
  const float* found_inf;
  FactorSource factor;
  LrSource lr;
  MadaOptions options;
  const double* coefficients;  // those that `learn` names
  double steps_taken;          // of those on the host
  int32_t tensors;
};
static_assert(sizeof(MadaScalarsLaunch) <= kParameterBytes);

struct PullbackScalarsLaunch {
  static constexpr int kCapacity = 4000;
  StepAddress step[kCapacity];
  PullbackStepScalars* out;
  const float* found_inf;
  LrSource lr;
  PullbackOptions options;
  double steps_taken;  // of those on the host
  int32_t tensors;
};
static_assert(sizeof(PullbackScalarsLaunch) <= kParameterBytes);

struct ScheduleFreeScalarsLaunch {
  static constexpr int kCapacity = 4000;
  StepAddress step[kCapacity];
  ScheduleFreeScalars* out;
  const float* found_inf;
  FactorSource factor;
  LrSource lr;
  ScheduleFreeOptions options;
  const double* schedule;  // in place of count and share; may be null
  double steps_taken;      // of those on the host
  int32_t tensors;
};
static_assert(sizeof(ScheduleFreeScalarsLaunch) <= kParameterBytes);

// ---- sweeps ---------------------------------------------------------------------------------------------------------

// The tensors of a launch: how many blocks come before each, and how many elements each has.
template <int kCapacity>
struct Table {
  int64_t numel[kCapacity];
  int32_t first_block[kCapacity];
  int32_t tensors;
};

struct PaceRow {
  double stats[kPaceStats];
};

struct PaceLaunch {
  static constexpr int kCapacity = 620;
  void* x[kCapacity];
  const void* g[kCapacity];
  float *m[kCapacity], *v[kCapacity], *e[kCapacity];
  Table<kCapacity> table;
  PaceStepScalars scalars;                // of all tensors, where they are not on the device
  const PaceStepScalars* device_scalars;  // of the first tensor of this launch; null: `scalars`
  const float* found_inf;                 // may be null, as in every launch
  PaceRow* rows;                          // of the first block of this launch
};
static_assert(sizeof(PaceLaunch) <= kParameterBytes);

struct MadaRow {
  double sums[kCoefficients];
};

struct MadaLaunch {
  static constexpr int kCapacity = 350;
  void* x[kCapacity];
  const void* g[kCapacity];
  float *m[kCapacity], *n[kCapacity], *v[kCapacity], *w[kCapacity], *l[kCapacity];
  float *last_g[kCapacity], *older_g[kCapacity], *e[kCapacity];
  Table<kCapacity> table;
  MadaStepScalars scalars;
  const MadaStepScalars* device_scalars;
  const float* found_inf;
  MadaRow* rows;
  int32_t pull;        // 1: the average pulls, also in a step in which it rests
  int32_t roles_stay;  // 1: last_g gets the new gradient and older_g the last one; 0: the new one goes over the older
};
static_assert(sizeof(MadaLaunch) <= kParameterBytes);

struct PullbackLaunch {
  static constexpr int kCapacity = 730;
  void* x[kCapacity];
  const void *before[kCapacity], *v[kCapacity];
  float* e[kCapacity];
  Table<kCapacity> table;
  PullbackStepScalars scalars;
  const PullbackStepScalars* device_scalars;
  const float* found_inf;
  PaceRow* rows;
};
static_assert(sizeof(PullbackLaunch) <= kParameterBytes);

struct ScheduleFreeLaunch {
  static constexpr int kCapacity = 740;
  void* y[kCapacity];
  const void* g[kCapacity];
  float *v[kCapacity], *z[kCapacity];
  Table<kCapacity> table;
  ScheduleFreeScalars scalars;
  const ScheduleFreeScalars* device_scalars;
  const float* found_inf;
};
static_assert(sizeof(ScheduleFreeLaunch) <= kParameterBytes);

// ---- sums of blocks -------------------------------------------------------------------------------------------------

constexpr int kSumThreads = 128;
constexpr int64_t kRowsPerBlock = 1024;

// Adds up rows, kRowsPerBlock of them a block, always in the same order. `out` null: the last of such launches, of one
// block, which writes `result`. Where the step is skipped there are no rows.
template <class Row>
struct SumLaunch {
  const Row* rows;
  Row* out;
  double* result;
  int64_t count;
  const float* found_inf;
  LrSource lr;    // MADA's: follows the sums, 0 where the step is skipped
  int64_t learn;  // MADA's: sums of coefficients that are not learned come out as 0
};

// ---- learning -------------------------------------------------------------------------------------------------------

struct LearnLaunch {
  static constexpr int kCapacity = 3000;
  const double* sums[kCapacity];
  double *coefficients, *momenta, *hypergradients, *hyper_step;
  const float* found_inf;
  HyperOptions options[kCoefficients];
  double warmup;
  int64_t learn;
  int32_t calls;  // how many sums there are
};
static_assert(sizeof(LearnLaunch) <= kParameterBytes);

// ---- which kernel ---------------------------------------------------------------------------------------------------

enum class KernelFamily : int32_t {
  kPaceScalars,
  kPace,
  kPaceSum,
  kMadaScalars,
  kMada,
  kMadaSum,
  kLearn,
  kPullbackScalars,
  kPullback,
  kScheduleFreeScalars,
  kScheduleFree,
};

// A sweep's instance: formats of weights and gradients, and the rule's flags. Others have none of these. The pullback
// reads no gradient: `g` is the format of the second moment, and of the weights where there is none.
struct KernelId {
  KernelFamily family;
  Format x = Format::kFloat32, g = Format::kFloat32;
  bool moment = false, pull = false, average = false, stats = false;           // PACE's
  bool before = false;                                                         // the pullback's, with three of PACE's
  bool lag = false, diff = false, second = false, lion = false, adam = false;  // MADA's
};

}  // namespace pace
