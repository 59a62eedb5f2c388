// Derivative rules of our own. See derivative_rules.h first.
//
// Most are compositions of operators whose formulas are right to every order; the composition runs at the level
// itself, so it needs no formula at all. The linear solvers give the tangent directly: PyTorch's formulas reuse the
// LU factors, through which no outer level can differentiate. In reverse mode PyTorch's formulas are right once; those
// of the norms are wrong in the third derivative, and that of det from the third on where tensors are wrappers, so
// nested levels use a composition too. Judged by finite differences.
#include "derivative_rules.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/_linalg_det.h>
#include <ATen/ops/_linalg_slogdet.h>
#include <ATen/ops/_linalg_solve_ex.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/linalg_lu_factor.h>
#include <ATen/ops/linalg_solve.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/real.h>
#include <ATen/ops/zeros_like.h>

#include <unordered_map>

#include "autodiff_level.h"
#include "fused_attention.h"

namespace functorch_lite {
namespace {

using at::Tensor;

// The arguments of one call, taken off the stack in order.
class Arguments {
 public:
  Arguments(Stack& stack, size_t n) : values_(torch::jit::pop(stack, n)) {}
  c10::IValue& next() { return values_[next_++]; }
  Tensor tensor() { return next().toTensor(); }
  Tensor optional_tensor() {
    auto& value = next();
    return value.isNone() ? Tensor() : value.toTensor();
  }

