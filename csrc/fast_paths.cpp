// Typed shortcuts for the commonest arithmetic, through the door and from autograd's kernels one level down.
//
// They do what the boxed way does (front.cpp; vmap_level.cpp and the pointwise family; autodiff_level.cpp) for calls
// that need nothing but that, without packing the arguments into a stack; any other call goes the boxed way. The boxed
// way is the truth that the tests compare with. docs/performance.md has what they save.
#include <ATen/EmptyTensor.h>
#include <ATen/ops/abs_ops.h>
#include <ATen/ops/add_ops.h>
#include <ATen/ops/conj_ops.h>
#include <ATen/ops/cos_ops.h>
#include <ATen/ops/div_ops.h>
#include <ATen/ops/exp_ops.h>
#include <ATen/ops/log_ops.h>
#include <ATen/ops/maximum_ops.h>
#include <ATen/ops/minimum_ops.h>
#include <ATen/ops/mul_ops.h>
#include <ATen/ops/neg_ops.h>
#include <ATen/ops/pow_ops.h>
#include <ATen/ops/reciprocal_ops.h>
#include <ATen/ops/relu_ops.h>
#include <ATen/ops/rsqrt_ops.h>
#include <ATen/ops/sigmoid_ops.h>
#include <ATen/ops/sin_ops.h>
#include <ATen/ops/sqrt_ops.h>
#include <ATen/ops/sub_ops.h>
#include <ATen/ops/tanh_ops.h>
#include <torch/library.h>

#include <atomic>
#include <type_traits>

#include "autodiff_level.h"
#include "front.h"
#include "keys.h"
#include "vmap_level.h"
#include "wrapper.h"

namespace functorch_lite {
namespace {

using at::Tensor;

std::atomic<bool> fast_paths_are_on = true;

// The innermost level, if nothing stands before it.
Level* level_on_top(c10::DispatchKeySet keys) {
  if (!fast_paths_are_on.load(std::memory_order_relaxed) || keys.has(kLeftByTorchFunc)) return nullptr;
  const auto autocast = c10::autocast_dispatch_keyset - c10::impl::tls_local_dispatch_key_set().excluded_;
  return autocast.empty() ? current_level() : nullptr;
}

bool value_passes_autograd(const Tensor& value) { return passes_autograd(value); }
bool value_passes_autograd(const at::Scalar&) { return true; }

// Calls the operator one level down.
template <class Op, class... Args>
Tensor call_below(const Level& level, const Args&... values) {
  const bool past = level.parent() == nullptr && (value_passes_autograd(values) && ...) && !a_mode_is_on();
  const RunBelow below(level, past ? BelowKeys::kPastAutograd : BelowKeys::kOuter);
  return Op::call(values...);
}

// A Python number beside a tensor is a tensor of its own type. The kernel would convert it by three more operators, and
// so would each derivative formula that it is saved for. This is what they would make of it; undefined if they make
// nothing, or something else.
Tensor as_number_of(const Tensor& x, const Tensor& number) {
  const auto* impl = number.unsafeGetTensorImpl();
  if (C10_LIKELY(!impl->is_wrapped_number())) return {};
  const auto type = number.scalar_type();
  const bool converts = x.scalar_type() == at::kFloat && (type == at::kDouble || type == at::kLong);
  if (!converts || !x.is_cpu() || !number.is_cpu() || !is_plain(number) || a_mode_is_on()) return {};
  if (!is_plain(innermost_value(x))) return {};
  Tensor result(at::detail::empty_cpu({}, at::kFloat));
  const auto* from = number.const_data_ptr();
  *static_cast<float*>(result.mutable_data_ptr()) = type == at::kDouble
                                                        ? static_cast<float>(*static_cast<const double*>(from))
                                                        : static_cast<float>(*static_cast<const int64_t*>(from));
  result.unsafeGetTensorImpl()->set_wrapped_number(true);
  return result;
}

// A tensor as the vmap level sees it.
struct Operand {
  const Tensor* value;
  int64_t bdim = kNoBatchDim;
  int64_t rank = 0;  // without the batch

