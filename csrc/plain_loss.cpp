// Losses as compositions of plain operators. See plain_compositions.h first.
#include <ATen/TensorOperators.h>
#include <ATen/core/Reduction.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>

#include <limits>

#include "level.h"
#include "plain_compositions.h"

namespace functorch_lite {
namespace {

at::Tensor tensor_of(const std::vector<int64_t>& numbers) {
  const Outside no_level_wraps_it;
  return at::tensor(numbers, c10::kLong);
}

// ctc_loss by PyTorch's own kernels, to which lengths in tensors are data. Its composition reads them, to choose
// between those kernels and cuDNN's.
void plain_ctc_loss(const c10::OperatorHandle& op, Stack& stack) {
  const auto arguments = torch::jit::pop(stack, count_arguments(op));
  const auto log_probs = arguments[0].toTensor();
  const auto lengths = arguments[3];
  const bool has_batch = log_probs.dim() == 3;
  const auto kernel = find_operator(lengths.isTensor() ? "_ctc_loss.Tensor" : "_ctc_loss");
  Stack results{has_batch ? log_probs : log_probs.unsqueeze(1),
                arguments[1].toTensor().to(log_probs.device(), c10::kLong),
                arguments[2],
                lengths,
                arguments[4],
                arguments[6]};
  kernel.callBoxed(&results);
  auto loss = results[0].toTensor();
  if (arguments[6].toBool()) loss = at::where(loss == std::numeric_limits<double>::infinity(), 0, loss);
  switch (arguments[5].toInt()) {
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
