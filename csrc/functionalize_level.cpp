// The functionalize level. See functionalize_level.h first.
#include "functionalize_level.h"

#include <ATen/FunctionalTensorWrapper.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/ScalarOps.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/enum_tag.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_to_copy.h>
#include <ATen/ops/alias.h>
#include <ATen/ops/alias_copy.h>
#include <ATen/ops/as_strided.h>
#include <ATen/ops/as_strided_copy.h>
#include <ATen/ops/as_strided_scatter.h>
#include <ATen/ops/clone.h>
#include <ATen/ops/detach.h>
#include <ATen/ops/detach_copy.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/permute.h>
#include <ATen/ops/resize.h>
#include <ATen/ops/resolve_conj.h>
#include <ATen/ops/resolve_neg.h>
#include <ATen/ops/where.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <unordered_set>

#include "autodiff_level.h"
#include "fallback.h"
#include "fused_attention.h"
#include "plain_compositions.h"
#include "siblings.h"

namespace functorch_lite {
namespace {

namespace functional = at::functionalization::impl;

thread_local int64_t open_functionalize_levels = 0;

at::FunctionalTensorWrapper& impl_of(const at::Tensor& tensor) {
  return *functional::unsafeGetFunctionalWrapper(tensor);
}

at::functionalization::FunctionalStorageImpl& memory_behind(const at::Tensor& tensor) {
  auto* storage = tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
  return *static_cast<at::functionalization::FunctionalStorageImpl*>(storage);
}

MemoryPlace place_of(const at::Tensor& tensor) {
  return MemoryPlace(tensor.unsafeGetTensorImpl()->unsafe_storage().getWeakStorageImpl());
}

void replace(const at::Tensor& tensor, const at::Tensor& value) {
  functional::replace_(tensor, value);
  functional::commit_update(tensor);
  functional::sync(tensor);
}

struct Derivatives {
  bool reverse;
  bool forward;
  bool may_be_of(const at::Tensor& tensor) const {
    return may_be_differentiated(tensor, {.grad = reverse, .forward_grad = forward, .inference = false});
  }
};

// The numbers of `value` with the derivatives of `source`.
at::Tensor with_derivatives_of(const at::Tensor& source, const at::Tensor& value, Derivatives which) {
  at::Tensor result;
  {
    const at::AutoGradMode record(true);
    result = at::clone(source);
  }
  const at::AutoGradMode record(false);
  const c10::AutoFwGradMode push(!which.forward && AutogradModes::current().forward_grad);
  return result.copy_(value);
}

// A view that is cut off from derivatives of its memory: detach() from all, one that is made without recording from
// those of reverse mode.
class DetachedView final : public at::functionalization::ViewMeta {
 public:
  DetachedView(Derivatives cut, bool keep_views)
      : ViewMeta(/*has_symbolic_inputs=*/false), cut_(cut), keep_views_(keep_views) {}

  at::Tensor forward(const at::Tensor& base) override {
    if (is_open_) return base;
    if (cut_.forward) return keep_views_ ? at::detach(base) : at::detach_copy(base);
    const at::AutoGradMode record(false);
    return keep_views_ ? at::alias(base) : at::alias_copy(base);
  }

  at::Tensor reverse(const at::Tensor& base, const at::Tensor& view) override {
    if (is_open_) return view;
    TORCH_CHECK_VALUE(
        !cut_.may_be_of(view),
        "functionalize: a value that is differentiated is written in place into a tensor that detach() or "
        "no_grad has cut off, and that shares its memory with one that is not. Write into a clone, for "
        "example x.detach().clone().");
    const Derivatives kept{cut_.reverse && at::GradMode::is_enabled(), cut_.forward};
    return kept.may_be_of(base) ? with_derivatives_of(base, view, kept) : view;
  }

  // To be called when no tensor of the memory is seen without this view any more, and the memory has been cut off.
  void open() { is_open_ = true; }
  bool is_open() const { return is_open_; }

 private:
  Derivatives cut_;
  bool keep_views_;
  bool is_open_ = false;
};

// as_strided, without PyTorch's formula for the derivative of its inverse, which is wrong. Levels have one of their
// own.
class StridedView final : public at::functionalization::ViewMeta {
 public:
  StridedView(std::vector<c10::SymInt> sizes, std::vector<c10::SymInt> strides, std::optional<c10::SymInt> offset,
              bool is_symbolic, bool keep_views)
      : ViewMeta(is_symbolic, /*is_multi_output=*/false, /*is_as_strided=*/true),
        sizes_(std::move(sizes)),
        strides_(std::move(strides)),
        offset_(std::move(offset)),
        keep_views_(keep_views) {}

