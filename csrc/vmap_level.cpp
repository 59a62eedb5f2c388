// The vmap level. See vmap_level.h first.
#include "vmap_level.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/enum_tag.h>

#include <algorithm>

#include "autodiff_level.h"
#include "keys.h"
#include "op_args.h"
#include "shared_memory.h"
#include "wrapper.h"
#include "written_arguments.h"

namespace functorch_lite {

VmapLevel& current_vmap_level() {
  auto* level = current_level();
  TORCH_INTERNAL_ASSERT(level != nullptr && typeid(*level) == typeid(VmapLevel), "a batching rule ran outside vmap");
  return static_cast<VmapLevel&>(*level);
}

namespace {

// Batched values are to be written into these.
void make_targets_batched(const c10::OperatorHandle& op, const c10::IValue* arguments, VmapLevel& level) {
  const auto& schema = op.schema();
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    const auto* alias = schema.arguments()[i].alias_info();
    if (alias == nullptr || !alias->isWrite()) continue;
    for_each_tensor(arguments + i, 1, [&](const at::Tensor& target) {
      auto* wrapper = wrapper_at(target, &level);
      if (wrapper == nullptr) return;
      if (wrapper->bdim() == kNoBatchDim) make_batched(*wrapper, level);
      bring_graph_up_to_date(wrapper->value());
    });
  }
}

// The argument that the results of a view operator show.
at::Tensor viewed_argument(const c10::OperatorHandle& op, const c10::IValue* arguments) {
  const auto& schema = op.schema();
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    if (schema.arguments()[i].alias_info() != nullptr && arguments[i].isTensor()) return arguments[i].toTensor();
  }
  return {};
}

bool is_from(const at::Tensor& tensor, const std::vector<at::Tensor>& others) {
  return std::any_of(others.begin(), others.end(), [&](const at::Tensor& other) {
    return have_one_storage(tensor, other) || innermost_value(tensor).is_same(innermost_value(other));
  });
}

}  // namespace

void VmapLevel::run(const c10::OperatorHandle& op, Stack& stack) {
  const auto n = count_arguments(op);
  auto* arguments = stack.data() + stack.size() - n;
  bool any_here = false;
  bool any_batched = false;
  bool any_closed = false;
  for_each_tensor(arguments, n, [&](const at::Tensor& tensor) {
    const auto* wrapper = as_wrapper(tensor);
    if (wrapper == nullptr) return;
    if (wrapper->level() == this) {
      any_here = true;
      any_batched |= wrapper->bdim() != kNoBatchDim;
    } else {
      any_closed |= !is_active(wrapper->level());
    }
  });
  if (C10_UNLIKELY(any_closed)) {
    replace_tensors(arguments, n, strip_closed_levels);
    return run(op, stack);
  }
  const bool is_random = op.hasTag(at::Tag::nondeterministic_seeded);
  if (is_random) remember_generator(*this, c10::ArrayRef<c10::IValue>(arguments, n));
  if (!any_batched && !is_random) return run_once(op, stack, any_here);
  if (any_batched || randomness_ == Randomness::kDifferent) make_targets_batched(op, arguments, *this);
  op.redispatchBoxed(c10::DispatchKeySet(kBatchingRules), &stack);
}

void VmapLevel::run_once(const c10::OperatorHandle& op, Stack& stack, bool any_here) {
  constexpr auto kComposite = c10::DispatchKey::CompositeImplicitAutograd;
  const bool is_composite = op.hasKernelForDispatchKey(kComposite);
  // Taken apart, so that it is known which of its results share memory with an argument.
  if (any_here && is_composite) return op.callBoxedForDispatchKey(kComposite, stack);
  const auto& schema = op.schema();
  const auto n = count_arguments(op);
  auto* arguments = stack.data() + stack.size() - n;
  if (any_here && op.hasTag(at::Tag::inplace_view)) {
    auto* target = wrapper_at(arguments[0].toTensor(), this);
    if (target != nullptr && is_seen_through_others(*target)) {
      make_batched(*target, *this);
      return op.redispatchBoxed(c10::DispatchKeySet(kBatchingRules), &stack);
    }
  }
  const auto aliasing = aliasing_of(schema);
  WrittenArguments written(schema, arguments);
  at::Tensor source;
  Stack recorded;
  std::vector<at::Tensor> captured;
  if (any_here && aliasing.any && !aliasing.writes) {
    source = viewed_argument(op, arguments);
    recorded.assign(arguments, arguments + n);
  }
  if (aliasing.any || is_composite) {
    for_each_tensor(arguments, n, [&](const at::Tensor& tensor) { captured.push_back(tensor); });
  }
  {
    const RunBelow below(*this);
    if (any_here) {
      replace_tensors(arguments, n, [&](const at::Tensor& tensor) {
        const auto* wrapper = wrapper_at(tensor, this);
        return wrapper != nullptr ? wrapper->value() : tensor;
      });
    }
    op.callBoxed(&stack);
  }
  auto* results = stack.data() + stack.size() - schema.returns().size();
  auto* viewed = source.defined() ? wrapper_at(source, this) : nullptr;
  if (viewed != nullptr) return wrap_views(op, recorded, *viewed, results);
  // torch.tensor passes what it has made through this operator, which looks like a view.
  if (op.operator_name().name == "aten::lift_fresh") captured.clear();
  for (size_t i = 0; i < schema.returns().size(); ++i) {
    if (written.restore(i, results[i], *this)) continue;
    replace_tensors(results + i, 1, [&](const at::Tensor& tensor) {
      return is_dense(tensor) && !is_from(tensor, captured) ? wrap(tensor, *this) : tensor;
    });
  }
}

}  // namespace functorch_lite
