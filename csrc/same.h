// Whether Python's objects are still those of a plan: compared by identity, many in one call. Limited API only.
//
// A dict's values are compared where the dict keeps them, without a look at the objects themselves: of 2,000 parameters
// with four states each, these would be 10,000 cache lines more.
#pragma once

#include <Python.h>

#include <limits>

namespace pace {

// Reads an attribute of one object after another. Where it is a member of C, as all of a tensor's are, it is looked up
// once for each type: that is half the time.
class Getter {
 public:
  explicit Getter(PyObject* name) : name_(name) {}
  ~Getter() { Py_XDECREF(member_); }
  Getter(const Getter&) = delete;
  Getter& operator=(const Getter&) = delete;

  // A new reference; null, with Python's error set, where there is none.
  PyObject* operator()(PyObject* of) {
    if (name_ == nullptr) return nullptr;
    if (Py_TYPE(of) != type_) find(Py_TYPE(of));
    return read_ != nullptr ? read_(member_, of, reinterpret_cast<PyObject*>(type_)) : PyObject_GetAttr(of, name_);
  }

 private:
  void find(PyTypeObject* type) {
    Py_CLEAR(member_);
    type_ = type, read_ = nullptr;
    if (PyType_GetSlot(type, Py_tp_getattro) != reinterpret_cast<void*>(PyObject_GenericGetAttr)) return;
    member_ = PyObject_GetAttr(reinterpret_cast<PyObject*>(type), name_);
    if (member_ == nullptr) {
      PyErr_Clear();
    } else if (Py_TYPE(member_) == &PyGetSetDescr_Type) {
      read_ = reinterpret_cast<descrgetfunc>(PyType_GetSlot(&PyGetSetDescr_Type, Py_tp_descr_get));
    }
  }

  PyObject *const name_, *member_ = nullptr;
  PyTypeObject* type_ = nullptr;
  descrgetfunc read_ = nullptr;
};

// As Python passes it: the number of arguments, and lists where lists are asked for.
inline bool takes(const char* name, PyObject* const* arguments, Py_ssize_t count, Py_ssize_t lists) {
  bool fits = count == lists;
  for (Py_ssize_t i = 0; fits && i < lists; ++i) fits = PyList_Check(arguments[i]);
  if (!fits) PyErr_Format(PyExc_TypeError, "%s takes %zd lists", name, lists);
  return fits;
}

// The options of a plan as a list of numbers. `places`: the indices of an option in it, a tuple.
class OptionNumbers {
 public:
  explicit OptionNumbers(PyObject* list) : list_(list) {}

  bool there() const { return list_ != nullptr; }
  // An error is left to PyErr_Occurred.
  void put(PyObject* value, PyObject* places) const {
    for (Py_ssize_t i = 0; i < PyTuple_Size(places); ++i) {
      Py_INCREF(value);
      PyList_SetItem(list_, PyLong_AsSsize_t(PyTuple_GetItem(places, i)), value);
    }
  }
  // Whether this number may follow the one that is there: kernels without a first moment are others than with one.
  bool follows(double value, PyObject* places) const {
    if (PyTuple_Size(places) == 0) return true;
    PyObject* const before = PyList_GetItem(list_, PyLong_AsSsize_t(PyTuple_GetItem(places, 0)));
    return before != nullptr && (PyFloat_AsDouble(before) == 0.0) == (value == 0.0);
  }

