// The door from Python to the plan of CUDA launches (csrc/cuda/plan.h), for tests: addresses are integers, options come
// by name, and out come the kernels with the bytes of their parameters. Built by build.py beside this file.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "cuda/plan.h"

namespace py = pybind11;

namespace {

using pace::Format;

template <class T>
T* pointer(const py::handle& source, const char* name) {
  const py::object value = source[name];
  return value.is_none() ? nullptr : reinterpret_cast<T*>(value.cast<uintptr_t>());
}

pace::StepAddress step(const py::handle& source) {
  const py::object value = source["step"];
  return {value.is_none() ? 0 : value.cast<uintptr_t>()};
}

template <class T>
T value(const py::handle& source, const char* name) {
  return py::object(source[name]).cast<T>();
}

Format format(const std::string& name) {
  if (name == "float32") return Format::kFloat32;
  return name == "bfloat16" ? Format::kBFloat16 : Format::kFloat16;
}

const char* format_name(Format f) {
  return f == Format::kFloat32 ? "Float32" : (f == Format::kBFloat16 ? "BFloat16" : "Float16");
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

pace::StepRequest step_request(const py::dict& r, double lr) {
  return {{lr, pointer<void>(r, "lr_tensor"), value<bool>(r, "lr_is_double")},
          {pointer<float>(r, "grad_scale"), pointer<float>(r, "clip_coef")},
          pointer<float>(r, "found_inf"),
          pointer<double>(r, "result")};
}

pace::Workspace workspace(const std::function<uintptr_t(size_t)>& take) {
  return [take](size_t bytes) { return reinterpret_cast<void*>(take(bytes)); };
}

py::list calls(const pace::Plan& plan) {
  static const char* const families[] = {
      "pace_scalars", "pace",  "pace_sum",         "mada_scalars", "mada",
      "mada_sum",     "learn", "pullback_scalars", "pullback",     "schedule_free_scalars",
      "schedule_free"};
  py::list out;
  for (const pace::KernelCall& c : plan) {
    const pace::KernelId& id = c.id;
    py::dict call;
    call["family"] = families[static_cast<int>(id.family)];
    call["formats"] = py::make_tuple(format_name(id.x), format_name(id.g));
    call["pace_flags"] = py::make_tuple(id.moment, id.pull, id.average, id.stats);
    call["pullback_flags"] = py::make_tuple(id.before, id.moment, id.pull, id.stats);
    call["mada_flags"] = py::make_tuple(id.lag, id.diff, id.second, id.lion, id.adam);
    call["blocks"] = c.blocks;
    call["threads"] = c.threads;
    call["parameters"] = py::bytes(reinterpret_cast<const char*>(c.parameters.data()), c.parameters.size());
    out.append(call);
  }
  return out;
}

py::list plan_pace(const py::list& tensors, const py::dict& options, const py::dict& request,
                   const std::function<uintptr_t(size_t)>& take) {
  std::vector<pace::PaceTensor> list;
  for (const py::handle& t : tensors) {
    list.push_back({pointer<void>(t, "x"), pointer<void>(t, "g"), pointer<float>(t, "m"), pointer<float>(t, "v"),
                    pointer<float>(t, "e"), format(value<std::string>(t, "x_format")),
                    format(value<std::string>(t, "g_format")), value<int64_t>(t, "numel"), step(t),
                    value<double>(t, "steps_taken")});
  }
  const auto o = options_of<pace::PaceOptions>(options);
  const pace::PaceRequest r{step_request(request, o.lr), o, value<bool>(request, "average")};
  return calls(pace::plan_pace(list, r, workspace(take)));
}

py::list plan_mada(const py::list& tensors, const py::dict& options, const py::dict& request,
                   const std::function<uintptr_t(size_t)>& take) {
  std::vector<pace::MadaTensor> list;
  for (const py::handle& t : tensors) {
    list.push_back({pointer<void>(t, "x"), pointer<void>(t, "g"), pointer<float>(t, "m"), pointer<float>(t, "n"),
                    pointer<float>(t, "v"), pointer<float>(t, "w"), pointer<float>(t, "l"), pointer<float>(t, "last_g"),
                    pointer<float>(t, "older_g"), pointer<float>(t, "e"), format(value<std::string>(t, "x_format")),
                    format(value<std::string>(t, "g_format")), value<int64_t>(t, "numel"), step(t),
                    value<double>(t, "steps_taken"), pointer<double>(t, "last")});
  }
  const auto o = options_of<pace::MadaOptions>(options);
  const pace::MadaRequest r{step_request(request, o.lr),
                            o,
                            pointer<double>(request, "coefficients"),
                            value<bool>(request, "diff"),
                            value<bool>(request, "second"),
                            value<bool>(request, "lion"),
                            value<bool>(request, "adam"),
                            o.capturable};
  return calls(pace::plan_mada(list, r, workspace(take)));
}

py::list plan_pullback(const py::list& tensors, const py::dict& o, const py::dict& request,
                       const std::function<uintptr_t(size_t)>& take) {
  std::vector<pace::PullbackTensor> list;
  for (const py::handle& t : tensors) {
    list.push_back({pointer<void>(t, "x"), pointer<void>(t, "before"), pointer<void>(t, "v"), pointer<float>(t, "e"),
                    format(value<std::string>(t, "x_format")), format(value<std::string>(t, "g_format")),
                    value<int64_t>(t, "numel"), step(t), value<double>(t, "steps_taken")});
  }
  const auto options = options_of<pace::PullbackOptions>(o);
  const pace::PullbackRequest r{step_request(request, options.lr), options, value<bool>(request, "before"),
                                value<bool>(request, "moment")};
  return calls(pace::plan_pullback(list, r, workspace(take)));
}

py::list plan_schedule_free(const py::list& tensors, const py::dict& o, const py::dict& request,
                            const std::function<uintptr_t(size_t)>& take) {
  std::vector<pace::ScheduleFreeTensor> list;
  for (const py::handle& t : tensors) {
    list.push_back({pointer<void>(t, "y"), pointer<void>(t, "g"), pointer<float>(t, "v"), pointer<float>(t, "z"),
                    format(value<std::string>(t, "x_format")), format(value<std::string>(t, "g_format")),
                    value<int64_t>(t, "numel"), step(t), value<double>(t, "steps_taken")});
  }
  const auto options = options_of<pace::ScheduleFreeOptions>(o);
  const pace::ScheduleFreeRequest r{step_request(request, options.lr), options, pointer<double>(request, "schedule")};
  return calls(pace::plan_schedule_free(list, r, workspace(take)));
}

py::list plan_learn(const py::dict& r) {
  pace::LearnRequest request{};
  for (const uintptr_t row : value<std::vector<uintptr_t>>(r, "sums")) {
    request.sums.push_back(reinterpret_cast<const double*>(row));
  }
  request.coefficients = pointer<double>(r, "coefficients"), request.momenta = pointer<double>(r, "momenta");
  request.hypergradients = pointer<double>(r, "hypergradients"), request.hyper_step = pointer<double>(r, "hyper_step");
  request.found_inf = pointer<float>(r, "found_inf");
  const auto lists = [&](const char* name) { return value<std::vector<double>>(r, name); };
  for (size_t k = 0; k < pace::kCoefficients; ++k) {
    request.options[k] = {lists("hyper_lr")[k], lists("hyper_momentum")[k], lists("lower")[k], lists("upper")[k],
                          value<double>(r, "clip")};
  }
  request.warmup = value<double>(r, "warmup");
  request.learn = value<int64_t>(r, "learn");
  return calls(pace::plan_learn(request));
}

}  // namespace

PYBIND11_MODULE(cuda_plan, m) {
  m.def("pace", &plan_pace);
  m.def("mada", &plan_mada);
  m.def("pullback", &plan_pullback);
  m.def("schedule_free", &plan_schedule_free);
  m.def("learn", &plan_learn);
  m.attr("CHUNK") = pace::kChunk;
  m.attr("PARAMETER_BYTES") = pace::kParameterBytes;
  m.attr("CAPACITY") = py::dict(py::arg("pace") = static_cast<int>(pace::PaceLaunch::kCapacity),
                                py::arg("mada") = static_cast<int>(pace::MadaLaunch::kCapacity),
                                py::arg("pace_scalars") = static_cast<int>(pace::PaceScalarsLaunch::kCapacity));
  m.attr("SIZES") = py::dict(py::arg("pace_scalars") = sizeof(pace::PaceStepScalars),
                             py::arg("mada_scalars") = sizeof(pace::MadaStepScalars),
                             py::arg("pullback_scalars") = sizeof(pace::PullbackStepScalars),
                             py::arg("schedule_free_scalars") = sizeof(pace::ScheduleFreeScalars),
                             py::arg("pace_row") = sizeof(pace::PaceRow), py::arg("mada_row") = sizeof(pace::MadaRow));
}