 private:
  std::vector<c10::IValue> values_;
  size_t next_ = 0;
};

std::vector<int64_t> last_dims(int64_t count) {
  std::vector<int64_t> dims;
  for (int64_t d = -count; d < 0; ++d) dims.push_back(d);
  return dims;
}

// bfloat16 and float16 are too coarse for statistics.
Tensor for_statistics(const Tensor& x) {
  return x.scalar_type() == c10::kBFloat16 || x.scalar_type() == c10::kHalf ? x.to(c10::kFloat) : x;
}

// g, y = softmax(x) -> y * g - y * sum(y * g)
void softmax_backward(AutodiffLevel&, Stack& stack) {
  Arguments arguments(stack, 4);
  const auto grad = arguments.tensor();
  const auto y = arguments.tensor();
  const auto dim = arguments.next().toInt();
  const auto dtype = arguments.next().toScalarType();
  const auto product = grad * y;
  torch::jit::push(stack, (product - y * product.sum(dim, /*keepdim=*/true)).to(dtype));
}

// g, y = log_softmax(x) -> g - exp(y) * sum(g)
void log_softmax_backward(AutodiffLevel&, Stack& stack) {
  Arguments arguments(stack, 4);
  const auto grad = arguments.tensor();
  const auto y = arguments.tensor();
  const auto dim = arguments.next().toInt();
  const auto dtype = arguments.next().toScalarType();
  torch::jit::push(stack, (grad - y.exp() * grad.sum(dim, /*keepdim=*/true)).to(dtype));
}

struct Normalized {
  Tensor value;  // (x - mean) * rstd
  Tensor mean;
  Tensor rstd;
};

Normalized normalize(const Tensor& x, at::IntArrayRef dims, double eps) {
  const auto mean = x.mean(dims, /*keepdim=*/true);
  const auto centered = x - mean;
  const auto rstd = ((centered * centered).mean(dims, /*keepdim=*/true) + eps).rsqrt();
  return {centered * rstd, mean, rstd};
}

// The derivative of normalize: g, normalized -> rstd * (g - mean(g) - n * mean(g * n))
Tensor normalize_backward(const Tensor& grad, const Tensor& normalized, const Tensor& rstd, at::IntArrayRef dims) {
  return rstd * (grad - grad.mean(dims, true) - normalized * (grad * normalized).mean(dims, true));
}

Tensor scale_and_shift(Tensor x, const Tensor& weight, const Tensor& bias) {
  if (weight.defined()) x = x * weight;
  return bias.defined() ? x + bias : x;
}

// x[*,n], weight[n]?, bias[n]? -> y[*,n], mean[*,1], rstd[*,1]
void layer_norm(AutodiffLevel&, Stack& stack) {
  Arguments arguments(stack, 5);
  const auto input = arguments.tensor();
  const auto dims = last_dims(static_cast<int64_t>(arguments.next().toSymIntVector().size()));
  const auto weight = arguments.optional_tensor();
  const auto bias = arguments.optional_tensor();
  const auto n = normalize(for_statistics(input), dims, arguments.next().toDouble());
  torch::jit::push(stack, scale_and_shift(n.value, weight, bias).to(input.scalar_type()), n.mean, n.rstd);
}

void layer_norm_backward(AutodiffLevel&, Stack& stack) {
  Arguments arguments(stack, 8);
  const auto grad = arguments.tensor();
  const auto input = arguments.tensor();
  const auto rank = static_cast<int64_t>(arguments.next().toSymIntVector().size());
  const auto dims = last_dims(rank);
  const auto mean = arguments.tensor();
  const auto rstd = arguments.tensor();
  const auto weight = arguments.optional_tensor();
  const auto bias = arguments.optional_tensor();
  const auto mask = arguments.next().toBoolList();
  const auto normalized = (for_statistics(input) - mean) * rstd;
  const auto g = for_statistics(grad);
  std::vector<int64_t> outer;
  for (int64_t d = 0; d < input.dim() - rank; ++d) outer.push_back(d);
  const auto over_examples = [&](const Tensor& x) { return outer.empty() ? x : x.sum(outer); };
  Tensor grad_input;
  Tensor grad_weight;
  Tensor grad_bias;
  if (mask[0])
    grad_input = normalize_backward(weight.defined() ? g * weight : g, normalized, rstd, dims).to(input.scalar_type());
  if (mask[1] && weight.defined()) grad_weight = over_examples(g * normalized).to(weight.scalar_type());
  if (mask[2] && bias.defined()) grad_bias = over_examples(g).to(bias.scalar_type());
  torch::jit::push(stack, grad_input, grad_weight, grad_bias);
}

// v[C] -> v[1,C,1..] to broadcast with x[N,C,*]
Tensor per_channel(const Tensor& v, const Tensor& x) {
  if (!v.defined()) return v;
  std::vector<c10::SymInt> shape(x.dim(), 1);
  shape[1] = v.sym_numel();
  return v.reshape_symint(shape);
}

// x[N,C,*] in G groups -> y[N,C,*], mean[N,G], rstd[N,G]
void group_norm(AutodiffLevel&, Stack& stack) {
  Arguments arguments(stack, 8);
  const auto input = arguments.tensor();
  const auto weight = arguments.optional_tensor();
  const auto bias = arguments.optional_tensor();
  const auto examples = arguments.next().toSymInt();
  for (int skipped = 0; skipped < 2; ++skipped) arguments.next();  // C and HxW follow from the input
  const auto groups = c10::SymInt(arguments.next().toInt());
  const auto n = normalize(for_statistics(input).reshape_symint({examples, groups, c10::SymInt(-1)}), {-1},
                           arguments.next().toDouble());
  const auto y =
      scale_and_shift(n.value.reshape_symint(input.sym_sizes()), per_channel(weight, input), per_channel(bias, input));
  torch::jit::push(stack, y.to(input.scalar_type()), n.mean.squeeze(-1), n.rstd.squeeze(-1));
}

std::vector<int64_t> all_but_channels(const Tensor& x) {
  std::vector<int64_t> dims;
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (d != 1) dims.push_back(d);
  }
  return dims;
}

struct BatchNorm {
  Tensor input, weight, bias, running_mean, running_var;
  bool training;
  double momentum, eps;

