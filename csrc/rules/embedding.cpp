// Tables of vectors looked up by index, alone and in bags.
#include <ATen/OpMathType.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/gather.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/one_hot.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/scatter.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <limits>

#include "../fallback.h"
#include "rules.h"

namespace functorch_lite {
namespace {

// index[B,k] -> index[B,k,d], a view.
at::Tensor with_features(const at::Tensor& index, const c10::SymInt& features) {
  return index.unsqueeze(-1).expand_symint({index.sym_size(0), index.sym_size(1), features});
}

// x[B,*] -> x[B,n]
at::Tensor flatten_example(const at::Tensor& x) { return x.dim() == 1 ? x.unsqueeze(1) : x.flatten(1); }

// weight[B?,n,d], index[B,k] -> y[B,k,d]. Every example's indices are checked against its own table.
at::Tensor look_up(BatchCall& call, size_t weight, const at::Tensor& index) {
  const auto& w = call.to_front(weight);
  if (!call.is_batched(weight)) return at::embedding(w, index);
  return at::gather(w, 1, with_features(index.to(c10::kLong), w.sym_size(2)));
}

// index[B,k], values[B,k,d] -> sums[B,n,d]
at::Tensor sum_into(const c10::SymInt& n, const at::Tensor& index, const at::Tensor& values) {
  const auto zeros = at::zeros_symint({values.sym_size(0), n, values.sym_size(2)}, values.options());
  return zeros.scatter_add(1, with_features(index.to(c10::kLong), values.sym_size(2)), values);
}

// index[B,k], counted[B,k] -> counts[B,n]
at::Tensor count_into(const c10::SymInt& n, const at::Tensor& index, const at::Tensor& counted) {
  return sum_into(n, index, counted.to(c10::kLong).unsqueeze(-1)).squeeze(-1);
}

// Padding and scaling by frequency are not part of the value but of its derivative, which an enclosing transform takes
// from the operator itself, and the operator has one table and one frequency of indices. So it is called for each
// example.
bool call_each(BatchCall& call) {
  if (call.batch_size() == 0) return false;
  run_each_example(call);
  return true;
}

// weight[B?,n,d], index[B?,*] -> y[B,*,d]
void embedding_rule(BatchCall& call) {
  const bool pads = call.is_batched(0) && call.arg("padding_idx").toSymInt() >= 0;
  if ((pads || call.arg("scale_grad_by_freq").toBool()) && call_each(call)) return;
  const auto& index = call.to_front(1);
  const auto& w = call.to_front(0);
  if (!call.is_batched(0)) {
    call.call();
    return call.finish();
  }
  auto sizes = index.sym_sizes().vec();
  if (!call.is_batched(1)) sizes.insert(sizes.begin(), call.batch_size());
  sizes.push_back(w.sym_size(2));
  const auto y =
      call.is_batched(1) ? look_up(call, 0, flatten_example(index)) : at::index_select(w, 1, index.reshape(-1));
  call.set_results(y.reshape_symint(sizes));
  call.finish();
}

// grad[B?,*,d], index[B?,*] -> grad_weight[B,n,d]
void embedding_dense_backward_rule(BatchCall& call) {
  const auto index = flatten_example(call.expand_to_front(1));
  auto grad = call.expand_to_front(0);
  grad = grad.reshape_symint({grad.sym_size(0), index.sym_size(1), grad.sym_size(-1)});
  const auto n = call.arg("num_weights").toSymInt();
  if (call.arg("scale_grad_by_freq").toBool()) {
    const auto frequency = count_into(n, index, at::ones_like(index));
    grad = grad / at::gather(frequency, 1, index.to(c10::kLong)).unsqueeze(-1);
  }
  grad = at::where((index != call.arg("padding_idx").toSymInt()).unsqueeze(-1), grad, 0);
  call.set_results(sum_into(n, index, grad));
  call.finish();
}

// weight[B,n,d], index[B?,*]: rows that are looked up and longer than max_norm are shortened to it.
void embedding_renorm_rule(BatchCall& call) {
  const bool in_place = call.schema().is_mutable();
  const auto w = in_place ? call.to_front(0) : call.expand_to_front(0);
  const auto index = flatten_example(call.expand_to_front(1)).to(c10::kLong);
  const auto max_norm = call.arg("max_norm").toDouble();
  const auto used =
      at::zeros_symint({w.sym_size(0), w.sym_size(1)}, w.options().dtype(c10::kBool)).scatter(1, index, 1);
  const auto norm = at::linalg_vector_norm(w, call.arg("norm_type").toScalar(), c10::IntArrayRef{2});
  const auto scale = at::where(used.logical_and(norm > max_norm), max_norm / (norm + 1e-7), 1).unsqueeze(-1);
  const auto result = at::where(scale == 1, w, w * scale);
  call.set_results(in_place ? w.copy_(result) : result);
  call.finish();
}

// index[B,*] -> y[B,*,n]. Without num_classes n is what the largest index says, which must be so in every example.
void one_hot_rule(BatchCall& call) {
  const auto& index = call.to_front(0);
  if (call.arg("num_classes").toInt() >= 0) {
    auto sizes = index.sym_sizes().vec();
    sizes.push_back(call.arg("num_classes").toSymInt());
    call.set_results(at::zeros_symint(sizes, index.options()).scatter(-1, index.unsqueeze(-1), 1));
    return call.finish();
  }
  TORCH_CHECK_VALUE(index.sym_numel() > 0,
                    "vmap: one_hot of an empty tensor does not know the number of classes. Pass num_classes.");
  const auto y = at::one_hot(index);
  const auto n = y.sym_size(-1);
  TORCH_CHECK_VALUE((at::amax(flatten_examples(index), 1) == n - 1).all().item<bool>(),
                    "vmap: one_hot without num_classes has as many classes as the largest index says, and the "
                    "examples differ in it (the largest of all is ",
                    n - 1, "). Pass num_classes, the same for all examples.");
  call.set_results(y);
  call.finish();
}

enum Mode : int64_t { kSum = 0, kMean = 1, kMax = 2 };

// The bags of each example: entry k of index[B,K] is in bag[B,K]. The forward operator and its backward ones work this
// out from the arguments, for one of them may have run on a batch and the other not.
struct Bags {
  at::Tensor index;   // [B,K]
  at::Tensor bag;     // [B,K]
  at::Tensor counts;  // [B,K], false for padding and for entries behind the last bag
  at::Tensor size;    // [B,n], how many entries of each bag count
  c10::SymInt n;

