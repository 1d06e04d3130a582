// Checks of an operator's arguments. All of them run before anything is written; each says which argument, what came
// and what is allowed.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "codes.h"
#include "scalars.h"
#include "storage.h"

namespace pace {

using Tensor = torch::stable::Tensor;
using TensorList = std::vector<Tensor>;
using torch::headeronly::ScalarType;

// The device that the tensors of a call must be on.
struct Place {
  bool cuda;
  int32_t index;  // of the CUDA device

  bool holds(const Tensor& t) const {
    return t.defined() && (cuda ? t.is_cuda() && t.get_device_index() == index : t.is_cpu());
  }
  std::string tensor() const {
    return cuda ? "a tensor on cuda:" + std::to_string(index) : std::string("a CPU tensor");
  }
};

inline constexpr Place kCpu{false, 0};

inline std::string entry(const char* name, size_t i) { return std::string(name) + "[" + std::to_string(i) + "]"; }

inline std::string shape_text(const Tensor& t) {
  std::string text = "(";
  for (const int64_t size : t.sizes()) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + ")";
}

// The list has one tensor for each parameter; or none at all, where the option that needs it is off.
inline void check_length(const char* name, const TensorList& list, const TensorList& params,
                         const char* if_empty = nullptr) {
  const bool allowed_empty = if_empty != nullptr && list.empty();
  STD_TORCH_CHECK(allowed_empty || list.size() == params.size(), name, " has ", list.size(), " tensors, params has ",
                  params.size(), if_empty != nullptr ? if_empty : "");
}

inline Format format_of(const char* name, size_t i, const Tensor& t, bool float32_only) {
  const ScalarType dtype = t.scalar_type();
  if (dtype == ScalarType::Float) return Format::kFloat32;
  STD_TORCH_CHECK(!float32_only, entry(name, i), " must be float32");
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, entry(name, i),
                  " must be float32, bfloat16 or float16 for the native kernel");
  return dtype == ScalarType::BFloat16 ? Format::kBFloat16 : Format::kFloat16;
}

// Why its elements can't be used where they lie; null where they can. A storage can be resized behind a tensor's back,
// as FSDP does with parameters that it puts away. Loops are vectorized, and GPUs read, on the premise that an element
// lies at a multiple of its size, which torch.frombuffer does not see to.
inline const char* memory_fault(const Tensor& t) {
  if (t.numel() == 0) return nullptr;
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  int64_t last = t.storage_offset();
  const auto sizes = t.sizes(), strides = t.strides();
  for (size_t d = 0; d < sizes.size(); ++d) last += (sizes[d] - 1) * strides[d];
  const size_t size = t.element_size();
  const uintptr_t address = reinterpret_cast<uintptr_t>(t.data_ptr());
  if (address == 0 || last >= bytes / static_cast<int64_t>(size)) {
    return " has more elements than memory: was its storage resized?";
  }
  return address % size == 0 ? nullptr : " must lie at a multiple of its element size: clone it";
}

// A dense tensor of the parameter's shape, in its place. A written one may not repeat elements by stride 0; the
// optimizers refuse every other overlap of a parameter when it is added.
inline void check_operand(const char* name, size_t i, const Tensor& t, const Tensor& param, bool written,
                          const Place& place) {
  STD_TORCH_CHECK(place.holds(t), entry(name, i), " must be ", place.tensor());
  int32_t layout = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(t.get(), &layout));
  STD_TORCH_CHECK(layout == aoti_torch_layout_strided(), entry(name, i), " must be a dense (strided) tensor");
  const auto sizes = t.sizes(), expected = param.sizes();
  const bool same = sizes.size() == expected.size() && std::equal(sizes.begin(), sizes.end(), expected.begin());
  STD_TORCH_CHECK(same, entry(name, i), " has shape ", shape_text(t), ", its parameter has ", shape_text(param));
  const char* const fault = memory_fault(t);
  STD_TORCH_CHECK(fault == nullptr, entry(name, i), fault);
  if (!written || t.is_contiguous()) return;
  const auto strides = t.strides();
  for (size_t d = 0; d < sizes.size(); ++d) {
    STD_TORCH_CHECK(sizes[d] <= 1 || strides[d] != 0, entry(name, i), " overlaps itself: dimension ", d,
                    " has stride 0");
  }
}

// The format of an operand that may be in codes. `beside`: what lies beside it; null: nothing.
inline Format coded_format(const ListInfo& list, size_t i, const Tensor& t, const Tensor* beside) {
  const ScalarType dtype = t.scalar_type();
  if (list.codec == Codec::weight) {
    const Format format = format_of(list.name, i, t, false);
    if (beside == nullptr) return format;
    STD_TORCH_CHECK(format == Format::kBFloat16, entry(list.name, i), " must be bfloat16, with ", list.beside);
    const ScalarType rest = beside->scalar_type();
    STD_TORCH_CHECK(rest == ScalarType::Short || rest == ScalarType::Char, entry(list.beside, i),
                    " must be int16 or int8");
    return rest == ScalarType::Short ? Format::kPair32 : Format::kPair24;
  }
  const bool average = list.codec == Codec::average || list.codec == Codec::iterate;
  if (beside == nullptr) {
    if (dtype == ScalarType::Float) return Format::kFloat32;
    STD_TORCH_CHECK(dtype == ScalarType::BFloat16 && !average, entry(list.name, i), " must be float32",
                    average ? "" : " or bfloat16", list.beside == nullptr ? "" : " without ",
                    list.beside == nullptr ? "" : list.beside);
    return Format::kDithered16;
  }
  if (!average) {
    STD_TORCH_CHECK(dtype == ScalarType::Byte, entry(list.name, i), " must be uint8, with ", list.beside);
    return list.codec == Codec::moment ? Format::kMoment8 : Format::kSquare8;
  }
  STD_TORCH_CHECK(dtype == ScalarType::Char || dtype == ScalarType::Short || dtype == ScalarType::BFloat16,
                  entry(list.name, i), " must be int8, int16 or bfloat16, with ", list.beside);
  return dtype == ScalarType::Char ? Format::kGrid8 : dtype == ScalarType::Short ? Format::kGrid16 : Format::kPair24;
}

