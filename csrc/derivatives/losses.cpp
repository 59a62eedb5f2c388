// Derivatives of losses. See derivative_rules.h first.
#include <ATen/TensorOperators.h>
#include <ATen/core/Reduction.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/gather.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/scatter_add.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include <limits>

#include "../derivative_rules.h"
#include "../plain_compositions.h"

namespace functorch_lite {
namespace {

using at::Tensor;

// The cotangent of each example's loss, from that of the reduced one: [N], or [] if N examples are not told apart.
Tensor before_reduction(const Tensor& grad, int64_t reduction, const Tensor& losses_like) {
  if (reduction == at::Reduction::None) return grad;
  const auto g = grad.expand_symint(losses_like.sym_sizes());
  return reduction == at::Reduction::Mean ? g / losses_like.sym_numel() : g;
}

// A single example may have a single class and no dimension.
Tensor with_classes(const Tensor& x) { return x.dim() == 0 ? x.unsqueeze(0) : x; }

// x[N,C] or [C], target[N] or []: the loss of an example is the mean of max(0, margin - x[target] + x[j])^p for j that
// are not the target, times the target's weight.
void multi_margin_loss_backward(AutodiffLevel&, const Operator&, Stack& stack) {
  CallArguments arguments(stack, 7);
  const auto grad = arguments.tensor();
  const auto input = arguments.tensor();
  const auto x = with_classes(input);
  auto target = arguments.tensor();
  const auto p = arguments.next().toScalar();
  const auto margin = arguments.next().toScalar();
  const auto weight = arguments.optional_tensor();
  const auto reduction = arguments.next().toInt();
  if (target.dim() == x.dim()) target = target.squeeze(-1);
  const auto at_target = target.unsqueeze(-1);
  const auto violation = margin - at::gather(x, -1, at_target) + x;
  const auto classes = at::arange(x.size(-1), target.options());
  const auto counts = (violation > 0).logical_and(classes != at_target).to(x.scalar_type());
  auto g = counts / x.sym_size(-1);
  if (!p.equal(1)) g = g * violation * p;
  if (weight.defined()) g = g * weight.index_select(0, target.reshape(-1)).reshape(target.sizes()).unsqueeze(-1);
  g = g.scatter_add(-1, at_target, -g.sum(-1, /*keepdim=*/true));
  g = g * before_reduction(grad, reduction, target).unsqueeze(-1);
  torch::jit::push(stack, g.reshape_symint(input.sym_sizes()));
}

// x[N,C] or [C], target[N,C]: classes, up to the first -1: the loss of an example is the sum over its targets t and the
// other classes j of max(0, 1 - x[t] + x[j]) / C.
void multilabel_margin_loss_backward(AutodiffLevel&, const Operator&, Stack& stack) {
  CallArguments arguments(stack, 5);
  const auto grad = arguments.tensor();
  const auto input = arguments.tensor();
  const auto x = with_classes(input);
  const auto target = with_classes(arguments.tensor());
  const auto reduction = arguments.next().toInt();
  const auto is_target = arguments.tensor();
  const auto valid = (target >= 0).to(c10::kLong).cumprod(-1);
  const auto classes = target.clamp_min(0);
  const auto violation = 1 - at::gather(x, -1, classes).unsqueeze(-1) + x.unsqueeze(-2);
  const auto counts = (violation > 0).to(x.scalar_type()) * valid.to(x.scalar_type()).unsqueeze(-1) *
                      (1 - is_target.reshape_symint(x.sym_sizes()).to(x.scalar_type())).unsqueeze(-2);
  const auto g = counts.sum(-2).scatter_add(-1, classes, -counts.sum(-1)) / x.sym_size(-1);
  const auto scaled = g * before_reduction(grad, reduction, x.select(-1, 0)).unsqueeze(-1);
  torch::jit::push(stack, scaled.reshape_symint(input.sym_sizes()));
}

// The targets and lengths of CTC, padded.
struct Labels {
  Tensor extended;        // [N,2S+1]: a blank before, between and behind the labels
  Tensor may_skip;        // [N,2S+1]: whether a path may come from two places before
  Tensor input_lengths;   // [N,1]
  Tensor target_lengths;  // [N,1]
};

Tensor lengths_of(const c10::IValue& value, const Tensor& targets) {
  if (value.isTensor()) return value.toTensor().to(targets.device(), c10::kLong).unsqueeze(-1);
  return tensor_of(value.toIntVector()).to(targets.device()).unsqueeze(-1);
}

Labels labels_of(const Tensor& targets, const c10::IValue& input_lengths, const c10::IValue& target_lengths,
                 int64_t blank) {
  const auto lengths = lengths_of(target_lengths, targets);
  auto padded = targets;
  if (targets.dim() == 1) {
    const auto places = (lengths.cumsum(0) - lengths) + at::arange(targets.size(0), targets.options());
    padded = targets.numel() == 0 ? targets.new_zeros({lengths.size(0), 0})
                                  : targets.index_select(0, places.clamp_max(targets.size(0) - 1).flatten())
                                        .reshape({lengths.size(0), targets.size(0)});
  }
  const auto blanks = at::full_like(padded, blank);
  const auto extended = at::cat({at::stack({blanks, padded}, -1).flatten(-2), at::full_like(lengths, blank)}, -1);
  const auto n = extended.size(-1);
  auto may_skip = at::zeros_like(extended, c10::kBool);
  if (n > 2) {
    const auto now = extended.narrow(-1, 2, n - 2);
    const auto differs = (now != blank).logical_and(now != extended.narrow(-1, 0, n - 2));
    may_skip = at::cat({may_skip.narrow(-1, 0, 2), differs}, -1);
  }
  return {extended, may_skip, lengths_of(input_lengths, targets), lengths};
}

// Stands for the logarithm of zero, and has a derivative.
constexpr double kLogZero = -1e30;

// log_probs[T,N,C] -> the negative logarithm of the probability of the targets [N], and log alpha[N,T,2S+1], the
// probabilities of all beginnings, by the recursion of Graves et al. 2006. Like PyTorch's derivative, that of this is
// one for log_probs that are normalized: adding a constant to all classes changes nothing.
std::pair<Tensor, Tensor> ctc(const Tensor& log_probs, const Labels& labels) {
  const auto normalized = at::log_softmax(log_probs, -1);
  const auto n = labels.extended.size(-1);
  const auto places = at::arange(n, labels.extended.options());
  const auto impossible = [&](const Tensor& like) { return at::full_like(like, kLogZero); };
  const auto emitted = [&](int64_t t) { return at::gather(normalized.select(0, t), -1, labels.extended); };
  const auto moved = [&](const Tensor& alpha, int64_t by) {
    if (by >= n) return impossible(alpha);
    return at::cat({impossible(alpha.narrow(-1, 0, by)), alpha.narrow(-1, 0, n - by)}, -1);
  };
  auto alpha = emitted(0);
  alpha = at::where((places <= 1).expand_as(alpha), alpha, impossible(alpha));
  std::vector<Tensor> alphas{alpha};
  for (int64_t t = 1; t < normalized.size(0); ++t) {
    const auto skipped = moved(alpha, 2);
    const auto before = at::stack({alpha, moved(alpha, 1), at::where(labels.may_skip, skipped, impossible(skipped))});
    const auto next = at::logsumexp(before, 0) + emitted(t);
    alpha = at::where(labels.input_lengths > t, next, alpha);
    alphas.push_back(alpha);
  }
  const auto last = at::gather(alpha, -1, labels.target_lengths * 2);
  const auto before_last = at::where(
      labels.target_lengths > 0, at::gather(alpha, -1, (labels.target_lengths * 2 - 1).clamp_min(0)), impossible(last));
  const auto loss = -at::logsumexp(at::stack({last, before_last}), 0).squeeze(-1);
  const auto infinite = at::full_like(loss, std::numeric_limits<double>::infinity());
  return {at::where(loss > -kLogZero / 2, infinite, loss), at::stack(alphas, 1)};
}

void ctc_loss(AutodiffLevel&, const Operator&, Stack& stack) {
  CallArguments arguments(stack, 6);
  const auto log_probs = arguments.tensor();
  const auto targets = arguments.tensor();
  const auto input_lengths = arguments.next();
  const auto target_lengths = arguments.next();
  const auto labels = labels_of(targets, input_lengths, target_lengths, arguments.next().toInt());
  const auto [loss, log_alpha] = ctc(log_probs, labels);
  torch::jit::push(stack, loss, log_alpha);
}

void ctc_loss_backward(AutodiffLevel&, const Operator&, Stack& stack) {
  CallArguments arguments(stack, 9);
  const auto grad = arguments.tensor();
  const auto log_probs = arguments.tensor();
  const auto targets = arguments.tensor();
  const auto input_lengths = arguments.next();
  const auto target_lengths = arguments.next();
  arguments.next();  // the loss and
  arguments.next();  // log alpha: both follow from the rest, with a derivative
  const auto labels = labels_of(targets, input_lengths, target_lengths, arguments.next().toInt());
  const bool zero_infinity = arguments.next().toBool();
  const auto loss = [&](const Tensor& x) {
    const auto y = ctc(x, labels).first;
    return zero_infinity ? at::where(y == std::numeric_limits<double>::infinity(), at::zeros_like(y), y) : y;
  };
  torch::jit::push(stack, pull_back(loss, log_probs, grad));
}

}  // namespace

const std::vector<DerivativeRow>& loss_derivatives() {
  static const std::vector<DerivativeRow> rows{
      always("multi_margin_loss_backward", multi_margin_loss_backward),
      always("multilabel_margin_loss_backward", multilabel_margin_loss_backward),
      nested("_ctc_loss", ctc_loss),
      nested("_ctc_loss.Tensor", ctc_loss),
      always("_ctc_loss_backward", ctc_loss_backward),
      always("_ctc_loss_backward.Tensor", ctc_loss_backward),
  };
  return rows;
}

}  // namespace functorch_lite
