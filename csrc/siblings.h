// Operators that do the work of another one, found by name and by the types of their arguments.
#pragma once

#include <vector>

#include "op_args.h"

namespace functorch_lite {

struct Sibling {
  c10::OperatorHandle op;
  // For each of its arguments the position in the original's that it takes, or -1 for its default.
  std::vector<int64_t> positions;

  // Its arguments, from those of the original.
  Stack arguments(const Stack& originals) const;
};

// Whether the operator writes its results into arguments, as torch.sin(x, out=y) does.
bool is_out_form(const c10::FunctionSchema& schema);

// For `sin.out` the form that returns a new tensor; for `_foreach_sin_` the operator for one element of its lists.
// Null if there is none. Only for operators of aten.
const Sibling* find_sibling(const c10::OperatorHandle& op);

}  // namespace functorch_lite