// What lies beside an operand of this format.
inline void check_beside(const ListInfo& list, size_t i, const Tensor& t, const Tensor& beside, Format format,
                         const Tensor& param, const Place& place) {
  if (!in_blocks(format)) {
    check_operand(list.beside, i, beside, param, true, place);
    STD_TORCH_CHECK(format != Format::kPair24 || beside.scalar_type() == ScalarType::Char, entry(list.beside, i),
                    " must be int8");
    return;
  }
  STD_TORCH_CHECK(place.holds(beside), entry(list.beside, i), " must be ", place.tensor());
  STD_TORCH_CHECK(param.numel() % kCodeBlock == 0, entry("params", i), " must have a multiple of ", kCodeBlock,
                  " elements, with ", list.beside);
  STD_TORCH_CHECK(param.is_contiguous() && t.is_contiguous(), entry(list.name, i),
                  " and its parameter must be contiguous, with ", list.beside);
  STD_TORCH_CHECK(beside.scalar_type() == ScalarType::Byte && beside.is_contiguous() &&
                      beside.numel() == param.numel() / kCodeBlock,
                  entry(list.beside, i), " must be contiguous, uint8, with an element for ", kCodeBlock,
                  " of its codes");
  const char* const fault = memory_fault(beside);
  STD_TORCH_CHECK(fault == nullptr, entry(list.beside, i), fault);
}

inline bool is_number(const Tensor& t) {
  return t.numel() == 1 && (t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::Double);
}

inline void check_step(const char* name, size_t i, const Tensor& t, const Place& place) {
  STD_TORCH_CHECK(place.holds(t) && is_number(t), entry(name, i), " must be ", place.tensor(),
                  ", float32 or float64, with one element");
  const char* const fault = memory_fault(t);
  STD_TORCH_CHECK(fault == nullptr, entry(name, i), fault);
}

// A number on the CPU.
inline double read_number(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? *static_cast<const double*>(t.data_ptr())
                                               : static_cast<double>(*static_cast<const float*>(t.data_ptr()));
}

// float32 holds every integer up to here, and this plus 1 is this.
constexpr double kFloat32Counts = 16777216.0;  // 2^24

inline void check_one(const char* name, const std::optional<Tensor>& t, const Place& place) {
  if (!t) return;
  STD_TORCH_CHECK(place.holds(*t) && t->numel() == 1 && t->scalar_type() == ScalarType::Float, name, " must be ",
                  place.tensor(), ", float32, with one element");
  const char* const fault = memory_fault(*t);
  STD_TORCH_CHECK(fault == nullptr, name, fault);
}

inline void check_lr(const std::optional<Tensor>& t, const Place& place) {
  if (!t) return;
  STD_TORCH_CHECK(place.holds(*t) && is_number(*t), "lr_tensor must be ", place.tensor(),
                  ", float32 or float64, with one element");
  const char* const fault = memory_fault(*t);
  STD_TORCH_CHECK(fault == nullptr, "lr_tensor", fault);
}

inline bool are_doubles(const Tensor& t, size_t count, const Place& place) {
  return place.holds(t) && t.is_contiguous() && static_cast<size_t>(t.numel()) == count &&
         t.scalar_type() == ScalarType::Double && memory_fault(t) == nullptr;
}

inline void check_doubles(const char* name, const Tensor& t, size_t count, const Place& place) {
  const char* const fault = place.holds(t) ? memory_fault(t) : nullptr;
  STD_TORCH_CHECK(fault == nullptr, name, fault);
  STD_TORCH_CHECK(are_doubles(t, count, place), name, " must be ", place.tensor(), ", contiguous, float64, with ",
                  count, " elements");
}

// Whether the value is in the range, and the sentence that says what is.
inline bool within(Range range, double value) {
  switch (range) {
    case Range::nonnegative:
      return std::isfinite(value) && value >= 0.0;
    case Range::positive:
      return std::isfinite(value) && value > 0.0;
    case Range::below_one:
      return value >= 0.0 && value < 1.0;
    case Range::unit:
      return value >= 0.0 && value <= 1.0;
    case Range::at_least_one:
      return value >= 1.0;
    case Range::not_negative:
      return value >= 0.0;
    case Range::any:
      break;
  }
  return true;
}

inline const char* allowed(Range range) {
  constexpr const char* kSentences[] = {
      "",
      " must be finite and >= 0",
      " must be finite and > 0",
      " must lie in [0, 1)",
      " must lie in [0, 1]",
      " must be >= 1",
      " must be >= 0",
  };
  return kSentences[static_cast<int>(range)];
}

struct RangeCheck {
  template <class T>
  void operator()(const char* name, const T& value, Range range) const {
    if constexpr (std::is_same_v<T, std::optional<double>>) {
      if (value) (*this)(name, *value, range);
    } else {
      STD_TORCH_CHECK(within(range, static_cast<double>(value)), name, allowed(range), ", got ", value);
    }
  }
};

}  // namespace pace
