// Finding what was compiled. See call_cache.h first.
#include "call_cache.h"

#include <ATen/Context.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/DefaultDtype.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "donation.h"
#include "level.h"
#include "wrapper.h"

namespace functorch_lite {
namespace {

// Numbers that are equal for calls that one entry serves.
using Key = std::vector<uint64_t>;

constexpr size_t kMostEntries = 128;

uint64_t address(const void* object) { return reinterpret_cast<uint64_t>(object); }

bool add_tensor(Key& key, const at::Tensor& tensor) {
  const auto* impl = tensor.unsafeGetTensorImpl();
  if (!is_dense(tensor) || impl->has_symbolic_sizes_strides() || as_wrapper(impl) != nullptr) return false;
  const bool requires_grad = impl->requires_grad();
  key.push_back(impl->key_set().raw_repr());
  key.push_back(static_cast<uint64_t>(tensor.scalar_type()) | static_cast<uint64_t>(impl->device().index() + 1) << 8 |
                static_cast<uint64_t>(requires_grad) << 16 |
                static_cast<uint64_t>(requires_grad && !tensor.is_leaf()) << 17 |
                static_cast<uint64_t>(impl->dim()) << 32);
  for (const auto size : impl->sizes()) key.push_back(size);
  for (const auto stride : impl->strides()) key.push_back(stride);
  return true;
}

void add_modes(Key& key) {
  const auto keys = c10::impl::tls_local_dispatch_key_set();
  key.push_back(keys.included_.raw_repr());
  key.push_back(keys.excluded_.raw_repr());
  const auto modes = AutogradModes::current();
  key.push_back(static_cast<uint64_t>(modes.grad) | static_cast<uint64_t>(modes.inference) << 1 |
                static_cast<uint64_t>(at::globalContext().deterministicAlgorithms()) << 2 |
                static_cast<uint64_t>(c10::get_default_dtype_as_scalartype()) << 8);
}

// Whether two of all these tensors lie in one memory.
bool share_memory(const Tensors& tensors, const Tensors& others = {}) {
  std::vector<const void*> memories;
  for (const auto* list : {&tensors, &others}) {
    for (const auto& tensor : *list) {
      memories.push_back(tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl());
    }
  }
  std::sort(memories.begin(), memories.end());
  return std::adjacent_find(memories.begin(), memories.end()) != memories.end();
}

// The leaves of arguments: tensors, and in the key what they are and everything else.
struct Arguments {
  Key key;
  Tensors tensors;
  std::vector<PyObject*> objects;  // of the tensors
  std::vector<py::object> held;    // strings that are interned, which the key has by their address

  // False if a value is of a kind that Python has to look at.
  bool add(PyObject* value) {
    if (THPVariable_CheckExact(value)) {
      key.push_back(address(Py_TYPE(value)));
      tensors.push_back(THPVariable_Unpack(value));
      objects.push_back(value);
      return add_tensor(key, tensors.back());
    }
    auto* type = Py_TYPE(value);
    key.push_back(address(type));
    if (value == Py_None) return true;
    if (type == &PyTuple_Type) return add_items(value, PyTuple_GET_SIZE(value), PyTuple_GetItem);
    if (type == &PyList_Type) return add_items(value, PyList_GET_SIZE(value), PyList_GetItem);
    if (type == &PyDict_Type) return add_dict(value);
    if (type == &PyBool_Type) return key.push_back(value == Py_True), true;
    if (type == &PyUnicode_Type) return add_text(value);
    if (type == &PyFloat_Type) return key.push_back(std::bit_cast<uint64_t>(PyFloat_AS_DOUBLE(value))), true;
    if (type != &PyLong_Type) return false;
    int overflow = 0;
    key.push_back(PyLong_AsLongLongAndOverflow(value, &overflow));
    return overflow == 0;
  }

 private:
  template <class Get>
  bool add_items(PyObject* items, Py_ssize_t size, Get get) {
    key.push_back(size);
    for (Py_ssize_t i = 0; i < size; ++i) {
      if (!add(get(items, i))) return false;
    }
    return true;
  }
  bool add_dict(PyObject* dict) {
    key.push_back(PyDict_GET_SIZE(dict));
    Py_ssize_t position = 0;
    PyObject* name = nullptr;
    PyObject* value = nullptr;
    while (PyDict_Next(dict, &position, &name, &value)) {
      if (!PyUnicode_CheckExact(name) || !add_text(name) || !add(value)) return false;
    }
    return true;
  }
  bool add_text(PyObject* text) {
    if (PyUnicode_CHECK_INTERNED(text)) {
      held.push_back(py::reinterpret_borrow<py::object>(text));
      key.push_back(address(text));
      return true;
    }
    Py_ssize_t size = 0;
    const char* bytes = PyUnicode_AsUTF8AndSize(text, &size);
    if (bytes == nullptr) throw py::error_already_set();
    key.insert(key.end(), {0, static_cast<uint64_t>(size)});
    for (Py_ssize_t i = 0; i < size; i += sizeof(uint64_t)) {
      uint64_t word = 0;
      std::memcpy(&word, bytes + i, std::min<size_t>(sizeof(uint64_t), size - i));
      key.push_back(word);
    }
    return true;
  }
};

// What Python looks at in any case: levels, and modes that see every operator.
bool is_simple() {
  return current_level() == nullptr && !c10::impl::dispatch_mode_enabled() &&
         at::impl::PythonTorchFunctionTLS::stack_len() == 0;
}

std::optional<Arguments> look_at(const py::tuple& args, const py::dict& kwargs) {
  if (!is_simple()) return std::nullopt;
  Arguments found;
  add_modes(found.key);
  if (!found.add(args.ptr()) || !found.add(kwargs.ptr()) || share_memory(found.tensors)) return std::nullopt;
  return found;
}

Key key_of(const Tensors& tensors) {
  Key key;
  for (const auto& tensor : tensors) {
    if (!add_tensor(key, tensor)) key.push_back(0);
  }
  return key;
}

py::object build(const py::handle& structure, const std::vector<py::object>& leaves) {
  auto* value = structure.ptr();
  if (PyLong_CheckExact(value)) return leaves[PyLong_AsSize_t(value)];
  if (PyTuple_CheckExact(value)) {
    py::tuple result(PyTuple_GET_SIZE(value));
    for (size_t i = 0; i < result.size(); ++i) result[i] = build(PyTuple_GET_ITEM(value, i), leaves);
    return result;
  }
  if (PyList_CheckExact(value)) {
    py::list result(PyList_GET_SIZE(value));
    for (size_t i = 0; i < result.size(); ++i) result[i] = build(PyList_GET_ITEM(value, i), leaves);
    return result;
  }
  if (PyDict_CheckExact(value)) {
    py::dict result;
    for (const auto& [key, item] : py::reinterpret_borrow<py::dict>(structure)) result[key] = build(item, leaves);
    return result;
  }
  return structure(leaves);
}

}  // namespace

struct CallCache::Entry {
  Key key;
  std::vector<py::object> held;
  Compiled compiled;
  Key captured_key;
  Guards guards;

