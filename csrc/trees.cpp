// Nested arguments. See trees.h first.
#include "trees.h"

#include <c10/util/hash.h>
#include <torch/csrc/autograd/python_variable.h>

#include <memory>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

namespace functorch_lite {
namespace {

constexpr int kDeepest = 100;
constexpr size_t kMostStructures = 1024;

// A structure in depth-first order: for a leaf 0, for a container its kind and size and, of a dict, the hashes of its
// names.
using Key = std::vector<uint64_t>;
enum Kind : uint64_t { kLeaf, kTuple, kList, kDict };

struct HashKey {
  size_t operator()(const Key& key) const {
    size_t seed = key.size();
    for (const auto part : key) seed = c10::hash_combine(seed, part);
    return seed;
  }
};

bool are_equal_names(PyObject* a, PyObject* b) {
  if (a == b) return PyUnicode_CheckExact(a);
  return PyUnicode_CheckExact(a) && PyUnicode_CheckExact(b) && PyUnicode_Compare(a, b) == 0;
}

std::optional<Kind> kind_of(PyObject* tree) {
  if (THPVariable_Check(tree)) return kLeaf;
  const auto* type = Py_TYPE(tree);
  if (type == &PyTuple_Type) return kTuple;
  if (type == &PyList_Type) return kList;
  if (type == &PyDict_Type) return kDict;
  const bool is_plain = tree == Py_None || type == &PyBool_Type || type == &PyLong_Type || type == &PyFloat_Type ||
                        type == &PyComplex_Type || type == &PyUnicode_Type;
  return is_plain ? std::make_optional(kLeaf) : std::nullopt;
}

Py_ssize_t size_of(Kind kind, PyObject* container) {
  if (kind == kDict) return PyDict_GET_SIZE(container);
  return kind == kTuple ? PyTuple_GET_SIZE(container) : PyList_GET_SIZE(container);
}

PyObject* item_of(Kind kind, PyObject* sequence, Py_ssize_t i) {
  return kind == kTuple ? PyTuple_GET_ITEM(sequence, i) : PyList_GET_ITEM(sequence, i);
}

// Calls `visit` with each child of a container, and its name in a dict, until it returns false.
template <class Visit>
bool for_each_child(Kind kind, PyObject* container, Visit&& visit) {
  if (kind == kDict) {
    Py_ssize_t position = 0;
    PyObject* name = nullptr;
    PyObject* child = nullptr;
    while (PyDict_Next(container, &position, &name, &child)) {
      if (!visit(child, name)) return false;
    }
    return true;
  }
  for (Py_ssize_t i = 0; i < size_of(kind, container); ++i) {
    if (!visit(item_of(kind, container, i), nullptr)) return false;
  }
  return true;
}

// A tree that was taken apart.
struct Parts {
  Key key;
  std::vector<PyObject*> names;
  py::list leaves;

  // False if the tree is not of the kind that is handled here.
  bool add(PyObject* tree, int depth = 0) {
    const auto kind = kind_of(tree);
    if (!kind.has_value() || depth > kDeepest) return false;
    if (*kind == kLeaf) {
      key.push_back(kLeaf);
      leaves.append(py::handle(tree));
      return true;
    }
    key.push_back(*kind | static_cast<uint64_t>(size_of(*kind, tree)) << 2);
    return for_each_child(*kind, tree, [&](PyObject* child, PyObject* name) {
      return (name == nullptr || add_name(name)) && add(child, depth + 1);
    });
  }

 private:
  bool add_name(PyObject* name) {
    if (!PyUnicode_CheckExact(name)) return false;
    key.push_back(static_cast<uint64_t>(PyObject_Hash(name)));
    names.push_back(name);
    return true;
  }
};

struct Structure {
  py::object pytorch;
  Key key;
  std::vector<py::object> names;
  size_t leaves;

  bool has_names(const std::vector<PyObject*>& others) const {
    for (size_t i = 0; i < names.size(); ++i) {
      if (!are_equal_names(names[i].ptr(), others[i])) return false;
    }
    return true;
  }
};

// Puts leaves together, from left to right.
class Assembly {
 public:
  Assembly(const Structure& structure, PyObject* const* leaves)
      : part_(structure.key.data()), name_(structure.names.data()), leaf_(leaves) {}

  py::object next() {
    const auto part = *part_++;
    const auto size = static_cast<py::ssize_t>(part >> 2);
    switch (part & 3) {
      case kTuple: {
        py::tuple result(size);
        for (py::ssize_t i = 0; i < size; ++i) PyTuple_SET_ITEM(result.ptr(), i, next().release().ptr());
        return result;
      }
      case kList: {
        py::list result(size);
        for (py::ssize_t i = 0; i < size; ++i) PyList_SET_ITEM(result.ptr(), i, next().release().ptr());
        return result;
      }
      case kDict: {
        py::dict result;
        for (py::ssize_t i = 0; i < size; ++i) {
          ++part_;
          const auto& name = *name_++;
          result[name] = next();
        }
        return result;
      }
      default:
        return py::reinterpret_borrow<py::object>(*leaf_++);
    }
  }

