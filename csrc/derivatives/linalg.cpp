// Derivatives of linear algebra. See derivative_rules.h first.
//
// PyTorch's formulas for solvers and determinants reuse the LU factors, through which no outer level can differentiate.
// That of det is wrong from the third derivative on where tensors are wrappers.
#include <ATen/TensorOperators.h>
#include <ATen/ops/_linalg_det.h>
#include <ATen/ops/_linalg_eigh.h>
#include <ATen/ops/_linalg_slogdet.h>
#include <ATen/ops/_linalg_solve_ex.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/linalg_eig.h>
#include <ATen/ops/linalg_lu_factor.h>
#include <ATen/ops/linalg_solve.h>
#include <ATen/ops/linalg_solve_triangular.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/real.h>

#include "../derivative_rules.h"
#include "../transposition.h"

namespace functorch_lite {
namespace {

using at::Tensor;

// A X = B (left) or X A = B, with matrix or vector B: dX = A^-1 (dB - dA X)
void solve(AutodiffLevel& level, const Operator&, Stack& stack) {
  CallArguments arguments(stack, 4);
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

void det(AutodiffLevel& level, const Operator&, Stack& stack) {
  CallArguments arguments(stack, 1);
  const Dual a(level, arguments.tensor());
  auto [value, lu, pivots] = at::_linalg_det(a.primal);
  torch::jit::push(stack, level.with_tangent(value, value * trace_of_solution(a)), lu, pivots);
}

void slogdet(AutodiffLevel& level, const Operator&, Stack& stack) {
  CallArguments arguments(stack, 1);
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

void det_by_lu(AutodiffLevel&, const Operator&, Stack& stack) {
  const Triangular t(CallArguments(stack, 1).tensor());
  torch::jit::push(stack, t.diagonal.prod(-1) * t.parity, t.lu, t.pivots);
}

void slogdet_by_lu(AutodiffLevel&, const Operator&, Stack& stack) {
  const Triangular t(CallArguments(stack, 1).tensor());
  torch::jit::push(stack, t.diagonal.sgn().prod(-1) * t.parity, t.diagonal.abs().log().sum(-1), t.lu, t.pivots);
}

// op(A) X = B, with op the transpose if asked for -> X, and a copy of A
void triangular_solve(AutodiffLevel&, const Operator&, Stack& stack) {
  CallArguments arguments(stack, 5);
  const auto b = arguments.tensor();
  const auto a = arguments.tensor();
  const bool upper = arguments.next().toBool();
  const bool transpose = arguments.next().toBool();
  const bool unitriangular = arguments.next().toBool();
  const auto x =
      at::linalg_solve_triangular(transpose ? a.mT() : a, b, upper != transpose, /*left=*/true, unitriangular);
  torch::jit::push(stack, x, a.clone());
}

// M, with V M = dA V for eigenvectors V of A, and M[i,j] / (l[j] - l[i]) off the diagonal: what to mix into eigenvector
// j of eigenvector i. PyTorch's formula divides by infinity on the diagonal, which has no derivative.
struct Mixing {
  Tensor in_eigenvectors;
  Tensor coefficients;
  Mixing(Tensor m, const Tensor& eigenvalues) : in_eigenvectors(std::move(m)) {
    const auto same = at::eye_symint(eigenvalues.sym_size(-1), eigenvalues.options().dtype(c10::kBool));
    const auto gap = (eigenvalues.unsqueeze(-2) - eigenvalues.unsqueeze(-1)).masked_fill(same, 1);
    coefficients = (in_eigenvectors / gap).masked_fill(same, 0);
  }
  Tensor eigenvalue_tangent() const { return in_eigenvectors.diagonal(0, -2, -1); }
};

// Hermitian A -> real l[*,n], V[*,n,n]
void eigh(AutodiffLevel& level, const Operator&, Stack& stack) {
  CallArguments arguments(stack, 3);
  const Dual a(level, arguments.tensor());
  const auto uplo = arguments.next().toStringView();
  arguments.next();  // whether V is wanted: the tangent of l needs it
  const auto [l, v] = at::_linalg_eigh(a.primal, uplo, /*compute_v=*/true);
  const Mixing mixing(at::matmul(v.mH(), at::matmul(a.tangent, v)), l);
  const auto dl = mixing.eigenvalue_tangent();
  torch::jit::push(stack, level.with_tangent(l, dl.is_complex() ? at::real(dl).clone() : dl.clone()),
                   level.with_tangent(v, at::matmul(v, mixing.coefficients)));
}

// A -> complex l[*,n], V[*,n,n] with columns of length one
void eig(AutodiffLevel& level, const Operator&, Stack& stack) {
  CallArguments arguments(stack, 1);
  const Dual a(level, arguments.tensor());
  const auto [l, v] = at::linalg_eig(a.primal);
  const Mixing mixing(at::linalg_solve(v, at::matmul(a.tangent.to(v.scalar_type()), v)), l);
  const auto dv = at::matmul(v, mixing.coefficients);
  const auto growth = at::real((v.conj() * dv).sum(-2, /*keepdim=*/true));
  torch::jit::push(stack, level.with_tangent(l, mixing.eigenvalue_tangent().clone()),
                   level.with_tangent(v, dv - v * growth));
}

}  // namespace

const std::vector<DerivativeRow>& linalg_derivatives() {
  static const std::vector<DerivativeRow> rows{
      only_forward("_linalg_solve_ex", solve),
      {"_linalg_det", det, det_by_lu, 2},
      {"_linalg_slogdet", slogdet, slogdet_by_lu, 2},
      only_forward("_linalg_eigh", eigh),
      only_forward("linalg_eig", eig),
      nested("triangular_solve", triangular_solve),
      only_forward("linalg_householder_product", push_forward_by_transposing),
  };
  return rows;
}

}  // namespace functorch_lite
