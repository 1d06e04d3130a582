// The Python module pace_kernels._C: importing it loads the library, which registers the CPU kernels. Limited API only.
#include <Python.h>

#include <exception>

#include "cpu/isa.h"
#include "cpu/plans.h"

namespace {

PyObject* cpu_isa(PyObject*, PyObject*) {
  try {
    return PyUnicode_FromString(pace::chosen_isa().name);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyMethodDef methods[] = {{"cpu_isa", cpu_isa, METH_NOARGS, "The instruction set whose kernels run here."},
                         {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

// ---- Plan: its `handle` names a plan to the operators; the plan goes when the object does ---------------------------

struct PlanObject {
  PyObject_HEAD long long handle;
};

PyObject* plan_new(PyTypeObject* type, PyObject*, PyObject*) {
  const auto allocate = reinterpret_cast<allocfunc>(PyType_GetSlot(type, Py_tp_alloc));
  PyObject* const self = allocate(type, 0);
  if (self != nullptr) reinterpret_cast<PlanObject*>(self)->handle = pace::new_plan();
  return self;
}

void plan_dealloc(PyObject* self) {
  pace::drop_plan(reinterpret_cast<PlanObject*>(self)->handle);
  PyTypeObject* const type = Py_TYPE(self);
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
  Py_DECREF(type);
}

PyObject* plan_handle(PyObject* self, void*) {
  return PyLong_FromLongLong(reinterpret_cast<PlanObject*>(self)->handle);
}

PyGetSetDef plan_members[] = {{"handle", plan_handle, nullptr, "Names the plan to the operators.", nullptr},
                              {nullptr, nullptr, nullptr, nullptr, nullptr}};

PyType_Slot plan_slots[] = {{Py_tp_new, reinterpret_cast<void*>(plan_new)},
                            {Py_tp_dealloc, reinterpret_cast<void*>(plan_dealloc)},
                            {Py_tp_getset, plan_members},
                            {0, nullptr}};

PyType_Spec plan_spec = {"pace_kernels._C.Plan", sizeof(PlanObject), 0, Py_TPFLAGS_DEFAULT, plan_slots};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  PyObject* const module = PyModule_Create(&definition);
  PyObject* const type = module != nullptr ? PyType_FromSpec(&plan_spec) : nullptr;
  if (type == nullptr || PyModule_AddObject(module, "Plan", type) < 0) {
    Py_XDECREF(type);
    Py_XDECREF(module);
    return nullptr;
  }
  return module;
}
