// Attention: one call of a fused kernel with the examples in its batch where nothing takes a derivative, and a
// composition of plain operators elsewhere.
#include <ATen/TensorOperators.h>
#include <ATen/ops/reshape.h>

#include <algorithm>

#include "../fallback.h"
#include "../fused_attention.h"
#include "rules.h"

namespace functorch_lite {
namespace {

// x[B,*,h,n,e] -> x[B*..,h,n,e]
at::Tensor flatten_leading(const at::Tensor& x) { return x.flatten(0, -4); }

// Kernels know one batch: q, k and v must have the same dimensions in front of the heads.
bool has_one_batch(const NamedArguments& args) {
  const auto leading = [&](const char* name) {
    const auto sizes = args.tensor(name).sym_sizes();
    return sizes.size() <= 3 ? c10::SymIntArrayRef() : sizes.slice(0, sizes.size() - 3);
  };
  const auto rank = args.tensor("query").dim();
  return rank >= 2 && args.tensor("key").dim() == rank && args.tensor("value").dim() == rank &&
         leading("query") == leading("key") && leading("query") == leading("value");
}

// mask[B?,*,h,l,s], where all but the last two may be missing or 1, -> mask[B*..,h,l,s], or what broadcasts to it
void fold_mask(BatchCall& call, size_t i, c10::SymIntArrayRef leading) {
  if (!call.is_tensor(i)) return;
  if (!call.is_batched(i) && call.rank(i) <= 3) {
    if (call.rank(i) == 3) call.arg(i) = call.tensor(i).unsqueeze(0);
    return;
  }
  const auto& mask = call.expand_to_front(i, static_cast<int64_t>(leading.size()) + 2);
  auto sizes = leading.vec();
  for (const auto& size : mask.sym_sizes().slice(mask.dim() - 3)) sizes.push_back(size);
  call.arg(i) = flatten_leading(mask.expand_symint(sizes));
}

// q[B?,*,h,l,e], k[B?,*,h,s,e], v[B?,*,h,s,f], mask[B?,*,h,l,s] -> [B*..,h,n,*] each. Returns the sizes of
// y[B,*,h,l,f].
std::vector<c10::SymInt> fold_arguments(BatchCall& call) {
  const auto rank = call.rank(0);
  for (size_t i = 0; i < 3; ++i) call.expand_to_front(i, 3);
  auto sizes = call.tensor(0).sym_sizes().vec();
  const auto mask = call.position("attn_mask");
  while (call.is_tensor(mask) && !call.is_batched(mask) && call.rank(mask) > 2 && call.tensor(mask).sym_size(0) == 1) {
    call.arg(mask) = call.tensor(mask).squeeze(0);
  }
  fold_mask(call, mask, c10::SymIntArrayRef(sizes).slice(0, sizes.size() - 3));
  sizes.back() = call.tensor(2).sym_size(-1);
  if (rank == 2) sizes.erase(sizes.begin() + 1);
  for (size_t i = 0; i < 3; ++i) call.arg(i) = flatten_leading(call.tensor(i));
  return sizes;
}

void fold_attention(BatchCall& call) {
  const auto sizes = fold_arguments(call);
  call.call();
  call.set_results(at::reshape_symint(call.result().toTensor(), sizes));
  call.finish();
}

void attention(const c10::OperatorHandle& op, Stack& stack) {
  const NamedArguments args(op, stack);
  const auto n = count_arguments(op);
  const bool draws = args["dropout_p"].toDouble() > 0;
  auto& level = current_vmap_level();
  if (draws) check_randomness(op, level);
  const bool differs = draws && level.randomness() == VmapLevel::Randomness::kDifferent;
  const bool batched = differs || any_batched(stack.data() + stack.size() - n, n);
  if (!batched || (draws && !differs) || !fused_attention_serves(args) || !has_one_batch(args)) {
    return find_plain_composition(op.operator_name())(op, stack);
  }
  BatchCall call(op, stack);
  fold_attention(call);
}

// Of an autodiff level within, which calls a kernel for tensors of rank 4 only.
void choose_attention(const c10::OperatorHandle& op, Stack& stack) {
  const NamedArguments args(op, stack);
  if (args.tensor("query").dim() != 4 || !fused_attention_serves(args) || !has_one_batch(args)) {
    return choose_plain_attention(op, stack);
  }
  BatchCall call(op, stack);
  fold_arguments(call);
  call.call();
  call.finish_unbatched();
}

bool is_one_of(const std::string& name, std::initializer_list<std::string_view> names) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

// A kernel of one backend, called directly: q[B?,N,*], k[B?,N,*], v[B?,N,*] -> y[B,N,*], with all B*N in its batch.
struct AttentionKernel {
  size_t folded_results;  // those in front have the batch, the others are the same for all examples

