// The functionalize level. See functionalize_level.h first.
#include "functionalize_level.h"

#include <ATen/FunctionalTensorWrapper.h>
#include <ATen/ScalarOps.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>

#include <ATen/ops/_to_copy.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/permute.h>
#include <ATen/ops/where.h>

#include <algorithm>
#include <numeric>

#include "autodiff_level.h"
#include "fused_attention.h"
#include "op_args.h"

namespace functorch_lite {
namespace {

namespace functionalization = at::functionalization::impl;

at::FunctionalTensorWrapper& functional_of(const Wrapper& wrapper) {
  return *functionalization::unsafeGetFunctionalWrapper(wrapper.functional());
}

at::functionalization::FunctionalStorageImpl& memory_behind(const at::Tensor& functional) {
  auto* storage = functional.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
  return *static_cast<at::functionalization::FunctionalStorageImpl*>(storage);
}

// What `target.copy_(source)` leaves, where it is differentiated: PyTorch's own `copy` has no derivative. The strides are
// those of `target`, for later code may view it.
at::Tensor differentiable_copy(const at::Tensor& target, const at::Tensor& source) {
  const auto same_type = at::_to_copy(source, target.options());
  return at::where(at::ones_like(target, at::kBool), same_type, target);
}

// A Python number that became a tensor for an operator. Nobody writes it, and under fake tensors it is real, which makes
// it no base for views.
bool is_number(const at::Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->is_wrapped_number() && as_wrapper(tensor) == nullptr;
}

at::Tensor conjugate_of_number(const at::Tensor& number) {
  const auto value = *static_cast<const c10::complex<double>*>(number.const_data_ptr());
  auto result = c10::scalar_to_tensor(std::conj(value));
  result.unsafeGetTensorImpl()->set_wrapped_number(true);
  return result;
}

// The dimensions in the order in which they lie in memory, or none if that is their own order.
std::vector<int64_t> order_in_memory(const at::Tensor& tensor) {
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
bool draw_in_order_of_memory(const c10::OperatorHandle& op, Stack& stack) {
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

// Batch norm writes its statistics, which its schema does not say.
bool update_statistics_apart(const c10::OperatorHandle& op, Stack& stack) {
  static const auto batch_norm = find_operator("native_batch_norm");
  if (op != batch_norm) return false;
  static const auto functional = find_operator("_native_batch_norm_legit_functional");
  const auto n = count_arguments(op);
  const auto* arguments = stack.data() + stack.size() - n;
  const auto mean = arguments[3];
  const auto var = arguments[4];
  const bool is_training = arguments[5].toBool();
  if (!is_training || mean.isNone() || !mean.toTensor().defined()) return false;
  functional.callBoxed(&stack);
  var.toTensor().copy_(torch::jit::pop(stack).toTensor());
  mean.toTensor().copy_(torch::jit::pop(stack).toTensor());
  return true;
}

}  // namespace

at::Tensor FunctionalizeLevel::wrap_functional(at::Tensor functional, const c10::VariableVersion& version) {
  auto value = functionalization::unsafeGetFunctionalWrapper(functional)->value();
  auto owner = LevelPtr::unsafe_reclaim_from_nonowning(this);
  return at::detail::make_tensor<Wrapper>(std::move(value), std::move(owner), std::move(functional), version);
}

at::Tensor FunctionalizeLevel::wrap_new(const at::Tensor& value) {
  TORCH_CHECK(!functionalization::isFunctionalTensor(value),
              "functionalize: got a tensor of PyTorch's own functionalization, expected a plain one or one of "
              "functorch_lite's transforms; use one of the two.");
  return wrap_functional(at::detail::make_tensor<at::FunctionalTensorWrapper>(value), c10::VariableVersion(0));
}

at::Tensor FunctionalizeLevel::lift(const at::Tensor& value) {
  if (wrapper_at(value, this) != nullptr) return value;
  auto& [outside, inside] = lifted_[value.unsafeGetTensorImpl()];
  if (!inside.defined()) {
    inside = wrap_new(value);
    outside = value;
  }
  return inside;
}

at::Tensor FunctionalizeLevel::current_value(const at::Tensor& tensor) const {
  if (wrapper_at(tensor, this) != nullptr || lifted_.empty()) return value_of(tensor);
  const auto known = lifted_.find(tensor.unsafeGetTensorImpl());
  return known != lifted_.end() ? value_of(known->second.second) : tensor;
}

std::optional<int64_t> FunctionalizeLevel::memory_of(const at::Tensor& tensor) const {
  const auto* wrapper = wrapper_at(tensor, this);
  if (wrapper == nullptr) return std::nullopt;
  return reinterpret_cast<int64_t>(&memory_behind(wrapper->functional()));
}

at::Tensor FunctionalizeLevel::memory_value(const at::Tensor& tensor) {
  const auto* wrapper = wrapper_at(tensor, this);
  if (wrapper == nullptr) return tensor;
  sync(wrapper->functional());
  return memory_behind(wrapper->functional()).base();
}

at::Tensor FunctionalizeLevel::replay_views(const at::Tensor& tensor, const at::Tensor& base) {
  const auto* wrapper = wrapper_at(tensor, this);
  if (wrapper == nullptr) return tensor;
  const RunBelowAll below(*this);
  return functionalization::apply_view_meta_sequence(base, functional_of(*wrapper).view_metas());
}

bool FunctionalizeLevel::is_view(const at::Tensor& tensor) const {
  const auto* wrapper = wrapper_at(tensor, this);
  return wrapper != nullptr && !functional_of(*wrapper).isBaseTensor();
}

void FunctionalizeLevel::sync(const at::Tensor& functional) const {
  const auto* tensor = functionalization::unsafeGetFunctionalWrapper(functional);
  if (tensor->is_up_to_date()) return;
  const RunBelowAll below(*this);
  functionalization::sync(functional);
}

// The lifted tensors hold the level.
void FunctionalizeLevel::on_close() { lifted_.clear(); }

void FunctionalizeLevel::run(const c10::OperatorHandle& op, Stack& stack) {
  constexpr auto kComposite = c10::DispatchKey::CompositeImplicitAutograd;
  const auto n = count_arguments(op);
  replace_tensors(stack.data() + stack.size() - n, n, strip_closed_levels);
  static const auto conj = find_operator("_conj");
  if (op == conj && is_number(stack.back().toTensor())) {
    stack.back() = conjugate_of_number(stack.back().toTensor());
    return;
  }
  static const auto choice_of_attention = find_operator("_fused_sdp_choice");
  if (op == choice_of_attention && parent() == nullptr) return ask_attention_kernels(op, stack);
  if (draw_in_order_of_memory(op, stack) || update_statistics_apart(op, stack)) return;
  // As PyTorch does above its own functionalization: a composition may make views, and write.
  if (op.hasKernelForDispatchKey(kComposite)) return op.callBoxedForDispatchKey(kComposite, stack);
  // What torch.tensor has made just now looks like a view.
  static const auto lift_fresh = find_operator("lift_fresh");
  if (!aliasing_of(op.schema()).any || op == lift_fresh) return run_without_aliases(op, stack);
  run_functionalized(op, stack);
}

void FunctionalizeLevel::run_without_aliases(const c10::OperatorHandle& op, Stack& stack) {
  const auto n = count_arguments(op);
  replace_tensors(stack.data() + stack.size() - n, n,
                  [&](const at::Tensor& tensor) { return current_value(tensor); });
  {
    const RunBelow below(*this);
    op.callBoxed(&stack);
  }
  const auto count = op.schema().returns().size();
  replace_tensors(stack.data() + stack.size() - count, count,
                  [&](const at::Tensor& value) { return wrap_new(value); });
}

void FunctionalizeLevel::run_functionalized(const c10::OperatorHandle& op, Stack& stack) {
  const auto& schema = op.schema();
  const auto n = count_arguments(op);
  auto* arguments = stack.data() + stack.size() - n;
  // What takes part in aliasing: the functional tensor, and the argument.
  std::vector<std::pair<at::Tensor, at::Tensor>> aliased;
  std::vector<at::Tensor> written;
  for (size_t i = 0; i < n; ++i) {
    const auto* alias = schema.arguments()[i].alias_info();
    replace_tensors(arguments + i, 1, [&](const at::Tensor& tensor) {
      if (alias == nullptr) return current_value(tensor);
      const auto inside = lift(tensor);
      const auto functional = as_wrapper(inside)->functional();
      sync(functional);
      aliased.emplace_back(functional, tensor);
      if (alias->isWrite()) written.push_back(inside);
      return functional;
    });
  }
  {
    const RunBelow below(*this);
    const at::functionalization::impl::FunctionalizationReapplyViewsGuard views(keep_views_);
    static const auto copy = find_operator("copy_");
    const auto is_differentiated = [&] {
      return may_be_differentiated(functionalization::from_functional_tensor(arguments[0].toTensor())) ||
             may_be_differentiated(arguments[1].toTensor());
    };
    if (op == copy && is_differentiated()) {
      auto target = arguments[0].toTensor();
      functionalization::replace_(target, differentiable_copy(functionalization::from_functional_tensor(target),
                                                             arguments[1].toTensor()));
      functionalization::commit_update(target);
      functionalization::sync(target);
      torch::jit::drop(stack, n);
      torch::jit::push(stack, std::move(target));
    } else {
      op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::Functionalize), &stack);
    }
  }
  for (const auto& target : written) {
    target.unsafeGetTensorImpl()->bump_version();
    as_wrapper(target)->value();
  }
  const auto count = schema.returns().size();
  replace_tensors(stack.data() + stack.size() - count, count, [&](const at::Tensor& result) {
    if (!functionalization::isFunctionalTensor(result)) return wrap_new(result);
    for (const auto& [functional, argument] : aliased) {
      if (result.is_same(functional)) return argument;
    }
    for (const auto& [functional, argument] : aliased) {
      if (!result.is_alias_of(functional)) continue;
      return wrap_functional(result, lift(argument).unsafeGetTensorImpl()->version_counter());
    }
    return wrap_functional(result, c10::VariableVersion(0));
  });
}

void Wrapper::follow_memory() {
  static_cast<FunctionalizeLevel*>(level())->sync(functional_);
  const auto& current = functional_of(*this).value();
  if (current.is_same(value_)) return;
  value_ = current;
  copy_keys_from_value();
  refresh();
}

}  // namespace functorch_lite
