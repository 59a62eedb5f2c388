// The door: one operator call goes to the innermost level.
#pragma once

#include <ATen/core/stack.h>
#include <c10/core/DispatchKeySet.h>

namespace c10 {
class OperatorHandle;
}

namespace functorch_lite {

void front(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack);

// Whether calls may take the shortcuts of fast_paths.cpp, which know no rule but their own. Off while somebody has
// replaced the rule of an operator that has one.
void set_fast_paths(bool on);

}  // namespace functorch_lite
