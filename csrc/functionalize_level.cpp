// The functionalize level. See functionalize_level.h first.
#include "functionalize_level.h"

#include <ATen/ops/resolve_conj.h>
#include <ATen/ops/resolve_neg.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include "fallback.h"
#include "functional_operators.h"
#include "fused_attention.h"
#include "plain_compositions.h"

namespace functorch_lite {
namespace {

thread_local int64_t open_functionalize_levels = 0;

}  // namespace

// The tensors of the level.

at::Tensor FunctionalizeLevel::wrap_functional(at::Tensor tensor, const c10::VariableVersion& version) {
  auto value = impl_of(tensor).value();
  auto owner = LevelPtr::unsafe_reclaim_from_nonowning(this);
  return at::detail::make_tensor<Wrapper>(std::move(value), std::move(owner), std::move(tensor), version);
}

at::Tensor FunctionalizeLevel::lift_new(const at::Tensor& value) {
  TORCH_CHECK(!functional::isFunctionalTensor(value),
              "functionalize: got a tensor of PyTorch's own functionalization, expected a plain tensor or one of "
              "functorch_lite's transforms. Use one of the two functionalizations.");
  if (!is_dense(value)) return value;
  return wrap_functional(at::detail::make_tensor<at::FunctionalTensorWrapper>(value), c10::VariableVersion(0));
}

at::Tensor FunctionalizeLevel::lift(const at::Tensor& outside) {
  if (wrapper_at(outside, this) != nullptr) return outside;
  const auto known = by_tensor_.find(outside.unsafeGetTensorImpl());
  if (known != by_tensor_.end()) return from_outside_[known->second].inside;
  const auto inside = lift_new(outside);
  if (inside.is_same(outside)) return outside;
  const auto& tensor = as_wrapper(inside)->functional();
  by_tensor_.emplace(outside.unsafeGetTensorImpl(), from_outside_.size());
  by_memory_.emplace(&memory_behind(tensor), from_outside_.size());
  from_outside_.push_back({outside, inside, place_of(tensor), {}});
  return inside;
}

at::Tensor FunctionalizeLevel::value_of(const at::Tensor& tensor) const {
  if (by_tensor_.empty() || wrapper_at(tensor, this) != nullptr) return value_at(tensor, this);
  const auto known = by_tensor_.find(tensor.unsafeGetTensorImpl());
  return known != by_tensor_.end() ? value_at(from_outside_[known->second].inside, this) : tensor;
}

std::optional<int64_t> FunctionalizeLevel::memory_of(const at::Tensor& tensor) const {
  const auto* wrapper = wrapper_at(tensor, this);
  if (wrapper == nullptr) return std::nullopt;
  return reinterpret_cast<int64_t>(&memory_behind(wrapper->functional()));
}

at::Tensor FunctionalizeLevel::memory_value(const at::Tensor& tensor) const {
  const auto* wrapper = wrapper_at(tensor, this);
  if (wrapper == nullptr) return tensor;
  sync(wrapper->functional());
  return memory_behind(wrapper->functional()).base();
}

at::Tensor FunctionalizeLevel::replay_views(const at::Tensor& tensor, const at::Tensor& base) const {
  const auto* wrapper = wrapper_at(tensor, this);
  if (wrapper == nullptr) return tensor;
  const RunBelowAll below(*this);
  return functional::apply_view_meta_sequence(base, impl_of(wrapper->functional()).view_metas());
}

bool FunctionalizeLevel::is_view(const at::Tensor& tensor) const {
  const auto* wrapper = wrapper_at(tensor, this);
  return wrapper != nullptr && !impl_of(wrapper->functional()).isBaseTensor();
}

const FromOutside* FunctionalizeLevel::find_outside(Memory memory) const {
  const auto found = by_memory_.find(memory);
  return found != by_memory_.end() ? &from_outside_[found->second] : nullptr;
}

at::Tensor FunctionalizeLevel::outside_of(const at::Tensor& tensor) const {
  const auto* wrapper = wrapper_at(tensor, this);
  if (wrapper == nullptr) return {};
  const auto* found = find_outside(&memory_behind(wrapper->functional()));
  return found != nullptr ? found->outside : at::Tensor();
}

Memory FunctionalizeLevel::memory_of_lifted(const at::Tensor& tensor) {
  if (C10_LIKELY(open_functionalize_levels == 0)) return nullptr;
  for (auto* level = current_level(); level != nullptr; level = level->parent()) {
    if (typeid(*level) != typeid(FunctionalizeLevel)) continue;
    const auto& here = static_cast<FunctionalizeLevel&>(*level);
    const auto known = here.by_tensor_.find(tensor.unsafeGetTensorImpl());
    if (known != here.by_tensor_.end()) return here.from_outside_[known->second].memory._unsafe_get_target();
  }
  return nullptr;
}

void FunctionalizeLevel::on_open() { ++open_functionalize_levels; }

void FunctionalizeLevel::on_close() {
  --open_functionalize_levels;
  // They hold the level.
  from_outside_.clear();
  by_tensor_.clear();
  by_memory_.clear();
  written_outside_.clear();
}

// Values and writes.

void FunctionalizeLevel::sync(const at::Tensor& tensor) const {
  const bool restore = !before_no_grad_.empty() && at::GradMode::is_enabled();
  if (!restore && impl_of(tensor).is_up_to_date()) return;
  const RunBelowAll below(*this);
  if (restore) restore_derivative(tensor);
  // Views are made again as they were made: those that were not recorded are cut off.
  const at::AutoGradMode record(true);
  functional::sync(tensor);
}

void FunctionalizeLevel::restore_derivative(const at::Tensor& tensor) const {
  auto& memory = memory_behind(tensor);
  const auto before = before_no_grad_.find(&memory);
  if (before == before_no_grad_.end()) return;
  memory.apply_updates();
  const auto restored = with_derivatives_of(before->second.second, memory.base(), {.reverse = true, .forward = false});
  before_no_grad_.erase(before);
  memory.add_update(restored, {});
  memory.apply_updates();
}

at::Tensor FunctionalizeLevel::detached(const at::Tensor& tensor) const {
  sync(tensor);
  const RunBelowAll below(*this);
  return cut_off(tensor, {.reverse = true, .forward = true}, keep_views_);
}

// Returns the functional tensor to write into.
at::Tensor FunctionalizeLevel::prepare_write(const at::Tensor& inside) {
  const auto& tensor = as_wrapper(inside)->functional();
  sync(tensor);
  auto& memory = memory_behind(tensor);
  if (at::has_internal_overlap(impl_of(tensor).value().unsafeGetTensorImpl()) == at::MemOverlap::Yes) {
    refuse_overlap(inside);
  }
  if (auto* view = common_detached_view(tensor)) {
    const RunBelowAll below(*this);
    if (may_be_differentiated(memory.base())) memory.add_update(at::detach(memory.base()), {});
    view->open();
    functional::sync(tensor);
  }
  layouts_.try_emplace(&memory, place_of(tensor), layout_of(memory.base()));
  constexpr Derivatives recorded{.reverse = true, .forward = false};
  if (!at::GradMode::is_enabled() && recorded.may_be_of(memory.base())) {
    before_no_grad_.try_emplace(&memory, place_of(tensor), memory.base());
  }
  return tensor;
}

// as_strided looks at the memory, and a new value may be laid out in another way.
void FunctionalizeLevel::refuse_moved(const at::Tensor& tensor, bool has_offset) const {
  const auto before = layouts_.find(&memory_behind(tensor));
  const bool moved = before != layouts_.end() && before->second.second != layout_of(memory_behind(tensor).base());
  TORCH_CHECK_VALUE(!moved && (keep_views_ || !has_offset || impl_of(tensor).isBaseTensor()),
                    "functionalize: as_strided of ", moved ? "a tensor that was written" : "a view",
                    " needs the memory as it was, and here it is a new one. Use other view operators.");
}

void FunctionalizeLevel::finish_write(const at::Tensor& inside, bool counted) {
  const auto* wrapper = as_wrapper(inside);
  if (counted) inside.unsafeGetTensorImpl()->bump_version();
  auto& memory = memory_behind(wrapper->functional());
  if (memory.base().is_conj() || memory.base().is_neg()) {  // through such a view
    const RunBelowAll below(*this);
    memory.add_update(at::resolve_neg(at::resolve_conj(memory.base())), {});
    memory.apply_updates();
  }
  wrapper->value();
  if (find_outside(&memory) != nullptr) written_outside_.insert(&memory);
}

void FunctionalizeLevel::remember_shape(const c10::OperatorHandle& op, const at::Tensor& inside, Stack arguments) {
  const auto known = std::find_if(from_outside_.begin(), from_outside_.end(),
                                  [&](const FromOutside& tensor) { return tensor.inside.is_same(inside); });
  if (known == from_outside_.end()) return;
  known->reshaped.emplace_back(op, std::move(arguments));
  static const auto resize = find_operator("resize_");
  if (op != resize) return;
  // It may have got another memory, and is the same tensor outside.
  const auto& tensor = as_wrapper(inside)->functional();
  known->memory = place_of(tensor);
  by_memory_.emplace(&memory_behind(tensor), known - from_outside_.begin());
  written_outside_.insert(&memory_behind(tensor));
}

void FunctionalizeLevel::write(const at::Tensor& target, const at::Tensor& value) {
  const auto inside = lift(target);
  const auto tensor = prepare_write(inside);
  {
    const RunBelowAll below(*this);
    replace(tensor, value);
  }
  finish_write(inside);
}

// Of two tensors from outside that share memory, the one that was not written is out of date.
void FunctionalizeLevel::refuse_stale(const at::Tensor& tensor) const {
  if (C10_LIKELY(written_outside_.empty())) return;
  const auto* wrapper = wrapper_at(tensor, this);
  const FromOutside* lifted = nullptr;
  if (wrapper != nullptr) {
    lifted = find_outside(&memory_behind(wrapper->functional()));
    if (lifted == nullptr) return;
  } else if (const auto known = by_tensor_.find(tensor.unsafeGetTensorImpl()); known != by_tensor_.end()) {
    lifted = &from_outside_[known->second];
  }
  if (lifted != nullptr && written_outside_.count(lifted->memory._unsafe_get_target()) > 0) return;
  const auto& outside = lifted != nullptr ? lifted->outside : tensor;
  const RunBelowAll below(*this);
  for (const auto& other : from_outside_) {
    if (written_outside_.count(other.memory._unsafe_get_target()) == 0 || !may_overlap(outside, other.outside))
      continue;
    TORCH_CHECK_VALUE(
        false, "functionalize: the function has written into a tensor from outside (shape ", other.outside.sym_sizes(),
        ") and then uses another one (shape ", outside.sym_sizes(),
        ") that shares its memory. Pass one of the two, and make the other from it inside the function; or "
        "pass a clone of one.");
  }
}

at::Tensor FunctionalizeLevel::readable(const at::Tensor& tensor) const {
  refuse_stale(tensor);
  return value_of(tensor);
}

// Operators.

void FunctionalizeLevel::run(const c10::OperatorHandle& op, Stack& stack) {
  static const auto detach = find_operator("detach");
  static const auto detach_in_place = find_operator("detach_");
  static const auto lift_fresh = find_operator("lift_fresh");
  static const auto conj = find_operator("_conj");
  static const auto choice_of_attention = find_operator("_fused_sdp_choice");
  const auto n = count_arguments(op);
  auto* arguments = stack.data() + stack.size() - n;
  replace_tensors(arguments, n, strip_closed_levels);
  // Compositions ask whether a tensor is conjugated, and a write may have changed that.
  for_each_tensor(arguments, n, [&](const at::Tensor& tensor) {
    if (tensor.is_complex() && wrapper_at(tensor, this) != nullptr) as_wrapper(tensor)->value();
  });
  if (needs_functional_form(op)) return run_as_functional_form(op, stack);
  if (op.hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd)) return run_composition(op, stack);
  if (op == conj && is_number(stack.back().toTensor())) {
    stack.back() = conjugate_of_number(stack.back().toTensor());
    return;
  }
  if (op == choice_of_attention && parent() == nullptr) return ask_attention_kernels(op, stack);
  if (draw_in_order_of_memory(op, stack)) return;
  if (op == detach || op == detach_in_place) return run_detach(op, stack);
  // What torch.tensor has made just now looks like a view.
  if (const auto view = view_that_says_so(op)) return view->callBoxed(&stack);
  const auto aliasing = aliasing_of(op.schema());
  // PyTorch's functional forms of these save their old values for the backward pass, or have no derivative.
  const bool writes_beside = updates_statistics(op, arguments) || writes_beside_any(op.schema());
  if (writes_beside && is_differentiated_below(arguments, n)) return run_on_copies(op, stack);
  if (updates_statistics(op, arguments)) return run_batch_norm(op, stack);
  if (!aliasing.any || op == lift_fresh) return run_without_aliases(op, stack);
  if (!all_dense(op, arguments)) return run_on_values(op, stack);
  if (op.hasKernelForDispatchKey(c10::DispatchKey::Functionalize)) return run_functionalized(op, stack);
  // The few others of PyTorch are composed of its own operators.
  constexpr auto kExplicit = c10::DispatchKey::CompositeExplicitAutograd;
  const bool is_composed = op.operator_name().getNamespace() == "aten" && op.hasKernelForDispatchKey(kExplicit);
  if (is_composed) return op.callBoxedForDispatchKey(kExplicit, stack);
  run_on_copies(op, stack);
}

