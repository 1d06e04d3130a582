// The Python type Plan of a library's module: its `handle` names a plan to the operators, and the plan goes when the
// object does. Calls without tensors go straight to it: an operator costs 2 µs. Limited API only.
#pragma once

#include <Python.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "same.h"

namespace pace {

// Of the library's device (plans.h).
int64_t new_plan();
void drop_plan(int64_t handle);
void plan_before(int64_t handle, const std::vector<double>& options);
void plan_step(int64_t handle, const std::vector<double>& options);

struct PlanObject {
  PyObject_HEAD long long handle;
};

inline PyObject* plan_new(PyTypeObject* type, PyObject*, PyObject*) {
  const auto allocate = reinterpret_cast<allocfunc>(PyType_GetSlot(type, Py_tp_alloc));
  PyObject* const self = allocate(type, 0);
  if (self != nullptr) reinterpret_cast<PlanObject*>(self)->handle = new_plan();
  return self;
}

inline void plan_dealloc(PyObject* self) {
  drop_plan(reinterpret_cast<PlanObject*>(self)->handle);
  PyTypeObject* const type = Py_TYPE(self);
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
  Py_DECREF(type);
}

inline PyObject* plan_handle(PyObject* self, void*) {
  return PyLong_FromLongLong(reinterpret_cast<PlanObject*>(self)->handle);
}

// As an operator does it: other threads run meanwhile, and an error becomes Python's.
template <void (*call)(int64_t, const std::vector<double>&)>
PyObject* plan_call(PyObject* self, PyObject* options) {
  const Py_ssize_t count = PySequence_Size(options);
  if (count < 0) return nullptr;
  std::vector<double> numbers(static_cast<size_t>(count));
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* const number = PySequence_GetItem(options, i);
    if (number == nullptr) return nullptr;
    numbers[static_cast<size_t>(i)] = PyFloat_AsDouble(number);
    Py_DECREF(number);
    if (PyErr_Occurred()) return nullptr;
  }
  PyObject* kind = nullptr;
  std::string what;
  PyThreadState* const thread = PyEval_SaveThread();
  try {
    call(reinterpret_cast<PlanObject*>(self)->handle, numbers);
  } catch (const std::domain_error& error) {
    kind = PyExc_ValueError, what = error.what();
  } catch (const std::exception& error) {
    kind = PyExc_RuntimeError, what = error.what();
  }
  PyEval_RestoreThread(thread);
  if (kind == nullptr) Py_RETURN_NONE;
  PyErr_SetString(kind, what.c_str());
  return nullptr;
}

// The module with the type in it; null, with Python's error set, where that failed. `name` has the module's before it.
inline PyObject* with_plan_type(PyObject* module, const char* name) {
  static PyGetSetDef members[] = {{"handle", plan_handle, nullptr, "Names the plan to the operators.", nullptr},
                                  {nullptr, nullptr, nullptr, nullptr, nullptr}};
  constexpr int kStatic = METH_FASTCALL | METH_STATIC;
  const auto function = [](auto* of_many) { return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(of_many)); };
  static PyMethodDef methods[] = {
      {"before", &plan_call<plan_before>, METH_O, "What is done before another optimizer's step. Takes options."},
      {"step", &plan_call<plan_step>, METH_O, "The step of a plan that takes no gradients. Takes options."},
      {"changed_groups", function(&changed_groups), kStatic, "Whether options changed, and which need a look."},
      {"gradients", function(&gradients), kStatic, "The gradients, or None if others are there than before."},
      {"holds_states", function(&holds_states), kStatic, "Whether the states are those of the plan."},
      {"put", function(&put), kStatic, "Gives each dict its next values under the names."},
      {"versions", function(&versions), kStatic, "The versions of tensors, and of the first in each dict."},
      {nullptr, nullptr, 0, nullptr}};
  static PyType_Slot slots[] = {{Py_tp_new, reinterpret_cast<void*>(plan_new)},
                                {Py_tp_dealloc, reinterpret_cast<void*>(plan_dealloc)},
                                {Py_tp_getset, members},
                                {Py_tp_methods, methods},
                                {0, nullptr}};
  PyType_Spec spec{name, sizeof(PlanObject), 0, Py_TPFLAGS_DEFAULT, slots};
  PyObject* const type = module != nullptr ? PyType_FromSpec(&spec) : nullptr;
  if (type != nullptr && PyModule_AddObject(module, "Plan", type) == 0) return module;
  Py_XDECREF(type);
  Py_XDECREF(module);
  return nullptr;
}

}  // namespace pace
