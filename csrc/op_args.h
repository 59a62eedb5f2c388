// The tensors of a boxed operator call: single, optional, and in lists.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

namespace functorch_lite {

using Stack = torch::jit::Stack;

// "sum.dim_IntList" as the dispatcher spells it.
inline c10::OperatorName aten_name(const std::string& name) {
  const auto dot = name.find('.');
  return {"aten::" + name.substr(0, dot), dot == std::string::npos ? std::string() : name.substr(dot + 1)};
}

// The operator of aten named "sum.dim_IntList".
inline c10::OperatorHandle find_operator(const std::string& name) {
  const auto full = aten_name(name);
  return c10::Dispatcher::singleton().findSchemaOrThrow(full.name.c_str(), full.overload_name.c_str());
}

inline size_t count_arguments(const c10::OperatorHandle& op) { return op.schema().arguments().size(); }

inline bool holds_tensor_list(const c10::IValue& v) { return v.isTensorList() || v.isOptionalTensorList(); }

// Whether it has memory with strides, as a wrapper pretends to.
inline bool is_dense(const at::Tensor& tensor) {
  return tensor.layout() == c10::kStrided && !tensor.is_quantized() && !tensor.is_nested();
}

// Calls visit(tensor) for every defined tensor in values[0..n).
template <class Visit>
void for_each_tensor(const c10::IValue* values, size_t n, Visit&& visit) {
  for (size_t i = 0; i < n; ++i) {
    const auto& v = values[i];
    if (v.isTensor()) {
      if (v.toTensor().defined()) visit(v.toTensor());
    } else if (v.isList() && holds_tensor_list(v)) {
      for (const auto& e : v.toListRef()) {
        if (e.isTensor() && e.toTensor().defined()) visit(e.toTensor());
      }
    }
  }
}

// Replaces every defined tensor in values[0..n) by replace(tensor). A list is copied first if it changes, for it
// may be the caller's.
template <class Replace>
void replace_tensors(c10::IValue* values, size_t n, Replace&& replace) {
  for (size_t i = 0; i < n; ++i) {
    auto& v = values[i];
    if (v.isTensor()) {
      const auto& tensor = v.toTensor();
      if (!tensor.defined()) continue;
      at::Tensor next = replace(tensor);
      if (!next.is_same(tensor)) v = std::move(next);
    } else if (v.isList() && holds_tensor_list(v)) {
      c10::List<c10::IValue> copy = v.toList();
      bool changed = false;
      for (size_t k = 0; k < copy.size(); ++k) {
        c10::IValue e = copy.get(k);
        if (!e.isTensor() || !e.toTensor().defined()) continue;
        at::Tensor next = replace(e.toTensor());
        if (next.is_same(e.toTensor())) continue;
        if (!changed) copy = copy.copy();
        changed = true;
        copy.set(k, std::move(next));
      }
      if (changed) v = std::move(copy);
    }
  }
}

// Whether the operator writes into an argument, or returns one or a view of one.
struct Aliasing {
  bool writes = false;
  bool any = false;
};
inline Aliasing aliasing_of(const c10::FunctionSchema& schema) {
  Aliasing result;
  for (const auto& argument : schema.arguments()) {
    if (const auto* alias = argument.alias_info()) {
      result.any = true;
      result.writes |= alias->isWrite();
    }
  }
  return result;
}

// For a result that is an argument written in place: that argument's index; otherwise -1.
inline int64_t written_argument(const c10::FunctionSchema& schema, size_t result) {
  const auto* alias = schema.returns()[result].alias_info();
  if (alias == nullptr || !alias->isWrite()) return -1;
  const auto& arguments = schema.arguments();
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto* candidate = arguments[i].alias_info();
    if (candidate != nullptr && candidate->isWrite() && candidate->beforeSets() == alias->beforeSets()) {
      return static_cast<int64_t>(i);
    }
  }
  return -1;
}

// Whether an operator that has results writes into this argument beside them, as batch norm does into its running
// statistics. Such a write has no derivative.
inline bool writes_beside_results(const c10::FunctionSchema& schema, size_t argument) {
  for (size_t i = 0; i < schema.returns().size(); ++i) {
    if (written_argument(schema, i) == static_cast<int64_t>(argument)) return false;
  }
  return !schema.returns().empty();
}

}  // namespace functorch_lite
