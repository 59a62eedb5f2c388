// Tangents that are known to be zero.
//
// PyTorch's forward-mode formulas make an "efficient zero tensor" for every argument without a tangent, and its
// arithmetic walks through Python. At our level such a zero is a flag on a wrapper: products with it stay zero, sums
// drop it, and any other operator gets real zeros.
#pragma once

#include "op_args.h"

namespace functorch_lite {

class Level;

// Handles the call if it makes a zero, or strips a tangent, or is simple arithmetic with a zero argument. Returns
// false if the call has to run as usual.
bool try_symbolic_zero(const c10::OperatorHandle& op, Stack& stack, bool any_zero, Level& level);

}  // namespace functorch_lite
