// Tangents that are known to be zero. See symbolic_zero.h first.
#include "symbolic_zero.h"

#include <ATen/ExpandUtils.h>
#include <ATen/native/TypeProperties.h>
#include <ATen/ops/_efficientzerotensor_ops.h>
#include <ATen/ops/_fw_primal_ops.h>
#include <ATen/ops/_has_same_storage_numel_ops.h>
#include <ATen/ops/clone.h>
#include <ATen/ops/is_same_size_ops.h>
#include <ATen/ops/mul.h>
#include <torch/library.h>

#include "front.h"
#include "wrapper.h"

namespace functorch_lite {
namespace {

struct Operators {
  c10::OperatorHandle mul = find_operator("mul.Tensor");
  c10::OperatorHandle div = find_operator("div.Tensor");
  c10::OperatorHandle add = find_operator("add.Tensor");
  c10::OperatorHandle sub = find_operator("sub.Tensor");
  c10::OperatorHandle mm = find_operator("mm");
  c10::OperatorHandle mv = find_operator("mv");
  c10::OperatorHandle bmm = find_operator("bmm");
  c10::OperatorHandle dot = find_operator("dot");
  c10::OperatorHandle vdot = find_operator("vdot");
};

const Operators& operators() {
  static const Operators instance;
  return instance;
}

bool is_zero(const at::Tensor& tensor, const Level& level) {
  const auto* wrapper = wrapper_at(tensor, &level);
  return wrapper != nullptr && wrapper->is_symbolic_zero();
}

c10::ScalarType common_dtype(const at::Tensor& a, const at::Tensor& b) {
  return at::native::result_type(at::native::update_result_type_state(b, at::native::update_result_type_state(a, {})));
}

struct Arithmetic {
  const at::Tensor& a;
  const at::Tensor& b;
  Level& level;
  std::vector<c10::SymInt> sizes = at::infer_size_symint(a.sym_sizes(), b.sym_sizes());
  c10::ScalarType dtype = common_dtype(a, b);

