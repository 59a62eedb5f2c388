// Operators as compositions of plain ones. See plain_compositions.h first.
#include "plain_compositions.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/Reduction.h>
#include <ATen/ops/_scaled_dot_product_attention_math.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include <limits>

#include "level.h"

namespace functorch_lite {
namespace {

using at::Tensor;

// scaled_dot_product_attention without the fused kernels: those have no second derivative, no forward mode, and see
// one batch only.
void plain_attention(const c10::OperatorHandle& op, Stack& stack) {
  const auto begin = stack.size() - count_arguments(op);
  const auto arg = [&](const char* name) -> const c10::IValue& {
    return stack[begin + *op.schema().argumentIndexWithName(name)];
  };
  const auto& query = arg("query").toTensor();
  auto mask = arg("attn_mask").toOptional<at::Tensor>();
  if (mask.has_value() && mask->defined() && mask->scalar_type() == c10::kBool) {
    // Added to the scores: nothing where the mask is true, minus infinity elsewhere.
    mask = at::zeros_like(*mask, query.scalar_type())
               .masked_fill(mask->logical_not(), -std::numeric_limits<double>::infinity());
  }
  auto result = std::get<0>(at::_scaled_dot_product_attention_math(
      query, arg("key").toTensor(), arg("value").toTensor(), mask, arg("dropout_p").toDouble(),
      arg("is_causal").toBool(), /*dropout_mask=*/{}, arg("scale").toOptional<double>(), arg("enable_gqa").toBool()));
  torch::jit::drop(stack, count_arguments(op));
  torch::jit::push(stack, std::move(result));
}

// The arguments (input, state, w_ih, w_hh, b_ih, b_hh) of a recurrent cell.
struct Cell {
  Tensor input, hidden, state;
  Tensor from_input, from_hidden;  // the gates, not yet added

  explicit Cell(Stack& stack) {
    const auto arguments = torch::jit::pop(stack, 6);
    input = arguments[0].toTensor();
    const auto states =
        arguments[1].isTensorList() ? arguments[1].toTensorVector() : std::vector<Tensor>{arguments[1].toTensor()};
    hidden = states.front();
    state = states.back();
    from_input = at::linear(input, arguments[2].toTensor(), arguments[4].toOptional<Tensor>());
    from_hidden = at::linear(hidden, arguments[3].toTensor(), arguments[5].toOptional<Tensor>());
  }
};

void lstm_cell(const c10::OperatorHandle&, Stack& stack) {
  const Cell cell(stack);
  const auto gates = (cell.from_input + cell.from_hidden).chunk(4, -1);
  const auto state = gates[1].sigmoid() * cell.state + gates[0].sigmoid() * gates[2].tanh();
  torch::jit::push(stack, gates[3].sigmoid() * state.tanh(), state);
}

void gru_cell(const c10::OperatorHandle&, Stack& stack) {
  const Cell cell(stack);
  const auto x = cell.from_input.chunk(3, -1);
  const auto h = cell.from_hidden.chunk(3, -1);
  const auto reset = (x[0] + h[0]).sigmoid();
  const auto update = (x[1] + h[1]).sigmoid();
  const auto candidate = (x[2] + reset * h[2]).tanh();
  torch::jit::push(stack, candidate + update * (cell.hidden - candidate));
}

void rnn_tanh_cell(const c10::OperatorHandle&, Stack& stack) {
  const Cell cell(stack);
  torch::jit::push(stack, (cell.from_input + cell.from_hidden).tanh());
}

void rnn_relu_cell(const c10::OperatorHandle&, Stack& stack) {
  const Cell cell(stack);
  torch::jit::push(stack, (cell.from_input + cell.from_hidden).relu());
}

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

const std::vector<std::pair<const char*, PlainComposition>>& plain_compositions() {
  static const std::vector<std::pair<const char*, PlainComposition>> rows{
      {"scaled_dot_product_attention", plain_attention},
      {"lstm_cell", lstm_cell},
      {"gru_cell", gru_cell},
      {"rnn_tanh_cell", rnn_tanh_cell},
      {"rnn_relu_cell", rnn_relu_cell},
      {"ctc_loss.IntList", plain_ctc_loss},
      {"ctc_loss.Tensor", plain_ctc_loss},
  };
  return rows;
}

PlainComposition find_plain_composition(const c10::OperatorName& name) {
  const auto full = c10::toString(name);
  for (const auto& [candidate, composition] : plain_compositions()) {
    if (full == std::string("aten::") + candidate) return composition;
  }
  return nullptr;
}

void choose_plain_attention(const c10::OperatorHandle& op, Stack& stack) {
  constexpr int64_t kPlain = 0;
  torch::jit::drop(stack, count_arguments(op));
  torch::jit::push(stack, kPlain);
}

}  // namespace functorch_lite
