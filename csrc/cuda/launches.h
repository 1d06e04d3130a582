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

// One thread a tensor: advances its step count and computes its scalars.
template <class Rule>
struct ScalarsLaunch {
  static constexpr int kCapacity = 2000;
  StepAddress step[kCapacity];
  double* row[kCapacity];       // the few numbers that a tensor keeps; null where it keeps none
  typename Rule::Scalars* out;  // of the first of these tensors
  const float* found_inf;       // may be null, as in every launch
  FactorSource factor;
  LrSource lr;
  typename Rule::D::Options options;
  const double* numbers;  // MADA's coefficients, the schedule; may be null
  double steps_taken;     // of those on the host
  int32_t tensors;
};

// ---- sweeps ---------------------------------------------------------------------------------------------------------

// The formats of a tensor's operands, 4 bits each.
using Formats = uint64_t;
PACE_RULE Format format_at(Formats formats, int operand) { return static_cast<Format>(formats >> (4 * operand) & 15u); }

// Operands that every step reads, or writes, and those that only some do (`When` in sweep.cuh): a bit each.
struct UsesAtLaunch {
  uint16_t in_every, in_some;

  PACE_ON_BOTH bool always(int k) const { return (in_every >> k & 1) != 0; }
  PACE_ON_BOTH bool sometimes(int k) const { return (in_some >> k & 1) != 0; }
};

// The launch of every sweep: a table of tensors whose rows are the operands' arrays. No template: the plan fills it for
// every rule by the same code, in place, and a kernel, which knows at compile time how many rows its rule has in play,
// reads the places of `tensors` alone.
struct SweepLaunch {
  static constexpr int kSlots = 4000;
  static constexpr size_t kScalarBytes = 400;
  static constexpr int kHeadRows = 2;  // number of elements; first block

  uint64_t slot[kSlots];                           // row r of tensor i: slot[r * capacity(arrays) + i]
  alignas(8) unsigned char scalars[kScalarBytes];  // of all tensors, where they are not on the device
  const void* device_scalars;                      // of the first tensor of this launch; null: `scalars`
  const float* found_inf;
  void* sums;  // of the first block of this launch
  int32_t tensors;
  uint32_t now;  // the rule's switches that are known at launch, not at compile time
  // Of a general sweep (general.cuh) the formats and the rule's flags, too, and what a step with these does.
  uint32_t flags;
  UsesAtLaunch reads, writes;
  Formats formats;

  static constexpr int capacity(int arrays) { return kSlots / (kHeadRows + arrays); }
};
static_assert(sizeof(SweepLaunch) <= kParameterBytes);

// A sweep of operands in codes has a row for each operand, and behind these a row for what lies beside each, null where
// that is nothing.
template <class D>
constexpr int coded_capacity = SweepLaunch::capacity(2 * D::kOperands);
// Of PACE's (coded.cuh) `now` has the formats, and behind these the rule's flags.
constexpr int kCodedBeside = PaceDefinition::kOperands;
constexpr int kCodedCapacity = coded_capacity<PaceDefinition>;
PACE_RULE uint32_t coded_now(Formats formats, unsigned flags) {
  return static_cast<uint32_t>(formats) | flags << (4 * kCodedBeside);
}
// The kernels count elements by fours, PACE's by eights, in 32 bits.
constexpr int64_t kMostCoded = int64_t{1} << 34;
PACE_RULE unsigned flags_of(uint32_t now) { return now >> (4 * kCodedBeside); }

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

// Of more sums than a launch has room for, each launch hands its total to the next, which goes on adding: the same
// additions in the same order. The last one learns.
struct LearnLaunch {
  static constexpr int kCapacity = 3000;
  const double* sums[kCapacity];
  const double* before;  // null: 0
  double* total;         // null: learn
  double *coefficients, *momenta, *hypergradients, *hyper_step;
  const float* found_inf;
  HyperOptions options[kCoefficients];
  double warmup;
  int64_t learn;
  int32_t calls;  // how many sums there are
};
static_assert(sizeof(LearnLaunch) <= kParameterBytes);

// ---- which kernel ---------------------------------------------------------------------------------------------------

enum class KernelKind : int32_t { kScalars, kSweep, kCoded, kSum, kLearn };
enum class RuleName : int32_t { kPace, kMada, kPullback, kScheduleFree };

// A sweep's instance: formats of weights and of what lies beside them in a format of its own, the gradients or the
// pullback's second moment; and the rule's flags. A sweep of codes: PACE's (coded.cuh) formats of weights and averages,
// and whether it is compiled for these, or for all; a general one (general.cuh) the group of its flags. Others have
// none of these.
struct KernelId {
  KernelKind kind;
  RuleName rule;
  Format x = Format::kFloat32, g = Format::kFloat32;
  unsigned flags = 0;
  Format e = Format::kFloat32;
  bool known = false;
  int group = 0;
};

}  // namespace pace
