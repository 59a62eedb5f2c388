// Tangents that are known to be zero.
//
// PyTorch's forward-mode formulas make an "efficient zero tensor" for every argument without a tangent, and its
// arithmetic walks through Python. At our level such a zero is a flag on a wrapper: products with it stay zero, sums
// drop it, and any other operator gets real zeros. What else the formulas ask around tangents, a primal without its
// tangent or whether sizes are the same, is answered at the door.
#pragma once

#include "op_args.h"

namespace functorch_lite {

class Level;

// Computes the call if it is simple arithmetic and an argument is a symbolic zero. Returns false otherwise.
bool try_zero_arithmetic(const c10::OperatorHandle& op, Stack& stack, Level& level);

}  // namespace functorch_lite