 private:
  const uint64_t* part_;
  const py::object* name_;
  PyObject* const* leaf_;
};

struct PyTorchSide {
  py::object flatten = py::module_::import("torch.utils._pytree").attr("tree_flatten");
  py::object unflatten = py::module_::import("torch.utils._pytree").attr("tree_unflatten");
};
// Never destroyed, as the structures: the interpreter may be gone by then.
const PyTorchSide& pytorch_side() {
  static const auto* side = new PyTorchSide();
  return *side;
}

// PyTorch's structures, which are slow to make, by ours and back. Used under Python's lock.
class Structures {
 public:
  // PyTorch's structure of a tree, undefined if another one has its key.
  py::object of(const Parts& parts, py::handle tree) {
    const auto found = by_key_.find(parts.key);
    if (found == by_key_.end()) return add(parts, tree);
    return found->second->has_names(parts.names) ? found->second->pytorch : py::object();
  }

  std::shared_ptr<const Structure> find(py::handle pytorch) const {
    const auto found = by_pytorch_.find(pytorch.ptr());
    return found != by_pytorch_.end() ? found->second : nullptr;
  }

 private:
  py::object add(const Parts& parts, py::handle tree) {
    auto made = std::make_shared<Structure>();
    made->pytorch = py::tuple(pytorch_side().flatten(tree))[1];
    made->key = parts.key;
    for (auto* name : parts.names) made->names.push_back(py::reinterpret_borrow<py::object>(name));
    made->leaves = parts.leaves.size();
    if (by_key_.size() >= kMostStructures) {
      by_pytorch_.clear();
      const auto released = std::exchange(by_key_, {});
    }
    if (by_key_.emplace(made->key, made).second) by_pytorch_.emplace(made->pytorch.ptr(), made);
    return made->pytorch;
  }

  std::unordered_map<Key, std::shared_ptr<const Structure>, HashKey> by_key_;
  std::unordered_map<const PyObject*, std::shared_ptr<const Structure>> by_pytorch_;
};
Structures& structures() {
  static auto* instance = new Structures();
  return *instance;
}

bool is_dim(PyObject* value) { return value == Py_None || (PyLong_Check(value) && !PyBool_Check(value)); }

// Both return false if the trees are not of the kind that is handled here.
bool repeat(PyObject* dim, PyObject* tree, py::list& result, int depth) {
  const auto kind = kind_of(tree);
  if (!kind.has_value() || depth > kDeepest) return false;
  if (*kind != kLeaf) {
    return for_each_child(*kind, tree,
                          [&](PyObject* child, PyObject*) { return repeat(dim, child, result, depth + 1); });
  }
  result.append(py::handle(dim));
  return true;
}
bool broadcast(PyObject* dims, PyObject* tree, py::list& result, int depth = 0) {
  if (is_dim(dims)) return repeat(dims, tree, result, depth);
  const auto kind = kind_of(tree);
  if (!kind.has_value() || *kind == kLeaf || kind_of(dims) != kind || depth > kDeepest) return false;
  if (size_of(*kind, dims) != size_of(*kind, tree)) return false;
  if (*kind != kDict) {
    for (Py_ssize_t i = 0; i < size_of(*kind, dims); ++i) {
      if (!broadcast(item_of(*kind, dims, i), item_of(*kind, tree, i), result, depth + 1)) return false;
    }
    return true;
  }
  // In one order, as PyTorch's structures have it.
  Py_ssize_t position = 0;
  PyObject* name = nullptr;
  PyObject* child = nullptr;
  return for_each_child(kDict, dims, [&](PyObject* below, PyObject* expected) {
    return PyDict_Next(tree, &position, &name, &child) != 0 && are_equal_names(name, expected) &&
           broadcast(below, child, result, depth + 1);
  });
}

}  // namespace

py::tuple flatten_tree(py::handle tree) {
  Parts parts;
  if (!parts.add(tree.ptr())) return pytorch_side().flatten(tree);
  auto structure = structures().of(parts, tree);
  return structure ? py::make_tuple(std::move(parts.leaves), std::move(structure))
                   : py::tuple(pytorch_side().flatten(tree));
}

py::object unflatten_tree(py::handle leaves, py::handle structure) {
  const auto given = py::reinterpret_steal<py::object>(PySequence_Fast(leaves.ptr(), "leaves must be a sequence"));
  if (!given) throw py::error_already_set();
  const auto found = structures().find(structure);
  if (found == nullptr || static_cast<size_t>(PySequence_Fast_GET_SIZE(given.ptr())) != found->leaves) {
    return pytorch_side().unflatten(given, structure);
  }
  return Assembly(*found, PySequence_Fast_ITEMS(given.ptr())).next();
}

py::object broadcast_dims(py::handle dims, py::handle tree) {
  py::list result;
  if (!broadcast(dims.ptr(), tree.ptr(), result)) return py::none();
  return result;
}

}  // namespace functorch_lite
