// Operators that write their results into arguments, as torch.sin(x, out=y) does, at a vmap level.
#pragma once

#include "op_args.h"

namespace functorch_lite {

// Whether `op` has `out` arguments, and a form that returns new tensors.
bool has_functional_form(const c10::OperatorHandle& op);

// Runs that form, and gives its results to the `out` arguments.
void run_out_form(const c10::OperatorHandle& op, Stack& stack);

}  // namespace functorch_lite