 private:
  PyObject* const list_;
};

// Whether an option's new value needs no look by Python; its numbers are put then. `places`: a tuple of them, of a
// float that is finite and >= 0; a tuple of such tuples, of a tuple of floats in [0, 1) that are 0 where they were;
// Ellipsis, of anything; None, Python looks.
inline bool takes_option(PyObject* value, PyObject* places, const OptionNumbers& numbers) {
  if (places == Py_Ellipsis) return true;
  if (!PyTuple_CheckExact(places)) return false;
  const Py_ssize_t n = PyTuple_Size(places);
  if (n == 0 || !PyTuple_CheckExact(PyTuple_GetItem(places, 0))) {
    if (!PyFloat_CheckExact(value)) return false;
    const double number = PyFloat_AsDouble(value);
    if (!(number >= 0.0 && number <= std::numeric_limits<double>::max())) return false;
    return numbers.put(value, places), true;
  }
  bool fit = PyTuple_CheckExact(value) && PyTuple_Size(value) == n;
  for (Py_ssize_t i = 0; fit && i < n; ++i) {
    PyObject* const one = PyTuple_GetItem(value, i);
    const double number = PyFloat_CheckExact(one) ? PyFloat_AsDouble(one) : -1.0;
    fit = number >= 0.0 && number < 1.0 && numbers.follows(number, PyTuple_GetItem(places, i));
  }
  for (Py_ssize_t i = 0; fit && i < n; ++i) numbers.put(PyTuple_GetItem(value, i), PyTuple_GetItem(places, i));
  return fit;
}

// changed_groups(groups, kept[, numbers]): whether options are other objects than in `kept`, rows of a group, its
// parameters, its values, its names, and the places of each; the values are None of a group that has to be looked at
// always. Those that `takes_option` takes are kept and put into `numbers`; without such a list there are none. False:
// all are the same; True: all others were taken; a list: these groups need a look; None: groups or parameters are
// others.
inline PyObject* changed_groups(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count > 1 && !PyList_Check(arguments[0])) Py_RETURN_NONE;
  if (!takes("changed_groups", arguments, count, count == 3 ? 3 : 2)) return nullptr;
  PyObject *const groups = arguments[0], *const kept = arguments[1];
  const OptionNumbers numbers(count == 3 ? arguments[2] : nullptr);
  const Py_ssize_t n = PyList_Size(groups);
  if (n != PyList_Size(kept)) Py_RETURN_NONE;
  static PyObject* const params = PyUnicode_InternFromString("params");
  PyObject* found = nullptr;  // as a rule none, and no list
  bool taken = false;
  for (Py_ssize_t i = 0; i < n; ++i) {
    PyObject *const group = PyList_GetItem(groups, i), *const row = PyList_GetItem(kept, i);
    PyObject *const its = PyList_GetItem(row, 1), *const values = PyList_GetItem(row, 2);
    PyObject *const names = PyList_GetItem(row, 3), *const places = PyList_GetItem(row, 4);
    if (its == nullptr || values == nullptr || names == nullptr || places == nullptr) {
      return Py_XDECREF(found), nullptr;
    }
    PyObject* const now = group == PyList_GetItem(row, 0) ? PyDict_GetItemWithError(group, params) : nullptr;
    bool same = now != nullptr && PyList_Check(now) && PyList_Size(now) == PyList_Size(its);
    for (Py_ssize_t k = same ? PyList_Size(its) : 0; same && k-- > 0;) {
      same = PyList_GetItem(now, k) == PyList_GetItem(its, k);
    }
    if (!same) {
      Py_XDECREF(found);
      if (PyErr_Occurred()) return nullptr;
      Py_RETURN_NONE;
    }
    same = values != Py_None && PyDict_Size(group) == PyList_Size(values);
    PyObject *key = nullptr, *value = nullptr;
    for (Py_ssize_t at = 0, k = 0; same && PyDict_Next(group, &at, &key, &value); ++k) {
      if (value == PyList_GetItem(values, k)) continue;
      same =
          numbers.there() && key == PyList_GetItem(names, k) && takes_option(value, PyList_GetItem(places, k), numbers);
      if (!same) break;
      Py_INCREF(value);
      same = taken = PyList_SetItem(values, k, value) == 0;
    }
    if (PyErr_Occurred()) return Py_XDECREF(found), nullptr;
    if (same) continue;
    if (found == nullptr && (found = PyList_New(0)) == nullptr) return nullptr;
    PyObject* const place = PyLong_FromSsize_t(i);
    const bool added = place != nullptr && PyList_Append(found, place) == 0;
    Py_XDECREF(place);
    if (!added) return Py_DECREF(found), nullptr;
  }
  return found != nullptr ? found : PyBool_FromLong(taken);
}

// gradients(params, unused, trained): the gradients, if they are None where `unused` says True and requires_grad is as
// in `trained`; otherwise None.
inline PyObject* gradients(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (!takes("gradients", arguments, count, 3)) return nullptr;
  PyObject *const params = arguments[0], *const unused = arguments[1], *const trained = arguments[2];
  const Py_ssize_t n = PyList_Size(params);
  if (n != PyList_Size(unused) || n != PyList_Size(trained)) Py_RETURN_NONE;
  PyObject* const found = PyList_New(n);
  static PyObject *const grad_name = PyUnicode_InternFromString("grad"), *const requires_grad_name =
                                                                             PyUnicode_InternFromString(
                                                                                 "requires_grad");
  Getter grad(grad_name), requires_grad(requires_grad_name);
  for (Py_ssize_t i = 0; found != nullptr && i < n; ++i) {
    PyObject* const param = PyList_GetItem(params, i);
    PyObject* const its = grad(param);
    if (its == nullptr || PyList_SetItem(found, i, its) != 0) return Py_DECREF(found), nullptr;
    PyObject* const trains = requires_grad(param);
    if (trains == nullptr) return Py_DECREF(found), nullptr;
    Py_DECREF(trains);
    if ((its == Py_None) != (PyList_GetItem(unused, i) == Py_True) || trains != PyList_GetItem(trained, i)) {
      Py_DECREF(found);
      Py_RETURN_NONE;
    }
  }
  return found;
}

