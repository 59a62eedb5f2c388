// The door: one operator call goes to the innermost level.
#pragma once

#include <ATen/core/boxing/BoxedKernel.h>
#include <ATen/core/boxing/impl/boxing.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

namespace functorch_lite {

using BoxedFunction = c10::BoxedKernel::BoxedKernelFunction_withDispatchKeys;

void front(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack);

// Calls a boxed function, by default the door, for the operator `Op` of at::_ops.
template <class Op, BoxedFunction* function = &front, class... Args>
decltype(auto) call_boxed(c10::DispatchKeySet keys, const Args&... args) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(Op::name, Op::overload_name);
  static const auto kernel = c10::BoxedKernel::makeFromFunction<function>();
  return c10::impl::BoxedKernelWrapper<typename Op::schema>::call(kernel, op, keys, args...);
}

// Whether calls may take the shortcuts of fast_paths.cpp, which know no rule but their own. Off while somebody has
// replaced the rule of an operator that has one.
void set_fast_paths(bool on);

}  // namespace functorch_lite
