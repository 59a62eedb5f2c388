// The autodiff level: record with PyTorch's autograd, run one level down. See autodiff_level.h first.
#include "autodiff_level.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_conj.h>
#include <ATen/ops/_neg_view.h>
#include <ATen/ops/add.h>
#include <ATen/ops/conj_physical.h>
#include <ATen/ops/neg.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <utility>

#include "backward_pass.h"
#include "derivative_rules.h"
#include "fallback.h"
#include "fused_attention.h"
#include "keys.h"
#include "op_args.h"
#include "plain_compositions.h"
#include "symbolic_zero.h"
#include "transposition.h"
#include "written_arguments.h"

namespace functorch_lite {
namespace {

// PyTorch has one forward-mode level for the process. All jvp levels of all threads share it, wrappers keeping
// their tangents apart; it is entered with the first and left with the last, unless the user had entered it.
constexpr uint64_t kForwardIndex = 0;
class SharedForwardMode {
 public:
  void acquire() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (users_++ > 0 || torch::autograd::ForwardADLevel::try_get_by_idx(kForwardIndex) != nullptr) return;
    torch::autograd::ForwardADLevel::get_next_idx();
    entered_here_ = true;
  }
  void release() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (--users_ > 0 || !entered_here_) return;
    entered_here_ = false;
    torch::autograd::ForwardADLevel::release_idx(kForwardIndex);
  }

 private:
  std::mutex mutex_;
  int64_t users_ = 0;
  bool entered_here_ = false;
};
SharedForwardMode shared_forward_mode;

[[noreturn]] void refuse_captured_write(const c10::OperatorHandle& op, const AutodiffLevel& level,
                                        const at::Tensor& target) {
  const auto name = python_hooks().name_of_tensor(target);
  TORCH_CHECK_VALUE(false, level.transform(), ": the function calls the in-place operator ", op.operator_name().name,
                    " to write a value that depends on the differentiated inputs into ",
                    name.empty() ? "a tensor" : "`" + name + "`, a tensor", " captured from outside (shape ",
                    target.sym_sizes(), ", dtype ", target.scalar_type(),
                    "). The derivative would be lost. Return the value from the function, or write into a tensor that "
                    "is created inside it, for example ",
                    name.empty() ? "a clone of the captured one" : name + ".clone()", ".");
}

}  // namespace

bool has_tangent(const at::Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->_fw_grad(kForwardIndex, tensor).defined();
}

bool may_be_differentiated(const at::Tensor& tensor, const AutogradModes& modes) {
  if (!tensor.defined()) return false;
  if ((modes.grad && tensor.requires_grad()) || (modes.forward_grad && has_tangent(tensor))) return true;
  const auto* wrapper = as_wrapper(tensor);
  return wrapper != nullptr && !wrapper->is_symbolic_zero() && may_be_differentiated(wrapper->value(), modes);
}

void AutodiffLevel::on_open() {
  if (is_forward()) shared_forward_mode.acquire();
}

void AutodiffLevel::on_close() {
  if (is_forward()) shared_forward_mode.release();
}

