// The door. See front.h first.
#include "front.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "keys.h"
#include "level.h"
#include "op_args.h"
#include "wrapper.h"

namespace functorch_lite {
namespace {

// Autocast stands above autograd, so its casts are recorded: it acts before the innermost level does, once.
bool autocast_first(const c10::OperatorHandle& op, Stack& stack) {
  const auto keys = c10::autocast_dispatch_keyset - c10::impl::tls_local_dispatch_key_set().excluded_;
  if (C10_LIKELY(keys.empty())) return false;
  const auto key = keys.highestPriorityTypeId();
  if (!op.hasKernelForDispatchKey(key)) return false;
  op.redispatchBoxed(c10::DispatchKeySet(key), &stack);
  return true;
}

// PyTorch's functionalization tries in-place operators on meta tensors, to see whether the shapes fit. Nobody else
// excludes these keys while a level is open.
bool is_shape_check() {
  constexpr auto excluded =
      c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::FuncTorchDynamicLayerFrontMode});
  return c10::impl::tls_local_dispatch_key_set().excluded_.has_all(excluded);
}

}  // namespace

void front(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  // What a transform of torch.func has wrapped and left behind when it returned: its own kernel unwraps it, and calls
  // again. A level would take it for a constant.
  if (C10_UNLIKELY(keys.has(kLeftByTorchFunc))) {
    op.redispatchBoxed(c10::DispatchKeySet(kLeftByTorchFunc), stack);
    return;
  }
  auto* level = current_level();
  if (level == nullptr || is_shape_check()) {
    const auto n = count_arguments(op);
    replace_tensors(stack->data() + stack->size() - n, n, strip_closed_levels);
    const PastTheDoor past_the_door;
    op.callBoxed(stack);
    return;
  }
  if (!autocast_first(op, *stack)) level->run(op, *stack);
}

namespace {

TORCH_LIBRARY_IMPL(_, DeferredInit, m) {
  static_assert(kFront == c10::DispatchKey::DeferredInit);
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&front>());
}

}  // namespace
}  // namespace functorch_lite