  Bags(BatchCall& call, c10::SymInt bags) : n(std::move(bags)) {
    index = call.expand_to_front(call.position("indices"));
    const auto offsets = call.find("offsets");
    bag = offsets ? bag_of(call.expand_to_front(*offsets).to(c10::kLong), index.sym_size(1))
                  : call.expand_to_front(call.position("offset2bag")).to(c10::kLong);
    counts = (index != call.arg("padding_idx").toInt()).logical_and(bag < n);
    size = count_into(n + 1, bag, counts).narrow_symint(1, 0, n);
  }

  // offsets[B,n], K -> bag[B,K]: the bag of an entry is the last that starts at or before it.
  static at::Tensor bag_of(const at::Tensor& offsets, const c10::SymInt& entries) {
    const auto starts = count_into(entries + 1, offsets, at::ones_like(offsets)).cumsum(1);
    return starts.narrow_symint(1, 0, entries) - 1;
  }
  // x[B,n,..] -> x[B,K,..]: what each entry has of its bag.
  at::Tensor of_entries(const at::Tensor& x) const {
    const auto within = at::where(counts, bag, 0);
    return x.dim() == 2 ? at::gather(x, 1, within) : at::gather(x, 1, with_features(within, x.sym_size(2)));
  }
  // y[B,K,d] -> y[B,n,d]
  at::Tensor sum(const at::Tensor& y) const {
    return sum_into(n + 1, bag, at::where(counts.unsqueeze(-1), y, 0)).narrow_symint(1, 0, n);
  }
  at::Tensor is_empty() const { return (size == 0).unsqueeze(-1); }

