// Attention as a composition of plain operators, for levels that need every derivative or batching rule of it.
#pragma once

#include "op_args.h"

namespace functorch_lite {

// scaled_dot_product_attention without the fused kernels: those have no second derivative, no forward mode, and see
// one batch only. Takes and leaves boxed arguments.
void plain_attention(const c10::OperatorHandle& op, Stack& stack);

// _fused_sdp_choice: always the plain form.
void choose_plain_attention(const c10::OperatorHandle& op, Stack& stack);

}  // namespace functorch_lite