  at::Tensor zero() const {
    const auto& sized = a.dim() > 0 ? a : b;
    return make_symbolic_zero(sizes, dtype, sized.device(), level);
  }
  bool is_whole_result(const at::Tensor& term) const {
    return term.scalar_type() == dtype && term.sym_sizes().equals(sizes);
  }
};

// A term that only the caller and our stack refer to is a temporary, and may itself become the result. Any other
// is copied: a tangent is written in place when its primal is.
at::Tensor as_result(const at::Tensor& term) { return term.use_count() <= 2 ? term : at::clone(term); }

at::Tensor sum_with_zero(const Arithmetic& sum, const at::Scalar& factor_of_b) {
  const bool a_is_zero = is_zero(sum.a, sum.level);
  if (a_is_zero && is_zero(sum.b, sum.level)) return sum.zero();
  const auto& term = a_is_zero ? sum.b : sum.a;
  if (!sum.is_whole_result(term)) return {};
  if (!a_is_zero || factor_of_b.equal(1)) return as_result(term);
  return at::mul(term, factor_of_b);
}

// The sizes of a product of matrices or vectors; none for another operator, or if the arguments do not fit.
std::optional<std::vector<c10::SymInt>> sizes_of_product(const c10::OperatorHandle& op, const at::Tensor& a,
                                                         const at::Tensor& b) {
  const auto& known = operators();
  const auto fits = [&](int64_t rank_a, int64_t rank_b) {
    return a.dim() == rank_a && b.dim() == rank_b && a.scalar_type() == b.scalar_type() &&
           a.sym_size(-1) == b.sym_size(rank_b == 1 ? 0 : -2);
  };
  using Sizes = std::vector<c10::SymInt>;
  if (op == known.mm && fits(2, 2)) return Sizes{a.sym_size(0), b.sym_size(1)};
  if (op == known.mv && fits(2, 1)) return Sizes{a.sym_size(0)};
  if (op == known.bmm && fits(3, 3)) return Sizes{a.sym_size(0), a.sym_size(1), b.sym_size(2)};
  if ((op == known.dot || op == known.vdot) && fits(1, 1)) return Sizes{};
  return std::nullopt;
}

// What formulas ask around tangents, typed, for they ask it at each operator. At other levels these are operators like
// any other.
Level* forward_level() {
  auto* level = current_level();
  return level != nullptr && level->is_forward() ? level : nullptr;
}

at::Tensor make_zero(c10::DispatchKeySet keys, c10::SymIntArrayRef sizes, std::optional<c10::ScalarType> dtype,
                     std::optional<c10::Layout> layout, std::optional<c10::Device> device,
                     std::optional<bool> pin_memory) {
  if (auto* level = forward_level()) {
    return make_symbolic_zero(sizes, dtype.value_or(c10::typeMetaToScalarType(c10::get_default_dtype())),
                              device.value_or(c10::kCPU), *level);
  }
  return call_boxed<at::_ops::_efficientzerotensor>(keys, sizes, dtype, layout, device, pin_memory);
}

// A primal without its tangent.
at::Tensor primal(c10::DispatchKeySet keys, const at::Tensor& dual, int64_t index) {
  auto* level = forward_level();
  const auto* wrapper = level != nullptr ? wrapper_at(dual, level) : nullptr;
  if (wrapper != nullptr) return wrap(wrapper->value(), *level);
  return call_boxed<at::_ops::_fw_primal>(keys, dual, index);
}

// Before a tensor gets a tangent, whose memory layout must match. Wrappers have no storage.
bool have_same_storage_size(c10::DispatchKeySet keys, const at::Tensor& x, const at::Tensor& y) {
  return forward_level() != nullptr || call_boxed<at::_ops::_has_same_storage_numel>(keys, x, y);
}

// Of a view before it has its tangent. Looking for that here would derive it from the base's.
bool are_same_size(c10::DispatchKeySet keys, const at::Tensor& x, const at::Tensor& y) {
  if (forward_level() != nullptr) return x.sym_sizes() == y.sym_sizes();
  return call_boxed<at::_ops::is_same_size>(keys, x, y);
}

TORCH_LIBRARY_IMPL(aten, DeferredInit, m) {
  static_assert(kFront == c10::DispatchKey::DeferredInit);
  m.impl("_efficientzerotensor", torch::CppFunction::makeFromUnboxedFunction(&make_zero));
  m.impl("_fw_primal", torch::CppFunction::makeFromUnboxedFunction(&primal));
  m.impl("_has_same_storage_numel", torch::CppFunction::makeFromUnboxedFunction(&have_same_storage_size));
  m.impl("is_same_size", torch::CppFunction::makeFromUnboxedFunction(&are_same_size));
}

}  // namespace

bool try_zero_arithmetic(const c10::OperatorHandle& op, Stack& stack, Level& level) {
  const auto& known = operators();
  if (op == known.mm || op == known.mv || op == known.bmm || op == known.dot || op == known.vdot) {
    const auto* factors = stack.data() + stack.size() - 2;
    const auto& a = factors[0].toTensor();
    const auto sizes = sizes_of_product(op, a, factors[1].toTensor());
    if (!sizes.has_value()) return false;
    auto zero = make_symbolic_zero(*sizes, a.scalar_type(), a.device(), level);
    torch::jit::drop(stack, 2);
    torch::jit::push(stack, std::move(zero));
    return true;
  }
  const bool multiplies = op == known.mul || op == known.div;
  const bool adds = op == known.add || op == known.sub;
  if (!multiplies && !adds) return false;
  const auto n = multiplies ? 2 : 3;
  const auto* arguments = stack.data() + stack.size() - n;
  const Arithmetic call{arguments[0].toTensor(), arguments[1].toTensor(), level};
  at::Tensor result;
  if (adds) {
    auto factor = arguments[2].toScalar();
    result = sum_with_zero(call, op == known.sub ? -factor : factor);
  } else if (op == known.mul ||
             (is_zero(call.a, level) && !is_zero(call.b, level) && c10::isFloatingType(call.dtype))) {
    result = call.zero();
  }
  if (!result.defined()) return false;
  torch::jit::drop(stack, n);
  torch::jit::push(stack, std::move(result));
  return true;
}

}  // namespace functorch_lite