  void run(Stack& stack) const {
    const auto x = for_statistics(input);
    const auto dims = all_but_channels(input);
    if (!training) {
      const auto rstd = (running_var + eps).rsqrt();
      const auto y = (x - per_channel(running_mean, x)) * per_channel(rstd, x);
      const auto none = input.new_empty_symint({c10::SymInt(0)});
      return finish(stack, y, none, none);
    }
    const auto n = normalize(x, dims, eps);
    if (running_mean.defined()) update(running_mean, n.mean.flatten());
    if (running_var.defined()) update(running_var, x.detach().var(dims, /*unbiased=*/true));
    finish(stack, n.value, n.mean.flatten(), n.rstd.flatten());
  }
  void update(const Tensor& running, const Tensor& current) const {
    running.mul_(1 - momentum).add_(current.detach().to(running.scalar_type()), momentum);
  }
  void finish(Stack& stack, const Tensor& y, const Tensor& mean, const Tensor& rstd) const {
    const auto result = scale_and_shift(y, per_channel(weight, input), per_channel(bias, input));
    torch::jit::push(stack, result.to(input.scalar_type()), mean, rstd);
  }
};

void native_batch_norm(AutodiffLevel&, Stack& stack) {
  Arguments a(stack, 8);
  BatchNorm{a.tensor(),          a.optional_tensor(), a.optional_tensor(), a.optional_tensor(),
            a.optional_tensor(), a.next().toBool(),   a.next().toDouble(), a.next().toDouble()}
      .run(stack);
}

void batch_norm_without_statistics(AutodiffLevel&, Stack& stack) {
  Arguments a(stack, 6);
  BatchNorm{a.tensor(), a.optional_tensor(), a.optional_tensor(), Tensor(),
            Tensor(),   a.next().toBool(),   a.next().toDouble(), a.next().toDouble()}
      .run(stack);
}

void batch_norm_backward(AutodiffLevel&, Stack& stack) {
  Arguments arguments(stack, 10);
  const auto grad = arguments.tensor();
  const auto input = arguments.tensor();
  const auto weight = arguments.optional_tensor();
  const auto running_mean = arguments.optional_tensor();
  const auto running_var = arguments.optional_tensor();
  const auto save_mean = arguments.optional_tensor();
  const auto save_rstd = arguments.optional_tensor();
  const bool training = arguments.next().toBool();
  const auto eps = arguments.next().toDouble();
  const auto mask = arguments.next().toBoolList();
  const auto x = for_statistics(input);
  const auto g = for_statistics(grad);
  const auto mean = per_channel(training ? save_mean : running_mean, x);
  const auto rstd = per_channel(training ? save_rstd : (running_var + eps).rsqrt(), x);
  const auto normalized = (x - mean) * rstd;
  const auto dims = all_but_channels(input);
  Tensor grad_input;
  Tensor grad_weight;
  Tensor grad_bias;
  if (mask[0]) {
    const auto scaled = weight.defined() ? g * per_channel(weight, x) : g;
    grad_input =
        (training ? normalize_backward(scaled, normalized, rstd, dims) : scaled * rstd).to(input.scalar_type());
  }
  if (mask[1]) grad_weight = (g * normalized).sum(dims);
  if (mask[2]) grad_bias = g.sum(dims);
  torch::jit::push(stack, grad_input, grad_weight, grad_bias);
}

// A primal and its tangent, zeros if it has none.
struct Dual {
  Tensor primal;
  Tensor tangent;
  Dual(AutodiffLevel& level, const Tensor& x) : primal(wrap(level.value_of(x), level)) {
    const auto t = level.tangent_of(x);
    tangent = t.defined() ? wrap(t, level) : at::zeros_like(primal);
  }
};

// A X = B (left) or X A = B, with matrix or vector B: dX = A^-1 (dB - dA X)
void solve(AutodiffLevel& level, Stack& stack) {
  Arguments arguments(stack, 4);
  const Dual a(level, arguments.tensor());
  const Dual b(level, arguments.tensor());
  const bool left = arguments.next().toBool();
  const bool check_errors = arguments.next().toBool();
  auto [x, lu, pivots, info] = at::_linalg_solve_ex(a.primal, b.primal, left, check_errors);
  const bool is_vector = b.primal.dim() == 1 || b.primal.dim() == a.primal.dim() - 1;
  const auto matrix = is_vector ? x.unsqueeze(-1) : x;
  const auto product = left ? at::matmul(a.tangent, matrix) : at::matmul(matrix, a.tangent);
  const auto dx = at::linalg_solve(a.primal, b.tangent - (is_vector ? product.squeeze(-1) : product), left);
  torch::jit::push(stack, level.with_tangent(x, dx), lu, pivots, info);
}

// trace(A^-1 dA), the derivative of log det A
Tensor trace_of_solution(const Dual& a) { return at::linalg_solve(a.primal, a.tangent).diagonal(0, -2, -1).sum(-1); }

void det(AutodiffLevel& level, Stack& stack) {
  Arguments arguments(stack, 1);
  const Dual a(level, arguments.tensor());
  auto [value, lu, pivots] = at::_linalg_det(a.primal);
  torch::jit::push(stack, level.with_tangent(value, value * trace_of_solution(a)), lu, pivots);
}

void slogdet(AutodiffLevel& level, Stack& stack) {
  Arguments arguments(stack, 1);
  const Dual a(level, arguments.tensor());
  auto [sign, logabsdet, lu, pivots] = at::_linalg_slogdet(a.primal);
  const auto trace = trace_of_solution(a);
  if (sign.is_complex()) {
    sign = level.with_tangent(sign, sign * (trace - trace.conj()) / 2);
    logabsdet = level.with_tangent(logabsdet, at::real(trace).clone());
  } else {
    logabsdet = level.with_tangent(logabsdet, trace);
  }
  torch::jit::push(stack, sign, logabsdet, lu, pivots);
}

// A[*,n,n] -> the diagonal of U, and the sign of the permutation of the rows, in the LU decomposition of A.
struct Triangular {
  Tensor lu, pivots, diagonal, parity;
  explicit Triangular(const Tensor& a) {
    std::tie(lu, pivots) = at::linalg_lu_factor(a);
    diagonal = lu.diagonal(0, -2, -1);
    const auto unmoved = at::arange(1, pivots.size(-1) + 1, pivots.options());
    parity = pivots.ne(unmoved).sum(-1).remainder(2).mul(-2).add(1).to(a.scalar_type());
  }
};

void det_by_lu(AutodiffLevel&, Stack& stack) {
  const Triangular t(Arguments(stack, 1).tensor());
  torch::jit::push(stack, t.diagonal.prod(-1) * t.parity, t.lu, t.pivots);
}

void slogdet_by_lu(AutodiffLevel&, Stack& stack) {
  const Triangular t(Arguments(stack, 1).tensor());
  torch::jit::push(stack, t.diagonal.sgn().prod(-1) * t.parity, t.diagonal.abs().log().sum(-1), t.lu, t.pivots);
}

constexpr int kNever = 1000;

struct Rules {
  DerivativeRule forward;
  DerivativeRule reverse;
  int reverse_from;  // the number of autodiff levels outside from which reverse mode needs it
};
using DerivativeRules = std::unordered_map<c10::OperatorHandle, Rules>;

DerivativeRules make_table() {
  const auto only_forward = [](DerivativeRule rule) { return Rules{rule, nullptr, kNever}; };
  const auto nested = [](DerivativeRule rule) { return Rules{rule, rule, 1}; };
  const std::pair<const char*, Rules> rows[] = {
      {"_softmax_backward_data", only_forward(softmax_backward)},
      {"_log_softmax_backward_data", only_forward(log_softmax_backward)},
      {"native_layer_norm", nested(layer_norm)},
      {"native_layer_norm_backward", nested(layer_norm_backward)},
      {"native_group_norm", nested(group_norm)},
      {"native_batch_norm", nested(native_batch_norm)},
      {"_native_batch_norm_legit", nested(native_batch_norm)},
      {"_native_batch_norm_legit.no_stats", nested(batch_norm_without_statistics)},
      {"native_batch_norm_backward", nested(batch_norm_backward)},
      {"_linalg_solve_ex", only_forward(solve)},
      {"_linalg_det", {det, det_by_lu, 2}},
      {"_linalg_slogdet", {slogdet, slogdet_by_lu, 2}},
  };
  DerivativeRules table;
  for (const auto& [name, rules] : rows) table.emplace(find_operator(name), rules);
  for (const auto& [name, forward, reverse] : fused_attention_rules()) {
    table.emplace(find_operator(name), Rules{forward, reverse, 0});
  }
  return table;
}

int autodiff_levels_outside(const Level& level) {
  int count = 0;
  for (const auto* l = level.parent(); l != nullptr; l = l->parent()) count += l->differentiates();
  return count;
}

}  // namespace

DerivativeRule find_derivative_rule(const c10::OperatorHandle& op, const AutodiffLevel& level) {
  static const DerivativeRules table = make_table();
  const auto found = table.find(op);
  if (found == table.end()) return nullptr;
  const auto& rules = found->second;
  if (level.is_forward()) return rules.forward;
  return autodiff_levels_outside(level) >= rules.reverse_from ? rules.reverse : nullptr;
}

}  // namespace functorch_lite
