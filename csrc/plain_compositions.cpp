// Operators as compositions of plain ones. See plain_compositions.h first.
#include "plain_compositions.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/_scaled_dot_product_attention_math.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/gather.h>
#include <ATen/ops/index_fill.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/tensor_split.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <limits>

#include "fallback.h"
#include "wrapper.h"

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

// x.narrow(dim, start, length) where `start` is a tensor: PyTorch makes a number of it, which may differ between examples.
void narrow_from_tensor(const c10::OperatorHandle& op, Stack& stack) {
  const auto begin = stack.size() - count_arguments(op);
  if (as_wrapper(stack[begin + 2].toTensor()) == nullptr) {
    return op.callBoxedForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd, stack);
  }
  const auto arguments = torch::jit::pop(stack, 4);
  const auto& x = arguments[0].toTensor();
  const auto dim = arguments[1].toInt();
  const auto& start = arguments[2].toTensor();
  TORCH_CHECK(start.dim() == 0 && at::isIntegralType(start.scalar_type(), /*includeBool=*/false),
              "narrow(): expected `start` to be an integer tensor of 0 dimensions");
  const auto first = at::where(start < 0, start + x.sym_size(dim), start);
  const auto steps = at::arange(arguments[3].toSymInt(), start.options());
  torch::jit::push(stack, at::index_select(x, dim, first + steps));
}

// x.tensor_split(indices or sections) where those are a tensor: pieces have one shape only if all examples agree.
void split_at_tensor(const c10::OperatorHandle& op, Stack& stack) {
  const auto arguments = torch::jit::pop(stack, 3);
  const auto& x = arguments[0].toTensor();
  const auto& places = arguments[1].toTensor();
  const auto dim = arguments[2].toInt();
  TORCH_CHECK(places.dim() <= 1 && places.scalar_type() == c10::kLong,
              "tensor_split(): expected a tensor of type long with 0 or 1 dimensions");
  if (places.dim() == 0) return torch::jit::push(stack, at::tensor_split(x, common_size(op, places), dim));
  std::vector<int64_t> indices;
  for (const auto& place : places.unbind()) indices.push_back(common_size(op, place));
  torch::jit::push(stack, at::tensor_split(x, indices, dim));
}

// Without a dimension, in the flattened tensor: an example may be contiguous where the batch is not, so that it has no
// flat view.
void take_along_dim(const c10::OperatorHandle& op, Stack& stack) {
  if (!stack.back().isNone()) {
    return op.callBoxedForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd, stack);
  }
  const auto arguments = torch::jit::pop(stack, 3);
  torch::jit::push(stack, at::gather(arguments[0].toTensor().reshape(-1), 0, arguments[1].toTensor().reshape(-1)));
}

// PyTorch's derivative for the value needs the distinct indices, and their number may differ between examples.
Tensor fill_along(const Tensor& x, int64_t dim, const Tensor& index, const Tensor& value) {
  TORCH_CHECK(value.dim() == 0, "index_fill(): expected a value of 0 dimensions, got ", value.dim());
  auto mask = at::zeros_symint({x.dim() == 0 ? 1 : x.sym_size(dim)}, x.options().dtype(c10::kBool));
  mask = at::index_fill(mask, 0, index, 1);
  if (x.dim() == 0) return at::where(mask.squeeze(0), value.to(x.scalar_type()), x);
  for (auto d = c10::maybe_wrap_dim(dim, x.dim()) + 1; d < x.dim(); ++d) mask = mask.unsqueeze(-1);
  return at::where(mask, value.to(x.scalar_type()), x);
}
void index_fill_with_tensor(const c10::OperatorHandle&, Stack& stack) {
  const auto arguments = torch::jit::pop(stack, 4);
  const auto& x = arguments[0].toTensor();
  torch::jit::push(stack, fill_along(x, arguments[1].toInt(), arguments[2].toTensor(), arguments[3].toTensor()));
}
void index_fill_in_place(const c10::OperatorHandle&, Stack& stack) {
  const auto arguments = torch::jit::pop(stack, 4);
  const auto& x = arguments[0].toTensor();
  torch::jit::push(
      stack, x.copy_(fill_along(x, arguments[1].toInt(), arguments[2].toTensor(), arguments[3].toTensor())));
}

}  // namespace

const std::vector<std::pair<const char*, PlainComposition>>& plain_compositions() {
  static const std::vector<std::pair<const char*, PlainComposition>> rows{
      {"scaled_dot_product_attention", plain_attention},
      {"lstm_cell", lstm_cell},
      {"gru_cell", gru_cell},
      {"rnn_tanh_cell", rnn_tanh_cell},
      {"rnn_relu_cell", rnn_relu_cell},
      {"narrow.Tensor", narrow_from_tensor},
      {"tensor_split.tensor_indices_or_sections", split_at_tensor},
      {"take_along_dim", take_along_dim},
      {"index_fill.int_Tensor", index_fill_with_tensor},
      {"index_fill_.int_Tensor", index_fill_in_place},
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