void AutodiffLevel::run(const c10::OperatorHandle& op, Stack& stack) {
  const auto n = count_arguments(op);
  auto* arguments = stack.data() + stack.size() - n;
  bool any_here = false;
  bool any_closed = false;
  bool any_variable = false;
  bool any_foreign = false;
  bool any_zero = false;
  for_each_tensor(arguments, n, [&](const at::Tensor& tensor) {
    const auto* wrapper = as_wrapper(tensor);
    if (wrapper != nullptr && wrapper->level() == this) {
      any_here = true;
      any_zero |= wrapper->is_symbolic_zero();
      any_variable |= needs_derivative(tensor);
    } else if (wrapper != nullptr && !is_active(wrapper->level())) {
      any_closed = true;
    } else {
      any_foreign |= carries_foreign_derivative(tensor);
    }
  });
  if (C10_UNLIKELY(any_closed)) {
    replace_tensors(arguments, n, strip_closed_levels);
    return run(op, stack);
  }
  if (any_zero && try_zero_arithmetic(op, stack, *this)) return;

  const auto modes = AutogradModes::current();
  any_variable = any_variable && (is_forward() ? modes.forward_grad : modes.grad);
  // Code that asked not to be recorded: in inference mode at this level, or (C++ guards) at none.
  const auto excluded = c10::impl::tls_local_dispatch_key_set().excluded_;
  const bool autograd_excluded = excluded.has_any(c10::autograd_dispatch_keyset);
  const bool same_keys = autograd_excluded && !modes.inference;
  const auto aliasing = aliasing_of(op.schema());
  if (aliasing.writes) {
    const auto& schema = op.schema();
    for (size_t i = 0; i < n; ++i) {
      const auto* alias = schema.arguments()[i].alias_info();
      if (alias == nullptr || !alias->isWrite()) continue;
      if (any_variable && writes_beside_results(schema, i)) continue;
      bool captured = false;
      for_each_tensor(arguments + i, 1, [&](const at::Tensor& target) {
        const auto* wrapper = wrapper_at(target, this);
        captured |= wrapper == nullptr || wrapper->is_captured;
        if (captured && any_variable) refuse_captured_write(op, *this, target);
        bring_graph_up_to_date(target);
      });
      if (captured) return run_below(op, stack, {.same_keys = same_keys});
    }
  }
  if (autograd_excluded) return run_below(op, stack, {.same_keys = same_keys});
  // Views and writes of constants go through autograd too: it tracks which tensors share memory, so that a
  // derivative written into one later is seen through the others.
  if (!any_variable && (!aliasing.any || !any_here)) {
    return run_below(op, stack, {.may_be_captured = aliasing.any && !any_here});
  }

  if (any_foreign) {
    replace_tensors(arguments, n, [&](const at::Tensor& tensor) {
      const bool foreign = wrapper_at(tensor, this) == nullptr && carries_foreign_derivative(tensor);
      return foreign ? wrap(tensor, *this) : tensor;
    });
  }
  if (const auto rule = find_derivative_rule(op, *this, stack)) return rule(*this, op, stack);
  // Only operators that make views have something to do here; on others the key would lead to a fallthrough, which a
  // redispatch must not name. A write is counted where it happens, below: all levels share one version counter, and
  // counting again would make what an outer level has just saved look modified.
  const bool tracks_views =
      aliasing.any && !aliasing.writes && op.hasKernelForDispatchKey(c10::DispatchKey::ADInplaceOrView);
  const auto keys = tracks_views ? kAutodiffKeys : kAutodiffKeys.remove(c10::DispatchKey::ADInplaceOrView);
  if (is_forward() && !aliasing.any) return push_forward(*this, op, keys, stack);
  op.redispatchBoxed(keys, &stack);
}

void AutodiffLevel::run_below(const c10::OperatorHandle& op, Stack& stack, Below how) {
  const auto& schema = op.schema();
  const auto n = schema.arguments().size();
  auto* arguments = stack.data() + stack.size() - n;
  WrittenArguments written(schema, arguments);
  std::vector<at::Tensor> sources;
  if (how.may_be_captured) {
    for_each_tensor(arguments, n, [&](const at::Tensor& tensor) { sources.push_back(tensor); });
  }
  const auto keys = how.same_keys     ? BelowKeys::kSame
                    : how.is_recorded ? keys_below(*this, arguments, n)
                                      : BelowKeys::kOuter;
  {
    RunBelow below(*this, keys);
    call_on_values(op, stack, *this);
  }
  auto* results = stack.data() + stack.size() - schema.returns().size();
  for (size_t i = 0; i < schema.returns().size(); ++i) {
    if (written.restore(i, results[i], *this)) continue;
    replace_tensors(results + i, 1, [&](const at::Tensor& tensor) {
      auto result = wrap(tensor, *this);
      for (const auto& source : sources) as_wrapper(result)->is_captured |= have_one_storage(tensor, source);
      return result;
    });
  }
}

at::Tensor AutodiffLevel::lift_variable(const at::Tensor& value) {
  has_variables_ = true;
  auto result = wrap(value, *this);
  result.unsafeGetTensorImpl()->set_requires_grad(true);
  return result;
}

namespace {

// The tangent with the conjugate and negative bits of the primal, which PyTorch expects of views.
at::Tensor in_form_of(const at::Tensor& primal, at::Tensor tangent) {
  tangent = tangent.resolve_conj().resolve_neg();
  if (primal.is_conj()) tangent = at::_conj(at::conj_physical(tangent));
  return primal.is_neg() ? at::_neg_view(at::neg(tangent)) : tangent;
}

// Whether both are values of the same vmap levels, and `x` is batched where `y` is.
bool is_batched_like(const at::Tensor& x, const at::Tensor& y) {
  const auto* of_y = as_wrapper(y);
  if (of_y == nullptr) return true;
  const auto* of_x = as_wrapper(x);
  if (of_x == nullptr || of_x->level() != of_y->level() || of_y->level()->differentiates()) return false;
  if (of_x->bdim() == kNoBatchDim && of_y->bdim() != kNoBatchDim) return false;
  return is_batched_like(of_x->value(), of_y->value());
}

}  // namespace