  void operator()(BatchCall& call) const {
    bool expands = check_kernel(call);
    for (size_t i = 0; i < call.size(); ++i) expands |= call.is_batched(i);
    if (!expands) {
      call.call();
      return call.finish_unbatched();
    }
    if (finish_without_examples(call)) return;
    const auto query = call.position("query");
    const std::vector<c10::SymInt> leading{call.batch_size(), call.tensor(query).sym_size(call.bdim(query) == 0)};
    for (size_t i = 0; i < call.size(); ++i) {
      const auto& name = call.schema().arguments()[i].name();
      if (is_one_of(name, {"attn_mask", "attn_bias", "bias"})) {
        fold_mask(call, i, leading);
      } else if (is_one_of(name, {"query", "key", "value", "grad_out", "grad_out_", "out", "logsumexp"})) {
        if (call.is_tensor(i)) call.arg(i) = merge_dims(call.expand_to_front(i), 0);
      } else if (call.is_batched(i)) {
        refuse_operator(call.op(), "Its argument '" + name + "' must be the same for all examples.");
      }
    }
    call.call();
    c10::SmallVector<int64_t, 9> bdims(call.count_results(), kNoBatchDim);
    for (size_t i = 0; i < folded_results; ++i) {
      const auto& y = call.result(i).toTensor();
      if (!y.defined()) continue;
      call.result(i) = unfold_batch(y, 0, call.batch_size());
      bdims[i] = 0;
    }
    call.finish_each(bdims);
  }

 private:
  // Whether it draws numbers, other ones for each example.
  static bool check_kernel(BatchCall& call) {
    for (const auto* name : {"cum_seq_q", "cu_seqlens_q"}) {
      const auto i = call.find(name);
      if (i && call.is_tensor(*i) && call.tensor(*i).numel() > 0) {
        refuse_operator(call.op(),
                        "Sequences of different lengths in one tensor cannot be joined with those of other "
                        "examples. Give padded sequences.");
      }
    }
    if (call.arg("dropout_p").toDouble() == 0) return false;
    check_randomness(call.op(), call.level());
    if (call.level().randomness() == VmapLevel::Randomness::kSame) {
      refuse_operator(call.op(),
                      "It draws other numbers for each example. Pass randomness='different' to vmap, or call "
                      "torch.nn.functional.scaled_dot_product_attention.");
    }
    return true;
  }
};

// t[B?,N,T,*], mask[B?,N,T] -> whether an example would become a nested tensor: none if the true elements of no mask
// come first in every row.
void left_aligned_rule(BatchCall& call) {
  const auto& mask = call.to_front(1);
  const auto n = mask.sym_size(-1);
  const auto in_order = mask.narrow_symint(-1, 1, n - 1).le(mask.narrow_symint(-1, 0, n - 1));
  call.set_results(in_order.flatten(-2).all(-1).any().item<bool>());
  call.finish_unbatched();
}

}  // namespace

void add_attention_rules(RuleTable& rules) {
  for (const auto& [op, composition] : attention_compositions()) {
    rules.add(std::string_view(op) == "scaled_dot_product_attention" ? &attention : composition, {op});
  }
  rules.add(&choose_attention, {"_fused_sdp_choice"});
  rules.add(along({"dim"}), {"_safe_softmax"});  // PyTorch's decomposition has the derivative NaN where all is masked
  const auto kernel = [](size_t folded_results) {
    return Family{"attention", [=](const c10::FunctionSchema&) -> Rule { return AttentionKernel{folded_results}; }};
  };
  rules.add(kernel(2), {"_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
                        "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
                        "_scaled_dot_product_fused_attention_overrideable", "_flash_attention_forward",
                        "_efficient_attention_forward"});
  rules.add(kernel(3),
            {"_scaled_dot_product_flash_attention_for_cpu_backward", "_scaled_dot_product_flash_attention_backward",
             "_scaled_dot_product_cudnn_attention_backward", "_flash_attention_backward"});
  rules.add(kernel(4), {"_scaled_dot_product_efficient_attention_backward",
                        "_scaled_dot_product_fused_attention_overrideable_backward", "_efficient_attention_backward"});
  rules.add(&left_aligned_rule, {"_nested_tensor_from_mask_left_aligned"});
  rules.add(forbid(kNoNestedTensors), {"_nested_tensor_from_mask"});
}

}  // namespace functorch_lite
