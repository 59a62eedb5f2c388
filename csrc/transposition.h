// Forward mode from reverse mode, for operators that PyTorch can differentiate backward only.
#pragma once

#include "op_args.h"

namespace functorch_lite {

class AutodiffLevel;

// Runs an operator that has tangents among its arguments with PyTorch's formula or, where there is none, by reverse
// mode: with the Jacobian J, that computes v -> J'v, which is linear in v. So reverse mode through it, applied to the
// tangent t, gives J t, at any v. `keys` lead to PyTorch's formula.
void push_forward(AutodiffLevel& level, const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack& stack);

// The second way alone. Takes the arguments off the stack and leaves the results, with tangents.
void push_forward_by_transposing(AutodiffLevel& level, const c10::OperatorHandle& op, Stack& stack);

}  // namespace functorch_lite