at::Tensor AutodiffLevel::lift_dual(const at::Tensor& primal, const at::Tensor& tangent) {
  has_variables_ = true;
  auto result = wrap(primal, *this);
  auto direction = tangent;
  {
    RunBelow below(*this);
    // In-place operators write into tangents, which must then be batched wherever their primals are.
    if (is_transformed(primal)) direction = at::add(tangent, at::zeros_like(primal));
    if (primal.is_conj() || primal.is_neg() || tangent.is_conj() || tangent.is_neg()) {
      direction = in_form_of(primal, direction);
    }
  }
  // Wrapped too, for it may have a tangent of its own one level down.
  return with_tangent(result, wrap(direction, *this));
}

at::Tensor AutodiffLevel::with_tangent(at::Tensor constant, const at::Tensor& tangent) {
  constant.unsafeGetTensorImpl()->_set_fw_grad(tangent, constant, kForwardIndex, /*is_inplace_op=*/false);
  return constant;
}

at::Tensor AutodiffLevel::tangent_of(const at::Tensor& dual) {
  if (wrapper_at(dual, this) == nullptr) return {};
  const auto& tangent = dual.unsafeGetTensorImpl()->_fw_grad(kForwardIndex, dual);
  return tangent.defined() ? value_of(tangent) : at::Tensor();
}

void AutodiffLevel::take_derivative(const at::Tensor& target, const at::Tensor& result) {
  auto* impl = target.unsafeGetTensorImpl();
  if (is_forward()) {
    const auto& tangent = result.unsafeGetTensorImpl()->_fw_grad(kForwardIndex, result);
    if (!tangent.defined()) return;
    const at::Tensor before = impl->_fw_grad(kForwardIndex, target);
    if (before.defined()) {
      before.copy_(tangent);
    } else {
      impl->_set_fw_grad(tangent, target, kForwardIndex, /*is_inplace_op=*/true);
    }
  } else if (result.requires_grad()) {
    torch::autograd::impl::rebase_history(target, torch::autograd::impl::gradient_edge(result));
  }
}

at::Tensor AutodiffLevel::value_of(const at::Tensor& tensor) { return value_at(tensor, this); }

namespace {

// Levels belong to a thread, so a backward pass stays in the one that asked for it.
class OneThread {
 public:
  OneThread() : before_(state().get_multithreading_enabled()) { state().set_multithreading_enabled(false); }
  ~OneThread() { state().set_multithreading_enabled(before_); }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  static c10::AutogradState& state() { return c10::AutogradState::get_tls_state(); }
  bool before_;
};

}  // namespace

std::vector<at::Tensor> AutodiffLevel::backward(const std::vector<at::Tensor>& outputs,
                                                const std::vector<at::Tensor>& cotangents,
                                                const std::vector<at::Tensor>& inputs, bool keep_graph) {
  torch::autograd::variable_list roots;
  torch::autograd::variable_list root_cotangents;
  const auto modes = AutogradModes::current();
  bool seen_outside = false;
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (!outputs[i].requires_grad() || wrapper_at(outputs[i], this) == nullptr) continue;
    const auto& value = as_wrapper(outputs[i])->value();
    roots.push_back(outputs[i]);
    // Formulas write in place into what they make from the cotangent: it must be batched wherever the output is.
    const bool is_expanded = is_transformed(value) && !is_batched_like(cotangents[i], value);
    root_cotangents.push_back(is_expanded ? at::add(cotangents[i], at::zeros_like(value)) : cotangents[i]);
    seen_outside |= may_be_differentiated(value, modes);
    seen_outside |= may_be_differentiated(cotangents[i], modes);
  }
  if (roots.empty()) return std::vector<at::Tensor>(inputs.size());
  const DoorBeforeExport unwraps;
  auto found = try_backward_pass({roots, root_cotangents, inputs, keep_graph, /*create_graph=*/seen_outside});
  if (!found.has_value()) {
    const OneThread one_thread;
    found = torch::autograd::grad(roots, inputs, root_cotangents, keep_graph, /*create_graph=*/seen_outside,
                                  /*allow_unused=*/true);
  }
  auto& gradients = *found;
  // A custom formula may hand out what it kept from the forward pass.
  for (auto& gradient : gradients) gradient = strip_closed_levels(std::move(gradient));
  return gradients;
}

