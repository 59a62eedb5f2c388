// The families of batching rules: most operators need no code of their own, only a row that names one of these.
#pragma once

#include "rule.h"

namespace functorch_lite {

// Broadcasting arithmetic: f(x[B,*], y[B,*]) -> z[B,*]. Follows type promotion as user code sees it.
Family pointwise();

// Works on trailing dimensions and lets leading ones through: x[B,*] -> y[B,*]. Other arguments may stay unbatched.
Family front();

// As `front`, but every tensor argument must have the batch: unbatched ones are expanded.
Family expanded();

// Acts along the named dimension arguments: x[B,*], dim -> y[B,*], dim + 1. A scalar counts as one element.
Family along(std::vector<std::string> dims);

// As `along` with several tensors of one rank, all of which get the batch: backward operators.
Family expanded_along(std::vector<std::string> dims);

// As `along` for reductions, where no dimensions means all of them. Honours `keepdim`.
Family reduce(std::string dim);

// A reduction of everything, as the sibling operator with a `dim` argument: x[B,*] -> y[B].
Family reduce_all(const char* sibling);

// The named size argument describes the result (or the input, in a backward operator): the batch size goes in front.
// Dimension arguments count within that size.
Family shaped(std::string size, std::vector<std::string> dims = {});

// Never batched: an error that gives the reason and what to write instead.
Family forbid(const char* advice);

// Helpers for single rules.

// Type promotion ranks scalars below tensors with dimensions, and a batched scalar has a dimension when the operator
// runs. The common dtype that user code expects:
c10::ScalarType dtype_as_seen(BatchCall& call);
// Converts the batched arguments to it where it would be another one.
void promote_as_seen(BatchCall& call);

// Whether any tensor of values[0..n) is batched at the current level: for compositions, which see wrappers.
bool any_batched(const c10::IValue* values, size_t n);

// target.copy_(value) that autograd does not count as a write, as where a kernel writes beside its results.
void copy_uncounted(const at::Tensor& target, const at::Tensor& value);

// dim as user code counts it, in a tensor of logical rank `rank` -> in x[B,*].
int64_t shift_dim(int64_t dim, int64_t rank);
// x[..,a,b,..] -> x[..,a*b,..], merging dimension `dim` with the one behind it.
at::Tensor merge_dims(const at::Tensor& x, int64_t dim);
// x[B,*] -> x[B,n], also for an empty batch.
at::Tensor flatten_examples(const at::Tensor& x);
// x[..,B,..] with the batch at `bdim`, merged into dimension `dim` of one example. With groups, that dimension is
// g*c and becomes g*B*c, so that each group keeps its own channels together.
at::Tensor fold_batch(const at::Tensor& x, int64_t bdim, int64_t dim, const c10::SymInt& groups = 1);
// The inverse, with the batch in front: y[..,g*B*c,..] -> y[B,..,g*c,..].
at::Tensor unfold_batch(const at::Tensor& y, int64_t dim, const c10::SymInt& batch_size, const c10::SymInt& groups = 1);
// For operators that refuse empty tensors: with batch size 0, runs one example of zeros for the shapes of the results,
// finishes the call, and returns true.
bool finish_without_examples(BatchCall& call);
// Arguments for `other`, by name from `overrides`, else from `call`, else the schema's defaults.
Stack arguments_for(const c10::OperatorHandle& other, BatchCall& call,
                    const std::vector<std::pair<std::string_view, c10::IValue>>& overrides);

}  // namespace functorch_lite
