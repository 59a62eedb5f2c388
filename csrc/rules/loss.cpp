// Losses. Each example has a loss of its own: what `reduction` sums is one example, never the batch.
#include <ATen/TensorOperators.h>
#include <ATen/core/Reduction.h>
#include <ATen/ops/_assert_async.h>
#include <ATen/ops/gather.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include "../plain_compositions.h"
#include "rules.h"

namespace functorch_lite {
namespace {

c10::SymInt elements_per_example(const at::Tensor& x) {
  c10::SymInt n = 1;
  for (int64_t d = 1; d < x.dim(); ++d) n = n * x.sym_size(d);
  return n;
}

std::vector<int64_t> behind_batch(const at::Tensor& x) {
  std::vector<int64_t> dims;
  for (int64_t d = 1; d < x.dim(); ++d) dims.push_back(d);
  return dims;
}

// x[B,*] -> y[B]
at::Tensor sum_examples(const at::Tensor& x) { return x.dim() == 1 ? x : x.sum(behind_batch(x)); }

// loss[B,*], reduction -> y[B,*] or y[B]
at::Tensor reduce_examples(const at::Tensor& loss, int64_t reduction) {
  if (reduction == at::Reduction::None || loss.dim() == 1) return loss;
  return reduction == at::Reduction::Mean ? loss.mean(behind_batch(loss)) : sum_examples(loss);
}

// The kernels compute without reduction: x[B?,*], target[B?,*], weights[B?,*] -> loss[B,*].
int64_t expand_operands(BatchCall& call) {
  int64_t rank = 0;
  for (size_t i = 0; i < call.size(); ++i) {
    if (call.is_tensor(i)) rank = std::max(rank, call.rank(i));
  }
  for (size_t i = 0; i < call.size(); ++i) {
    if (call.is_tensor(i)) call.expand_to_front(i, rank);
  }
  const auto reduction = call.arg("reduction").toInt();
  call.arg("reduction") = static_cast<int64_t>(at::Reduction::None);
  return reduction;
}

void elementwise_loss_rule(BatchCall& call) {
  const auto reduction = expand_operands(call);
  call.call();
  call.set_results(reduce_examples(call.result().toTensor(), reduction));
  call.finish();
}

// grad[B?] or grad[B?,*], x[B?,*], .. -> grad_x[B,*]
void elementwise_loss_backward_rule(BatchCall& call) {
  const auto reduction = expand_operands(call);
  if (reduction == at::Reduction::Mean) {
    call.arg("grad_output") = call.arg("grad_output").toTensor() / elements_per_example(call.arg("self").toTensor());
  }
  // Not left to broadcasting: some kernels squeeze the gradient first.
  if (reduction != at::Reduction::None) {
    const auto& sizes = call.arg("self").toTensor().sym_sizes();
    call.arg("grad_output") = call.arg("grad_output").toTensor().expand_symint(sizes);
  }
  call.call();
  call.finish();
}

// The targets of a negative log likelihood: class indices t[B,*] for x[B,C] or x[B,N,C,*].
struct Classes {
  int64_t dim;        // of the classes in x
  at::Tensor kept;    // [B,*], false where the target is ignored
  at::Tensor index;   // [B,*], a valid class everywhere
  at::Tensor weight;  // [B,*] of the target's class, zero where ignored

  explicit Classes(BatchCall& call) {
    const auto self = call.position("self");
    const auto rank = call.rank(self);
    dim = rank == 1 ? 1 : 2;
    const auto& x = call.expand_to_front(self);
    const auto& target = call.expand_to_front(call.position("target"));
    auto expected = x.sym_sizes().vec();
    expected.erase(expected.begin() + dim);
    TORCH_CHECK_VALUE(target.sym_sizes().equals(expected), call.name(), ": the target has shape ",
                      target.sym_sizes().slice(1), " and the input ", x.sym_sizes().slice(1),
                      "; expected the input's shape without its dimension of classes.");
    kept = target != call.arg("ignore_index").toSymInt();
    index = at::where(kept, target, 0).to(c10::kLong);
    const auto w = call.position("weight");
    if (call.is_tensor(w)) {
      weight = at::where(kept, weights_of_classes(call.to_front(w), call.is_batched(w)), 0);
    } else {
      weight = kept.to(x.scalar_type());
    }
  }

