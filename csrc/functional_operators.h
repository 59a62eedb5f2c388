// Operators that a functionalize level runs in another way than PyTorch's functionalization does.
#pragma once

#include <ATen/MemoryOverlap.h>
#include <ATen/ScalarOps.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/enum_tag.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/permute.h>
#include <ATen/ops/resize.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <unordered_set>

#include "functional_memory.h"
#include "siblings.h"

namespace functorch_lite {

// Whether PyTorch's way to write the results into `out` needs memory, or leaves something out.
inline bool needs_functional_form(const c10::OperatorHandle& op) {
  static const std::unordered_set<std::string> names{"aten::matmul", "aten::linear", "aten::kron",
                                                     "aten::linalg_matrix_rank", "aten::_native_batch_norm_legit"};
  return names.count(op.operator_name().name) > 0 && is_out_form(op.schema()) && find_sibling(op) != nullptr;
}

// Gives the arguments for results the results of the functional form.
inline void run_as_functional_form(const c10::OperatorHandle& op, Stack& stack) {
  const auto* form = find_sibling(op);
  const Stack arguments = torch::jit::pop(stack, count_arguments(op));
  auto results = form->arguments(arguments);
  form->op.callBoxed(&results);
  const auto first = arguments.size() - results.size();
  for (size_t i = 0; i < results.size(); ++i) {
    const auto out = arguments[first + i].toTensor();
    const auto result = results[i].toTensor();
    if (out.sym_sizes() != result.sym_sizes()) out.resize__symint(result.sym_sizes());
    out.copy_(result);
    stack.emplace_back(out);
  }
}

// Forms that differ from another operator in nothing but that they do not say that they make views.
inline std::optional<c10::OperatorHandle> view_that_says_so(const c10::OperatorHandle& op) {
  static const auto split = find_operator("unsafe_split.Tensor");
  static const auto split_with_sizes = find_operator("unsafe_split_with_sizes");
  if (op == split) return find_operator("split.Tensor");
  if (op == split_with_sizes) return find_operator("split_with_sizes");
  return std::nullopt;
}

// In-place operators whose result does not depend on what was there before. The forms that PyTorch's functionalization
// calls for them have no derivative.
inline bool overwrites(const c10::OperatorName& name) {
  static const std::unordered_set<std::string> names{"aten::bernoulli_", "aten::cauchy_",     "aten::exponential_",
                                                     "aten::geometric_", "aten::log_normal_", "aten::normal_",
                                                     "aten::random_",    "aten::uniform_",    "aten::zero_"};
  return names.count(name.name) > 0;
}

// A Python number that became a tensor for an operator. Nobody writes it, and under fake tensors it is real, which
// makes it no base for views.
inline bool is_number(const at::Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->is_wrapped_number() && as_wrapper(tensor) == nullptr;
}

inline at::Tensor conjugate_of_number(const at::Tensor& number) {
  const auto value = *static_cast<const c10::complex<double>*>(number.const_data_ptr());
  auto result = c10::scalar_to_tensor(std::conj(value));
  result.unsafeGetTensorImpl()->set_wrapped_number(true);
  return result;
}

// The dimensions in the order in which they lie in memory, or none if that is their own order.
inline std::vector<int64_t> order_in_memory(const at::Tensor& tensor) {
  std::vector<int64_t> order(tensor.dim());
  std::iota(order.begin(), order.end(), 0);
  const auto strides = tensor.sym_strides();
  const auto is_before = [&](int64_t a, int64_t b) {
    const auto x = strides[a].maybe_as_int();
    const auto y = strides[b].maybe_as_int();
    return x.has_value() && y.has_value() && *x > *y;
  };
  std::stable_sort(order.begin(), order.end(), is_before);
  return std::is_sorted(order.begin(), order.end()) ? std::vector<int64_t>() : order;
}

// In place, random numbers are drawn in the order of memory, and functional operators draw in the order of indices.
inline bool draw_in_order_of_memory(const c10::OperatorHandle& op, Stack& stack) {
  if (!op.hasTag(at::Tag::nondeterministic_seeded) || op.operator_name().name.back() != '_') return false;
  auto& target = stack[stack.size() - count_arguments(op)];
  if (!target.isTensor()) return false;
  const auto order = order_in_memory(target.toTensor());
  if (order.empty()) return false;
  const auto given = target;
  target = at::permute(target.toTensor(), order);
  op.callBoxed(&stack);
  stack.back() = given;
  return true;
}

// as_strided looks at the memory, so the views before it do not matter, and PyTorch can undo it only if there are none.
inline void start_from_memory(c10::IValue* arguments, size_t n) {
  const auto view = arguments[0].toTensor();
  const auto& views = impl_of(view).view_metas();
  const auto is_cut = [](const auto& meta) {
    const auto* detached = dynamic_cast<const DetachedView*>(meta.get());
    return detached != nullptr && !detached->is_open();
  };
  if (views.empty() || std::any_of(views.begin(), views.end(), is_cut)) return;
  auto whole = at::detail::make_tensor<at::FunctionalTensorWrapper>(memory_behind(view).base());
  whole.unsafeGetTensorImpl()->set_storage_keep_dtype(view.storage());
  if (arguments[n - 1].isNone()) arguments[n - 1] = impl_of(view).value().sym_storage_offset();
  arguments[0] = std::move(whole);
}

// Whether all tensors that the operator writes, or makes views of, have memory with strides.
inline bool all_dense(const c10::OperatorHandle& op, const c10::IValue* arguments) {
  bool result = true;
  for (size_t i = 0; i < count_arguments(op); ++i) {
    if (op.schema().arguments()[i].alias_info() == nullptr) continue;
    for_each_tensor(arguments + i, 1, [&](const at::Tensor& tensor) { result &= is_dense(tensor); });
  }
  return result;
}

inline bool writes_beside_any(const c10::FunctionSchema& schema) {
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    const auto* alias = schema.arguments()[i].alias_info();
    if (alias != nullptr && alias->isWrite() && writes_beside_results(schema, i)) return true;
  }
  return false;
}

