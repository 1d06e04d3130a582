// A call of a step's operator, by the definition of its optimizer: its arguments read off torch's stack, and the checks
// of them that all devices share. The operators are declared in pace_kernels/ops.py.
#pragma once

#include <torch/csrc/stable/library.h>

#include <array>
#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#include "checks.h"
#include "stats.h"

namespace pace {

// What mixed precision and clipping hand over: the gradient is divided by `grad_scale` and multiplied by `clip_coef`;
// where `found_inf` is not 0, the step is left undone. One float32 element each, on the device of the parameters.
struct GradScaling {
  std::optional<Tensor> grad_scale, clip_coef, found_inf;
};

inline void check_scaling(const GradScaling& s, const Place& place) {
  check_one("grad_scale", s.grad_scale, place);
  check_one("clip_coef", s.clip_coef, place);
  check_one("found_inf", s.found_inf, place);
}

template <class D>
struct Call {
  using Definition = D;

  std::array<TensorList, D::kOperands> lists;
  TensorList rows, steps;
  TensorList others;  // of a pullback's plan: the step counts of the optimizer whose step it follows, on the host
  std::array<TensorList, D::kOperands> beside;  // what lies beside coded operands; as a rule nothing
  std::array<std::optional<Tensor>, D::kExtras> extras;
  std::optional<Tensor> lr;  // in place of the option, on the device of the parameters
  GradScaling scaling;
  typename D::Options options;

  const TensorList& operator[](typename D::Operand k) const { return lists[static_cast<size_t>(k)]; }
  const TensorList& params() const { return lists[0]; }
  bool has(typename D::Operand k) const { return !(*this)[k].empty(); }

  double* numbers(typename D::Extra k) const {
    return extras[k] ? static_cast<double*>(extras[k]->data_ptr()) : nullptr;
  }
};

// Reads the arguments of a boxed operator in order.
class Reader {
 public:
  explicit Reader(StableIValue* stack) : next_(stack) {}

  template <class T>
  T take() {
    return torch::stable::detail::to<T>(*next_++);
  }

  template <class T>
  void operator()(const char*, T& option, Range) const {
    option = torch::stable::detail::to<T>(*next_++);
  }

 private:
  mutable StableIValue* next_;
};

template <class D>
Call<D> read_call(StableIValue* stack) {
  Reader reader(stack);
  Call<D> call;
  for (const int k : D::kOrder) (k < 0 ? call.rows : call.lists[static_cast<size_t>(k)]) = reader.take<TensorList>();
  call.steps = reader.take<TensorList>();
  using Optional = std::optional<Tensor>;
  for (auto& extra : call.extras) extra = reader.take<Optional>();
  call.lr = reader.take<Optional>();
  if (D::kScales) call.scaling.grad_scale = reader.take<Optional>(), call.scaling.clip_coef = reader.take<Optional>();
  call.scaling.found_inf = reader.take<Optional>();
  for (int k = 0; k < D::kOperands; ++k) {
    if (D::kLists[k].beside == nullptr) continue;
    if (auto given = reader.take<std::optional<TensorList>>()) call.beside[static_cast<size_t>(k)] = std::move(*given);
  }
  call.options.visit(reader);
  return call;
}

// The integer that a float64 is.
inline int64_t whole(const char* name, double value) {
  constexpr double kLargest = 9007199254740992.0;  // 2^53
  STD_TORCH_CHECK(std::abs(value) <= kLargest && value == std::trunc(value), name,
                  " must be an integer that float64 holds, got ", value);
  return static_cast<int64_t>(value);
}

// Options as numbers in the order of the schema: a switch is 0 or 1, what is None is NaN.
class Numbers {
 public:
  explicit Numbers(const std::vector<double>& values) : values_(values) {}

  void operator()(const char*, double& option, Range) const { option = next(); }
  void operator()(const char* name, int64_t& option, Range) const { option = whole(name, next()); }
  void operator()(const char*, bool& option, Range) const { option = next() != 0.0; }
  void operator()(const char*, std::optional<double>& option, Range) const {
    const double value = next();
    option = std::isnan(value) ? std::nullopt : std::optional<double>(value);
  }
  void check_done(const char* op) const {
    STD_TORCH_CHECK(at_ == values_.size(), op, " has ", at_, " options, got ", values_.size());
  }