  // w[B?,C] -> w[B,*]
  at::Tensor weights_of_classes(const at::Tensor& w, bool is_batched) const {
    if (!is_batched) return at::index_select(w, 0, index.reshape(-1)).reshape_symint(index.sym_sizes());
    const auto flat = index.dim() == 1 ? index.unsqueeze(1) : index.flatten(1);
    return at::gather(w, 1, flat).reshape_symint(index.sym_sizes());
  }
};

// x[B?,N,C,*], target[B?,N,*], weight[B?,C] -> loss[B] or loss[B,N,*], total_weight[B]
void nll_loss_rule(BatchCall& call) {
  const Classes classes(call);
  const auto& x = call.arg("self").toTensor();
  const auto picked = at::gather(x, classes.dim, classes.index.unsqueeze(classes.dim)).squeeze(classes.dim);
  // An ignored target hides whatever is in x, infinities too.
  const auto loss = at::where(classes.kept, -picked * classes.weight, 0);
  const auto reduction = call.arg("reduction").toInt();
  if (reduction == at::Reduction::None) {
    call.set_results(loss, at::zeros_symint({call.batch_size()}, x.options()));
  } else {
    const auto total = sum_examples(classes.weight);
    const auto sum = sum_examples(loss);
    call.set_results(reduction == at::Reduction::Mean ? sum / total : sum, total);
  }
  call.finish();
}

// grad[B?] or grad[B?,N,*], x[B?,N,C,*], .. -> grad_x[B,N,C,*]
void nll_loss_backward_rule(BatchCall& call) {
  const Classes classes(call);
  const auto& x = call.arg("self").toTensor();
  auto grad = call.expand_to_front(call.position("grad_output"));
  if (call.arg("reduction").toInt() == at::Reduction::Mean) {
    grad = grad / call.expand_to_front(call.position("total_weight"));
  }
  grad = at::where(classes.kept, -pad_rank(grad, classes.index.dim() - 1) * classes.weight, 0);
  const auto zeros = at::zeros_symint(x.sym_sizes(), x.options());
  call.set_results(zeros.scatter(classes.dim, classes.index.unsqueeze(classes.dim),
                                 grad.to(x.scalar_type()).unsqueeze(classes.dim)));
  call.finish();
}

// Margin losses of rows: x[B?,N,C] or x[B?,C] as rows x[B*N,C]. A scalar is a row of one class.
class Rows {
 public:
  explicit Rows(BatchCall& call) : call_(call), rank_(call.rank(call.position("self"))) {
    reduction_ = call.arg("reduction").toInt();
    call.arg("reduction") = static_cast<int64_t>(at::Reduction::None);
    const auto& x = call.expand_to_front(call.position("self"));
    count_ = rank_ < 2 ? c10::SymInt(1) : x.sym_size(1);
  }
  // x[B?,N,*] -> x[B*N,*], and x[B?,*] without rows likewise.
  at::Tensor stack(const char* name, bool has_classes) {
    const auto& x = call_.expand_to_front(call_.position(name));
    // A single row may come as a scalar or as a vector of one element.
    if (!has_classes) return x.reshape_symint({batch_rows()});
    return x.reshape_symint({batch_rows(), rank_ == 0 ? c10::SymInt(1) : x.sym_size(-1)});
  }
  // grad[B?] or grad[B?,N] -> grad[B*N], for the loss without reduction.
  at::Tensor stack_gradient() {
    auto grad = call_.expand_to_front(call_.position("grad_output"));
    if (grad.dim() == 1) grad = grad.unsqueeze(-1);
    if (reduction_ == at::Reduction::Mean) grad = grad / count_;
    return grad.expand_symint({call_.batch_size(), count_}).reshape_symint({batch_rows()});
  }
  // w[B?,C], target[B*N] -> w[B*N]
  at::Tensor weights(const at::Tensor& target) {
    const auto w = call_.position("weight");
    const auto index = target.to(c10::kLong).reshape_symint({call_.batch_size(), count_});
    return at::gather(call_.expand_to_front(w), 1, index).reshape_symint({batch_rows()});
  }
  // loss[B*N] -> loss[B,N] or loss[B]
  at::Tensor reduce(const at::Tensor& loss) {
    const auto rows = loss.reshape_symint({call_.batch_size(), count_});
    return rank_ < 2 ? rows.squeeze(1) : reduce_examples(rows, reduction_);
  }
  c10::SymInt batch_rows() const { return call_.batch_size() * count_; }

