// The vmap level. See vmap_level.h first.
#include "vmap_level.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/enum_tag.h>

#include "keys.h"
#include "op_args.h"
#include "wrapper.h"

namespace functorch_lite {

VmapLevel& current_vmap_level() {
  auto* level = current_level();
  TORCH_INTERNAL_ASSERT(level != nullptr && typeid(*level) == typeid(VmapLevel), "a batching rule ran outside vmap");
  return static_cast<VmapLevel&>(*level);
}

void VmapLevel::on_open() {
  if (chunks_ != nullptr) chunks_->begin(batch_size_.expect_int());
}

void VmapLevel::run(const c10::OperatorHandle& op, Stack& stack) {
  const auto n = count_arguments(op);
  auto* arguments = stack.data() + stack.size() - n;
  bool any_batched = false;
  bool any_closed = false;
  for_each_tensor(arguments, n, [&](const at::Tensor& tensor) {
    const auto* wrapper = as_wrapper(tensor);
    if (wrapper == nullptr) return;
    if (wrapper->level() == this) {
      any_batched = true;
    } else {
      any_closed |= !is_active(wrapper->level());
    }
  });
  if (C10_UNLIKELY(any_closed)) {
    replace_tensors(arguments, n, strip_closed_levels);
    return run(op, stack);
  }
  const bool is_random = op.hasTag(at::Tag::nondeterministic_seeded);
  if (is_random) remember_generator(*this, c10::ArrayRef<c10::IValue>(arguments, n));
  if (!any_batched && !is_random) {
    RunBelow below(*this);
    op.callBoxed(&stack);
    return;
  }
  op.redispatchBoxed(c10::DispatchKeySet(kBatchingRules), &stack);
}

}  // namespace functorch_lite