 private:
  double next() const {
    ++at_;
    return at_ <= values_.size() ? values_[at_ - 1] : 0.0;
  }
  const std::vector<double>& values_;
  mutable size_t at_ = 0;
};

// ---- what an operator refuses beyond ranges and shapes --------------------------------------------------------------

inline bool may_be_empty(const Call<PaceDefinition>& a, int k) {
  using D = PaceDefinition;
  return k == D::kM ? a.options.beta1 == 0.0 : k == D::kE && a.options.lambda_pullback == 0.0;
}

inline void check_rule(const Call<PaceDefinition>&) {}

// What is in play in a call of MADA's: the lists that are there say it.
struct MadaParts {
  bool lag, diff, second, lion, adam, pull;

  explicit MadaParts(const Call<MadaDefinition>& a)
      : lag(a.options.learn != 0),
        diff(a.has(MadaDefinition::kN)),
        second(a.has(MadaDefinition::kW)),
        lion(a.has(MadaDefinition::kL)),
        adam(a.has(MadaDefinition::kV)),
        pull(a.options.lambda_pullback != 0.0) {}
  bool keeps_gradients() const { return lag || diff; }
};

inline bool may_be_empty(const Call<MadaDefinition>& a, int k) {
  using D = MadaDefinition;
  const MadaParts p(a);
  return k == D::kM        ? !p.adam
         : k == D::kLastG  ? !p.keeps_gradients()
         : k == D::kOlderG ? !(p.lag && p.diff)
                           : k != D::kE || !p.pull;
}

inline void check_rule(const Call<MadaDefinition>& a) {
  using D = MadaDefinition;
  const MadaParts p(a);
  const MadaCoefficients fixed = fixed_coefficients(a.options);
  const auto in_play = [&](MadaCoefficient k, double vertex) { return learned(a.options, k) || fixed[k] != vertex; };
  STD_TORCH_CHECK(p.adam || !(p.lag || p.diff || p.second || p.pull || in_play(kGamma, 0.0)),
                  "exp_avg_sqs may be empty only where gamma is 0 and nothing is learned or pulls");
  STD_TORCH_CHECK(p.lion || !in_play(kGamma, 1.0), "exp_avg_lions may be empty only where gamma is fixed at 1");
  STD_TORCH_CHECK(!p.adam || p.diff || !in_play(kBeta3, 0.0),
                  "exp_avg_diffs may be empty only where beta3 is fixed at 0");
  STD_TORCH_CHECK(!p.adam || p.second || !in_play(kRho, 1.0),
                  "second_exp_avg_sqs may be empty only where rho is fixed at 1");
  STD_TORCH_CHECK(!p.lag || a.extras[D::kCoefficients], "coefficients may be missing only where nothing is learned");
  check_length("last_scalars", a.rows, a.params(), p.keeps_gradients() ? nullptr : "");
}

inline bool may_be_empty(const Call<PullbackDefinition>& a, int k) {
  using D = PullbackDefinition;
  return k == D::kBefore || (k == D::kV && (a.options.gain || !pulls(a.options)));
}

// Whether averages lie on a grid beside their weights.
inline bool on_grid(const Call<PullbackDefinition>& a) {
  using D = PullbackDefinition;
  const auto is_grid = [](const Tensor& t) {
    return t.scalar_type() == ScalarType::Char || t.scalar_type() == ScalarType::Short;
  };
  return std::any_of(a[D::kE].begin(), a[D::kE].end(), is_grid);
}

inline void check_rule(const Call<PullbackDefinition>& a) {
  using D = PullbackDefinition;
  const bool grid = on_grid(a);
  STD_TORCH_CHECK(!grid || a.has(D::kBefore) || a.params().empty(),
                  "befores must not be empty where emas are int8 or int16, which are read beside them");
  STD_TORCH_CHECK(grid || pulls(a.options) || !a.has(D::kBefore), "befores must be empty where nothing pulls");
  STD_TORCH_CHECK(pulls(a.options) || !a.has(D::kV), "second_moments must be empty where nothing pulls");
  STD_TORCH_CHECK(!a.options.gain || !a.has(D::kV), "second_moments must be empty where gain is given");
}

inline bool may_be_empty(const Call<ScheduleFreeDefinition>&, int) { return false; }

inline void check_rule(const Call<ScheduleFreeDefinition>&) {}

// ---- the checks of every call ---------------------------------------------------------------------------------------

// `fresh`: the operand that comes later, with each step of a plan; −1: none.
template <class D>
void check_call(Call<D>& a, const Place& place, int fresh = -1) {
  a.options.visit(RangeCheck{});
  check_rule(a);
  for (int k = 1; k < D::kOperands; ++k) {
    if (k == fresh) continue;
    const ListInfo& list = D::kLists[k];
    check_length(list.name, a.lists[static_cast<size_t>(k)], a.params(), may_be_empty(a, k) ? list.empty : nullptr);
  }
  check_length("steps", a.steps, a.params());
  for (int k = 0; k < D::kOperands; ++k) {
    const TensorList& beside = a.beside[static_cast<size_t>(k)];
    if (!beside.empty()) check_length(D::kLists[k].beside, beside, a.params());
  }
  for (size_t i = 0; i < a.rows.size(); ++i) {
    if (are_doubles(a.rows[i], D::kRows.numbers, place)) continue;  // or else its name, which takes a string
    check_doubles(entry(D::kRows.name, i).c_str(), a.rows[i], D::kRows.numbers, place);
  }
  for (int k = 0; k < D::kExtras; ++k) {
    if (a.extras[k]) check_doubles(D::kExtraInfo[k].name, *a.extras[k], D::kExtraInfo[k].numbers, place);
  }
  check_lr(a.lr, place);
  check_scaling(a.scaling, place);
}

// A written operand may not have one element at several places. The weights of a pullback that pulls nothing are read
// alone.
template <class D>
bool is_written(const Call<D>& a, int k) {
  if constexpr (std::is_same_v<D, PullbackDefinition>) {
    if (k == D::kX) return pulls(a.options);
  }
  return D::kLists[k].mutable_;
}

// The format of operand k of parameter i, and that what lies beside it is as it has to be.
template <class D>
Format checked_format(const Call<D>& a, int k, size_t i, const Tensor& t, const Place& place) {
  const ListInfo& list = D::kLists[k];
  if (list.codec == Codec::none) return format_of(list.name, i, t, list.role == Role::state);
  const TensorList& lists = a.beside[static_cast<size_t>(k)];
  const Format format = coded_format(list, i, t, lists.empty() ? nullptr : &lists[i]);
  if constexpr (D::kStochastic) {
    if (k == 0 && format == Format::kBFloat16 && a.options.stochastic_rounding) return Format::kDithered16;
  }
  if constexpr (std::is_same_v<D, MadaDefinition>) {
    // A maximum of values that were rounded up by chance would creep up.
    if (k == D::kW && format == Format::kDithered16 && a.options.second_max) return Format::kBFloat16;
  }
  if (!lists.empty()) check_beside(list, i, t, lists[i], format, a.params()[i], place);
  return format;
}

// ---- learning -------------------------------------------------------------------------------------------------------

constexpr int kHypergradients = MadaDefinition::kExtraInfo[MadaDefinition::kHypergradients].numbers;

// The arguments of mada_learn_ by name.
struct LearnArguments {
  Tensor coefficients, momenta, hypergradients, hyper_step;
  TensorList sums;
  std::optional<Tensor> found_inf;
  int64_t learn;
  std::vector<double> hyper_lr, hyper_momentum, lower, upper;
  double clip;
  int64_t warmup;

