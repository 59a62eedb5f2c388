// Products of matrices and vectors. Only the batched operand gets the batch: x[B,m,k] @ y[k,n] stays one product.
#include <ATen/TensorOperators.h>
#include <ATen/ops/_cdist_forward.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/triu_indices.h>

#include "rules.h"

namespace functorch_lite {
namespace {

// a[B?,m,k], b[B?,k,n] -> c[B,m,n]
at::Tensor product(BatchCall& call, size_t a, size_t b) { return at::matmul(call.to_front(a), call.to_front(b)); }

// a[B?,m,k], v[B?,k] -> y[B,m]
at::Tensor matrix_vector(BatchCall& call, size_t a, size_t v) {
  const auto& matrix = call.to_front(a);
  const auto& vector = call.to_front(v);
  if (!call.is_batched(v)) return at::matmul(matrix, vector);
  if (!call.is_batched(a)) return at::matmul(vector, matrix.t());
  return at::matmul(matrix, vector.unsqueeze(-1)).squeeze(-1);
}

// A number times x in the dtype of x: the fused operators convert it for integers and booleans.
at::Tensor scaled(const at::Tensor& x, const at::Scalar& number) {
  if (number.equal(1)) return x;
  if (x.scalar_type() == c10::kBool) return at::mul(x, at::Scalar(number.toDouble() != 0));
  return at::mul(x, c10::isIntegralType(x.scalar_type(), /*includeBool=*/false) ? at::Scalar(number.toLong()) : number);
}

// beta * bias + alpha * product, where beta == 0 ignores what is in bias.
at::Tensor add_scaled(BatchCall& call, const at::Tensor& product, int64_t rank) {
  const auto result = scaled(product, call.arg("alpha").toScalar());
  const auto beta = call.arg("beta").toScalar();
  // The product alone has no batch if only the bias has one.
  if (beta.equal(0)) return result.dim() == rank ? expand_batch(result, call.batch_size()) : result;
  return result + scaled(call.to_front(0, rank), beta);
}

// The in-place form writes the same result into its first argument.
void finish_sum(BatchCall& call, const at::Tensor& result) {
  if (call.schema().is_mutable()) {
    const auto target = call.to_front(0);
    call.set_results(target.copy_(result));
  } else {
    call.set_results(result);
  }
  call.finish();
}

void mm_rule(BatchCall& call) {
  call.set_results(product(call, 0, 1));
  call.finish();
}

void mv_rule(BatchCall& call) {
  call.set_results(matrix_vector(call, 0, 1));
  call.finish();
}

// a[B?,n], b[B?,n] -> y[B]
at::Tensor inner_product(const at::Tensor& a, const at::Tensor& b) {
  if (a.dim() == 1) return at::matmul(b, a);
  if (b.dim() == 1) return at::matmul(a, b);
  return at::matmul(a.unsqueeze(1), b.unsqueeze(2)).squeeze(2).squeeze(1);
}
void dot_rule(BatchCall& call) {
  call.set_results(inner_product(call.to_front(0), call.to_front(1)));
  call.finish();
}
void vdot_rule(BatchCall& call) {
  call.set_results(inner_product(call.to_front(0).conj(), call.to_front(1)));
  call.finish();
}

void addmm_rule(BatchCall& call) { finish_sum(call, add_scaled(call, product(call, 1, 2), 2)); }
void baddbmm_rule(BatchCall& call) { finish_sum(call, add_scaled(call, product(call, 1, 2), 3)); }
void addbmm_rule(BatchCall& call) { finish_sum(call, add_scaled(call, product(call, 1, 2).sum(-3), 2)); }
void addmv_rule(BatchCall& call) { finish_sum(call, add_scaled(call, matrix_vector(call, 1, 2), 1)); }
void addr_rule(BatchCall& call) {
  const auto outer = call.to_front(1).unsqueeze(-1) * call.to_front(2).unsqueeze(-2);
  finish_sum(call, add_scaled(call, outer, 2));
}

// x[B?,*,k], weight[B?,n,k], bias[B?,n] -> y[B,*,n]
void linear_rule(BatchCall& call) {
  const auto rank = call.rank(0);
  const bool shared_layer = !call.is_batched(1) && (!call.is_tensor(2) || !call.is_batched(2));
  if (shared_layer) {
    call.to_front(0);
    call.call();
    return call.finish();
  }
  const auto& x = call.to_front(0);
  at::Tensor y;
  if (!call.is_batched(1)) {
    y = at::linear(x, call.tensor(1));
  } else if (rank == 1) {
    y = matrix_vector(call, 1, 0);
  } else {
    // The rows of x as one matrix: matmul would copy the weight for every index in front of them.
    const int64_t first = call.is_batched(0) ? 1 : 0;
    const auto product = at::matmul(x.flatten(first, -2), call.to_front(1).transpose(-1, -2));
    y = product.unflatten_symint(1, x.sym_sizes().slice(first, rank - 1));
  }
  if (call.is_tensor(2)) y = y + call.to_front(2, rank);
  call.set_results(y);
  call.finish();
}

// x[B,n,k] -> distances[B,n*(n-1)/2] of the pairs of rows
void pdist_rule(BatchCall& call) {
  const auto& x = call.to_front(0);
  const auto n = x.size(1);
  const auto pairs = at::triu_indices(n, n, 1, x.options().dtype(c10::kLong));
  const auto all = at::_cdist_forward(x, x, call.arg("p").toDouble(), /*compute_mode=*/2);
  call.set_results(at::index_select(flatten_examples(all), 1, pairs.select(0, 0) * n + pairs.select(0, 1)));
  call.finish();
}

}  // namespace

void add_matmul_rules(RuleTable& rules) {
  rules.add(&mm_rule, {"mm", "bmm"});
  rules.add(&mv_rule, {"mv"});
  rules.add(&dot_rule, {"dot"});
  rules.add(&vdot_rule, {"vdot"});
  rules.add(&addmm_rule, {"addmm", "addmm_"});
  rules.add(&baddbmm_rule, {"baddbmm", "baddbmm_"});
  rules.add(&addbmm_rule, {"addbmm", "addbmm_"});
  rules.add(&addmv_rule, {"addmv", "addmv_"});
  rules.add(&addr_rule, {"addr", "addr_"});
  rules.add(&pdist_rule, {"_pdist_forward"});
  rules.add(&linear_rule, {"linear"});
}

}  // namespace functorch_lite