  Operand(const Tensor& tensor, const Level& level) : value(&tensor) {
    while (const auto* wrapper = as_wrapper(*value)) {
      const bool here = wrapper->level() == &level;
      if (!here && (is_active(wrapper->level()) || wrapper->bdim() != kNoBatchDim)) break;
      value = &wrapper->value();
      if (here) bdim = wrapper->bdim();
      if (here) break;
    }
    rank = value->dim() - (bdim == kNoBatchDim ? 0 : 1);
  }
  // A wrapper of a level that is closed, which the boxed way refuses.
  bool escaped() const {
    const auto* wrapper = as_wrapper(*value);
    return wrapper != nullptr && !is_active(wrapper->level());
  }
};

// Where the batch is in a(x) op b(y), if the two can meet as they are.
std::optional<int64_t> common_batch_dim(const Operand& a, const Operand& b) {
  const bool promotes = a.value->scalar_type() != b.value->scalar_type() || a.value->device() != b.value->device();
  if (a.bdim != kNoBatchDim && b.bdim != kNoBatchDim) {
    if (a.bdim == b.bdim && a.rank == b.rank && !promotes) return a.bdim;
    return std::nullopt;
  }
  const auto& batched = a.bdim != kNoBatchDim ? a : b;
  const auto& other = a.bdim != kNoBatchDim ? b : a;
  if (other.value->unsafeGetTensorImpl()->is_wrapped_number()) return batched.bdim;
  if (promotes || other.rank > batched.rank || (other.rank > 0 && batched.bdim != 0)) return std::nullopt;
  return batched.bdim;
}

// What an autodiff level does with a call of an operator that has no aliases and no derivative rule of our own.
enum class Part { kRecord, kRunBelow, kBoxed };

class Arguments {
 public:
  explicit Arguments(const AutodiffLevel& level) : level_(level) {}

  void look_at(const at::Scalar&) {}
  void look_at(const Tensor& tensor) {
    const auto* wrapper = as_wrapper(tensor);
    if (wrapper != nullptr && wrapper->level() == &level_) {
      is_simple_ &= !wrapper->is_symbolic_zero();
      any_variable_ |= level_.needs_derivative(tensor);
    } else {
      is_simple_ &= !carries_foreign_derivative(tensor) && (wrapper == nullptr || is_active(wrapper->level()));
    }
  }
  Part part() const {
    if (!is_simple_) return Part::kBoxed;
    if (c10::impl::tls_local_dispatch_key_set().excluded_.has_any(c10::autograd_dispatch_keyset)) return Part::kBoxed;
    const auto modes = AutogradModes::current();
    // In forward mode the rules of derivatives/forward.cpp act.
    if (level_.is_forward()) return any_variable_ && modes.forward_grad ? Part::kBoxed : Part::kRunBelow;
    return any_variable_ && modes.grad ? Part::kRecord : Part::kRunBelow;
  }

