// Recurrent networks and their cells as compositions of plain operators. See plain_compositions.h first.
//
// All time steps of a layer meet their input weights in one product; the loop over steps has what depends on the state.
#include <ATen/TensorOperators.h>
#include <ATen/ops/_pack_padded_sequence.h>
#include <ATen/ops/_pad_packed_sequence.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros_like.h>

#include "plain_compositions.h"
#include "wrapper.h"

namespace functorch_lite {
namespace {

using at::Tensor;

enum class Network { kTanh, kRelu, kGru, kLstm };

// hidden[N,P], and of an LSTM cell[N,H]. P is H unless the LSTM projects.
using State = std::vector<Tensor>;

State state_of(const c10::IValue& value) {
  return value.isTensorList() ? value.toTensorVector() : State{value.toTensor()};
}

// The weights of one direction of one layer, or of a cell.
struct RecurrentWeights {
  Tensor w_ih, w_hh;
  std::optional<Tensor> b_ih, b_hh, w_hr;
};

// from_input[N,gates*H], state -> the next state
template <Network kind>
State step(const Tensor& from_input, const State& state, const RecurrentWeights& w) {
  const auto& hidden = state[0];
  const auto from_hidden = at::linear(hidden, w.w_hh, w.b_hh);
  if constexpr (kind == Network::kTanh) {
    return {(from_input + from_hidden).tanh()};
  } else if constexpr (kind == Network::kRelu) {
    return {(from_input + from_hidden).relu()};
  } else if constexpr (kind == Network::kGru) {
    const auto x = from_input.chunk(3, -1);
    const auto h = from_hidden.chunk(3, -1);
    const auto reset = (x[0] + h[0]).sigmoid();
    const auto update = (x[1] + h[1]).sigmoid();
    const auto candidate = (x[2] + reset * h[2]).tanh();
    return {candidate + update * (hidden - candidate)};
  } else {
    const auto gates = (from_input + from_hidden).chunk(4, -1);
    const auto cell = gates[1].sigmoid() * state[1] + gates[0].sigmoid() * gates[2].tanh();
    const auto next = gates[3].sigmoid() * cell.tanh();
    return {w.w_hr.has_value() ? at::linear(next, *w.w_hr) : next, cell};
  }
}

template <Network kind>
void cell(const c10::OperatorHandle& op, Stack& stack) {
  const NamedArguments args(op, stack);
  const RecurrentWeights w{
      args.tensor("w_ih"), args.tensor("w_hh"), args.optional_tensor("b_ih"), args.optional_tensor("b_hh"), {}};
  const auto next = step<kind>(at::linear(args.tensor("input"), w.w_ih, w.b_ih), state_of(args["hx"]), w);
  torch::jit::drop(stack, count_arguments(op));
  for (const auto& part : next) torch::jit::push(stack, part);
}

// A tensor of sizes below all wrappers: lengths decide about shapes, so they are the same for all examples.
const Tensor& shared_sizes(const c10::OperatorHandle& op, const Tensor& sizes, const char* name) {
  const auto* tensor = &sizes;
  while (const auto* wrapper = as_wrapper(*tensor)) {
    TORCH_CHECK_VALUE(wrapper->bdim() == kNoBatchDim, "vmap: ", op.operator_name().name, " got ", name,
                      " that are batched, but the lengths of packed sequences must be the same for all examples. Give "
                      "lengths that are not batched, or leave the sequences padded.");
    tensor = &wrapper->value();
  }
  return *tensor;
}

// x[T,N,*] (or [N,T,*]) -> data[S,*], batch_sizes[T]. What PyTorch packs are the numbers of the rows.
void pack_padded_sequence(const c10::OperatorHandle& op, Stack& stack) {
  const NamedArguments args(op, stack);
  auto x = args.tensor("input");
  if (args.flag("batch_first")) x = x.transpose(0, 1);
  const auto& lengths = shared_sizes(op, args.tensor("lengths"), "lengths");
  Tensor index;
  Tensor batch_sizes;
  {
    const Outside outside;
    const auto rows = at::arange(x.size(0) * x.size(1)).view({x.size(0), x.size(1)});
    std::tie(index, batch_sizes) = at::_pack_padded_sequence(rows, lengths, /*batch_first=*/false);
    index = index.to(x.device());
  }
  torch::jit::drop(stack, count_arguments(op));
  torch::jit::push(stack, x.flatten(0, 1).index_select(0, index), batch_sizes);
}

// data[S,*], batch_sizes[T] -> x[T,N,*] (or [N,T,*]), lengths[N], padded with row number S.
void pad_packed_sequence(const c10::OperatorHandle& op, Stack& stack) {
  const NamedArguments args(op, stack);
  const auto data = args.tensor("data");
  const auto& batch_sizes = shared_sizes(op, args.tensor("batch_sizes"), "batch_sizes");
  Tensor index;
  Tensor lengths;
  {
    const Outside outside;
    std::tie(index, lengths) = at::_pad_packed_sequence(at::arange(data.size(0)), batch_sizes, args.flag("batch_first"),
                                                        /*padding_value=*/data.size(0), args["total_length"].toInt());
    index = index.to(data.device());
  }
  auto padding_size = data.sym_sizes().vec();
  padding_size[0] = 1;
  const auto padding = at::full_symint(padding_size, args["padding_value"].toScalar(), data.options());
  const auto x = at::cat({data, padding}, 0).index_select(0, index.flatten());
  torch::jit::drop(stack, count_arguments(op));
  torch::jit::push(stack, x.unflatten(0, index.sizes()), lengths);
}

// How many sequences have each time step, the longest sequences first.
using Rows = std::vector<c10::SymInt>;

Rows rows_of_steps(const Tensor& batch_sizes) {
  const Outside outside;
  Rows rows;
  for (int64_t t = 0; t < batch_sizes.size(0); ++t) rows.emplace_back(batch_sizes[t].item<int64_t>());
  return rows;
}

// Through one layer in one direction. The state of sequences that have ended, or not begun, stays as it is.
template <Network kind>
std::pair<Tensor, State> run_layer(const Tensor& x, const Rows& rows, State state, const RecurrentWeights& w,
                                   bool reverse) {
  const auto from_input = at::linear(x, w.w_ih, w.b_ih).split_with_sizes_symint(rows, 0);
  std::vector<Tensor> outputs(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) {
    const auto t = reverse ? rows.size() - 1 - i : i;
    State others;
    if (rows[t] != rows[0]) {
      for (auto& part : state) {
        others.push_back(part.narrow_symint(0, rows[t], rows[0] - rows[t]));
        part = part.narrow_symint(0, 0, rows[t]);
      }
    }
    state = step<kind>(from_input[t], state, w);
    outputs[t] = state[0];
    for (size_t k = 0; k < others.size(); ++k) state[k] = at::cat({state[k], others[k]}, 0);
  }
  return {at::cat(outputs, 0), state};
}

// PyTorch's fused kernels have one derivative, in reverse mode. That is enough for a level with nothing outside.
bool may_run_fused() {
  const auto* level = current_level();
  return level->differentiates() && !level->is_forward() && level->parent() == nullptr;
}

// input[T,N,I], or [N,T,I] with the batch first, or packed data[S,I], through all layers.
template <Network kind>
void network(const c10::OperatorHandle& op, Stack& stack) {
  if (may_run_fused()) return op.callBoxedForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd, stack);
  const NamedArguments args(op, stack);
  const bool packed = args.has("batch_sizes");
  const bool batch_first = !packed && args.flag("batch_first");
  auto x = args.tensor(packed ? "data" : "input");
  if (batch_first) x = x.transpose(0, 1);
  const auto rows = packed ? rows_of_steps(shared_sizes(op, args.tensor("batch_sizes"), "batch_sizes"))
                           : Rows(x.size(0), x.sym_size(1));
  TORCH_CHECK_VALUE(!rows.empty(), op.operator_name().name, ": expected at least one time step, got none.");
  if (!packed) x = x.flatten(0, 1);

