// Convolutions. A batch of inputs joins their batch; a batch of weights joins the channels; a batch of both joins the
// groups, for then each example is a convolution of its own.
#include <ATen/TensorOperators.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/zeros.h>

#include "rules.h"

namespace functorch_lite {
namespace {

// bias[B?,c] -> bias[B?,1,c,1..], to be added to y[B,N,c,*].
at::Tensor channels_for(BatchCall& call, size_t bias, int64_t rank) {
  auto result = call.to_front(bias).unsqueeze(-2);
  for (int64_t d = 2; d < rank; ++d) result = result.unsqueeze(-1);
  return result;
}

// x[B?,N,g*i,*], weight[B?,g*o,i,*] (transposed: [B?,g*i,o,*]), bias[B?,g*o] -> y[B,N,g*o,*]
void convolution_rule(BatchCall& call) {
  if (finish_without_examples(call)) return;
  constexpr size_t kInput = 0, kWeight = 1, kBias = 2;
  const auto rank = call.rank(kInput);
  const auto groups = call.arg("groups").toSymInt();
  const bool transposed = call.arg("transposed").toBool();
  const bool input_batched = call.is_batched(kInput);
  const bool weight_batched = call.is_batched(kWeight);

  at::Tensor added_bias;
  if (call.is_tensor(kBias) && (weight_batched || call.is_batched(kBias))) {
    added_bias = channels_for(call, kBias, rank);
    call.arg(kBias) = c10::IValue();
  }
  if (input_batched && weight_batched) {
    call.arg(kInput) = fold_batch(call.tensor(kInput), call.bdim(kInput), 1);
    call.arg(kWeight) = fold_batch(call.tensor(kWeight), call.bdim(kWeight), 0);
    call.arg("groups") = groups * call.batch_size();
  } else if (input_batched) {
    call.arg(kInput) = fold_batch(call.tensor(kInput), call.bdim(kInput), 0);
  } else if (weight_batched) {
    const auto& weight = call.tensor(kWeight);
    call.arg(kWeight) = fold_batch(weight, call.bdim(kWeight), transposed ? 1 : 0, transposed ? 1 : groups);
  }
  call.call();
  auto y = call.result().toTensor();
  if (weight_batched) {
    y = unfold_batch(y, 1, call.batch_size(), input_batched ? 1 : groups);
  } else if (input_batched) {
    y = unfold_batch(y, 0, call.batch_size());
  }
  call.set_results(added_bias.defined() ? y + added_bias : y);
  call.finish();
}

// The three gradients, each a convolution of two of the tensors. Of the third only the shape matters.
class ConvolutionBackward {
 public:
  explicit ConvolutionBackward(BatchCall& call)
      : call_(call), groups_(call.arg("groups").toSymInt()), transposed_(call.arg("transposed").toBool()) {}

  // grad[B?,N,g*o,*], weight[B?,..] -> grad_input[B?,N,g*i,*]
  at::Tensor input() {
    const auto shape = example_sizes(kInput);
    if (!call_.is_batched(kWeight)) {
      if (!call_.is_batched(kGrad))
        return gradient<0>(call_.tensor(kGrad), zeros(kInput, shape), call_.tensor(kWeight));
      const auto grad = fold_batch(call_.tensor(kGrad), call_.bdim(kGrad), 0);
      return unfold_batch(gradient<0>(grad, zeros(kInput, larger(shape, 0)), call_.tensor(kWeight)), 0, batch_size());
    }
    const auto grad = fold_batch(call_.expand_to_front(kGrad), 0, 1);
    const auto weight = fold_batch(call_.to_front(kWeight), 0, 0);
    const auto result = gradient<0>(grad, zeros(kInput, larger(shape, 1)), weight, batch_size());
    return unfold_batch(result, 1, batch_size());
  }

  // grad[B?,N,g*o,*], x[B?,N,g*i,*] -> grad_weight[B?,..]
  at::Tensor weight() {
    const auto shape = example_sizes(kWeight);
    if (!call_.is_batched(kInput)) {
      const auto& x = call_.tensor(kInput);
      if (!call_.is_batched(kGrad)) return gradient<1>(call_.tensor(kGrad), x, zeros(kWeight, shape));
      // As in the forward rule: more output channels in each group.
      const auto grad = fold_batch(call_.tensor(kGrad), call_.bdim(kGrad), 1, groups_);
      const int64_t dim = transposed_ ? 1 : 0;
      const auto result = gradient<1>(grad, x, zeros(kWeight, larger(shape, dim)));
      return unfold_batch(result, dim, batch_size(), transposed_ ? 1 : groups_);
    }
    const auto grad = fold_batch(call_.expand_to_front(kGrad), 0, 1);
    const auto x = fold_batch(call_.to_front(kInput), 0, 1);
    return unfold_batch(gradient<1>(grad, x, zeros(kWeight, larger(shape, 0)), batch_size()), 0, batch_size());
  }

