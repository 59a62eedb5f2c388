// Products of matrices and vectors. Only the batched operand gets the batch: x[B,m,k] @ y[k,n] stays one product.
#include <ATen/TensorOperators.h>
#include <ATen/ops/_cdist_forward.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/triu_indices.h>

#include "rules.h"

namespace functorch_lite {
namespace {

// a[B?,m,k], b[B?,k,n] -> c[B,m,n]
at::Tensor product(BatchCall& call, size_t a, size_t b) {
  const auto& x = call.to_front(a);
  const auto& y = call.to_front(b);
  // A sparse matrix meets the columns of all examples at once, for it has no product with a stack of matrices.
  if (x.layout() != c10::kStrided && call.is_batched(b) && y.dim() == 3) {
    const auto columns = y.permute({1, 0, 2}).reshape_symint({y.sym_size(1), y.sym_size(0) * y.sym_size(2)});
    return at::matmul(x, columns).reshape_symint({x.sym_size(0), y.sym_size(0), y.sym_size(2)}).permute({1, 0, 2});
  }
  const bool plain_stacks = call.is_batched(a) && call.is_batched(b) && x.dim() == 3 && y.dim() == 3;
  return plain_stacks ? at::bmm(x, y) : at::matmul(x, y);
}

// a[B?,m,k], v[B?,k] -> y[B,m]
at::Tensor matrix_vector(BatchCall& call, size_t a, size_t v) {
  const auto& matrix = call.to_front(a);
  const auto& vector = call.to_front(v);
  if (!call.is_batched(v)) return at::matmul(matrix, vector);
  if (!call.is_batched(a)) return at::matmul(vector, matrix.t());
  return at::bmm(matrix, vector.unsqueeze(-1)).squeeze(-1);
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
  return at::bmm(a.unsqueeze(1), b.unsqueeze(2)).flatten();
}
void dot_rule(BatchCall& call) {
  call.set_results(inner_product(call.to_front(0), call.to_front(1)));
  call.finish();
}
void vdot_rule(BatchCall& call) {
  call.set_results(inner_product(call.to_front(0).conj(), call.to_front(1)));
  call.finish();
}

void addmm_rule(BatchCall& call) {
  if (call.is_batched(1) && call.is_batched(2)) {
    const auto& bias = call.to_front(0, 2);
    return finish_sum(call, at::baddbmm(bias, call.to_front(1), call.to_front(2), call.arg("beta").toScalar(),
                                        call.arg("alpha").toScalar()));
  }
  finish_sum(call, add_scaled(call, product(call, 1, 2), 2));
}
void baddbmm_rule(BatchCall& call) { finish_sum(call, add_scaled(call, product(call, 1, 2), 3)); }
// a[B?,N,m,k], b[B?,N,k,n]: the sum over N as one product of a[B?,m,N*k] and b[B?,N*k,n].
void addbmm_rule(BatchCall& call) {
  const auto a = call.to_front(1).transpose(-3, -2).flatten(-2);
  const auto b = call.to_front(2).flatten(-3, -2);
  finish_sum(call, add_scaled(call, at::matmul(a, b), 2));
}
void addmv_rule(BatchCall& call) { finish_sum(call, add_scaled(call, matrix_vector(call, 1, 2), 1)); }
void addr_rule(BatchCall& call) {
  const auto outer = call.to_front(1).unsqueeze(-1) * call.to_front(2).unsqueeze(-2);
  finish_sum(call, add_scaled(call, outer, 2));
}

// a[B,*,m,k], b[B,k,n] -> c[B,*,m,n]: all rows of an example at once.
at::Tensor rows_product(const at::Tensor& a, const at::Tensor& b) {
  if (a.dim() == 3) return at::bmm(a, b);
  auto sizes = a.sym_sizes().vec();
  sizes.back() = b.sym_size(2);
  return at::bmm(a.flatten(1, -2), b).reshape_symint(sizes);
}

// a[B?,*,m,k] or a[B?,k], b[B?,*,k,n] or b[B?,k]: leading dimensions broadcast.
void matmul_rule(BatchCall& call) {
  if (call.rank(0) == 2 && call.rank(1) == 2) return mm_rule(call);
  const bool row = call.rank(0) == 1, column = call.rank(1) == 1;
  TORCH_CHECK(call.rank(0) > 0 && call.rank(1) > 0,
              "matmul: both arguments need at least one dimension, but they have ", call.rank(0), " and ",
              call.rank(1));
  auto a = call.to_front(0), b = call.to_front(1);
  if (row) a = a.unsqueeze(-2);
  if (column) b = b.unsqueeze(-1);
  at::Tensor y;
  if (call.is_batched(0) && call.is_batched(1) && call.rank(1) <= 2) {
    y = rows_product(a, b);
  } else {
    const auto rank = std::max(call.rank(0) + row, call.rank(1) + column);
    y = at::matmul(call.is_batched(0) ? pad_rank(a, rank) : a, call.is_batched(1) ? pad_rank(b, rank) : b);
  }
  if (column) y = y.squeeze(-1);
  if (row) y = y.squeeze(column ? -1 : -2);
  call.set_results(y);
  call.finish();
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
  } else if (rank == 2 && call.is_batched(0) && call.is_tensor(2)) {
    call.set_results(at::baddbmm(call.to_front(2, 2), x, call.to_front(1).transpose(1, 2)));
    return call.finish();
  } else if (call.is_batched(0)) {
    y = rows_product(x, call.to_front(1).transpose(1, 2));
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
  rules.add(&matmul_rule, {"matmul"});
  rules.add(&mv_rule, {"mv"});
  rules.add(&dot_rule, {"dot"});
  rules.add(&vdot_rule, {"vdot"});
  rules.add(&addmm_rule, {"addmm", "addmm_", "_sparse_addmm"});
  rules.add(&baddbmm_rule, {"baddbmm", "baddbmm_"});
  rules.add(&addbmm_rule, {"addbmm", "addbmm_"});
  rules.add(&addmv_rule, {"addmv", "addmv_"});
  rules.add(&addr_rule, {"addr", "addr_"});
  rules.add(&pdist_rule, {"_pdist_forward"});
  rules.add(&linear_rule, {"linear"});
}

}  // namespace functorch_lite
