// Linear algebra. The operators take leading dimensions, so most rules say which ranks the matrices have as user code
// sees them: that tells a vector right-hand side from a matrix one.
#include <ATen/ExpandUtils.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/_linalg_check_errors.h>
#include <ATen/ops/diagonal.h>
#include <ATen/ops/einsum.h>
#include <ATen/ops/permute.h>

#include <algorithm>

#include "../fallback.h"
#include "rules.h"

namespace functorch_lite {
namespace {

// Some results are left out, as an empty vector, when an option says so: each example has an empty vector then.
// For operators whose other results have at least two dimensions with the batch.
void optional_matrices_rule(BatchCall& call) {
  for (size_t i = 0; i < call.size(); ++i) {
    if (call.is_tensor(i)) call.expand_to_front(i);
  }
  call.call();
  for (size_t i = 0; i < call.count_results(); ++i) {
    const auto result = call.result(i).toTensor();
    if (result.dim() == 1) call.result(i) = expand_batch(result, call.batch_size());
  }
  call.finish();
}

// x[B?,*,m,n] -> x[B|1,1..,*,m,n] of logical rank `rank`, so that leading dimensions broadcast.
at::Tensor align(BatchCall& call, size_t i, int64_t rank) {
  if (call.is_batched(i)) return call.to_front(i, rank);
  return pad_rank(call.tensor(i).unsqueeze(0), rank);
}

// b[B,n,k] -> b[n,B*k]: one matrix that is the same for all examples meets all right-hand sides at once. From the
// right, b[B,k,n] -> b[B*k,n].
at::Tensor join_sides(const at::Tensor& b, bool left) {
  if (!left) return b.reshape_symint({b.sym_size(0) * b.sym_size(1), b.sym_size(2)});
  return at::permute(b, {1, 0, 2}).reshape_symint({b.sym_size(1), b.sym_size(0) * b.sym_size(2)});
}
at::Tensor part_sides(const at::Tensor& x, const at::Tensor& b, bool left) {
  if (!left) return x.reshape_symint(b.sym_sizes());
  return at::permute(x.reshape_symint({b.sym_size(1), b.sym_size(0), b.sym_size(2)}), {1, 0, 2});
}

// One matrix for all examples, several right-hand sides: factors (matrix rank 2) and b[B,n,k].
bool is_shared_matrix(BatchCall& call, size_t matrix, size_t b) {
  return !call.is_batched(matrix) && call.rank(matrix) == 2 && call.is_batched(b) && call.rank(b) == 2;
}

// What `op` does for x in a @ x = b: is b[*,n] a stack of vectors for a[*,n,n]?
bool is_vector_side(BatchCall& call, size_t a, size_t b) {
  if (call.rank(b) == 1) return true;
  if (call.rank(a) - 1 != call.rank(b)) return false;
  const auto& matrix = call.to_front(a);
  const auto& side = call.to_front(b);
  const auto matrix_sizes = matrix.sym_sizes().slice(call.is_batched(a) ? 1 : 0, call.rank(a) - 1);
  return matrix_sizes.equals(side.sym_sizes().slice(call.is_batched(b) ? 1 : 0));
}

// a[B?,*,n,n], b[B?,*,n,k] or b[B?,*,n] -> x[B,*,n,k], and of a: LU[B?,*,n,n], pivots[B?,*,n], info[B?,*]
void solve_ex_rule(BatchCall& call) {
  const bool left = call.arg("left").toBool();
  const bool is_vector = is_vector_side(call, 0, 1);
  TORCH_CHECK_VALUE(left || !is_vector, call.name(), ": a vector right-hand side needs left=True.");
  if (is_vector) {
    call.to_front(1);
    call.arg(1) = call.tensor(1).unsqueeze(-1);
  }
  if (is_shared_matrix(call, 0, 1)) {
    const auto b = call.to_front(1);
    call.arg(1) = join_sides(b, left);
    call.call();
    const auto x = part_sides(call.result(0).toTensor(), b, left);
    call.result(0) = is_vector ? x.squeeze(-1) : x;
    return call.finish_each({0, kNoBatchDim, kNoBatchDim, kNoBatchDim});
  }
  call.expand_to_front(0);
  const auto rank = std::max(call.rank(0), call.rank(1));
  const bool pads = call.rank(0) < rank;
  auto sizes = call.tensor(0).sym_sizes().vec();
  call.arg(0) = pad_rank(call.tensor(0), rank);
  call.arg(1) = align(call, 1, rank);
  call.call();
  if (is_vector) call.result(0) = call.result(0).toTensor().squeeze(-1);
  // LU, pivots and info: each has the dimensions of `a` and one fewer than the one before.
  for (size_t i = 1; i < call.count_results() && pads; ++i) {
    call.result(i) = call.result(i).toTensor().reshape_symint(sizes);
    sizes.pop_back();
  }
  call.finish();
}

// factor[B?,*,n,n], pivots[B?,*,n], b[B?,*,n,k] -> x[B,*,n,k]
void factored_solve_rule(BatchCall& call) {
  const bool left = !call.find("left") || call.arg("left").toBool();
  if (is_shared_matrix(call, 0, 2) && !call.is_batched(1)) {
    const auto b = call.to_front(2);
    call.arg(2) = join_sides(b, left);
    call.call();
    call.result() = part_sides(call.result().toTensor(), b, left);
    return call.finish();
  }
  const auto rank = std::max(call.rank(0), call.rank(2));
  const auto factor = call.expand_to_front(0, rank);
  const auto pivots = call.expand_to_front(1, rank - 1);
  const auto b = align(call, 2, rank);
  // Not left to broadcasting: PyTorch 2.13 computes wrong numbers from a factor with leading dimensions of size 1.
  const auto leading = at::infer_size_symint(factor.sym_sizes().slice(0, rank - 1), b.sym_sizes().slice(0, rank - 1));
  const auto expanded = [&](const at::Tensor& x, int64_t core) {
    std::vector<c10::SymInt> sizes(leading.begin(), leading.end());
    for (auto d = x.dim() - core; d < x.dim(); ++d) sizes.push_back(x.sym_size(d));
    return x.expand_symint(sizes).contiguous();
  };
  call.arg(0) = expanded(factor, 2);
  call.arg(1) = expanded(pivots, 1);
  call.arg(2) = expanded(b, 2);
  call.call();
  call.finish();
}

// a[B?,*,n,n], b[B?,*,n,k] -> x[B,*,n,k]
void solve_triangular_rule(BatchCall& call) {
  const bool left = call.arg("left").toBool();
  if (is_shared_matrix(call, 0, 1)) {
    const auto b = call.to_front(1);
    call.arg(1) = join_sides(b, left);
    call.call();
    call.result() = part_sides(call.result().toTensor(), b, left);
    return call.finish();
  }
  const auto rank = std::max(call.rank(0), call.rank(1));
  for (size_t i = 0; i < 2; ++i) call.arg(i) = align(call, i, rank);
  call.call();
  call.finish();
}

// b[B?,*,n,k], factor[B?,*,n,n] -> x[B,*,n,k]
void cholesky_solve_rule(BatchCall& call) {
  if (is_shared_matrix(call, 1, 0)) {
    const auto b = call.to_front(0);
    call.arg(0) = join_sides(b, /*left=*/true);
    call.call();
    call.result() = part_sides(call.result().toTensor(), b, /*left=*/true);
    return call.finish();
  }
  const auto rank = std::max(call.rank(0), call.rank(1));
  for (size_t i = 0; i < 2; ++i) call.arg(i) = align(call, i, rank);
  call.call();
  call.finish();
}

// All matrices of one rank, with the batch: x[B,1..,*,m,n].
void expanded_matrices_rule(BatchCall& call) {
  int64_t rank = 0;
  for (size_t i = 0; i < call.size(); ++i) {
    if (call.is_tensor(i)) rank = std::max(rank, call.rank(i));
  }
  for (size_t i = 0; i < call.size(); ++i) {
    if (call.is_tensor(i)) call.expand_to_front(i, rank);
  }
  call.call();
  call.finish();
}

// a[B?,*,m,n], b[B?,*,m,k] or b[B?,*,m] -> x[B,*,n,k], residuals, rank, singular values; what the driver does not
// compute is an empty vector for each example.
void lstsq_rule(BatchCall& call) {
  const bool is_vector = is_vector_side(call, 0, 1);
  const auto driver = call.arg("driver").toOptional<std::string>();
  if (is_vector) {
    call.to_front(1);
    call.arg(1) = call.tensor(1).unsqueeze(-1);
  }
  const auto rank = std::max(call.rank(0), call.rank(1));
  call.expand_to_front(0, rank);
  call.expand_to_front(1, rank);
  call.call();
  const auto left_out = [&](size_t i) { call.result(i) = expand_batch(call.result(i).toTensor(), call.batch_size()); };
  if (is_vector) call.result(0) = call.result(0).toTensor().squeeze(-1);
  // Residuals have a dimension for the columns of b, so a vector of them is the empty one.
  const auto residuals = call.result(1).toTensor();
  if (residuals.dim() == 1) {
    left_out(1);
  } else if (is_vector) {
    call.result(1) = residuals.squeeze(-1);
  }
  const bool has_singular_values = call.result(3).toTensor().dim() > 1;
  const bool is_gels = driver.has_value() ? *driver == "gels" : !call.tensor(0).is_cpu();
  if (is_gels) left_out(2);
  if (!has_singular_values) left_out(3);
  call.finish();
}

// x[B?,*,m,n], atol[B?,*], rtol[B?,*] -> y[B,*,n,m]
void pinv_rule(BatchCall& call) {
  const auto rank = call.rank(0);
  call.expand_to_front(0);
  for (size_t i = 1; i < 3; ++i) {
    if (call.is_tensor(i) && call.is_batched(i)) call.to_front(i, rank - 2);
  }
  call.call();
  call.finish();
}

// x[B,*,n,n] -> y[B,*,n,n]; the kernel views its argument as one stack of matrices.
void matrix_exp_rule(BatchCall& call) {
  call.arg(0) = call.to_front(0).contiguous();
  call.call();
  call.finish();
}

// x[B,m,n] -> y[B]
void trace_rule(BatchCall& call) {
  TORCH_CHECK(call.rank(0) == 2, "trace: expected a matrix, got ", call.rank(0), " dimensions.");
  call.set_results(at::diagonal(call.to_front(0), 0, 1, 2).sum(1));
  call.finish();
}

// Raises if the factorization of any example failed. There is no result.
void check_errors_rule(BatchCall& call) {
  const auto name = call.arg("api_name").toStringRef();
  const auto& info = call.to_front(0);
  at::_linalg_check_errors(info.dim() == 1 ? info : info.reshape(-1), name, /*is_matrix=*/false);
  call.set_results();
}

// The product of i1, i2, i3, each with dimensions of size 1 put in at `expand`, summed over `sumdim`.
void trilinear_rule(BatchCall& call) {
  const char* expands[] = {"expand1", "expand2", "expand3"};
  const auto rank = call.rank(0) + static_cast<int64_t>(call.arg(expands[0]).toIntVector().size());
  const auto letters = [&](const std::vector<int64_t>& without) {
    std::string result;
    for (int64_t d = 0; d < rank; ++d) {
      if (std::find(without.begin(), without.end(), d) == without.end()) result.push_back(static_cast<char>('a' + d));
    }
    return result;
  };
  std::string equation;
  std::vector<at::Tensor> factors;
  for (size_t i = 0; i < 3; ++i) {
    factors.push_back(call.to_front(i));
    equation +=
        (i > 0 ? "," : "") + std::string(call.is_batched(i) ? "Z" : "") + letters(call.arg(expands[i]).toIntVector());
  }
  equation += "->Z" + letters(call.arg("sumdim").toIntVector());
  call.set_results(at::einsum(equation, factors));
  call.finish();
}

}  // namespace

void add_linalg_rules(RuleTable& rules) {
  rules.add(front(),
            {"linalg_inv_ex", "linalg_cholesky_ex", "cholesky", "cholesky_inverse", "geqrf", "linalg_eig",
             "_linalg_eigvals", "_linalg_det", "_linalg_slogdet", "linalg_lu_factor_ex", "linalg_ldl_factor_ex"});
  rules.add(&matrix_exp_rule, {"linalg_matrix_exp"});
  rules.add(expanded(), {"linalg_householder_product", "ormqr"});
  rules.add(&optional_matrices_rule, {"_linalg_svd", "_linalg_eigh", "linalg_qr", "linalg_lu", "lu_unpack"});
  rules.add(&solve_ex_rule, {"_linalg_solve_ex"});
  rules.add(&factored_solve_rule, {"linalg_lu_solve", "linalg_ldl_solve"});
  rules.add(&solve_triangular_rule, {"linalg_solve_triangular"});
  rules.add(&cholesky_solve_rule, {"cholesky_solve", "_cholesky_solve_helper"});
  rules.add(&expanded_matrices_rule, {"triangular_solve", "_cdist_forward", "_cdist_backward", "_euclidean_dist"});
  rules.add(&lstsq_rule, {"linalg_lstsq"});
  rules.add(&pinv_rule, {"linalg_pinv.atol_rtol_tensor"});
  rules.add(&trace_rule, {"trace"});
  rules.add(&check_errors_rule, {"_linalg_check_errors"});
  rules.add(&trilinear_rule, {"_trilinear"});
  rules.add(expanded_along({"dim"}), {"linalg_cross"});
}

}  // namespace functorch_lite
