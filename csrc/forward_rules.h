// Forward-mode rules of our own, for operators where PyTorch has none or a formula that is wrong one derivative later.
#pragma once

#include "op_args.h"

namespace functorch_lite {

class AutodiffLevel;

// Takes the arguments off the stack and leaves the results, with their tangents, at a level in forward mode.
using ForwardRule = void (*)(AutodiffLevel& level, Stack& stack);

// The rule of an operator, or null: then PyTorch's formula serves.
ForwardRule find_forward_rule(const c10::OperatorHandle& op);

}  // namespace functorch_lite
