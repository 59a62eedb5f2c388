// Typed shortcuts through the door for the commonest arithmetic under vmap.
//
// They do what the boxed way does (front.cpp, vmap_level.cpp, the pointwise family) for calls whose batch dimensions
// need no rearranging, without packing the arguments into a stack; any other call goes the boxed way. The boxed rule is
// the truth that the tests compare with. Measured: a third off the cost of an operator under vmap.
#include <ATen/core/boxing/BoxedKernel.h>
#include <ATen/core/boxing/impl/boxing.h>
#include <ATen/ops/abs_ops.h>
#include <ATen/ops/add_ops.h>
#include <ATen/ops/conj_ops.h>
#include <ATen/ops/cos_ops.h>
#include <ATen/ops/div_ops.h>
#include <ATen/ops/exp_ops.h>
#include <ATen/ops/log_ops.h>
#include <ATen/ops/mul_ops.h>
#include <ATen/ops/neg_ops.h>
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

#include "front.h"
#include "keys.h"
#include "vmap_level.h"
#include "wrapper.h"

namespace functorch_lite {
namespace {

using at::Tensor;

std::atomic<bool> fast_paths_are_on = true;

// The innermost level, if it is a vmap and nothing stands before it.
VmapLevel* vmap_on_top() {
  auto* level = current_level();
  if (level == nullptr || typeid(*level) != typeid(VmapLevel)) return nullptr;
  if (!fast_paths_are_on.load(std::memory_order_relaxed)) return nullptr;
  const auto autocast = c10::autocast_dispatch_keyset - c10::impl::tls_local_dispatch_key_set().excluded_;
  return autocast.empty() ? static_cast<VmapLevel*>(level) : nullptr;
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
  const bool promotes = a.value->scalar_type() != b.value->scalar_type();
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

template <class Op, class... Args>
Tensor boxed_way(c10::DispatchKeySet keys, const Args&... args) {
  static const auto kernel = c10::BoxedKernel::makeFromFunction<&front>();
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(Op::name, Op::overload_name);
  return c10::impl::BoxedKernelWrapper<typename Op::schema>::call(kernel, op, keys, args...);
}

template <class Op>
Tensor unary(c10::DispatchKeySet keys, const Tensor& x) {
  if (auto* level = vmap_on_top()) {
    const Operand a(x, *level);
    if (!a.escaped()) {
      Tensor result;
      {
        RunBelow below(*level);
        result = Op::call(*a.value);
      }
      return wrap(std::move(result), *level, a.bdim);
    }
  }
  return boxed_way<Op>(keys, x);
}

template <class Op, class... Rest>
Tensor binary(c10::DispatchKeySet keys, const Tensor& x, const Tensor& y, const Rest&... rest) {
  if (auto* level = vmap_on_top()) {
    const Operand a(x, *level);
    const Operand b(y, *level);
    const bool unbatched = a.bdim == kNoBatchDim && b.bdim == kNoBatchDim;
    const auto bdim = unbatched ? kNoBatchDim : common_batch_dim(a, b);
    if (bdim.has_value() && !a.escaped() && !b.escaped()) {
      Tensor result;
      {
        RunBelow below(*level);
        result = Op::call(*a.value, *b.value, rest...);
      }
      return wrap(std::move(result), *level, *bdim);
    }
  }
  return boxed_way<Op>(keys, x, y, rest...);
}

// Derivative formulas conjugate everything, and nearly everything is real.
Tensor conj(c10::DispatchKeySet keys, const Tensor& x) {
  return x.is_complex() ? boxed_way<at::_ops::conj>(keys, x) : x;
}

template <class... Ops>
void add_unary(torch::Library& m) {
  (m.impl(Ops::name, torch::CppFunction::makeFromUnboxedFunction(&unary<Ops>)), ...);
}

template <class Op, class... Rest>
void add_binary(torch::Library& m) {
  m.impl((std::string(Op::name) + "." + Op::overload_name).c_str(),
         torch::CppFunction::makeFromUnboxedFunction(&binary<Op, Rest...>));
}

TORCH_LIBRARY_IMPL(aten, DeferredInit, m) {
  namespace ops = at::_ops;
  add_unary<ops::abs, ops::cos, ops::exp, ops::log, ops::neg, ops::reciprocal, ops::relu, ops::rsqrt, ops::sigmoid,
            ops::sin, ops::sqrt, ops::tanh>(m);
  m.impl("conj", torch::CppFunction::makeFromUnboxedFunction(&conj));
  add_binary<ops::add_Tensor, at::Scalar>(m);
  add_binary<ops::sub_Tensor, at::Scalar>(m);
  add_binary<ops::mul_Tensor>(m);
  add_binary<ops::div_Tensor>(m);
}

}  // namespace

void set_fast_paths(bool on) { fast_paths_are_on = on; }

}  // namespace functorch_lite
