// Derivative rules of our own, for operators where PyTorch has none or a formula that is wrong one derivative later.
#pragma once

#include "op_args.h"

namespace functorch_lite {

class AutodiffLevel;

// Takes the arguments off the stack and leaves the results, differentiable at the level.
using DerivativeRule = void (*)(AutodiffLevel& level, Stack& stack);

// The rule of an operator at a level, or null: then PyTorch's formula serves.
DerivativeRule find_derivative_rule(const c10::OperatorHandle& op, const AutodiffLevel& level);

}  // namespace functorch_lite
