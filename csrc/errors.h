// Errors that need a Python class.
#pragma once

#include <string>

namespace functorch_lite {

class Wrapper;

// functorch_lite.EscapedTensorError: a batched tensor was used after its vmap returned.
[[noreturn]] void raise_escaped(const Wrapper& wrapper);

}  // namespace functorch_lite
