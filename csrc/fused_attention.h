// When PyTorch's fused attention kernels serve, and derivatives of their backward pass, which PyTorch does not have.
#pragma once

#include "derivative_rules.h"
#include "plain_compositions.h"

namespace functorch_lite {

// What _fused_sdp_choice answers for the composition of plain operators.
constexpr int64_t kPlainAttention = 0;
void choose_plain_attention(const c10::OperatorHandle& op, Stack& stack);

// Whether the kernels have all derivatives that may be asked for: none, or one in reverse mode with respect to query, key
// and value. With dropout they do not, for nobody else can draw their random numbers again.
bool fused_attention_serves(const NamedArguments& args);

// How many queries to attend for at a time, or none if all scores may be in memory at once.
std::optional<int64_t> attention_chunk(const NamedArguments& args);
// How many scores may be in memory at once, and for how many queries in any case. For tests.
void set_attention_limits(int64_t scores, int64_t rows);

// The kernels and their rules, for the table in derivative_rules.cpp.
struct FusedAttentionRow {
  const char* op;
  DerivativeRule forward;
  DerivativeRule reverse;
};
const std::vector<FusedAttentionRow>& fused_attention_rules();

}  // namespace functorch_lite
