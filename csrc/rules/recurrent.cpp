// Recurrent networks, and packed sequences.
#include <ATen/ops/_pack_padded_sequence.h>
#include <ATen/ops/reshape.h>

#include "../fallback.h"
#include "../plain_compositions.h"
#include "rules.h"

namespace functorch_lite {
namespace {

bool is_batched_here(const at::Tensor& tensor) { return wrapper_at(tensor, &current_vmap_level()) != nullptr; }

bool any_batched(const c10::IValue& value) {
  bool any = false;
  for_each_tensor(&value, 1, [&](const at::Tensor& tensor) { any |= is_batched_here(tensor); });
  return any;
}

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
  const bool input_batched = any_batched(args[args.has("data") ? "data" : "input"]) || any_batched(args["hx"]);
  const bool lengths_batched = args.has("batch_sizes") && any_batched(args["batch_sizes"]);
  const bool shared_weights = !any_batched(args["params"]) && !lengths_batched && (!draws || differs);
  if (shared_weights && (input_batched || differs)) {
    BatchCall call(op, stack);
    return fold_sequences(call);
  }
  find_plain_composition(op.operator_name())(op, stack);
}

// x[B,N,T,*] (or [B,T,N,*]) -> data[S,*,B]: the kernel lets trailing dimensions through.
void pack_padded_sequence_rule(BatchCall& call) {
  if (call.is_batched(1)) {
    refuse_operator(call.op(),
                    "The lengths differ between examples, and so would the sizes of what it packs. Give lengths that "
                    "are not batched, or leave the sequences padded.");
  }
  const auto& x = call.tensor(0);
  call.arg(0) = move_dim(x, call.bdim(0), x.dim() - 1);
  call.call();
  call.finish_each({call.result().toTensor().dim() - 1, kNoBatchDim});
}

}  // namespace

void add_recurrent_rules(RuleTable& rules) {
  for (const auto& [op, composition] : recurrent_compositions()) {
    const bool is_cell = std::string_view(op).find("_cell") != std::string_view::npos;
    rules.add(is_cell ? composition : &recurrent_network, {op});
  }
  rules.add(&pack_padded_sequence_rule, {"_pack_padded_sequence"});
}

}  // namespace functorch_lite
