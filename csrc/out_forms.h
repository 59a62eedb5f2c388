// Operators that write their results into arguments, as torch.sin(x, out=y) does, at a vmap level.
#pragma once

#include "op_args.h"

namespace functorch_lite {

// Runs the form of `op` that returns new tensors, and gives its results to the `out` arguments. False, and nothing is
// done, if `op` has no `out` argument or no such form.
bool try_out_form(const c10::OperatorHandle& op, Stack& stack);

}  // namespace functorch_lite
