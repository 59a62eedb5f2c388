// What the rules need for operators whose results have a size that depends on values: all examples must agree on it.
#pragma once

#include "../batch_call.h"

namespace functorch_lite {

// Whether the values of the tensor can be looked at: not while tracing, nor on meta tensors.
bool has_values(const at::Tensor& x);
// mask[B,*] of rank r -> positions[B,k,r] of its k true elements, in order.
at::Tensor positions_of_true(BatchCall& call, const at::Tensor& mask);

}  // namespace functorch_lite
