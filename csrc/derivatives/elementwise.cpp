// Derivatives of elementwise operators, of softmax and of cumulative ones. See derivative_rules.h first.
#include <ATen/TensorOperators.h>
#include <ATen/ops/_log_softmax.h>
#include <ATen/ops/_safe_softmax.h>
#include <ATen/ops/_softmax.h>
#include <ATen/ops/cat.h>

#include "../derivative_rules.h"
#include "../transposition.h"

namespace functorch_lite {
namespace {

using at::Tensor;

// g, y = softmax(x) -> y * g - y * sum(y * g)
void softmax_backward(AutodiffLevel&, const Operator&, Stack& stack) {
  CallArguments arguments(stack, 4);
  const auto grad = arguments.tensor();
  const auto y = arguments.tensor();
  const auto dim = arguments.next().toInt();
  const auto dtype = arguments.next().toScalarType();
  const auto product = grad * y;
  torch::jit::push(stack, (product - y * product.sum(dim, /*keepdim=*/true)).to(dtype));
}

// g, y = log_softmax(x) -> g - exp(y) * sum(g)
void log_softmax_backward(AutodiffLevel&, const Operator&, Stack& stack) {
  CallArguments arguments(stack, 4);
  const auto grad = arguments.tensor();
  const auto y = arguments.tensor();
  const auto dim = arguments.next().toInt();
  const auto dtype = arguments.next().toScalarType();
  torch::jit::push(stack, (grad - y.exp() * grad.sum(dim, /*keepdim=*/true)).to(dtype));
}

// Where the mask leaves entries out, y is zero, and so is their cotangent.
void masked_softmax_backward(AutodiffLevel&, const Operator&, Stack& stack) {
  CallArguments arguments(stack, 4);
  const auto grad = arguments.tensor();
  const auto y = arguments.tensor();
  arguments.next();  // the mask
  const auto& dim = arguments.next();
  const auto product = grad * y;
  torch::jit::push(stack, product - y * product.sum(dim.isNone() ? -1 : dim.toInt(), /*keepdim=*/true));
}

// The tangent of y = softmax(x): PyTorch's own goes through log-sum-exp, which at minus infinity has no derivative.
Tensor softmax_tangent(const Tensor& y, const Tensor& t, int64_t dim) {
  const auto product = y * t;
  return product - y * product.sum(dim, /*keepdim=*/true);
}

void softmax(AutodiffLevel& level, const Operator&, Stack& stack) {
  CallArguments arguments(stack, 3);
  const Dual x(level, arguments.tensor());
  const auto dim = arguments.next().toInt();
  const auto y = at::_softmax(x.primal, dim, arguments.next().toBool());
  torch::jit::push(stack, level.with_tangent(y, softmax_tangent(y, x.tangent.to(y.scalar_type()), dim)));
}

void safe_softmax(AutodiffLevel& level, const Operator&, Stack& stack) {
  CallArguments arguments(stack, 3);
  const Dual x(level, arguments.tensor());
  const auto dim = arguments.next().toInt();
  const auto y = at::_safe_softmax(x.primal, dim, arguments.next().toOptional<c10::ScalarType>());
  torch::jit::push(stack, level.with_tangent(y, softmax_tangent(y, x.tangent.to(y.scalar_type()), dim)));
}

void log_softmax(AutodiffLevel& level, const Operator&, Stack& stack) {
  CallArguments arguments(stack, 3);
  const Dual x(level, arguments.tensor());
  const auto dim = arguments.next().toInt();
  const auto y = at::_log_softmax(x.primal, dim, arguments.next().toBool());
  const auto t = x.tangent.to(y.scalar_type());
  torch::jit::push(stack, level.with_tangent(y, t - (y.exp() * t).sum(dim, /*keepdim=*/true)));
}

// x[*,2n,*] -> a * sigmoid(b), with its halves a and b
void glu(AutodiffLevel&, const Operator&, Stack& stack) {
  CallArguments arguments(stack, 2);
  const auto halves = arguments.tensor().chunk(2, arguments.next().toInt());
  torch::jit::push(stack, halves[0] * halves[1].sigmoid());
}

void glu_backward(AutodiffLevel&, const Operator&, Stack& stack) {
  CallArguments arguments(stack, 3);
  const auto grad = arguments.tensor();
  const auto x = arguments.tensor();
  const auto dim = arguments.next().toInt();
  const auto halves = x.chunk(2, dim);
  const auto gate = halves[1].sigmoid();
  torch::jit::push(stack, at::cat({grad * gate, grad * halves[0] * gate * (1 - gate)}, dim));
}

void hardsigmoid_backward(AutodiffLevel&, const Operator&, Stack& stack) {
  CallArguments arguments(stack, 2);
  const auto grad = arguments.tensor();
  const auto x = arguments.tensor();
  torch::jit::push(stack, grad * (x > -3).logical_and(x < 3).to(grad.scalar_type()) / 6);
}

bool is_complex(const AutodiffLevel&, const Operator&, const Stack& stack) {
  return stack[stack.size() - 2].toTensor().is_complex();
}

}  // namespace

const std::vector<DerivativeRow>& elementwise_derivatives() {
  static const std::vector<DerivativeRow> rows{
      only_forward("_softmax", softmax),
      only_forward("_safe_softmax", safe_softmax),
      only_forward("_log_softmax", log_softmax),
      only_forward("_softmax_backward_data", softmax_backward),
      only_forward("_log_softmax_backward_data", log_softmax_backward),
      nested("glu", glu),
      only_forward("glu_backward", glu_backward),
      always("hardsigmoid_backward", hardsigmoid_backward),
      always("acosh_", write_functional_result),
      always("asinh_", write_functional_result),
      always("atanh_", write_functional_result),
      only_forward("rrelu_with_noise_", write_functional_result),
      always("_masked_softmax_backward", masked_softmax_backward),
      {"logcumsumexp", push_forward_by_transposing, nullptr, 0, is_complex},
  };
  return rows;
}

}  // namespace functorch_lite
