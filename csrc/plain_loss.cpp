// Losses as compositions of plain operators. See plain_compositions.h first.
#include <ATen/TensorOperators.h>
#include <ATen/core/Reduction.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>

#include <limits>

#include "level.h"
#include "plain_compositions.h"

namespace functorch_lite {

at::Tensor tensor_of(const std::vector<int64_t>& numbers) {
  const Outside no_level_wraps_it;
  return at::tensor(numbers, c10::kLong);
}

namespace {

// ctc_loss by PyTorch's own kernels, to which lengths in tensors are data. Its composition reads them, to choose
// between those kernels and cuDNN's.
void plain_ctc_loss(const c10::OperatorHandle& op, Stack& stack) {
  static const auto with_tensors = find_operator("_ctc_loss.Tensor");
  static const auto with_lists = find_operator("_ctc_loss");
  const NamedArguments args(op, stack);
  const auto log_probs = args.tensor("log_probs");
  const auto lengths = args["target_lengths"];
  const bool has_batch = log_probs.dim() == 3;
  const bool zero_infinity = args.flag("zero_infinity");
  const auto reduction = args["reduction"].toInt();
  Stack results{has_batch ? log_probs : log_probs.unsqueeze(1),
                args.tensor("targets").to(log_probs.device(), c10::kLong),
                args["input_lengths"],
                lengths,
                args["blank"],
                zero_infinity};
  torch::jit::drop(stack, count_arguments(op));
  (lengths.isTensor() ? with_tensors : with_lists).callBoxed(&results);
  auto loss = results[0].toTensor();
  if (zero_infinity) loss = at::where(loss == std::numeric_limits<double>::infinity(), 0, loss);
  switch (reduction) {
    case at::Reduction::Mean: {
      const auto length = lengths.isTensor() ? lengths.toTensor() : tensor_of(lengths.toIntVector());
      return torch::jit::push(stack, (loss / length.to(loss.device(), loss.scalar_type()).clamp_min(1)).mean());
    }
    case at::Reduction::Sum:
      return torch::jit::push(stack, loss.sum());
    default:
      return torch::jit::push(stack, has_batch ? loss : loss.squeeze(0));
  }
}

}  // namespace

const std::vector<PlainRow>& loss_compositions() {
  static const std::vector<PlainRow> rows{
      {"ctc_loss.IntList", plain_ctc_loss},
      {"ctc_loss.Tensor", plain_ctc_loss},
  };
  return rows;
}

}  // namespace functorch_lite
