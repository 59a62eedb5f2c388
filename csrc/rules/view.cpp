// Views, indexing by integers and slices, and joining and splitting tensors.
#include <ATen/ops/alias.h>
#include <ATen/ops/as_strided.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/new_zeros.h>
#include <ATen/ops/reshape.h>
#include <ATen/ops/roll.h>
#include <ATen/ops/squeeze.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/transpose.h>

#include "../fallback.h"
#include "rules.h"

namespace functorch_lite {
namespace {

// x[B,*] without its dimensions of size 1; the batch stays even if it is one.
void squeeze_rule(BatchCall& call) {
  const auto& x = call.to_front(0);
  std::vector<int64_t> dims;
  for (int64_t d = 1; d < x.dim(); ++d) {
    if (x.sym_size(d) == 1) dims.push_back(d);
  }
  call.set_results(at::squeeze(x, dims));
  call.finish();
}

// dim counts in the result, which has one dimension more.
void unsqueeze_rule(BatchCall& call) {
  call.to_front(0);
  call.arg(1) = shift_dim(call.arg(1).toInt(), call.rank(0) + 1);
  call.call();
  call.finish();
}

// Its callers know that one example is contiguous, which does not say how the batch is laid out: it may need a copy.
void unsafe_view_rule(BatchCall& call) {
  call.arg(0) = call.to_front(0).contiguous();
  shaped("size").rule_for(call.schema())(call);
}

// x[B,m,n] -> x[B,n,m]; vectors and scalars stay.
void t_rule(BatchCall& call) {
  const auto& x = call.to_front(0);
  TORCH_CHECK(call.rank(0) <= 2, "t(): expected a tensor of at most 2 dimensions, got ", call.rank(0));
  call.set_results(call.rank(0) == 2 ? at::transpose(x, 1, 2) : at::alias(x));
  call.finish();
}

void permute_rule(BatchCall& call) {
  call.to_front(0);
  auto dims = call.arg(1).toIntVector();
  for (auto& d : dims) d = shift_dim(d, call.rank(0));
  dims.insert(dims.begin(), 0);
  call.arg(1) = dims;
  call.call();
  call.finish();
}

// Without dims it rolls the flattened example.
void roll_rule(BatchCall& call) {
  const auto x = call.to_front(0);
  auto dims = call.arg("dims").toIntVector();
  for (auto& d : dims) d = shift_dim(d, call.rank(0));
  const auto shifts = call.arg("shifts").toSymIntVector();
  if (!dims.empty()) {
    call.set_results(at::roll_symint(x, shifts, dims));
  } else if (x.dim() == 1) {
    call.set_results(x.clone());
  } else {
    const auto flat = x.flatten(1);
    call.set_results(at::reshape_symint(at::roll_symint(flat, shifts, {1}), x.sym_sizes()));
  }
  call.finish();
}

// How many elements of memory such a tensor spans.
c10::SymInt span(c10::SymIntArrayRef sizes, c10::SymIntArrayRef strides) {
  c10::SymInt result = 1;
  for (size_t d = 0; d < sizes.size(); ++d) result = result + strides[d] * (sizes[d] - 1);
  return result;
}

// How many elements of an example lie `x.stride(dim)` apart, counting on through dimensions that continue it.
c10::SymInt run_length(const at::Tensor& x, int64_t dim) {
  auto length = x.sym_size(dim);
  for (int64_t k = 1; k < x.dim(); ++k) {
    if (k == dim || x.sym_size(k) <= 1 || x.sym_stride(k) != x.sym_stride(dim) * length) continue;
    length = length * x.sym_size(k);
    k = 0;
  }
  return length;
}

// Whether each dimension of the view walks along one of the example's own: then it stays on the example's elements,
// also where examples interleave, as for tangents that follow the views of their primals.
bool follows_dimensions(const at::Tensor& x, const std::vector<c10::SymInt>& sizes,
                        const std::vector<c10::SymInt>& strides) {
  for (size_t d = 0; d < sizes.size(); ++d) {
    bool found = sizes[d] <= 1 || strides[d] == 0;
    for (int64_t k = 1; k < x.dim() && !found; ++k) {
      if (x.sym_size(k) <= 1 || x.sym_stride(k) == 0 || strides[d] % x.sym_stride(k) != 0) continue;
      found = strides[d] / x.sym_stride(k) * (sizes[d] - 1) < run_length(x, k);
    }
    if (!found) return false;
  }
  return true;
}

// The view that user code describes is in one example's memory; the batch keeps its own stride. So the examples must
// lie one after the other.
void as_strided_rule(BatchCall& call) {
  const auto& x = call.to_front(0);
  auto sizes = call.arg("size").toSymIntVector();
  auto strides = call.arg("stride").toSymIntVector();
  const auto& step = x.sym_stride(0);
  if (step != 0 && call.batch_size() > 1) {
    const auto seen = span(x.sym_sizes().slice(1), x.sym_strides().slice(1));
    TORCH_CHECK_VALUE((seen <= step && span(sizes, strides) <= step) || follows_dimensions(x, sizes, strides),
                      "vmap: as_strided to size ", c10::SymIntArrayRef(sizes), " and stride ",
                      c10::SymIntArrayRef(strides),
                      " would read other examples: it describes memory, and the batch lies in this memory too. Use "
                      "indexing, view or unfold, which describe values, or call it on x.clone().");
  }
  sizes.insert(sizes.begin(), call.batch_size());
  strides.insert(strides.begin(), x.sym_stride(0));
  const auto& offset = call.arg("storage_offset");
  call.set_results(
      at::as_strided_symint(x, sizes, strides, offset.isNone() ? x.sym_storage_offset() : offset.toSymInt()));
  call.finish();
}

// x[B?,*], src[B?,size] -> y[B,*]: src written where as_strided would read. Each example gets memory of its own, laid
// out as before.
void as_strided_scatter_rule(BatchCall& call) {
  const auto x = call.expand_to_front(0);
  const auto& src = call.expand_to_front(1);
  auto sizes = call.arg("size").toSymIntVector();
  auto strides = call.arg("stride").toSymIntVector();
  const auto& given = call.arg("storage_offset");
  const auto window = given.isNone() ? x.sym_storage_offset() : given.toSymInt();
  const auto start = x.sym_storage_offset().min(window);
  const auto seen = x.sym_storage_offset() - start + span(x.sym_sizes().slice(1), x.sym_strides().slice(1));
  const auto extent = seen.max(window - start + span(sizes, strides)).max(1);
  const auto memory = x.new_zeros_symint({call.batch_size() * extent});
  const auto view = [&](std::vector<c10::SymInt> s, std::vector<c10::SymInt> steps, const c10::SymInt& offset) {
    s.insert(s.begin(), call.batch_size());
    steps.insert(steps.begin(), extent);
    return at::as_strided_symint(memory, s, steps, offset - start);
  };
  const auto y = view(x.sym_sizes().slice(1).vec(), x.sym_strides().slice(1).vec(), x.sym_storage_offset());
  y.copy_(x);
  view(sizes, strides, window).copy_(src);
  call.set_results(y);
  call.finish();
}

// x[B,*], repeats[r] -> y[B,*] of rank r.
void repeat_rule(BatchCall& call) {
  auto repeats = call.arg("repeats").toSymIntVector();
  call.to_front(0, static_cast<int64_t>(repeats.size()));
  repeats.insert(repeats.begin(), 1);
  call.arg("repeats") = repeats;
  call.call();
  call.finish();
}

// x[B,*,n,*] -> y[B,*,m,*,size]; a scalar gives y[B,size].
void unfold_rule(BatchCall& call) {
  const bool scalar = call.rank(0) == 0;
  call.to_front(0, 1);
  call.arg("dimension") = shift_dim(call.arg("dimension").toInt(), call.rank(0));
  call.call();
  if (scalar) call.result() = call.result().toTensor().select(1, 0);
  call.finish();
}

// The gradient grad[B,*,m,*,size] of such windows -> x[B,*,n,*]; of a scalar, grad[B,size] with at most one window.
void unfold_backward_rule(BatchCall& call) {
  if (!call.arg("input_sizes").toSymIntVector().empty()) {
    return shaped("input_sizes", {"dim"}).rule_for(call.schema())(call);
  }
  call.set_results(at::sum(call.to_front(0), {1}));
  call.finish();
}

void chunk_cat_rule(BatchCall& call) {
  if (finish_without_examples(call)) return;
  const auto tensors = call.expanded_list(0);
  call.arg("dim") = shift_dim(call.arg("dim").toInt(), tensors[0].dim() - 1);
  call.arg(0) = tensors;
  call.call();
  call.finish();
}

// x_i[B,*], dim -> y[B,*]. Empty vectors join tensors of any rank, as in user code.
void cat_rule(BatchCall& call) {
  auto tensors = call.expanded_list(0);
  int64_t rank = 1;
  for (const auto& x : tensors) rank = std::max(rank, x.dim() - 1);
  std::vector<at::Tensor> kept;
  for (auto& x : tensors) {
    const bool legacy_empty = x.dim() == 2 && rank != 1 && x.sym_size(1) == 0;
    if (!legacy_empty) kept.push_back(x);
  }
  call.set_results(at::cat(kept, shift_dim(call.arg("dim").toInt(), rank)));
  call.finish();
}

void stack_rule(BatchCall& call) {
  const auto tensors = call.expanded_list(0);
  call.set_results(at::stack(tensors, shift_dim(call.arg("dim").toInt(), tensors[0].dim())));
  call.finish();
}

// x.squeeze_() and the like: the out-of-place view becomes the value of the same wrapper.
void in_place_view(const c10::OperatorHandle& op, Stack& stack) {
  auto twin = op.operator_name();
  twin.name.pop_back();
  if (twin.name == "aten::transpose") twin.overload_name = "int";
  const auto self = stack[stack.size() - count_arguments(op)].toTensor();
  c10::Dispatcher::singleton().findSchemaOrThrow(twin.name.c_str(), twin.overload_name.c_str()).callBoxed(&stack);
  const auto* view = as_wrapper(stack.back().toTensor());
  as_wrapper(self)->replace_value(view->value(), view->bdim());
  stack.back() = self;
}

// x.resize_(sizes): the example's elements in order, then uninitialised ones if there are to be more.
void resize(const c10::OperatorHandle& op, Stack& stack) {
  const auto arguments = torch::jit::pop(stack, count_arguments(op));
  const auto self = arguments[0].toTensor();
  const auto sizes = arguments[1].isTensor() ? arguments[1].toTensor().sym_sizes().vec()  //
                                             : arguments[1].toSymIntVector();
  auto& level = current_vmap_level();
  auto* wrapper = wrapper_at(self, &level);
  if (wrapper == nullptr) {  // the sizes are those of a batched tensor
    self.resize__symint(sizes);
  } else {
    c10::SymInt wanted = 1;
    for (const auto& size : sizes) wanted = wanted * size;
    const auto n = self.sym_numel();
    const auto flat = self.reshape_symint({n});
    const auto elements =
        wanted <= n ? flat.narrow_symint(0, 0, wanted) : at::cat({flat, flat.new_empty_symint({wanted - n})});
    const auto result = elements.reshape_symint(sizes);
    const auto* resized = wrapper_at(result, &level);
    wrapper->replace_value(resized->value(), resized->bdim());
  }
  stack.emplace_back(self);
}

}  // namespace

void add_view_rules(RuleTable& rules) {
  rules.add(&squeeze_rule, {"squeeze", "squeeze_copy"});
  rules.add(&unsqueeze_rule, {"unsqueeze", "unsqueeze_copy"});
  rules.add(&unsafe_view_rule, {"_unsafe_view"});
  rules.add(&t_rule, {"t"});
  rules.add(&permute_rule, {"permute", "permute_copy"});
  rules.add(&roll_rule, {"roll"});
  rules.add(&as_strided_rule, {"as_strided", "as_strided_copy"});
  rules.add(&in_place_view,
            {"squeeze_", "squeeze_.dim", "squeeze_.dims", "unsqueeze_", "t_", "transpose_", "as_strided_"});
  rules.add(&resize, {"resize_", "resize_as_"});
  rules.add(&cat_rule, {"cat"});
  rules.add(&stack_rule, {"stack", "_stack"});
  rules.add(front(), {"alias", "detach", "detach_", "lift", "lift_fresh", "lift_fresh_copy", "tril", "triu", "tril_",
                      "triu_", "view_as_real", "view_as_complex", "view.dtype", "requires_grad_"});
  rules.add(along({"dim"}),
            {"select.int", "slice.Tensor", "select_copy.int", "slice_copy.Tensor", "split_copy.Tensor",
             "split_with_sizes_copy", "unbind_copy.int", "split.Tensor", "split_with_sizes", "unsafe_split.Tensor",
             "unsafe_split_with_sizes", "unbind.int", "squeeze.dim", "squeeze.dims"});
  rules.add(&unfold_rule, {"unfold", "unfold_copy"});
  rules.add(&as_strided_scatter_rule, {"as_strided_scatter"});
  rules.add(&chunk_cat_rule, {"_chunk_cat"});
  rules.add(forbid("A sparse tensor cannot be a batch of dense ones. Convert outside vmap, for example its result."),
            {"_to_sparse", "_to_sparse.sparse_dim", "_to_sparse_csr", "_to_sparse_csc", "_to_sparse_bsr",
             "_to_sparse_bsc", "to_mkldnn"});
  rules.add(along({"dims"}), {"flip"});
  rules.add(along({"dim0", "dim1"}), {"transpose.int", "transpose_copy.int"});
  rules.add(along({"dim1", "dim2"}), {"diagonal", "linalg_diagonal"});
  rules.add(shaped("size"), {"view", "view_copy", "expand", "expand_copy", "_reshape_copy", "new_empty", "new_zeros",
                             "new_ones", "new_full"});
  rules.add(&repeat_rule, {"repeat"});
  rules.add(shaped("input_sizes", {"dim"}), {"select_backward", "slice_backward"});
  rules.add(shaped("input_sizes", {"dim1", "dim2"}), {"diagonal_backward"});
  rules.add(&unfold_backward_rule, {"unfold_backward"});
}

}  // namespace functorch_lite
