// Second derivatives of distances, in all pairs. See derivative_rules.h first.
#include <ATen/TensorOperators.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/triu_indices.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include <cmath>

#include "../derivative_rules.h"

namespace functorch_lite {
namespace {

using at::Tensor;

// g / d, and 0 where the distance d is 0: there PyTorch takes 0 among the subgradients.
Tensor over_distance(const Tensor& g, const Tensor& d) {
  const auto apart = d != 0;
  return at::where(apart, g / at::where(apart, d, at::ones_like(d)), at::zeros_like(g));
}

// The derivative of the p-norm d[*,1] by the difference[*,M], times g[*,1].
Tensor norm_backward(const Tensor& g, const Tensor& difference, double p, const Tensor& d) {
  if (p == 0) return at::zeros_like(difference);
  if (p == 1) return g * difference.sgn();
  if (p == 2) return over_distance(g, d) * difference;
  if (std::isinf(p)) return g * difference.sgn() * (difference.abs() == d).to(g.scalar_type());
  const auto size = difference.abs();
  const auto apart = size != 0;
  // Of |x|^(p-2) x, where x = 0 would give infinity times 0.
  const auto power = at::where(apart, size, at::ones_like(size)).pow(p - 1);
  const auto scale = at::where(d != 0, d, at::ones_like(d)).pow(1 - p);
  return at::where(apart.logical_and(d != 0), g * scale * power * difference.sgn(), at::zeros_like(difference));
}

// g[*,P,R], x1[*,P,M], x2[*,R,M], d[*,P,R] -> the cotangent of x1
void cdist_backward(AutodiffLevel&, const Operator&, Stack& stack) {
  CallArguments arguments(stack, 5);
  const auto grad = arguments.tensor();
  const auto x1 = arguments.tensor();
  const auto x2 = arguments.tensor();
  const auto p = arguments.next().toDouble();
  const auto d = arguments.tensor();
  if (p == 2) {
    const auto weight = over_distance(grad, d);
    return torch::jit::push(stack, x1 * weight.sum(-1, /*keepdim=*/true) - at::matmul(weight, x2));
  }
  const auto difference = x1.unsqueeze(-2) - x2.unsqueeze(-3);
  torch::jit::push(stack, norm_backward(grad.unsqueeze(-1), difference, p, d.unsqueeze(-1)).sum(-2));
}

// g[K], x[N,M], d[K], K the pairs i < j -> the cotangent of x
void pdist_backward(AutodiffLevel&, const Operator&, Stack& stack) {
  CallArguments arguments(stack, 4);
  const auto grad = arguments.tensor();
  const auto x = arguments.tensor();
  const auto p = arguments.next().toDouble();
  const auto d = arguments.tensor();
  const auto pairs = at::triu_indices(x.size(0), x.size(0), 1, x.options().dtype(c10::kLong));
  const auto first = pairs.select(0, 0);
  const auto second = pairs.select(0, 1);
  const auto difference = x.index_select(0, first) - x.index_select(0, second);
  const auto g = norm_backward(grad.unsqueeze(-1), difference, p, d.unsqueeze(-1));
  torch::jit::push(stack, at::zeros_like(x).index_add(0, first, g).index_add(0, second, -g));
}

}  // namespace

const std::vector<DerivativeRow>& distance_derivatives() {
  static const std::vector<DerivativeRow> rows{
      always("_cdist_backward", cdist_backward),
      always("_pdist_backward", pdist_backward),
  };
  return rows;
}

}  // namespace functorch_lite
