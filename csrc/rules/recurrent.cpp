// Recurrent networks and packed sequences.
#include <ATen/ops/reshape.h>

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

}  // namespace

void add_recurrent_rules(RuleTable& rules) {
  for (const auto& [op, composition] : recurrent_compositions()) {
    const bool is_network = std::string_view(op).find('.') != std::string_view::npos;  // lstm.input and the like
    rules.add(is_network ? &recurrent_network : composition, {op});
  }
}

}  // namespace functorch_lite