 private:
  BatchCall& call_;
  int64_t rank_;
  int64_t reduction_;
  c10::SymInt count_;
};

void multi_margin_loss_rule(BatchCall& call) {
  Rows rows(call);
  const auto target = rows.stack("target", false);
  // Weights scale the loss of a row, so they may differ between examples although the kernel shares them.
  const auto scale = call.is_tensor(call.position("weight")) ? rows.weights(target) : at::Tensor();
  call.arg("self") = rows.stack("self", true);
  call.arg("target") = target;
  call.arg("weight") = c10::IValue();
  call.call();
  const auto loss = call.result().toTensor();
  call.set_results(rows.reduce(scale.defined() ? loss * scale : loss));
  call.finish();
}

void multi_margin_loss_backward_rule(BatchCall& call) {
  Rows rows(call);
  const auto target = rows.stack("target", false);
  auto grad = rows.stack_gradient();
  if (call.is_tensor(call.position("weight"))) grad = grad * rows.weights(target);
  const auto x = rows.stack("self", true);
  const auto sizes = call.arg("self").toTensor().sym_sizes().vec();
  call.arg("grad_output") = grad;
  call.arg("self") = x;
  call.arg("target") = target;
  call.arg("weight") = c10::IValue();
  call.call();
  call.set_results(call.result().toTensor().reshape_symint(sizes));
  call.finish();
}

void multilabel_margin_loss_rule(BatchCall& call) {
  Rows rows(call);
  const auto x = rows.stack("self", true);
  const auto target = rows.stack("target", true);
  const auto sizes = call.arg("target").toTensor().sym_sizes().vec();
  call.arg("self") = x;
  call.arg("target") = target;
  call.call();
  call.set_results(rows.reduce(call.result(0).toTensor()), call.result(1).toTensor().reshape_symint(sizes));
  call.finish();
}

void multilabel_margin_loss_backward_rule(BatchCall& call) {
  Rows rows(call);
  const auto grad = rows.stack_gradient();
  const auto x = rows.stack("self", true);
  const auto sizes = call.arg("self").toTensor().sym_sizes().vec();
  const auto target = rows.stack("target", true);
  const auto is_target = rows.stack("is_target", true);
  call.arg("grad_output") = grad;
  call.arg("self") = x;
  call.arg("target") = target;
  call.arg("is_target") = is_target;
  call.call();
  call.set_results(call.result().toTensor().reshape_symint(sizes));
  call.finish();
}

// lengths[B,N], targets[B*S]: the kernel checks the sum over all examples only.
void check_total(const at::Tensor& lengths, const at::Tensor& targets) {
  const auto length = targets.sym_size(0) / lengths.sym_size(0);
  at::_assert_async((lengths.sum(1) == length).all(),
                    "vmap: ctc_loss: targets of one dimension hold one target behind the other, but target_lengths do "
                    "not add up to the number of targets of each example.");
}

// The sequences of all examples as those of one call, x[B?,T,N,C] -> x[T,B*N,C] and everything else y[B?,N,*] ->
// y[B*N,*], targets that stand one behind the other included. Lists of lengths become tensors.
Stack ctc_arguments(BatchCall& call) {
  Stack arguments;
  const bool in_a_row = call.rank(call.position("targets")) == 1;
  for (size_t i = 0; i < call.size(); ++i) {
    if (call.arg(i).isIntList()) {
      const Outside no_level_wraps_it;
      call.arg(i) = at::tensor(call.arg(i).toIntVector(), c10::kLong);
    }
    if (call.is_tensor(i)) {
      const auto& x = call.expand_to_front(i, /*rank=*/1);
      if (i == call.position("target_lengths") && in_a_row) check_total(x, call.arg("targets").toTensor());
      call.arg(i) = i == call.position("log_probs") ? fold_batch(x, 0, 1) : merge_dims(x, 0);
    }
    arguments.push_back(call.arg(i));
  }
  return arguments;
}

// log_probs[B?,T,N,C], targets[B?,N,S] or [B?,S], lengths[B?,N] -> loss[B,N], and a workspace[B,N,T,L], as long as the
// longest target of all examples needs.
void ctc_loss_rule(BatchCall& call) {
  static const auto with_tensors = find_operator("_ctc_loss.Tensor");
  if (call.batch_size() == 0) {
    const auto& x = call.expand_to_front(0);
    call.set_results(at::zeros_symint({0, x.sym_size(2)}, x.options()),
                     at::zeros_symint({0, x.sym_size(2), x.sym_size(1), 1}, x.options()));
    return call.finish();
  }
  call.call(with_tensors, ctc_arguments(call));
  for (size_t i = 0; i < 2; ++i) call.result(i) = unfold_batch(call.result(i).toTensor(), 0, call.batch_size());
  call.finish();
}

// grad[B?,N], log_probs[B?,T,N,C], .. -> grad_log_probs[B,T,N,C]
void ctc_loss_backward_rule(BatchCall& call) {
  static const auto with_tensors = find_operator("_ctc_loss_backward.Tensor");
  if (call.batch_size() == 0) {
    call.set_results(at::zeros_like(call.expand_to_front(call.position("log_probs"))));
    return call.finish();
  }
  call.call(with_tensors, ctc_arguments(call));
  call.set_results(unfold_batch(call.result().toTensor(), 1, call.batch_size()));
  call.finish();
}

}  // namespace

void add_loss_rules(RuleTable& rules) {
  for (const auto& [op, composition] : loss_compositions()) rules.add(composition, {op});
  rules.add(&elementwise_loss_rule, {"mse_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy",
                                     "binary_cross_entropy_with_logits", "soft_margin_loss"});
  rules.add(&elementwise_loss_backward_rule, {"mse_loss_backward", "smooth_l1_loss_backward", "huber_loss_backward",
                                              "binary_cross_entropy_backward", "soft_margin_loss_backward"});
  rules.add(&nll_loss_rule, {"nll_loss_forward", "nll_loss2d_forward"});
  rules.add(&nll_loss_backward_rule, {"nll_loss_backward", "nll_loss2d_backward"});
  rules.add(&multi_margin_loss_rule, {"multi_margin_loss"});
  rules.add(&multi_margin_loss_backward_rule, {"multi_margin_loss_backward"});
  rules.add(&multilabel_margin_loss_rule, {"multilabel_margin_loss_forward"});
  rules.add(&multilabel_margin_loss_backward_rule, {"multilabel_margin_loss_backward"});
  rules.add(&ctc_loss_rule, {"_ctc_loss", "_ctc_loss.Tensor"});
  rules.add(&ctc_loss_backward_rule, {"_ctc_loss_backward", "_ctc_loss_backward.Tensor"});
}

}  // namespace functorch_lite