// Whether this is a batch norm that writes running statistics, which its schema does not say.
constexpr size_t kRunningMean = 3;
constexpr size_t kRunningVar = 4;
constexpr size_t kTraining = 5;
inline bool updates_statistics(const c10::OperatorHandle& op, const c10::IValue* arguments) {
  static const std::unordered_set<std::string> names{"aten::native_batch_norm", "aten::cudnn_batch_norm",
                                                     "aten::miopen_batch_norm"};
  if (names.count(op.operator_name().name) == 0 || !op.operator_name().overload_name.empty()) return false;
  const auto& mean = arguments[kRunningMean];
  return mean.isTensor() && mean.toTensor().defined() && arguments[kTraining].toBool();
}

// By the operator whose schema does.
inline void run_batch_norm(const c10::OperatorHandle& op, Stack& stack) {
  static const auto explicit_form = find_operator("_native_batch_norm_legit");
  const auto input = torch::jit::peek(stack, 0, count_arguments(op)).toTensor();
  explicit_form.callBoxed(&stack);
  // cuDNN's has a fourth result, for its own backward pass.
  if (op.schema().returns().size() == 4) torch::jit::push(stack, at::empty({0}, input.options().dtype(at::kByte)));
}

inline bool is_differentiated_value(const at::Tensor& tensor) {
  return may_be_differentiated(functional::from_functional_tensor(tensor, /*assert_functional=*/false));
}

// Both below the level, with functional tensors where the operator has aliases. They take the arguments off the stack.
inline void call_differentiable_copy(Stack& stack) {
  const auto arguments = torch::jit::pop(stack, 3);  // target, source, non_blocking
  const auto& target = arguments[0].toTensor();
  replace(target, differentiable_copy(impl_of(target).value(), arguments[1].toTensor()));
  stack.emplace_back(target);
}

inline void call_as_strided(Stack& stack, bool keep_views) {
  const auto arguments = torch::jit::pop(stack, 4);  // tensor, sizes, strides, offset
  const auto& whole = arguments[0].toTensor();
  auto offset = arguments[3].isNone() ? std::nullopt : std::make_optional(arguments[3].toSymInt());
  const bool is_symbolic = whole.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
  auto view = std::make_shared<StridedView>(arguments[1].toSymIntVector(), arguments[2].toSymIntVector(),
                                            std::move(offset), is_symbolic, keep_views);
  const auto value = view->forward(impl_of(whole).value());
  stack.emplace_back(at::detail::make_tensor<at::FunctionalTensorWrapper>(value, &impl_of(whole), std::move(view)));
}

// What was there before has no part in the derivative.
inline void forget_derivatives(c10::IValue* arguments, size_t n) {
  replace_tensors(arguments, n, [](const at::Tensor& tensor) {
    if (!is_differentiated_value(tensor)) return tensor;
    if (!functional::isFunctionalTensor(tensor)) return at::detach(tensor);
    impl_of(tensor).replace_(at::detach(impl_of(tensor).value()));
    return tensor;
  });
}

inline void call_functionalized(const c10::OperatorHandle& op, Stack& stack, bool keep_views) {
  static const auto copy = find_operator("copy_");
  static const auto as_strided = find_operator("as_strided");
  static const std::array larger_than_memory{find_operator("expand"), find_operator("unfold"), as_strided};
  const auto n = count_arguments(op);
  auto* arguments = stack.data() + stack.size() - n;
  if (op == copy &&
      (is_differentiated_value(arguments[0].toTensor()) || is_differentiated_value(arguments[1].toTensor()))) {
    return call_differentiable_copy(stack);
  }
  if (overwrites(op.operator_name())) forget_derivatives(arguments, n);
  const bool may_be_larger =
      !keep_views && std::find(larger_than_memory.begin(), larger_than_memory.end(), op) != larger_than_memory.end();
  const auto source = may_be_larger ? arguments[0].toTensor() : at::Tensor();
  if (op == as_strided) {
    call_as_strided(stack, keep_views);
  } else {
    const functional::FunctionalizationReapplyViewsGuard views(keep_views);
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::Functionalize), &stack);
  }
  if (!source.defined() || source.sym_numel() >= stack.back().toTensor().sym_numel()) return;
  const auto copied = stack.back().toTensor();
  stack.back() = at::detail::make_tensor<at::FunctionalTensorWrapper>(impl_of(copied).value(), &impl_of(copied),
                                                                      std::make_shared<ExpandedCopy>());
}

}  // namespace functorch_lite