  // grad[B?,N,c,*] -> grad_bias[B?,c]
  at::Tensor bias() {
    const auto& grad = call_.to_front(kGrad);
    const int64_t first = call_.is_batched(kGrad) ? 1 : 0;
    std::vector<int64_t> dims{first};
    for (auto d = first + 2; d < grad.dim(); ++d) dims.push_back(d);
    return grad.sum(dims);
  }

 private:
  static constexpr size_t kGrad = 0, kInput = 1, kWeight = 2;

  const c10::SymInt& batch_size() const { return call_.batch_size(); }

  std::vector<c10::SymInt> example_sizes(size_t i) {
    auto sizes = call_.tensor(i).sym_sizes().vec();
    if (call_.is_batched(i)) sizes.erase(sizes.begin() + call_.bdim(i));
    return sizes;
  }
  std::vector<c10::SymInt> larger(std::vector<c10::SymInt> sizes, int64_t dim) const {
    sizes[dim] = sizes[dim] * batch_size();
    return sizes;
  }
  // One zero in memory, seen as a tensor of these sizes.
  at::Tensor zeros(size_t like, const std::vector<c10::SymInt>& sizes) {
    return at::zeros({}, call_.tensor(like).options()).expand_symint(sizes);
  }

  template <int kWhich>
  at::Tensor gradient(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
                      const c10::SymInt& more_groups = 1) {
    const auto results = at::convolution_backward_symint(
        grad, x, weight, std::nullopt, call_.arg("stride").toSymIntVector(), call_.arg("padding").toSymIntVector(),
        call_.arg("dilation").toSymIntVector(), transposed_, call_.arg("output_padding").toSymIntVector(),
        groups_ * more_groups, {kWhich == 0, kWhich == 1, false});
    return std::get<kWhich>(results);
  }

  BatchCall& call_;
  c10::SymInt groups_;
  bool transposed_;
};

void convolution_backward_rule(BatchCall& call) {
  if (finish_without_examples(call)) return;
  const bool grad_batched = call.is_batched(0), input_batched = call.is_batched(1), weight_batched = call.is_batched(2);
  const auto mask = call.arg("output_mask").toBoolList();
  const auto with_batch = [&](const at::Tensor& x, bool batched) {
    return batched ? x : expand_batch(x, call.batch_size());
  };
  ConvolutionBackward backward(call);
  at::Tensor grad_input, grad_weight, grad_bias;
  // Each needs the arguments as they came: an argument that one of them expands counts as batched for the next.
  if (mask[2]) grad_bias = with_batch(backward.bias(), grad_batched);
  // The input's first, whose temporaries are the largest.
  if (mask[0]) grad_input = with_batch(backward.input(), grad_batched || weight_batched);
  if (mask[1]) grad_weight = with_batch(backward.weight(), call.is_batched(0) || input_batched);
  call.set_results(grad_input, grad_weight, grad_bias);
  call.finish();
}

// x[T,N,c], weight[k,c,o], bias[o] -> y[T',N,o], as a convolution along the last dimension.
void conv_tbc(const c10::OperatorHandle& op, Stack& stack) {
  const auto arguments = torch::jit::pop(stack, count_arguments(op));
  const auto bias = arguments[2].toTensor();
  const auto y = at::convolution(arguments[0].toTensor().permute({1, 2, 0}), arguments[1].toTensor().permute({2, 1, 0}),
                                 bias, {1}, {arguments[3].toInt()}, {1}, false, {0}, 1);
  stack.emplace_back(y.permute({2, 0, 1}));
}

// grad[T',N,o], x[T,N,c], weight[k,c,o], bias[o] -> the gradients of the last three, in the same way.
void conv_tbc_backward(const c10::OperatorHandle& op, Stack& stack) {
  const auto arguments = torch::jit::pop(stack, count_arguments(op));
  const auto [grad_x, grad_weight, grad_bias] = at::convolution_backward_symint(
      arguments[0].toTensor().permute({1, 2, 0}), arguments[1].toTensor().permute({1, 2, 0}),
      arguments[2].toTensor().permute({2, 1, 0}), arguments[3].toTensor().sym_sizes(), {1}, {arguments[4].toInt()}, {1},
      false, {0}, 1, {true, true, true});
  torch::jit::push(stack, grad_x.permute({2, 0, 1}), grad_weight.permute({2, 1, 0}), grad_bias);
}

}  // namespace

void add_convolution_rules(RuleTable& rules) {
  rules.add(&convolution_rule, {"convolution", "_convolution", "convolution_overrideable"});
  rules.add(&convolution_backward_rule, {"convolution_backward", "convolution_backward_overrideable"});
  rules.add(&conv_tbc, {"conv_tbc"});
  rules.add(&conv_tbc_backward, {"conv_tbc_backward"});
}

}  // namespace functorch_lite