// A composition may make views, and write, and so it runs here. One that has none of this and that levels take apart in
// their own way is left to them.
void FunctionalizeLevel::run_composition(const c10::OperatorHandle& op, Stack& stack) {
  const auto plain = find_plain_composition(op.operator_name());
  const bool aliases = aliasing_of(op.schema()).any;
  if (plain != nullptr && aliases) return plain(op, stack);
  if (plain != nullptr && parent() != nullptr) return run_without_aliases(op, stack);
  op.callBoxedForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd, stack);
}

void FunctionalizeLevel::run_without_aliases(const c10::OperatorHandle& op, Stack& stack) {
  const auto n = count_arguments(op);
  replace_tensors(stack.data() + stack.size() - n, n, [&](const at::Tensor& tensor) { return readable(tensor); });
  {
    const RunBelow below(*this);
    op.callBoxed(&stack);
  }
  const auto count = op.schema().returns().size();
  replace_tensors(stack.data() + stack.size() - count, count, [&](const at::Tensor& value) { return lift_new(value); });
}

// Sparse tensors have no functional form: they are written and viewed as they are.
void FunctionalizeLevel::run_on_values(const c10::OperatorHandle& op, Stack& stack) {
  const auto n = count_arguments(op);
  replace_tensors(stack.data() + stack.size() - n, n, [&](const at::Tensor& tensor) { return readable(tensor); });
  const RunBelow below(*this);
  op.callBoxed(&stack);
}