// holds_states(keys, entries, dicts, values, state): whether the dict `state` has these keys and entries, and the
// dicts, some of the entries, have these values one after the other; Ellipsis is any value.
inline PyObject* holds_states(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (!takes("holds_states", arguments, count - 1, 4)) return nullptr;
  PyObject *const keys = arguments[0], *const entries = arguments[1], *const dicts = arguments[2];
  PyObject *const values = arguments[3], *const state = arguments[4];
  if (!PyDict_Check(state)) Py_RETURN_FALSE;
  if (PyDict_Size(state) != PyList_Size(keys) || PyList_Size(keys) != PyList_Size(entries)) Py_RETURN_FALSE;
  PyObject *key = nullptr, *value = nullptr;
  for (Py_ssize_t at = 0, k = 0; PyDict_Next(state, &at, &key, &value); ++k) {
    if (key != PyList_GetItem(keys, k) || value != PyList_GetItem(entries, k)) Py_RETURN_FALSE;
  }
  const Py_ssize_t n = PyList_Size(dicts), all = PyList_Size(values);
  Py_ssize_t k = 0;
  for (Py_ssize_t i = 0; i < n; ++i) {
    PyObject* const dict = PyList_GetItem(dicts, i);
    if (!PyDict_Check(dict) || PyDict_Size(dict) > all - k) Py_RETURN_FALSE;
    for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &key, &value); ++k) {
      PyObject* const kept = PyList_GetItem(values, k);
      if (value != kept && kept != Py_Ellipsis) Py_RETURN_FALSE;
    }
  }
  return PyBool_FromLong(k == all);
}

// put(dicts, names, values): gives each dict its next values under the names.
inline PyObject* put(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (!takes("put", arguments, count, 3)) return nullptr;
  PyObject *const dicts = arguments[0], *const names = arguments[1], *const values = arguments[2];
  const Py_ssize_t n = PyList_Size(names);
  for (Py_ssize_t k = 0; k < n * PyList_Size(dicts); ++k) {
    PyObject* const value = PyList_GetItem(values, k);
    if (value == nullptr || PyDict_SetItem(PyList_GetItem(dicts, k / n), PyList_GetItem(names, k % n), value) != 0) {
      return nullptr;
    }
  }
  Py_RETURN_NONE;
}

// versions(tensors, dicts): the versions of the tensors, and of the first value of each dict; None: it has none.
inline PyObject* versions(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (!takes("versions", arguments, count, 2)) return nullptr;
  PyObject *const tensors = arguments[0], *const dicts = arguments[1];
  const Py_ssize_t n = PyList_Size(tensors), all = n + PyList_Size(dicts);
  PyObject* const found = PyList_New(all);
  static PyObject* const name = PyUnicode_InternFromString("_version");
  Getter version(name);
  for (Py_ssize_t i = 0; found != nullptr && i < all; ++i) {
    PyObject *key = nullptr, *of = i < n ? PyList_GetItem(tensors, i) : PyList_GetItem(dicts, i - n);
    if (Py_ssize_t at = 0; i >= n && !(PyDict_Check(of) && PyDict_Next(of, &at, &key, &of))) of = Py_None;
    Py_INCREF(of);
    PyObject* its = version(of);
    Py_DECREF(of);
    if (its == nullptr &&
        (PyErr_ExceptionMatches(PyExc_AttributeError) || PyErr_ExceptionMatches(PyExc_RuntimeError))) {
      PyErr_Clear();  // no tensor, or one of inference mode
      its = Py_None;
      Py_INCREF(its);
    }
    if (its == nullptr || PyList_SetItem(found, i, its) != 0) return Py_DECREF(found), nullptr;
  }
  return found;
}

}  // namespace pace