  // y[B,K,d] -> max[B,n,d], and the table index[B,n,d] of the first entry that attains it, which alone has the
  // gradient.
  std::pair<at::Tensor, at::Tensor> max(const at::Tensor& y) const {
    const auto entries = y.sym_size(1);
    const auto features = y.sym_size(2);
    const auto target = with_features(bag, features);
    const auto lowest = at::where(counts.unsqueeze(-1), y, -std::numeric_limits<double>::infinity());
    auto largest = at::zeros_symint({y.sym_size(0), n + 1, features}, y.options())
                       .scatter_reduce(1, target, lowest, "amax", /*include_self=*/false);
    largest = at::where(is_empty(), 0, largest.narrow_symint(1, 0, n));
    if (entries == 0) return {largest, at::zeros_symint(largest.sym_sizes(), index.options())};
    const auto positions = at::arange(entries, index.options().dtype(c10::kLong)).unsqueeze(0).unsqueeze(-1);
    const auto attains = (lowest == of_entries(largest)).logical_and(counts.unsqueeze(-1));
    const auto candidates = at::where(attains, positions, entries - 1);
    const auto first = at::zeros_symint({y.sym_size(0), n + 1, features}, candidates.options())
                           .scatter_reduce(1, target, candidates, "amin", /*include_self=*/false)
                           .narrow_symint(1, 0, n);
    return {at::where(is_empty(), 0, at::gather(y, 1, first)), at::gather(with_features(index, features), 1, first)};
  }
};

c10::SymInt last_logical_size(BatchCall& call, size_t i, int64_t from_end) {
  call.to_front(i);
  return call.tensor(i).sym_size(-from_end);
}

void refuse_sparse(BatchCall& call) {
  TORCH_CHECK_NOT_IMPLEMENTED(!call.arg("sparse").toBool(), "vmap: ", call.name(),
                              " has no sparse gradient under vmap. Use sparse=False.");
}

// weight[B?,n,d], indices[B?,K], offsets[B?,m], per_sample_weights[B?,K]
//   -> y[B,m,d], offset2bag[B,K], bag_size[B,m], max_indices[B,m,d]
void embedding_bag_rule(BatchCall& call) {
  if (call.arg("scale_grad_by_freq").toBool() && call_each(call)) return;
  auto bags_count = last_logical_size(call, call.position("offsets"), 1);
  if (call.arg("include_last_offset").toBool()) bags_count = bags_count - 1;
  const Bags bags(call, bags_count);
  auto rows = look_up(call, 0, bags.index);
  const auto dtype = rows.scalar_type();
  rows = rows.to(at::toOpMathType(dtype));  // sums are rounded once
  const auto scales = call.position("per_sample_weights");
  if (call.is_tensor(scales)) rows = rows * call.expand_to_front(scales).unsqueeze(-1);
  const auto mode = call.arg("mode").toInt();
  at::Tensor y;
  auto max_indices = at::zeros_symint(bags.size.sym_sizes(), bags.index.options());
  if (mode == kMax) {
    std::tie(y, max_indices) = bags.max(rows);
  } else {
    y = bags.sum(rows);
    if (mode == kMean) y = y / bags.size.clamp_min(1).unsqueeze(-1);
  }
  call.set_results(y.to(dtype), bags.bag.to(bags.index.scalar_type()), bags.size.to(bags.index.scalar_type()),
                   max_indices);
  call.finish();
}

// It has no derivative, which an enclosing transform may want.
void embedding_bag_forward_only(const c10::OperatorHandle&, Stack& stack) {
  static const auto with_derivative = find_operator("_embedding_bag");
  with_derivative.callBoxed(&stack);
}

// grad[B?,m,d], indices[B?,K], .. -> grad_weight[B,n,d]
void embedding_bag_backward_rule(BatchCall& call) {
  if (call.find("sparse")) refuse_sparse(call);
  if (call.arg("scale_grad_by_freq").toBool() && call_each(call)) return;
  const auto grad = call.expand_to_front(0);
  const Bags bags(call, grad.sym_size(1));
  const auto n = call.arg("num_weights").toSymInt();
  const auto mode = call.arg("mode").toInt();
  if (mode == kMax) {
    const auto attained = call.expand_to_front(call.position("maximum_indices")).to(c10::kLong);
    const auto zeros = at::zeros_symint({grad.sym_size(0), n, grad.sym_size(2)}, grad.options());
    const auto empty = bags.is_empty();
    call.set_results(zeros.scatter_add(1, at::where(empty, 0, attained), at::where(empty, 0, grad)));
    return call.finish();
  }
  auto entries = bags.of_entries(mode == kMean ? grad / bags.size.clamp_min(1).unsqueeze(-1) : grad);
  const auto scales = call.position("per_sample_weights");
  if (call.is_tensor(scales)) entries = entries * call.expand_to_front(scales).unsqueeze(-1);
  call.set_results(sum_into(n, bags.index, at::where(bags.counts.unsqueeze(-1), entries, 0)));
  call.finish();
}

// grad[B?,m,d], weight[B?,n,d], indices[B?,K] -> grad_scales[B,K]
void embedding_bag_scales_backward_rule(BatchCall& call) {
  const auto grad = call.expand_to_front(0);
  const Bags bags(call, grad.sym_size(1));
  const auto products = (bags.of_entries(grad) * look_up(call, 1, bags.index)).sum(-1);
  call.set_results(at::where(bags.counts, products, 0));
  call.finish();
}

}  // namespace

void add_embedding_rules(RuleTable& rules) {
  rules.add(&embedding_rule, {"embedding"});
  rules.add(&embedding_dense_backward_rule, {"embedding_dense_backward"});
  rules.add(&embedding_renorm_rule, {"embedding_renorm", "embedding_renorm_"});
  rules.add(&one_hot_rule, {"one_hot"});
  rules.add(&embedding_bag_rule, {"_embedding_bag"});
  rules.add(&embedding_bag_forward_only, {"_embedding_bag_forward_only"});
  rules.add(&embedding_bag_backward_rule, {"_embedding_bag_backward", "_embedding_bag_dense_backward"});
  rules.add(&embedding_bag_scales_backward_rule, {"_embedding_bag_per_sample_weights_backward"});
}

}  // namespace functorch_lite