void FunctionalizeLevel::run_detach(const c10::OperatorHandle& op, Stack& stack) {
  const auto source = torch::jit::pop(stack).toTensor();
  refuse_stale(source);
  const auto inside = lift(source);
  auto* wrapper = wrapper_at(inside, this);
  TORCH_INTERNAL_ASSERT(wrapper != nullptr, "a tensor without strides is detached");
  auto cut = detached(wrapper->functional());
  if (aliasing_of(op.schema()).writes) {
    wrapper->take_functional(std::move(cut));
    remember_shape(op, inside, {});
    return torch::jit::push(stack, source);
  }
  torch::jit::push(stack, wrap_functional(std::move(cut), wrapper->version_counter()));
}

void FunctionalizeLevel::run_functionalized(const c10::OperatorHandle& op, Stack& stack) {
  static const auto set_from_tensor = find_operator("set_.source_Tensor");
  const auto& schema = op.schema();
  const auto n = count_arguments(op);
  auto* arguments = stack.data() + stack.size() - n;
  static const auto as_strided = find_operator("as_strided");
  static const auto as_strided_in_place = find_operator("as_strided_");
  struct Aliased {
    at::Tensor functional;
    at::Tensor argument;
    at::Tensor inside;
  };
  std::vector<Aliased> aliased;
  std::vector<std::pair<at::Tensor, bool>> written;
  const Stack behind_first = op.hasTag(at::Tag::inplace_view) ? Stack(arguments + 1, arguments + n) : Stack();
  for (size_t i = 0; i < n; ++i) {
    const auto* alias = schema.arguments()[i].alias_info();
    const bool writes = alias != nullptr && alias->isWrite();
    replace_tensors(arguments + i, 1, [&](const at::Tensor& tensor) {
      refuse_stale(tensor);
      if (alias == nullptr && op != set_from_tensor) return value_of(tensor);
      const auto inside = lift(tensor);
      if (writes) {
        written.emplace_back(inside, !writes_beside_results(schema, i));
        prepare_write(inside);
      }
      sync(as_wrapper(inside)->functional());
      const bool strides = op == as_strided || op == as_strided_in_place;
      if (strides) refuse_moved(as_wrapper(inside)->functional(), !arguments[n - 1].isNone());
      aliased.push_back({as_wrapper(inside)->functional(), tensor, inside});
      return aliased.back().functional;
    });
  }
  const bool unrecorded = written.empty() && !at::GradMode::is_enabled();
  const auto count = schema.returns().size();
  if (op == as_strided && keep_views_) start_from_memory(arguments, n);
  {
    const RunBelow below(*this);
    call_functionalized(op, stack, keep_views_);
    if (unrecorded) {
      constexpr Derivatives recorded{.reverse = true, .forward = false};
      replace_tensors(stack.data() + stack.size() - count, count, [&](const at::Tensor& view) {
        const bool cut = functional::isFunctionalTensor(view) && recorded.may_be_of(memory_behind(view).base());
        return cut ? cut_off(view, recorded, keep_views_) : view;
      });
    }
  }
  for (const auto& [target, counted] : written) finish_write(target, counted);
  if (op.hasTag(at::Tag::inplace_view)) remember_shape(op, written[0].first, behind_first);
  replace_tensors(stack.data() + stack.size() - count, count, [&](const at::Tensor& result) {
    if (!functional::isFunctionalTensor(result)) return lift_new(result);
    for (const auto& [tensor, argument, inside] : aliased) {
      if (result.is_same(tensor)) return argument;
    }
    for (const auto& [tensor, argument, inside] : aliased) {
      if (!result.is_alias_of(tensor)) continue;
      return wrap_functional(result, inside.unsafeGetTensorImpl()->version_counter());
    }
    return wrap_functional(result, c10::VariableVersion(0));
  });
}