  at::Tensor forward(const at::Tensor& base) override {
    if (!keep_views_) return at::as_strided_copy_symint(base, sizes_, strides_, offset_);
    return at::as_strided_symint(base, sizes_, strides_, offset_);
  }

  at::Tensor reverse(const at::Tensor& base, const at::Tensor& view) override {
    if (current_level() != nullptr || !(base.requires_grad() || view.requires_grad())) {
      return at::as_strided_scatter_symint(base, view, sizes_, strides_, offset_);
    }
    auto result = at::clone(base);
    at::as_strided_symint(result, sizes_, strides_, offset_).copy_(view);
    return result;
  }

 private:
  std::vector<c10::SymInt> sizes_;
  std::vector<c10::SymInt> strides_;
  std::optional<c10::SymInt> offset_;
  bool keep_views_;
};

[[noreturn]] void refuse_overlap(const at::Tensor& tensor) {
  TORCH_CHECK(false, "functionalize: an in-place operator writes into a tensor of shape ", tensor.sym_sizes(),
              " in which several elements are one place in memory, as after expand(). Write into its clone().");
}

// Marks a copy that stands for a view larger than its memory: the strides do not tell.
class ExpandedCopy final : public at::functionalization::ViewMeta {
 public:
  ExpandedCopy() : ViewMeta(/*has_symbolic_inputs=*/false) {}
  at::Tensor forward(const at::Tensor& base) override { return base; }
  at::Tensor reverse(const at::Tensor&, const at::Tensor& view) override { refuse_overlap(view); }
};

// The detached view through which all tensors of this memory are seen, or null.
DetachedView* common_detached_view(const at::Tensor& tensor) {
  for (const auto& view : impl_of(tensor).view_metas()) {
    auto* detached = dynamic_cast<DetachedView*>(view.get());
    const bool is_common = view.use_count() == static_cast<int64_t>(tensor.storage().use_count());
    if (detached != nullptr && !detached->is_open() && is_common) return detached;
  }
  return nullptr;
}

// Below the level of the functional tensor.
at::Tensor cut_off(const at::Tensor& tensor, Derivatives which, bool keep_views) {
  auto view = std::make_shared<DetachedView>(which, keep_views);
  const auto value = view->forward(impl_of(tensor).value());
  return at::detail::make_tensor<at::FunctionalTensorWrapper>(value, &impl_of(tensor), std::move(view));
}

// Where the memory of a plain tensor begins and ends, in bytes.
std::pair<int64_t, int64_t> extent(const at::Tensor& tensor) {
  int64_t last = tensor.storage_offset();
  for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
  const auto size = static_cast<int64_t>(tensor.itemsize());
  return {tensor.storage_offset() * size, (last + 1) * size};
}

bool may_overlap(const at::Tensor& a, const at::Tensor& b) {
  if (!have_one_storage(a, b)) return false;
  const auto& plain_a = innermost_value(a);
  const auto& plain_b = innermost_value(b);
  for (const auto* plain : {&plain_a, &plain_b}) {
    if (plain->unsafeGetTensorImpl()->has_symbolic_sizes_strides()) return true;
    if (plain->numel() == 0) return false;
  }
  const auto [begin_a, end_a] = extent(plain_a);
  const auto [begin_b, end_b] = extent(plain_b);
  return begin_a < end_b && begin_b < end_a;
}

// What `target.copy_(source)` leaves, where it is differentiated: PyTorch's own `copy` has no derivative. The strides
// are those of `target`, for later code may view it.
at::Tensor differentiable_copy(const at::Tensor& target, const at::Tensor& source) {
  const auto same_type = at::_to_copy(source, target.options());
  return at::where(at::ones_like(target, at::kBool), same_type, target);
}

std::vector<c10::SymInt> layout_of(const at::Tensor& value) {
  auto layout = value.sym_strides().vec();
  layout.push_back(value.sym_storage_offset());
  return layout;
}

// Whether PyTorch's way to write the results into `out` needs memory, or leaves something out.
bool needs_functional_form(const c10::OperatorHandle& op) {
  static const std::unordered_set<std::string> names{"aten::matmul", "aten::linear", "aten::kron",
                                                     "aten::linalg_matrix_rank", "aten::_native_batch_norm_legit"};
  return names.count(op.operator_name().name) > 0 && is_out_form(op.schema()) && find_sibling(op) != nullptr;
}

// Gives the arguments for results the results of the functional form.
void run_as_functional_form(const c10::OperatorHandle& op, Stack& stack) {
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
std::optional<c10::OperatorHandle> view_that_says_so(const c10::OperatorHandle& op) {
  static const auto split = find_operator("unsafe_split.Tensor");
  static const auto split_with_sizes = find_operator("unsafe_split_with_sizes");
  if (op == split) return find_operator("split.Tensor");
  if (op == split_with_sizes) return find_operator("split_with_sizes");
  return std::nullopt;
}

// In-place operators whose result does not depend on what was there before. The forms that PyTorch's functionalization
// calls for them have no derivative.
bool overwrites(const c10::OperatorName& name) {
  static const std::unordered_set<std::string> names{"aten::bernoulli_", "aten::cauchy_",     "aten::exponential_",
                                                     "aten::geometric_", "aten::log_normal_", "aten::normal_",
                                                     "aten::random_",    "aten::uniform_",    "aten::zero_"};
  return names.count(name.name) > 0;
}

// A Python number that became a tensor for an operator. Nobody writes it, and under fake tensors it is real, which
// makes it no base for views.
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

// as_strided looks at the memory, so the views before it do not matter, and PyTorch can undo it only if there are none.
void start_from_memory(c10::IValue* arguments, size_t n) {
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
bool all_dense(const c10::OperatorHandle& op, const c10::IValue* arguments) {
  bool result = true;
  for (size_t i = 0; i < count_arguments(op); ++i) {
    if (op.schema().arguments()[i].alias_info() == nullptr) continue;
    for_each_tensor(arguments + i, 1, [&](const at::Tensor& tensor) { result &= is_dense(tensor); });
  }
  return result;
}

bool writes_beside_any(const c10::FunctionSchema& schema) {
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
bool updates_statistics(const c10::OperatorHandle& op, const c10::IValue* arguments) {
  static const std::unordered_set<std::string> names{"aten::native_batch_norm", "aten::cudnn_batch_norm",
                                                     "aten::miopen_batch_norm"};
  if (names.count(op.operator_name().name) == 0 || !op.operator_name().overload_name.empty()) return false;
  const auto& mean = arguments[kRunningMean];
  return mean.isTensor() && mean.toTensor().defined() && arguments[kTraining].toBool();
}

// By the operator whose schema does.
void run_batch_norm(const c10::OperatorHandle& op, Stack& stack) {
  static const auto explicit_form = find_operator("_native_batch_norm_legit");
  const auto input = torch::jit::peek(stack, 0, count_arguments(op)).toTensor();
  explicit_form.callBoxed(&stack);
  // cuDNN's has a fourth result, for its own backward pass.
  if (op.schema().returns().size() == 4) torch::jit::push(stack, at::empty({0}, input.options().dtype(at::kByte)));
}

bool is_differentiated_value(const at::Tensor& tensor) {
  return may_be_differentiated(functional::from_functional_tensor(tensor, /*assert_functional=*/false));
}

// Both below the level, with functional tensors where the operator has aliases. They take the arguments off the stack.
void call_differentiable_copy(Stack& stack) {
  const auto arguments = torch::jit::pop(stack, 3);  // target, source, non_blocking
  const auto& target = arguments[0].toTensor();
  replace(target, differentiable_copy(impl_of(target).value(), arguments[1].toTensor()));
  stack.emplace_back(target);
}

void call_as_strided(Stack& stack, bool keep_views) {
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
void forget_derivatives(c10::IValue* arguments, size_t n) {
  replace_tensors(arguments, n, [](const at::Tensor& tensor) {
    if (!is_differentiated_value(tensor)) return tensor;
    if (!functional::isFunctionalTensor(tensor)) return at::detach(tensor);
    impl_of(tensor).replace_(at::detach(impl_of(tensor).value()));
    return tensor;
  });
}

void call_functionalized(const c10::OperatorHandle& op, Stack& stack, bool keep_views) {
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