 private:
  const AutodiffLevel& level_;
  bool is_simple_ = true;
  bool any_variable_ = false;
};

const Tensor& value_in(const Tensor& tensor, const Level& level) {
  const auto* wrapper = wrapper_at(tensor, &level);
  return wrapper != nullptr ? wrapper->value() : tensor;
}
const at::Scalar& value_in(const at::Scalar& number, const Level&) { return number; }

template <class Op, class... Args>
Tensor run_below(AutodiffLevel& level, const Args&... args) {
  return wrap(call_below<Op>(level, value_in(args, level)...), level);
}

template <class Op, class... Args>
Tensor differentiate(AutodiffLevel& level, c10::DispatchKeySet keys, const Args&... args) {
  Arguments arguments(level);
  (arguments.look_at(args), ...);
  switch (arguments.part()) {
    case Part::kRecord:
      return Op::redispatch(kAutodiffKeys.remove(c10::DispatchKey::ADInplaceOrView), args...);
    case Part::kRunBelow:
      return run_below<Op>(level, args...);
    default:
      return call_boxed<Op>(keys, args...);
  }
}

// On kBelowAutograd: PyTorch's autograd kernel has recorded the call.
template <class Op, class... Args>
Tensor recorded(c10::DispatchKeySet keys, const Args&... args) {
  if (!fast_paths_are_on.load(std::memory_order_relaxed)) return call_boxed<Op, &below_autograd>(keys, args...);
  return run_below<Op>(static_cast<AutodiffLevel&>(*current_level()), args...);
}

bool is_vmap(const Level& level) { return typeid(level) == typeid(VmapLevel); }

template <class Op, class... Rest>
Tensor unary(c10::DispatchKeySet keys, const Tensor& x, const Rest&... rest) {
  auto* level = level_on_top(keys);
  if (level != nullptr && level->differentiates()) {
    return differentiate<Op>(static_cast<AutodiffLevel&>(*level), keys, x, rest...);
  }
  if (level != nullptr && is_vmap(*level)) {
    const Operand a(x, *level);
    if (!a.escaped()) return wrap(call_below<Op>(*level, *a.value, rest...), *level, a.bdim);
  }
  return call_boxed<Op>(keys, x, rest...);
}

template <class Op, class... Rest>
Tensor binary_of_tensors(c10::DispatchKeySet keys, const Tensor& x, const Tensor& y, const Rest&... rest) {
  auto* level = level_on_top(keys);
  if (level != nullptr && level->differentiates()) {
    return differentiate<Op>(static_cast<AutodiffLevel&>(*level), keys, x, y, rest...);
  }
  if (level != nullptr && is_vmap(*level)) {
    const Operand a(x, *level);
    const Operand b(y, *level);
    const bool unbatched = a.bdim == kNoBatchDim && b.bdim == kNoBatchDim;
    const auto bdim = unbatched ? kNoBatchDim : common_batch_dim(a, b);
    if (bdim.has_value() && !a.escaped() && !b.escaped()) {
      return wrap(call_below<Op>(*level, *a.value, *b.value, rest...), *level, *bdim);
    }
  }
  return call_boxed<Op>(keys, x, y, rest...);
}

template <class Op, class... Rest>
Tensor binary(c10::DispatchKeySet keys, const Tensor& x, const Tensor& y, const Rest&... rest) {
  if (!fast_paths_are_on.load(std::memory_order_relaxed)) return call_boxed<Op>(keys, x, y, rest...);
  const auto number = as_number_of(x, y);
  return binary_of_tensors<Op, Rest...>(keys, x, number.defined() ? number : y, rest...);
}

// Derivative formulas conjugate everything, and nearly everything is real.
Tensor conj(c10::DispatchKeySet keys, const Tensor& x) {
  return x.is_complex() ? call_boxed<at::_ops::conj>(keys, x) : x;
}

// The two places where the dispatcher finds shortcuts.
enum class Place { kDoor, kBelowAutograd };

template <Place place, class Op, class... Args>
void add(torch::Library& m, Tensor (*at_door)(c10::DispatchKeySet, const Args&...)) {
  auto* kernel = place == Place::kDoor ? at_door : &recorded<Op, Args...>;
  m.impl(c10::toString(c10::OperatorName(Op::name, Op::overload_name)).c_str(),
         torch::CppFunction::makeFromUnboxedFunction(kernel));
}

template <Place place>
void add_all(torch::Library& m) {
  namespace ops = at::_ops;
  const auto add_unary = [&]<class... Ops>(std::tuple<Ops...>*) { (add<place, Ops>(m, &unary<Ops>), ...); };
  add_unary(static_cast<std::tuple<ops::abs, ops::cos, ops::exp, ops::log, ops::neg, ops::reciprocal, ops::relu,
                                   ops::rsqrt, ops::sigmoid, ops::sin, ops::sqrt, ops::tanh>*>(nullptr));
  add<place, ops::pow_Tensor_Scalar>(m, &unary<ops::pow_Tensor_Scalar, at::Scalar>);
  add<place, ops::add_Tensor>(m, &binary<ops::add_Tensor, at::Scalar>);
  add<place, ops::sub_Tensor>(m, &binary<ops::sub_Tensor, at::Scalar>);
  add<place, ops::mul_Tensor>(m, &binary<ops::mul_Tensor>);
  add<place, ops::div_Tensor>(m, &binary<ops::div_Tensor>);
  add<place, ops::maximum>(m, &binary<ops::maximum>);
  add<place, ops::minimum>(m, &binary<ops::minimum>);
}

TORCH_LIBRARY_IMPL(aten, DeferredInit, m) {
  add_all<Place::kDoor>(m);
  m.impl("conj", torch::CppFunction::makeFromUnboxedFunction(&conj));
}

TORCH_LIBRARY_IMPL(aten, PrivateUse3, m) {
  static_assert(kBelowAutograd == c10::DispatchKey::PrivateUse3);
  add_all<Place::kBelowAutograd>(m);
}

}  // namespace

void set_fast_paths(bool on) { fast_paths_are_on = on; }

}  // namespace functorch_lite
