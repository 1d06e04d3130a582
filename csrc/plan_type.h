// The Python type Plan of a library's module: its `handle` names a plan to the operators, and the plan goes when the
// object does. Limited API only.
#pragma once

#include <Python.h>

#include <cstdint>

namespace pace {

// Of the library's device (plans.h).
int64_t new_plan();
void drop_plan(int64_t handle);

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

// The module with the type in it; null, with Python's error set, where that failed. `name` has the module's before it.
inline PyObject* with_plan_type(PyObject* module, const char* name) {
  static PyGetSetDef members[] = {{"handle", plan_handle, nullptr, "Names the plan to the operators.", nullptr},
                                  {nullptr, nullptr, nullptr, nullptr, nullptr}};
  static PyType_Slot slots[] = {{Py_tp_new, reinterpret_cast<void*>(plan_new)},
                                {Py_tp_dealloc, reinterpret_cast<void*>(plan_dealloc)},
                                {Py_tp_getset, members},
                                {0, nullptr}};
  PyType_Spec spec{name, sizeof(PlanObject), 0, Py_TPFLAGS_DEFAULT, slots};
  PyObject* const type = module != nullptr ? PyType_FromSpec(&spec) : nullptr;
  if (type != nullptr && PyModule_AddObject(module, "Plan", type) == 0) return module;
  Py_XDECREF(type);
  Py_XDECREF(module);
  return nullptr;
}

}  // namespace pace
