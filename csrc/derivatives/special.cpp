// Derivatives of special functions, which PyTorch takes to be constant, or has wrong at 0. See derivative_rules.h
// first.
#include <ATen/TensorOperators.h>
#include <ATen/ops/special_bessel_j0.h>
#include <ATen/ops/special_bessel_j1.h>
#include <ATen/ops/special_bessel_y0.h>
#include <ATen/ops/special_bessel_y1.h>
#include <ATen/ops/special_hermite_polynomial_h.h>
#include <ATen/ops/special_hermite_polynomial_he.h>
#include <ATen/ops/special_i0.h>
#include <ATen/ops/special_i1.h>
#include <ATen/ops/special_modified_bessel_i0.h>
#include <ATen/ops/special_modified_bessel_i1.h>
#include <ATen/ops/special_modified_bessel_k0.h>
#include <ATen/ops/special_modified_bessel_k1.h>
#include <ATen/ops/special_scaled_modified_bessel_k0.h>
#include <ATen/ops/special_scaled_modified_bessel_k1.h>
#include <ATen/ops/where.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include "../derivative_node.h"
#include "../derivative_rules.h"

namespace functorch_lite {
namespace {

using at::Tensor;

// The arguments of an operator f(x, ...) -> f'(x, ...).
using Slope = Tensor (*)(const std::vector<c10::IValue>& arguments);

// Records y = f(x, ...) in reverse mode.
struct SlopeNode final : torch::autograd::Node {
  torch::autograd::SavedVariable x;
  std::vector<c10::IValue> arguments;
  Slope slope;

  std::string name() const override { return "SlopeBackward"; }
  void release_variables() override { x.reset_data(); }
  torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override {
    if (!grads[0].defined()) return {Tensor()};
    auto given = arguments;
    given[0] = strip_closed_levels(x.unpack());
    return {grads[0] * slope(given)};
  }
};

template <Slope slope>
void differentiate(AutodiffLevel& level, const Operator& op, Stack& stack) {
  auto arguments = torch::jit::pop(stack, count_arguments(op));
  const auto x = arguments[0].toTensor();
  arguments[0] = wrap(level.value_of(x), level);
  for (const auto& argument : arguments) stack.push_back(argument);
  op.callBoxed(&stack);
  auto y = stack.back().toTensor();
  if (level.is_forward()) {
    const auto t = level.tangent_of(x);
    if (t.defined()) stack.back() = level.with_tangent(y, wrap(t, level) * slope(arguments));
    return;
  }
  if (!x.requires_grad()) return;
  auto node = make_node<SlopeNode>();
  node->x = torch::autograd::SavedVariable(x, /*is_output=*/false);
  arguments[0] = c10::IValue();
  node->arguments = std::move(arguments);
  node->slope = slope;
  node->set_next_edges(torch::autograd::collect_next_edges(x));
  torch::autograd::set_history(y, node);
}

Tensor first(const std::vector<c10::IValue>& arguments) { return arguments[0].toTensor(); }

// f0(x) - f1(x) / x, the derivative of f1, which is J1 for a negative sign and I1 for a positive one. At 0 it is a
// power series, for derivatives to come.
Tensor slope_of_order_one(const Tensor& f0, const Tensor& f1, const Tensor& x, double sign) {
  const auto at_zero = x == 0;
  const auto z = sign * x * x;
  const auto series = 0.5 + z * (3. / 16 + z * (5. / 384 + z * (7. / 18432)));
  return at::where(at_zero, series, f0 - f1 / at::where(at_zero, 1, x));
}

Tensor j0_slope(const std::vector<c10::IValue>& a) { return -at::special_bessel_j1(first(a)); }
Tensor j1_slope(const std::vector<c10::IValue>& a) {
  const auto x = first(a);
  return slope_of_order_one(at::special_bessel_j0(x), at::special_bessel_j1(x), x, -1);
}
Tensor y0_slope(const std::vector<c10::IValue>& a) { return -at::special_bessel_y1(first(a)); }
Tensor y1_slope(const std::vector<c10::IValue>& a) {
  const auto x = first(a);
  return at::special_bessel_y0(x) - at::special_bessel_y1(x) / x;
}
Tensor i0_slope(const std::vector<c10::IValue>& a) { return at::special_modified_bessel_i1(first(a)); }
Tensor i1_slope(const std::vector<c10::IValue>& a) {
  const auto x = first(a);
  return slope_of_order_one(at::special_modified_bessel_i0(x), at::special_modified_bessel_i1(x), x, 1);
}
Tensor another_i1_slope(const std::vector<c10::IValue>& a) {
  const auto x = first(a);
  return slope_of_order_one(at::special_i0(x), at::special_i1(x), x, 1);
}
Tensor k0_slope(const std::vector<c10::IValue>& a) { return -at::special_modified_bessel_k1(first(a)); }
Tensor k1_slope(const std::vector<c10::IValue>& a) {
  const auto x = first(a);
  return -at::special_modified_bessel_k0(x) - at::special_modified_bessel_k1(x) / x;
}
// exp(x) k(x)
Tensor scaled_k0_slope(const std::vector<c10::IValue>& a) {
  const auto x = first(a);
  return at::special_scaled_modified_bessel_k0(x) - at::special_scaled_modified_bessel_k1(x);
}
Tensor scaled_k1_slope(const std::vector<c10::IValue>& a) {
  const auto x = first(a);
  const auto y = at::special_scaled_modified_bessel_k1(x);
  return y - at::special_scaled_modified_bessel_k0(x) - y / x;
}
// n is a tensor or a number.
Tensor degree(const std::vector<c10::IValue>& a) {
  return a[1].isTensor() ? a[1].toTensor() : first(a).new_zeros({}).fill_(a[1].toScalar());
}
Tensor hermite_h_slope(const std::vector<c10::IValue>& a) {
  const auto n = degree(a);
  return 2 * n * at::special_hermite_polynomial_h(first(a), n - 1);
}
Tensor hermite_he_slope(const std::vector<c10::IValue>& a) {
  const auto n = degree(a);
  return n * at::special_hermite_polynomial_he(first(a), n - 1);
}

// Better no derivative than zero.
void refuse(AutodiffLevel& level, const Operator& op, Stack&) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      false, level.transform(), ": the operator ", op.operator_name().name,
      " has no derivative here: PyTorch takes it to be constant, which it is not. Pass x.detach() "
      "if it is to be a constant, or give a function of your own a derivative with "
      "functorch_lite.custom_vjp or custom_jvp.");
}
bool varies(const AutodiffLevel& level, const Operator& op, const Stack& stack) {
  const auto& x = stack[stack.size() - count_arguments(op)];
  if (!x.isTensor()) return false;
  return level.is_forward() ? has_tangent(x.toTensor()) : x.toTensor().requires_grad();
}

}  // namespace

