// Recurrent networks and packed sequences.
#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/reshape.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros_like.h>

#include "../fallback.h"
#include "../plain_compositions.h"
#include "rules.h"

namespace functorch_lite {
namespace {

// x[..,n,B,..] with the batch behind dimension `dim`, merged into it: what one time step has stays together.
at::Tensor fold_behind(const at::Tensor& x, int64_t bdim, int64_t dim) {
  return merge_dims(move_dim(x, bdim, dim + 1), dim);
}

// y[..,n*B,..] -> y[..,n,B,..]
at::Tensor unfold_behind(const at::Tensor& y, int64_t dim, const c10::SymInt& n, const c10::SymInt& batch_size) {
  auto sizes = y.sym_sizes().vec();
  sizes[dim] = n;
  sizes.insert(sizes.begin() + dim + 1, batch_size);
  return at::reshape_symint(y, sizes);
}

// input[T,N,I] (or [N,T,I], or packed [S,I]), hx[L,N,H]: the sequences of all examples run as one batch of N*B.
void fold_sequences(BatchCall& call) {
  const auto batch_sizes = call.find("batch_sizes");
  const int64_t dim = batch_sizes || call.arg("batch_first").toBool() ? 0 : 1;
  const auto input = call.expand_to_front(0);
  const auto rows = input.sym_size(dim + 1);
  call.arg(0) = fold_behind(input, 0, dim);
  if (batch_sizes) call.arg(*batch_sizes) = call.tensor(*batch_sizes) * call.batch_size().guard_int(__FILE__, __LINE__);
  const auto hx = call.position("hx");
  c10::SymInt sequences;
  if (call.is_tensor(hx)) {
    const auto& state = call.expand_to_front(hx);
    sequences = state.sym_size(2);
    call.arg(hx) = fold_behind(state, 0, 1);
  } else {
    auto states = call.expanded_list(hx);
    sequences = states[0].sym_size(2);
    for (auto& state : states) state = fold_behind(state, 0, 1);
    call.arg(hx) = states;
  }
  call.call();
  for (size_t i = 0; i < call.count_results(); ++i) {
    auto& result = call.result(i);
    result = unfold_behind(result.toTensor(), i == 0 ? dim : 1, i == 0 ? rows : sequences, call.batch_size());
  }
  c10::SmallVector<int64_t, 3> bdims(call.count_results(), 2);
  bdims[0] = dim + 1;
  call.finish_each(bdims);
}

// With weights that all examples share it is one network on more sequences.
void recurrent_network(const c10::OperatorHandle& op, Stack& stack) {
  const NamedArguments args(op, stack);
  const bool draws = args["dropout"].toDouble() > 0 && args.flag("train") && args["num_layers"].toInt() > 1;
  auto& level = current_vmap_level();
  if (draws) check_randomness(op, level);
  const bool differs = draws && level.randomness() == VmapLevel::Randomness::kDifferent;
  const auto batched = [&](const char* name) { return args.has(name) && any_batched(&args[name], 1); };
  const bool batched_sequences = differs || batched("input") || batched("data") || batched("hx");
  if (!batched_sequences || batched("params") || batched("batch_sizes") || (draws && !differs)) {
    return find_plain_composition(op.operator_name())(op, stack);
  }
  BatchCall call(op, stack);
  fold_sequences(call);
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
  std::vector<at::Tensor> cells{args.tensor("cx_tmp")};
  for (int64_t i = 0; i < steps; ++i) {
    const auto t = step_at(i);
    cells.push_back(forget[t] * cells.back() + in[t] * candidate[t]);
  }

  const auto grad_output = args.optional_tensor("grad_output");
  auto dh = args.optional_tensor("grad_hy").value_or(at::zeros_like(hx[0]));
  auto dc = args.optional_tensor("grad_cy").value_or(at::zeros_like(cells[0]));
  std::vector<at::Tensor> by_step(steps);
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

void add_recurrent_rules(RuleTable& rules) {
  for (const auto& [op, composition] : recurrent_compositions()) {
    const bool is_network = std::string_view(op).find('.') != std::string_view::npos;  // lstm.input and the like
    rules.add(is_network ? &recurrent_network : composition, {op});
  }
  rules.add(&lstm_layer_backward, {"mkldnn_rnn_layer_backward"});
}

}  // namespace functorch_lite
