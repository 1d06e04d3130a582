// The small kernels: scalars on the device, sums over blocks, learning; and the launch itself.
#include <cuda_runtime.h>

#include <mutex>
#include <set>
#include <utility>

#include "sweep.cuh"

namespace pace {

template <class Rule>
__global__ void __launch_bounds__(kThreads) scalars_kernel(const __grid_constant__ ScalarsLaunch<Rule> launch) {
  const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (i >= launch.tensors || skipped(launch.found_inf)) return;
  const StepAddress step = launch.step[i];
  const double t = read(step, launch.steps_taken) + 1.0;
  typename Rule::D::Options options = launch.options;
  options.lr = read(launch.lr);
  typename Rule::Scalars& out = launch.out[i];
  clear_words(out);
  Rule::fill(out, options, t, read(launch.factor), launch.numbers, launch.row[i]);
  write(step, t);
}

__device__ __forceinline__ void clear(PaceRow& row) { clear_stats(row.values); }
__device__ __forceinline__ void merge(PaceRow& a, const PaceRow& b) { merge_stats(a.values, b.values); }
__device__ __forceinline__ void clear(MadaRow& row) {
  for (int k = 0; k < kCoefficients; ++k) row.values[k] = 0.0;
}
__device__ __forceinline__ void merge(MadaRow& a, const MadaRow& b) {
  for (int k = 0; k < kCoefficients; ++k) a.values[k] += b.values[k];
}

__device__ __forceinline__ void write_result(const SumLaunch<PaceRow>& launch, const PaceRow& row, bool) {
  for (int k = 0; k < kPaceStats; ++k) launch.result[k] = row.values[k];
}
__device__ __forceinline__ void write_result(const SumLaunch<MadaRow>& launch, const MadaRow& row, bool skip) {
  for (int k = 0; k < kCoefficients; ++k) launch.result[k] = (launch.learn >> k & 1) != 0 ? row.values[k] : 0.0;
  launch.result[kCoefficients] = skip ? 0.0 : read(launch.lr);
}

template <class Row>
__global__ void __launch_bounds__(kSumThreads) sum_kernel(const __grid_constant__ SumLaunch<Row> launch) {
  __shared__ Row rows[kSumThreads];
  const int thread = static_cast<int>(threadIdx.x);
  const bool skip = skipped(launch.found_inf);
  const int64_t begin = blockIdx.x * kRowsPerBlock, end = begin + kRowsPerBlock;
  const int64_t count = skip ? 0 : launch.count;
  Row mine;
  clear(mine);
  for (int64_t i = begin + thread; i < end && i < count; i += kSumThreads) merge(mine, launch.rows[i]);
  rows[thread] = mine;
  for (int half = kSumThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) merge(rows[thread], rows[thread + half]);
  }
  if (thread != 0) return;
  if (launch.out != nullptr) {
    launch.out[blockIdx.x] = rows[0];
  } else {
    write_result(launch, rows[0], skip);
  }
}

// One warp: a lane for each coefficient, and one for the learning rates.
__global__ void __launch_bounds__(32) learn_kernel(const __grid_constant__ LearnLaunch launch) {
  const int k = static_cast<int>(threadIdx.x);
  if (skipped(launch.found_inf)) return;
  double total = 0.0;
  if (k <= kCoefficients) {
    if (launch.before != nullptr) total = launch.before[k];
    for (int call = 0; call < launch.calls; ++call) total += launch.sums[call][k];
    if (launch.total != nullptr) launch.total[k] = total;
  }
  if (launch.total != nullptr) return;
  const bool steps = __shfl_sync(0xffffffffu, total, kCoefficients) > 0.0;
  double step = *launch.hyper_step;
  step += steps ? 1.0 : 0.0;
  __syncwarp();
  if (k == 0) *launch.hyper_step = step;
  if (k >= kCoefficients) return;
  launch.hypergradients[k] = total;
  if (!steps || !(step > launch.warmup) || (launch.learn >> k & 1) == 0) return;
  double q = launch.coefficients[k], b = launch.momenta[k];
  hyper_rule(launch.options[k], total, q, b);
  launch.coefficients[k] = q;
  launch.momenta[k] = b;
}

template <class X, class G>
const void* mada_function(const KernelId& id);  // mada.cu, one object for each pair of formats

template <>
const void* sweep_function<MadaRule>(const KernelId& id) {
  return PACE_BY_FORMAT(mada_function, id);
}

template <class Rule>
static const void* function_of(const KernelId& id) {
  switch (id.kind) {
    case KernelKind::kScalars:
      return (const void*)scalars_kernel<Rule>;
    case KernelKind::kSweep:
      return sweep_function<Rule>(id);
    case KernelKind::kCoded:
      return coded_function<Rule>(id);
    case KernelKind::kSum:
      return (const void*)sum_kernel<typename Rule::Row>;
    case KernelKind::kLearn:
      return (const void*)learn_kernel;
  }
  return nullptr;
}

// Kernels are loaded when they are first asked for. That may allocate, which a capture forbids unless the thread says
// that it knows better; so a step that a kernel has its first launch in can be captured.
static cudaError_t load(const void* function, int32_t device) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int32_t>> loaded;
  const std::lock_guard<std::mutex> lock(mutex);
  if (loaded.count({function, device}) != 0) return cudaSuccess;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaError_t error = cudaThreadExchangeStreamCaptureMode(&mode);
  if (error != cudaSuccess) return error;
  cudaFuncAttributes attributes;
  error = cudaFuncGetAttributes(&attributes, function);
  const cudaError_t after = cudaThreadExchangeStreamCaptureMode(&mode);
  if (error == cudaSuccess) error = after;
  if (error == cudaSuccess) loaded.emplace(function, device);
  return error;
}

const char* launch_kernel(const KernelId& id, int64_t blocks, int threads, const void* parameters, int32_t device,
                          void* stream) {
  const void* function = nullptr;
#define FIND(Rule) \
  if (id.rule == Rule::kName) function = function_of<Rule>(id);
  PACE_CUDA_RULES(FIND)
#undef FIND
  // torch's runtime has made the device current; this library's own, linked statically, must know it too.
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = load(function, device);
  if (error == cudaSuccess) {
    void* arguments[] = {const_cast<void*>(parameters)};
    error = cudaLaunchKernel(function, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)),
                             arguments, 0, static_cast<cudaStream_t>(stream));
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

std::string driver_refusal() {
  int driver = 0, runtime = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || cudaRuntimeGetVersion(&runtime) != cudaSuccess) return "";
  // Minor versions are compatible: a driver of CUDA 12.1 runs what CUDA 12.8 compiled. Before 12.1, kernels had no more
  // than 4 KiB of parameters.
  const int needed = runtime / 1000 > 12 ? runtime / 1000 * 1000 : 12010;
  if (driver == 0 || driver >= needed) return "";
  const auto text = [](int version) {
    return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  };
  return "the driver is of CUDA " + text(driver) + "; the kernels, built by CUDA " + text(runtime) + ", need " +
         text(needed) + " or later";
}

}  // namespace pace
