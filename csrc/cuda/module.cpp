// The Python module pace_kernels._cuda: importing it loads the library, which registers the CUDA kernels. Limited API
// only. It needs no GPU and no driver to be imported.
#include <Python.h>

#include "../plan_type.h"
#include "kernels.h"

namespace {

PyObject* driver_refusal(PyObject*, PyObject*) {
  const std::string reason = pace::driver_refusal();
  if (reason.empty()) Py_RETURN_NONE;
  return PyUnicode_FromString(reason.c_str());
}

PyObject* architectures(PyObject*, PyObject*) { return PyUnicode_FromString(PACE_CUDA_ARCHITECTURES); }

PyMethodDef methods[] = {
    {"architectures", architectures, METH_NOARGS, "What the kernels were compiled for, as in TORCH_CUDA_ARCH_LIST."},
    {"driver_refusal", driver_refusal, METH_NOARGS, "Why the driver can't run these kernels, or None."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cuda() { return pace::with_plan_type(PyModule_Create(&definition), "pace_kernels._cuda.Plan"); }