  HyperOptions options(size_t k) const { return {hyper_lr[k], hyper_momentum[k], lower[k], upper[k], clip}; }
};

inline void check_call(const LearnArguments& a, const Place& place) {
  check_doubles("coefficients", a.coefficients, kCoefficients, place);
  check_doubles("momenta", a.momenta, kCoefficients, place);
  check_doubles("hypergradients", a.hypergradients, kCoefficients, place);
  check_doubles("hyper_step", a.hyper_step, 1, place);
  for (const auto* list : {&a.hyper_lr, &a.hyper_momentum, &a.lower, &a.upper}) {
    STD_TORCH_CHECK(list->size() == kCoefficients, "hyper options must have ", static_cast<int>(kCoefficients),
                    " entries, got ", list->size());
  }
  for (const Tensor& row : a.sums) check_doubles("sums", row, kHypergradients, place);
  check_one("found_inf", a.found_inf, place);
}

template <void (*run)(const LearnArguments&)>
void mada_learn_(Tensor coefficients, Tensor momenta, Tensor hypergradients, Tensor hyper_step, TensorList sums,
                 std::optional<Tensor> found_inf, int64_t learn, std::vector<double> hyper_lr,
                 std::vector<double> hyper_momentum, std::vector<double> lower, std::vector<double> upper, double clip,
                 int64_t warmup) {
  run({coefficients, momenta, hypergradients, hyper_step, std::move(sums), found_inf, learn, std::move(hyper_lr),
       std::move(hyper_momentum), std::move(lower), std::move(upper), clip, warmup});
}

}  // namespace pace