  const auto layers = args["num_layers"].toInt();
  const int64_t directions = args.flag("bidirectional") ? 2 : 1;
  const auto dropout = args["dropout"].toDouble();
  const bool train = args.flag("train");
  const bool has_biases = args.flag("has_biases");
  const auto params = args["params"].toTensorVector();
  const auto initial = state_of(args["hx"]);
  const auto n = params.size() / (layers * directions);  // w_ih, w_hh, then b_ih and b_hh, then w_hr
  std::vector<std::vector<Tensor>> last(initial.size());
  for (int64_t layer = 0; layer < layers; ++layer) {
    std::vector<Tensor> outputs;
    for (int64_t k = layer * directions; k < (layer + 1) * directions; ++k) {
      const auto* given = &params[k * n];
      RecurrentWeights w{given[0], given[1], {}, {}, {}};
      if (has_biases) w.b_ih = given[2], w.b_hh = given[3];
      if (n % 2 == 1) w.w_hr = given[n - 1];
      State state;
      for (const auto& part : initial) state.push_back(part.select(0, k));
      auto [y, final_state] = run_layer<kind>(x, rows, state, w, /*reverse=*/k % directions == 1);
      outputs.push_back(std::move(y));
      for (size_t i = 0; i < last.size(); ++i) last[i].push_back(final_state[i]);
    }
    x = directions == 1 ? outputs[0] : at::cat(outputs, -1);
    if (dropout > 0 && layer + 1 < layers) x = at::dropout(x, dropout, train);
  }
  if (!packed) x = x.unflatten_symint(0, {c10::SymInt(static_cast<int64_t>(rows.size())), rows[0]});
  if (batch_first) x = x.transpose(0, 1);
  torch::jit::drop(stack, count_arguments(op));
  torch::jit::push(stack, x);
  for (const auto& parts : last) torch::jit::push(stack, at::stack(parts));
}

// The cotangents of one direction of an LSTM layer, input[T,N,I] and output[T,N,H], for which PyTorch's CPU has a
// kernel. The gates of all time steps follow from the output at once.
void lstm_layer_backward(const c10::OperatorHandle& op, Stack& stack) {
  const NamedArguments args(op, stack);
  const auto x = args.tensor("input");
  const auto w_ih = args.tensor("weight1");
  const auto w_hh = args.tensor("weight2");
  const auto output = args.tensor("output");
  const auto hx = args.tensor("hx_").unsqueeze(0);
  const bool reverse = args.flag("reverse");
  const auto steps = x.size(0);
  const auto step_at = [&](int64_t i) { return reverse ? steps - 1 - i : i; };
  const auto before =
      reverse ? at::cat({output.narrow(0, 1, steps - 1), hx}, 0) : at::cat({hx, output.narrow(0, 0, steps - 1)}, 0);
  const auto bias = [&](const char* name) {
    return args.flag("has_biases") ? args.optional_tensor(name) : std::nullopt;
  };
  const auto gates = at::linear(x, w_ih, bias("weight3")) + at::linear(before, w_hh, bias("weight4"));
  const auto parts = gates.chunk(4, -1);
  const auto in = parts[0].sigmoid();
  const auto forget = parts[1].sigmoid();
  const auto candidate = parts[2].tanh();
  const auto out = parts[3].sigmoid();
  std::vector<Tensor> cells{args.tensor("cx_tmp")};
  for (int64_t i = 0; i < steps; ++i) {
    const auto t = step_at(i);
    cells.push_back(forget[t] * cells.back() + in[t] * candidate[t]);
  }

  const auto grad_output = args.optional_tensor("grad_output");
  auto dh = args.optional_tensor("grad_hy").value_or(at::zeros_like(hx[0]));
  auto dc = args.optional_tensor("grad_cy").value_or(at::zeros_like(cells[0]));
  std::vector<Tensor> by_step(steps);
  for (auto i = steps - 1; i >= 0; --i) {
    const auto t = step_at(i);
    if (grad_output.has_value()) dh = dh + (*grad_output)[t];
    const auto active = cells[i + 1].tanh();
    dc = dc + dh * out[t] * (1 - active * active);
    by_step[t] = at::cat({dc * candidate[t] * in[t] * (1 - in[t]), dc * cells[i] * forget[t] * (1 - forget[t]),
                          dc * in[t] * (1 - candidate[t] * candidate[t]), dh * active * out[t] * (1 - out[t])},
                         -1);
    dc = dc * forget[t];
    dh = at::matmul(by_step[t], w_hh);
  }
  const auto d_gates = at::stack(by_step);
  const auto by_gate = d_gates.flatten(0, 1).t();
  const auto d_bias = by_gate.sum(1);
  torch::jit::drop(stack, count_arguments(op));
  torch::jit::push(stack, at::matmul(d_gates, w_ih), at::matmul(by_gate, x.flatten(0, 1)),
                   at::matmul(by_gate, before.flatten(0, 1)), d_bias, d_bias, dh, dc);
}

}  // namespace

const std::vector<PlainRow>& recurrent_compositions() {
  static const std::vector<PlainRow> rows{
      {"lstm_cell", cell<Network::kLstm>},
      {"gru_cell", cell<Network::kGru>},
      {"rnn_tanh_cell", cell<Network::kTanh>},
      {"rnn_relu_cell", cell<Network::kRelu>},
      {"lstm.input", network<Network::kLstm>},
      {"lstm.data", network<Network::kLstm>},
      {"gru.input", network<Network::kGru>},
      {"gru.data", network<Network::kGru>},
      {"rnn_tanh.input", network<Network::kTanh>},
      {"rnn_tanh.data", network<Network::kTanh>},
      {"rnn_relu.input", network<Network::kRelu>},
      {"rnn_relu.data", network<Network::kRelu>},
      {"_pack_padded_sequence", pack_padded_sequence},
      {"_pad_packed_sequence", pad_packed_sequence},
      {"mkldnn_rnn_layer_backward", lstm_layer_backward},
  };
  return rows;
}

}  // namespace functorch_lite
