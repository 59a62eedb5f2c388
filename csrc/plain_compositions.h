// Operators as compositions of plain ones, for levels that need every derivative or batching rule of them. PyTorch's
// own compositions and formulas choose fused kernels, write in place where one argument is batched and another is not,
// or look at values.
#pragma once

#include "op_args.h"

namespace functorch_lite {

// Takes and leaves boxed arguments.
using PlainComposition = void (*)(const c10::OperatorHandle& op, Stack& stack);

// "lstm_cell" and the like, with their compositions. Both kinds of level use them.
const std::vector<std::pair<const char*, PlainComposition>>& plain_compositions();

// The composition of an operator, or null.
PlainComposition find_plain_composition(const c10::OperatorName& name);

// _fused_sdp_choice: always the plain form.
void choose_plain_attention(const c10::OperatorHandle& op, Stack& stack);

}  // namespace functorch_lite
