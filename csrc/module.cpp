// The Python module pace_kernels._C: importing it loads the library, which registers the CPU kernels. Limited API only.
#include <Python.h>

#include <exception>

#include "cpu/isa.h"
#include "plan_type.h"

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

}  // namespace

PyMODINIT_FUNC PyInit__C() { return pace::with_plan_type(PyModule_Create(&definition), "pace_kernels._C.Plan"); }