  bool is_valid(const Arguments& arguments) const {
    if (key_of(compiled.captured) != captured_key) return false;
    const bool changes_memory = !compiled.writes.empty() || !compiled.donated.empty();
    if (changes_memory && share_memory(arguments.tensors, compiled.captured)) return false;
    for (const auto& [module, training] : guards.training) {
      if (module.attr("training").ptr() != (training ? Py_True : Py_False)) return false;
    }
    for (const auto& [members, name, tensor] : guards.members) {
      if (PyDict_GetItem(members.ptr(), name.ptr()) != tensor.ptr()) return false;
    }
    return true;
  }

  py::object run(Arguments arguments) const {
    auto inputs = arguments.tensors;
    inputs.insert(inputs.end(), compiled.captured.begin(), compiled.captured.end());
    const auto objects = std::move(arguments.objects);
    arguments.tensors.clear();
    for (const auto i : compiled.donated) inputs[i].storage().data();  // raises an error if it was donated before
    for (const auto i : compiled.donated) inputs[i] = take_memory(inputs[i]);
    const auto keep = compiled.writes.empty() ? Tensors() : inputs;
    Tensors results;
    std::vector<py::object> others;
    if (compiled.program.defined()) {
      const py::gil_scoped_release unlocked;
      results = compiled.program->run(std::move(inputs), !compiled.donated.empty());
      if (!compiled.writes.empty()) write(keep, results);
    } else {
      const at::AutoGradMode unrecorded(false);
      py::list given(inputs.size());
      for (size_t i = 0; i < inputs.size(); ++i) given[i] = py::cast(inputs[i]);
      inputs.clear();
      for (const auto& result : compiled.function(given)) {
        others.push_back(py::reinterpret_borrow<py::object>(result));
        auto* value = others.back().ptr();
        results.push_back(THPVariable_Check(value) ? THPVariable_Unpack(value) : at::Tensor());
      }
      write(keep, results);
    }
    std::vector<py::object> leaves;
    for (const auto& output : compiled.outputs) leaves.push_back(leaf(output, results, others, objects));
    return build(compiled.structure, leaves);
  }

 private:
  void write(const Tensors& inputs, const Tensors& results) const {
    const at::AutoGradMode unrecorded(false);
    for (const auto& [input, result] : compiled.writes) inputs[input].copy_(results[result]);
  }
  py::object leaf(const py::tuple& output, const Tensors& results, const std::vector<py::object>& others,
                  const std::vector<PyObject*>& objects) const {
    if (!output[0].is_none()) {
      const auto i = output[0].cast<size_t>();
      return others.empty() ? py::reinterpret_steal<py::object>(THPVariable_Wrap(results[i])) : others[i];
    }
    if (!output[1].is_none()) {
      const auto i = output[1].cast<size_t>();
      if (i < objects.size()) return py::reinterpret_borrow<py::object>(objects[i]);
      return py::cast(compiled.captured[i - objects.size()]);
    }
    return output[2];
  }
};

CallCache::CallCache() = default;
CallCache::~CallCache() = default;
CallCache::CallCache(CallCache&&) noexcept = default;

py::object CallCache::call(const py::tuple& args, const py::dict& kwargs) {
  auto arguments = look_at(args, kwargs);
  if (!arguments.has_value()) return py::ellipsis();
  for (size_t i = 0; i < entries_.size(); ++i) {
    const auto entry = entries_[i];
    if (entry->key != arguments->key || !entry->is_valid(*arguments)) continue;
    if (i > 0) std::swap(entries_[i], entries_[i - 1]);
    return entry->run(std::move(*arguments));
  }
  return py::ellipsis();
}

void CallCache::add(const py::tuple& args, const py::dict& kwargs, Compiled compiled, Guards guards) {
  auto arguments = look_at(args, kwargs);
  if (!arguments.has_value()) return;
  auto captured_key = key_of(compiled.captured);
  if (entries_.size() >= kMostEntries) entries_.clear();
  entries_.push_back(std::make_shared<Entry>(Entry{std::move(arguments->key), std::move(arguments->held),
                                                   std::move(compiled), std::move(captured_key), std::move(guards)}));
}

void CallCache::clear() { entries_.clear(); }

}  // namespace functorch_lite