bool FunctionalizeLevel::is_differentiated_below(const c10::IValue* arguments, size_t n) const {
  bool result = false;
  for_each_tensor(arguments, n, [&](const at::Tensor& tensor) { result |= may_be_differentiated(value_of(tensor)); });
  return result;
}

// An operator that PyTorch cannot functionalize writes into copies.
void FunctionalizeLevel::run_on_copies(const c10::OperatorHandle& op, Stack& stack) {
  const auto& schema = op.schema();
  const auto n = count_arguments(op);
  auto* arguments = stack.data() + stack.size() - n;
  const Stack originals(arguments, arguments + n);
  struct Target {
    at::Tensor inside;
    at::Tensor functional;
    at::Tensor value;
    bool counted;
  };
  std::vector<Target> targets;
  const bool has_statistics = updates_statistics(op, arguments);
  const auto is_written = [&](size_t i) {
    return schema.arguments()[i].alias_info() != nullptr || (has_statistics && (i == kRunningMean || i == kRunningVar));
  };
  for (size_t i = 0; i < n; ++i) {
    const auto* alias = schema.arguments()[i].alias_info();
    TORCH_CHECK_NOT_IMPLEMENTED(alias == nullptr || alias->isWrite(), "functionalize: the operator ",
                                op.operator_name(),
                                " returns views, and PyTorch has no functional form of it. Have it "
                                "return copies, or compose it of PyTorch's view operators.");
    replace_tensors(arguments + i, 1, [&](const at::Tensor& tensor) {
      if (!is_written(i)) return readable(tensor);
      refuse_stale(tensor);
      const auto inside = lift(tensor);
      const auto target = prepare_write(inside);
      targets.push_back({inside, target, impl_of(target).value(), !writes_beside_results(schema, i)});
      return targets.back().value;
    });
  }
  {
    const RunBelow below(*this);
    const bool is_traced = parent() == nullptr && c10::impl::TorchDispatchModeTLS::any_modes_set();
    auto values = is_traced ? python_hooks().call_auto_functionalized(op, stack) : std::nullopt;
    if (!values.has_value()) {
      values.emplace();
      size_t next = 0;
      for (size_t i = 0; i < n; ++i) {
        if (!is_written(i)) continue;
        replace_tensors(stack.data() + stack.size() - n + i, 1, [&](const at::Tensor&) {
          values->push_back(at::clone(targets[next++].value));
          return values->back();
        });
      }
      op.callBoxed(&stack);
    }
    for (size_t i = 0; i < targets.size(); ++i) replace(targets[i].functional, (*values)[i]);
  }
  for (const auto& target : targets) finish_write(target.inside, target.counted);
  auto* results = stack.data() + stack.size() - schema.returns().size();
  for (size_t i = 0; i < schema.returns().size(); ++i) {
    const auto index = written_argument(schema, i);
    if (index >= 0) {
      results[i] = originals[index];
    } else {
      replace_tensors(results + i, 1, [&](const at::Tensor& value) { return lift_new(value); });
    }
  }
}

// Wrappers.

void Wrapper::follow_memory() {
  static_cast<FunctionalizeLevel*>(level())->sync(functional_);
  const auto& current = impl_of(functional_).value();
  if (current.is_same(value_)) return;
  value_ = current;
  copy_keys_from_value();
  refresh();
  show_derivative();
}

// For code that asks, as compositions do that choose between kernels. No autograd sees the wrapper.
void Wrapper::show_derivative() {
  const bool shows = requires_grad();
  const bool is_number = at::isFloatingType(value_.scalar_type()) || at::isComplexType(value_.scalar_type());
  const bool is_differentiated = is_number && may_be_differentiated(value_);
  if (shows != is_differentiated) set_requires_grad(is_differentiated);
}

void Wrapper::take_functional(at::Tensor functional) {
  functional_ = std::move(functional);
  follow_memory();
}

c10::intrusive_ptr<c10::TensorImpl> Wrapper::detached_copy() const {
  auto copy = static_cast<FunctionalizeLevel*>(level())->detached(functional_);
  auto value = impl_of(copy).value();
  return c10::make_intrusive<Wrapper>(std::move(value), level_, std::move(copy), c10::VariableVersion(0));
}

}  // namespace functorch_lite
