// The door from Python to the plan of CUDA launches (csrc/cuda/plan.h), for tests: addresses are integers, options come
// by name, and out come the kernels with the bytes of their parameters. Built by build.py beside this file.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "cuda/plan.h"
#include "names.h"

namespace py = pybind11;

namespace {

using pace::Format;

template <class T>
T* pointer(const py::handle& source, const char* name) {
  const py::object value = source[name];
  return value.is_none() ? nullptr : reinterpret_cast<T*>(value.cast<uintptr_t>());
}

template <class T>
T value(const py::handle& source, const char* name) {
  return py::object(source[name]).cast<T>();
}

Format format(const std::string& name) {
  if (name == "float32") return Format::kFloat32;
  return name == "bfloat16" ? Format::kBFloat16 : Format::kFloat16;
}

// Options by their names.
struct Reader {
  const py::dict& from;

  template <class T>
  void operator()(const char* name, T& option, pace::Range) const {
    option = from.contains(name) ? value<T>(from, name) : T{};
  }
};

template <class Options>
Options options_of(const py::dict& from) {
  Options options{};
  options.visit(Reader{from});
  return options;
}

pace::Workspace workspace(const std::function<uintptr_t(size_t)>& take) {
  return [take](size_t bytes) { return reinterpret_cast<void*>(take(bytes)); };
}

pace::Emit append_to(py::list& calls) {
  return [&calls](const pace::KernelId& id, int64_t blocks, int threads, const void* parameters, size_t bytes) {
    py::dict call;
    call["kind"] = pace::name_of(id.kind);
    call["rule"] = pace::name_of(id.rule);
    call["formats"] = py::make_tuple(pace::name_of(id.x), pace::name_of(id.g));
    call["e"] = pace::name_of(id.e);
    call["known"] = id.known;
    call["flags"] = id.flags;
    call["group"] = id.group;
    call["blocks"] = blocks;
    call["threads"] = threads;
    call["parameters"] = py::bytes(static_cast<const char*>(parameters), bytes);
    calls.append(call);
  };
}

// `tensors`: addresses of the operands in the order of the definition, and the rest by name.
template <class Rule>
py::list plan_step(const py::list& tensors, const py::dict& options, const py::dict& r,
                   const std::function<uintptr_t(size_t)>& take) {
  std::vector<pace::SweepTensor> list;
  for (const py::handle& from : tensors) {
    pace::SweepTensor& t = list.emplace_back();
    size_t k = 0;
    for (const py::handle& address : py::list(from["operands"])) {
      t.array[k++] = address.is_none() ? nullptr : reinterpret_cast<void*>(address.cast<uintptr_t>());
    }
    t.x = format(value<std::string>(from, "x_format")), t.g = format(value<std::string>(from, "g_format"));
    if (from.contains("formats")) t.formats = value<pace::Formats>(from, "formats");
    t.numel = value<int64_t>(from, "numel");
    t.step = {reinterpret_cast<uintptr_t>(pointer<void>(from, "step"))};
    t.steps_taken = value<double>(from, "steps_taken");
    t.row = pointer<double>(from, "row");
  }
  const auto o = options_of<typename Rule::D::Options>(options);
  const pace::StepRequest<Rule> request{o,
                                        value<unsigned>(r, "lists"),
                                        {o.lr, pointer<void>(r, "lr_tensor"), value<bool>(r, "lr_is_double")},
                                        {pointer<float>(r, "grad_scale"), pointer<float>(r, "clip_coef")},
                                        pointer<float>(r, "found_inf"),
                                        pointer<double>(r, "numbers"),
                                        pointer<double>(r, "result")};
  py::list calls;
  pace::plan_step(list, request, workspace(take), append_to(calls));
  return calls;
}

}  // namespace

PYBIND11_MODULE(cuda_plan, m) {
  py::dict sizes;
#define PLAN(Rule)                                   \
  m.def(pace::Rule::D::kOp, &plan_step<pace::Rule>); \
  sizes[pace::Rule::D::kOp] = py::make_tuple(sizeof(pace::Rule::Scalars), sizeof(pace::Rule::Row));
  PACE_CUDA_RULES(PLAN)
  m.attr("CHUNK") = pace::kChunk;
  m.attr("PARAMETER_BYTES") = pace::kParameterBytes;
  m.attr("CAPACITY") = py::cpp_function(&pace::SweepLaunch::capacity);
  m.attr("SCALARS_CAPACITY") = static_cast<int>(pace::ScalarsLaunch<pace::PaceRule>::kCapacity);
  m.attr("SIZES") = sizes;  // of a tensor's scalars and of a block's sums
}
