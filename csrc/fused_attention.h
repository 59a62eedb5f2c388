// Which form of attention runs: PyTorch's fused kernels, which have one derivative in reverse mode, or a composition,
// which has all. derivatives/attention.cpp is about the derivative of what the kernels do backward.
#pragma once

#include "plain_compositions.h"

namespace functorch_lite {

// What _fused_sdp_choice answers for the composition of plain operators.
constexpr int64_t kPlainAttention = 0;
void choose_plain_attention(const c10::OperatorHandle& op, Stack& stack);

// Whether the kernels have all derivatives that may be asked for: none, or one in reverse mode with respect to query,
// key and value. With dropout they do not, for nobody else can draw their random numbers again.
bool fused_attention_serves(const NamedArguments& args);

// What the kernels of the query's device say, in _fused_sdp_choice. They look at sizes; fake tensors, asked themselves,
// say that there is none.
void ask_attention_kernels(const c10::OperatorHandle& op, Stack& stack);

// How many queries should attend at a time, or none if all scores may be in memory at once.
std::optional<int64_t> attention_chunk(const at::Tensor& query, const at::Tensor& key);
// How many scores may be in memory at once, and the queries of the smallest chunk. For tests.
void set_attention_limits(int64_t scores, int64_t rows);

}  // namespace functorch_lite