std::vector<at::Tensor> AutodiffLevel::gradients(const std::vector<at::Tensor>& outputs,
                                                 const std::vector<at::Tensor>& cotangents,
                                                 const std::vector<at::Tensor>& inputs, bool keep_graph,
                                                 bool create_graph, bool allow_unused) {
  const OneThread one_thread;
  return torch::autograd::grad(outputs, inputs, cotangents, keep_graph, create_graph, allow_unused);
}

void below_autograd(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  auto* level = current_level();
  TORCH_INTERNAL_ASSERT(level != nullptr && typeid(*level) == typeid(AutodiffLevel), op.operator_name(),
                        " was recorded outside an autodiff level");
  static_cast<AutodiffLevel*>(level)->run_below(op, *stack, {.is_recorded = true});
}

namespace {

void choose_attention(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  if (fused_attention_serves(NamedArguments(op, *stack))) {
    const bool is_outermost = current_level()->parent() == nullptr;
    return is_outermost ? ask_attention_kernels(op, *stack) : below_autograd(op, keys, stack);
  }
  choose_plain_attention(op, *stack);
}
void run_plain_composition(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  find_plain_composition(op.operator_name())(op, *stack);
}

// kBelowAutograd is a backend key, where kernels shared by all backends would win over a fallback. So the handler
// is registered on every operator that autograd records, now and, for operators defined later, on first use.
class Handlers final : public c10::OpRegistrationListener {
 public:
  void onOperatorRegistered(const c10::OperatorHandle& op) override {
    std::lock_guard<std::mutex> lock(mutex_);
    pending_.push_back(op);
    any_pending_.store(true, std::memory_order_release);
  }
  void onOperatorDeregistered(const c10::OperatorHandle& op) override {
    std::lock_guard<std::mutex> lock(mutex_);
    pending_.erase(std::remove(pending_.begin(), pending_.end(), op), pending_.end());
  }

  void register_pending() {
    if (C10_LIKELY(!any_pending_.load(std::memory_order_acquire))) return;
    // Not under mutex_, which the dispatcher takes while it holds its own lock. Other threads wait until all is done.
    std::lock_guard<std::mutex> one_thread(registering_);
    for (auto operators = take_pending(); !operators.empty(); operators = take_pending()) register_all(operators);
  }

 private:
  std::vector<c10::OperatorHandle> take_pending() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (pending_.empty()) any_pending_.store(false, std::memory_order_release);
    return std::exchange(pending_, {});
  }
  void register_all(const std::vector<c10::OperatorHandle>& operators) {
    for (const auto& op : operators) {
      if (find_plain_composition(op.operator_name()) != nullptr) {
        add(op, kAutograd, c10::KernelFunction::makeFromBoxedFunction<&run_plain_composition>());
        continue;
      }
      if (op.hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd)) continue;
      if (op.hasKernelForDispatchKey(kBelowAutograd)) continue;
      add(op, kBelowAutograd, kernel_for(op));
    }
  }
  void add(const c10::OperatorHandle& op, c10::DispatchKey key, c10::KernelFunction kernel) {
    registrations_.push_back(c10::Dispatcher::singleton().registerImpl(
        op.operator_name(), key, std::move(kernel), std::nullopt, nullptr, "functorch_lite: autodiff level"));
  }
  static c10::KernelFunction kernel_for(const c10::OperatorHandle& op) {
    const auto& name = op.operator_name().name;
    if (name == "aten::_fused_sdp_choice") return c10::KernelFunction::makeFromBoxedFunction<&choose_attention>();
    return c10::KernelFunction::makeFromBoxedFunction<&below_autograd>();
  }

  std::mutex mutex_;
  std::vector<c10::OperatorHandle> pending_;
  std::atomic<bool> any_pending_{false};
  std::mutex registering_;
  std::vector<c10::RegistrationHandleRAII> registrations_;
};

Handlers* handlers = nullptr;

}  // namespace

void register_below_autograd() {
  auto listener = std::make_unique<Handlers>();
  handlers = listener.get();
  // Never removed: the dispatcher outlives every level.
  static auto* registration =
      new c10::RegistrationHandleRAII(c10::Dispatcher::singleton().addRegistrationListener(std::move(listener)));
  (void)registration;
  handlers->register_pending();
}

AutodiffLevel::AutodiffLevel(Mode mode, std::string transform)
    : Level(/*sets_modes=*/true), mode_(mode), transform_(std::move(transform)) {
  handlers->register_pending();
}

}  // namespace functorch_lite