const std::vector<DerivativeRow>& special_derivatives() {
  static const std::vector<DerivativeRow> rows = [] {
    std::vector<DerivativeRow> result{
        always("special_bessel_j0", differentiate<j0_slope>),
        always("special_bessel_j1", differentiate<j1_slope>),
        always("special_bessel_y0", differentiate<y0_slope>),
        always("special_bessel_y1", differentiate<y1_slope>),
        always("special_modified_bessel_i0", differentiate<i0_slope>),
        always("special_modified_bessel_i1", differentiate<i1_slope>),
        always("special_i1", differentiate<another_i1_slope>),
        always("special_modified_bessel_k0", differentiate<k0_slope>),
        always("special_modified_bessel_k1", differentiate<k1_slope>),
        always("special_scaled_modified_bessel_k0", differentiate<scaled_k0_slope>),
        always("special_scaled_modified_bessel_k1", differentiate<scaled_k1_slope>),
        always("special_hermite_polynomial_h", differentiate<hermite_h_slope>),
        always("special_hermite_polynomial_h.n_scalar", differentiate<hermite_h_slope>),
        always("special_hermite_polynomial_he", differentiate<hermite_he_slope>),
        always("special_hermite_polynomial_he.n_scalar", differentiate<hermite_he_slope>),
    };
    for (const auto* op : {"special_airy_ai",
                           "special_spherical_bessel_j0",
                           "special_laguerre_polynomial_l",
                           "special_laguerre_polynomial_l.n_scalar",
                           "special_legendre_polynomial_p",
                           "special_legendre_polynomial_p.n_scalar",
                           "special_chebyshev_polynomial_t",
                           "special_chebyshev_polynomial_t.n_scalar",
                           "special_chebyshev_polynomial_u",
                           "special_chebyshev_polynomial_u.n_scalar",
                           "special_chebyshev_polynomial_v",
                           "special_chebyshev_polynomial_v.n_scalar",
                           "special_chebyshev_polynomial_w",
                           "special_chebyshev_polynomial_w.n_scalar",
                           "special_shifted_chebyshev_polynomial_t",
                           "special_shifted_chebyshev_polynomial_t.n_scalar",
                           "special_shifted_chebyshev_polynomial_u",
                           "special_shifted_chebyshev_polynomial_u.n_scalar",
                           "special_shifted_chebyshev_polynomial_v",
                           "special_shifted_chebyshev_polynomial_v.n_scalar",
                           "special_shifted_chebyshev_polynomial_w",
                           "special_shifted_chebyshev_polynomial_w.n_scalar"}) {
      result.push_back({op, refuse, refuse, 0, varies});
    }
    return result;
  }();
  return rows;
}

}  // namespace functorch_lite
