// Forward mode of the commonest operators. See derivative_rules.h first.
//
// PyTorch has right formulas for these, and its kernel computes them at the level: it conjugates, asks which arguments
// have tangents, makes zeros for those that have none, and each operator goes through the door. Here the result and its
// tangent are computed one level down, with the operators that are needed.
#include <ATen/TensorOperators.h>
#include <ATen/core/Reduction.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/dot.h>
#include <ATen/ops/elu_backward.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/hardsigmoid_backward.h>
#include <ATen/ops/hardswish_backward.h>
#include <ATen/ops/hardtanh_backward.h>
#include <ATen/ops/leaky_relu_backward.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mv.h>
#include <ATen/ops/sigmoid_backward.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/softplus_backward.h>
#include <ATen/ops/tanh_backward.h>
#include <ATen/ops/threshold_backward.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/SmallVector.h>

#include <limits>
#include <numbers>

#include "../derivative_rules.h"

namespace functorch_lite {
namespace {
// The formulas have the operators' names.
namespace tangent {

using at::Tensor;

// A call one level down.
struct Call {
  const Operator& op;
  c10::SmallVector<c10::IValue, 8> arguments{};
  c10::SmallVector<Tensor, 8> tangents{};  // undefined for arguments that have none
  Tensor y{};

  const Tensor& x(size_t i) const { return arguments[i].toTensor(); }
  const Tensor& t(size_t i) const { return tangents[i]; }
  at::Scalar number(size_t i) const { return arguments[i].toScalar(); }
  bool has(size_t i) const { return tangents[i].defined(); }
};

// The tangent of the result: a new tensor, which may be broadcast to it. Tangents of a Jacobian are batched where the
// values are not, so that values are multiplied first.
using Tangent = Tensor (*)(const Call& call);

Tensor whole(Tensor tangent, const Tensor& y) {
  if (tangent.scalar_type() != y.scalar_type()) tangent = tangent.to(y.scalar_type());
  if (tangent.sym_sizes().equals(y.sym_sizes())) return tangent;
  // It may be written into.
  return tangent.expand_symint(y.sym_sizes()).clone();
}

template <Tangent tangent>
void push(AutodiffLevel& level, const Operator& op, Stack& stack) {
  const auto n = count_arguments(op);
  auto* arguments = stack.data() + stack.size() - n;
  Call call{.op = op};
  for (size_t i = 0; i < n; ++i) {
    const bool has_tangent = arguments[i].isTensor() && arguments[i].toTensor().defined();
    call.tangents.push_back(has_tangent ? level.tangent_of(arguments[i].toTensor()) : Tensor());
  }
  replace_tensors(arguments, n, [&](const Tensor& x) { return level.value_of(x); });
  call.arguments.append(arguments, arguments + n);
  Tensor t;
  {
    const RunBelow below(level);
    op.callBoxed(&stack);
    call.y = stack.back().toTensor();
    t = whole(tangent(call), call.y);
  }
  stack.back() = level.with_tangent(wrap(call.y, level), wrap(t, level));
}

// Sums.

Tensor plus(const Tensor& a, const Tensor& b) { return !a.defined() ? b : !b.defined() ? a : a + b; }
Tensor times(const at::Scalar& factor, const Tensor& t) {
  return !t.defined() || factor.equal(1) ? t : factor.equal(-1) ? -t : t * factor;
}

Tensor sum_of(const Tensor& a, const Tensor& b, const at::Scalar& factor) {
  const auto scaled = times(factor, b);
  if (a.defined() && b.defined()) return a + scaled;
  if (a.defined()) return a.clone();
  return scaled.is_same(b) ? b.clone() : scaled;
}
Tensor add(const Call& c) { return sum_of(c.t(0), c.t(1), c.number(2)); }
Tensor sub(const Call& c) { return sum_of(c.t(0), c.t(1), -c.number(2)); }
Tensor rsub(const Call& c) { return sum_of(c.t(1), c.t(0), -c.number(2)); }
Tensor rsub_from_number(const Call& c) { return sum_of(Tensor(), c.t(0), -c.number(2)); }

// Products.

template <class Product>
Tensor product_rule(const Call& c, size_t a, size_t b, Product product) {
  return plus(c.has(a) ? product(c.t(a), c.x(b)) : Tensor(), c.has(b) ? product(c.x(a), c.t(b)) : Tensor());
}
Tensor mul(const Call& c) {
  if (!c.has(0)) return c.x(0) * c.t(1);
  const auto moved = c.t(0) * c.x(1);
  return c.has(1) ? moved.addcmul(c.x(0), c.t(1)) : moved;
}
Tensor mm(const Call& c) {
  return product_rule(c, 0, 1, [](auto& a, auto& b) { return at::mm(a, b); });
}
Tensor mv(const Call& c) {
  return product_rule(c, 0, 1, [](auto& a, auto& b) { return at::mv(a, b); });
}
Tensor bmm(const Call& c) {
  return product_rule(c, 0, 1, [](auto& a, auto& b) { return at::bmm(a, b); });
}
Tensor dot(const Call& c) {
  return product_rule(c, 0, 1, [](auto& a, auto& b) { return at::dot(a, b); });
}

// beta * x + alpha * a @ b
template <class Product>
Tensor add_product(const Call& c, Product product) {
  const auto moved = times(c.number(4), product_rule(c, 1, 2, product));
  if (!c.has(0)) return moved;
  return sum_of(moved, c.t(0), c.number(3));
}
Tensor addmm(const Call& c) {
  return add_product(c, [](auto& a, auto& b) { return at::mm(a, b); });
}
Tensor baddbmm(const Call& c) {
  return add_product(c, [](auto& a, auto& b) { return at::bmm(a, b); });
}

// The quotient again, and not the result: a reverse mode outside would miss it if it is written into.
Tensor div(const Call& c) {
  if (!c.has(1)) return c.t(0) / c.x(1);
  const auto moved = c.t(1) * (c.x(0) / c.x(1));
  return (c.has(0) ? c.t(0) - moved : -moved) / c.x(1);
}

// Linear operators of their first argument.
Tensor linear(const Call& c) {
  Stack stack(c.arguments.begin(), c.arguments.end());
  stack[0] = c.t(0);
  c.op.callBoxed(&stack);
  return stack.back().toTensor();
}

// Functions of one argument: the tangent from t, x and y.

Tensor acos(const Call& c) { return c.t(0) * -(1 - c.x(0) * c.x(0)).rsqrt(); }
Tensor acosh(const Call& c) { return c.t(0) * ((c.x(0) + 1).rsqrt() * (c.x(0) - 1).rsqrt()); }
Tensor asin(const Call& c) { return c.t(0) * (1 - c.x(0) * c.x(0)).rsqrt(); }
Tensor asinh(const Call& c) { return c.t(0) * (c.x(0) * c.x(0) + 1).rsqrt(); }
Tensor atan(const Call& c) { return c.t(0) / (c.x(0) * c.x(0) + 1); }
Tensor atanh(const Call& c) { return c.t(0) / (1 - c.x(0) * c.x(0)); }
Tensor cos(const Call& c) { return c.t(0) * -c.x(0).sin(); }
Tensor cosh(const Call& c) { return c.t(0) * c.x(0).sinh(); }
Tensor exp(const Call& c) { return c.t(0) * c.y; }
Tensor exp2(const Call& c) { return c.t(0) * (c.y * std::numbers::ln2); }
Tensor expm1(const Call& c) { return c.t(0) * (c.y + 1); }
Tensor log(const Call& c) { return c.t(0) / c.x(0); }
Tensor log10(const Call& c) { return c.t(0) / (c.x(0) * std::numbers::ln10); }
Tensor log1p(const Call& c) { return c.t(0) / (c.x(0) + 1); }
Tensor log2(const Call& c) { return c.t(0) / (c.x(0) * std::numbers::ln2); }
Tensor reciprocal(const Call& c) { return c.t(0) * -(c.y * c.y); }
Tensor rsqrt(const Call& c) { return c.t(0) * (c.y * c.y * c.y * -0.5); }
Tensor sin(const Call& c) { return c.t(0) * c.x(0).cos(); }
Tensor sinh(const Call& c) { return c.t(0) * c.x(0).cosh(); }
Tensor sqrt(const Call& c) { return c.t(0) / (c.y * 2); }
Tensor tan(const Call& c) { return c.t(0) * (c.y * c.y + 1); }
Tensor tanh(const Call& c) { return c.y.is_complex() ? c.t(0) * (1 - c.y * c.y) : at::tanh_backward(c.t(0), c.y); }
Tensor sigmoid(const Call& c) {
  return c.y.is_complex() ? c.t(0) * (c.y * (1 - c.y)) : at::sigmoid_backward(c.t(0), c.y);
}

constexpr double kSlopeOfErf = 2 * std::numbers::inv_sqrtpi;
Tensor erf(const Call& c) { return c.t(0) * ((c.x(0) * c.x(0)).neg().exp() * kSlopeOfErf); }
Tensor erfc(const Call& c) { return c.t(0) * ((c.x(0) * c.x(0)).neg().exp() * -kSlopeOfErf); }
Tensor erfinv(const Call& c) { return c.t(0) * (c.x(0).erfinv().square().exp() / kSlopeOfErf); }

// sin(pi x) / (pi x). At 0 its derivative is a power series, for derivatives to come.
Tensor sinc(const Call& c) {
  constexpr double pi = std::numbers::pi;
  const auto& x = c.x(0);
  const auto at_zero = x == 0;
  const auto slope = ((x * pi).cos() - x.sinc()) / at::where(at_zero, 1, x);
  return c.t(0) * at::where(at_zero, x * (-pi * pi / 3), slope);
}

Tensor silu(const Call& c) {
  const auto s = c.x(0).sigmoid();
  return c.t(0) * (s * (c.x(0) * (1 - s) + 1));
}
Tensor mish(const Call& c) {
  const auto w = at::softplus(c.x(0)).tanh();
  return c.t(0) * (c.x(0) * c.x(0).sigmoid() * (1 - w * w) + w);
}
Tensor logit(const Call& c) {
  const auto& x = c.x(0);
  const auto eps = c.arguments[1].toOptional<double>();
  const auto inside = (x >= eps.value_or(0)).logical_and(x <= 1 - eps.value_or(0));
  const double outside = eps.has_value() ? 0 : std::numeric_limits<double>::quiet_NaN();
  return c.t(0) * at::where(inside, 1 / (x * (1 - x)), outside);
}
Tensor pow_of_number(const Call& c) {
  const auto exponent = c.number(1);
  if (exponent.equal(2)) return c.t(0) * (c.x(0) * 2);
  if (exponent.equal(0)) return at::zeros_like(c.t(0));
  return c.t(0) * (c.x(0).pow(exponent.isFloatingPoint() ? at::Scalar(exponent.toDouble() - 1)
                              : exponent.isComplex()     ? at::Scalar(exponent.toComplexDouble() - 1.)
                                                         : at::Scalar(exponent.toLong() - 1)) *
                   exponent);
}

// Functions whose backward kernel multiplies by the derivative, as forward mode has to.

Tensor relu(const Call& c) { return at::threshold_backward(c.t(0), c.y, 0); }
Tensor threshold(const Call& c) { return at::threshold_backward(c.t(0), c.x(0), c.number(1)); }
Tensor softplus(const Call& c) { return at::softplus_backward(c.t(0), c.x(0), c.number(1), c.number(2)); }
Tensor elu(const Call& c) {
  return at::elu_backward(c.t(0), c.number(1), c.number(2), c.number(3), /*is_result=*/false, c.x(0));
}
Tensor celu(const Call& c) {
  const auto alpha = c.number(1);
  return at::elu_backward(c.t(0), alpha, 1, 1 / alpha.toDouble(), /*is_result=*/false, c.x(0));
}
Tensor gelu(const Call& c) { return at::gelu_backward(c.t(0), c.x(0), c.arguments[1].toStringView()); }
Tensor hardsigmoid(const Call& c) { return at::hardsigmoid_backward(c.t(0), c.x(0)); }
Tensor hardswish(const Call& c) { return at::hardswish_backward(c.t(0), c.x(0)); }
Tensor hardtanh(const Call& c) { return at::hardtanh_backward(c.t(0), c.x(0), c.number(1), c.number(2)); }
Tensor leaky_relu(const Call& c) {
  return at::leaky_relu_backward(c.t(0), c.x(0), c.number(1), /*self_is_result=*/false);
}

// Backward kernels themselves, for forward over reverse mode: linear in the cotangent, argument 0, and then the
// derivative by argument 1.

Tensor threshold_backward(const Call& c) {
  return c.has(0) ? at::threshold_backward(c.t(0), c.x(1), c.number(2)) : at::zeros_like(c.y);
}
Tensor conj(const Tensor& x) { return x.is_complex() ? x.conj() : x; }
// The part of the cotangent, and t times the derivative by the other argument.
Tensor backward_kernel(const Tensor& by_cotangent, const Tensor& t, const Tensor& slope) {
  return by_cotangent.defined() ? by_cotangent.addcmul(t, slope) : t * slope;
}
Tensor tanh_backward(const Call& c) {
  const auto& y = c.x(1);
  const auto by_cotangent = c.has(0) ? at::tanh_backward(c.t(0), y) : Tensor();
  return c.has(1) ? backward_kernel(by_cotangent, conj(c.t(1)), c.x(0) * conj(y) * -2) : by_cotangent;
}
Tensor sigmoid_backward(const Call& c) {
  const auto& y = c.x(1);
  const auto by_cotangent = c.has(0) ? at::sigmoid_backward(c.t(0), y) : Tensor();
  return c.has(1) ? backward_kernel(by_cotangent, conj(c.t(1)), c.x(0) * (1 - conj(y) * 2)) : by_cotangent;
}
Tensor softplus_backward(const Call& c) {
  const auto beta = c.number(2);
  const auto by_cotangent = c.has(0) ? at::softplus_backward(c.t(0), c.x(1), beta, c.number(3)) : Tensor();
  if (!c.has(1)) return by_cotangent;
  const auto z = c.x(1) * beta;
  const auto s = z.sigmoid();
  return backward_kernel(by_cotangent, c.t(1), at::where(z > c.number(3), 0, c.x(0) * (s * (1 - s) * beta)));
}

// The same for losses of a difference d = x - target: arguments g, x, target, reduction, and that of the loss.
Tensor loss_backward(const Call& c, Tensor (*curvature)(const Tensor& d, const Call& c)) {
  Tensor by_cotangent;
  if (c.has(0)) {
    Stack stack(c.arguments.begin(), c.arguments.end());
    stack[0] = c.t(0);
    c.op.callBoxed(&stack);
    by_cotangent = stack.back().toTensor();
  }
  if (!c.has(1) && !c.has(2)) return by_cotangent;
  const auto moved = !c.has(2) ? c.t(1) : c.has(1) ? c.t(1) - c.t(2) : -c.t(2);
  const auto d = c.x(1) - c.x(2);
  auto slope = c.x(0) * curvature(d, c);
  if (c.arguments[3].toInt() == at::Reduction::Mean) slope = slope / d.sym_numel();
  return backward_kernel(by_cotangent, moved, slope);
}
Tensor within(const Tensor& d, double bound, double inside) { return (d.abs() < bound).to(d.scalar_type()) * inside; }
Tensor mse_loss_backward(const Call& c) {
  return loss_backward(c, [](const Tensor& d, const Call&) { return at::full_like(d, 2); });
}
Tensor smooth_l1_loss_backward(const Call& c) {
  return loss_backward(c, [](const Tensor& d, const Call& c) {
    const auto beta = c.arguments[4].toDouble();
    return within(d, beta, beta == 0 ? 0 : 1 / beta);
  });
}
Tensor huber_loss_backward(const Call& c) {
  return loss_backward(c, [](const Tensor& d, const Call& c) { return within(d, c.arguments[4].toDouble(), 1); });
}

// Functions of two arguments.

// Tangents of the arguments where they are chosen, and half of each where both are equal.
Tensor choose(const Call& c, const Tensor& first_lost, const Tensor& second_lost) {
  const auto part = [&](size_t i, const Tensor& lost, const Tensor& won) {
    if (!c.has(i)) return Tensor();
    return c.t(i) * at::where(lost, 0, at::where(won, 1, 0.5)).to(c.t(i).scalar_type());
  };
  return plus(part(0, first_lost, second_lost), part(1, second_lost, first_lost));
}
Tensor maximum(const Call& c) { return choose(c, c.x(0) < c.x(1), c.x(0) > c.x(1)); }
Tensor minimum(const Call& c) { return choose(c, c.x(0) > c.x(1), c.x(0) < c.x(1)); }

Tensor atan2(const Call& c) {
  const auto square = c.x(0) * c.x(0) + c.x(1) * c.x(1);
  return plus(c.has(0) ? c.t(0) * (c.x(1) / square) : Tensor(), c.has(1) ? c.t(1) * (-c.x(0) / square) : Tensor());
}

}  // namespace tangent
}  // namespace

const std::vector<DerivativeRow>& forward_derivatives() {
  static const std::vector<DerivativeRow> rows{
      only_forward("add.Tensor", tangent::push<tangent::add>),
      only_forward("sub.Tensor", tangent::push<tangent::sub>),
      only_forward("rsub.Tensor", tangent::push<tangent::rsub>),
      only_forward("rsub.Scalar", tangent::push<tangent::rsub_from_number>),
      only_forward("mul.Tensor", tangent::push<tangent::mul>),
      only_forward("div.Tensor", tangent::push<tangent::div>),
      only_forward("mm", tangent::push<tangent::mm>),
      only_forward("mv", tangent::push<tangent::mv>),
      only_forward("bmm", tangent::push<tangent::bmm>),
      only_forward("dot", tangent::push<tangent::dot>),
      only_forward("addmm", tangent::push<tangent::addmm>),
      only_forward("baddbmm", tangent::push<tangent::baddbmm>),
      only_forward("neg", tangent::push<tangent::linear>),
      only_forward("sum", tangent::push<tangent::linear>),
      only_forward("sum.dim_IntList", tangent::push<tangent::linear>),
      only_forward("mean", tangent::push<tangent::linear>),
      only_forward("mean.dim", tangent::push<tangent::linear>),
      only_forward("acos", tangent::push<tangent::acos>),
      only_forward("acosh", tangent::push<tangent::acosh>),
      only_forward("asin", tangent::push<tangent::asin>),
      only_forward("asinh", tangent::push<tangent::asinh>),
      only_forward("atan", tangent::push<tangent::atan>),
      only_forward("atanh", tangent::push<tangent::atanh>),
      only_forward("cos", tangent::push<tangent::cos>),
      only_forward("cosh", tangent::push<tangent::cosh>),
      only_forward("erf", tangent::push<tangent::erf>),
      only_forward("erfc", tangent::push<tangent::erfc>),
      only_forward("erfinv", tangent::push<tangent::erfinv>),
      only_forward("exp", tangent::push<tangent::exp>),
      only_forward("exp2", tangent::push<tangent::exp2>),
      only_forward("expm1", tangent::push<tangent::expm1>),
      only_forward("log", tangent::push<tangent::log>),
      only_forward("log10", tangent::push<tangent::log10>),
      only_forward("log1p", tangent::push<tangent::log1p>),
      only_forward("log2", tangent::push<tangent::log2>),
      only_forward("logit", tangent::push<tangent::logit>),
      only_forward("mish", tangent::push<tangent::mish>),
      only_forward("pow.Tensor_Scalar", tangent::push<tangent::pow_of_number>),
      only_forward("reciprocal", tangent::push<tangent::reciprocal>),
      only_forward("rsqrt", tangent::push<tangent::rsqrt>),
      only_forward("sigmoid", tangent::push<tangent::sigmoid>),
      only_forward("silu", tangent::push<tangent::silu>),
      only_forward("sin", tangent::push<tangent::sin>),
      only_forward("sinc", tangent::push<tangent::sinc>),
      only_forward("sinh", tangent::push<tangent::sinh>),
      only_forward("sqrt", tangent::push<tangent::sqrt>),
      only_forward("tan", tangent::push<tangent::tan>),
      only_forward("tanh", tangent::push<tangent::tanh>),
      only_forward("celu", tangent::push<tangent::celu>),
      only_forward("elu", tangent::push<tangent::elu>),
      only_forward("gelu", tangent::push<tangent::gelu>),
      only_forward("hardsigmoid", tangent::push<tangent::hardsigmoid>),
      only_forward("hardswish", tangent::push<tangent::hardswish>),
      only_forward("hardtanh", tangent::push<tangent::hardtanh>),
      only_forward("leaky_relu", tangent::push<tangent::leaky_relu>),
      only_forward("relu", tangent::push<tangent::relu>),
      only_forward("softplus", tangent::push<tangent::softplus>),
      only_forward("threshold", tangent::push<tangent::threshold>),
      only_forward("huber_loss_backward", tangent::push<tangent::huber_loss_backward>),
      only_forward("mse_loss_backward", tangent::push<tangent::mse_loss_backward>),
      only_forward("smooth_l1_loss_backward", tangent::push<tangent::smooth_l1_loss_backward>),
      only_forward("sigmoid_backward", tangent::push<tangent::sigmoid_backward>),
      only_forward("softplus_backward", tangent::push<tangent::softplus_backward>),
      only_forward("tanh_backward", tangent::push<tangent::tanh_backward>),
      only_forward("threshold_backward", tangent::push<tangent::threshold_backward>),
      only_forward("maximum", tangent::push<tangent::maximum>),
      only_forward("minimum", tangent::push<tangent::minimum>),
      only_forward("atan2", tangent::push<tangent::atan2>),
  };
  return rows;
}

}  // namespace functorch_lite
