// Running a program. See replay.h first.
#include "replay.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <sstream>

namespace functorch_lite {

namespace {

bool is_held_by_nobody_else(const at::Tensor& tensor) {
  return tensor.use_count() == 1 && tensor.storage().use_count() == 1;
}

}  // namespace

at::Tensor Program::show(const View& view, const Tensors& slots) {
  const auto& base = slots[view.base];
  TORCH_INTERNAL_ASSERT(view.base_layout.fits(base), "jit: a tensor lies in memory in another way than before: sizes ",
                        base.sizes(), ", strides ", base.strides());
  auto impl = c10::make_intrusive<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(base.storage()), base.key_set(),
                                                   base.dtype());
  impl->set_sizes_and_strides(view.layout.sizes, view.layout.strides, base.storage_offset() + view.offset);
  return at::Tensor(std::move(impl));
}

void Program::perform(const Call& call, Tensors& slots, Stack& stack, bool may_overwrite) {
  const bool writes =
      call.in_place.has_value() &&
      (!call.overwrites_input || (may_overwrite && is_held_by_nobody_else(slots[call.operands[0].slot])));
  push_arguments(stack, call.arguments, call.operands, slots);
  (writes ? *call.in_place : call.op).callBoxed(&stack);
  size_t i = 0;
  for_each_new_result(call.op.schema(), stack.data(),
                      [&](const at::Tensor& result) { slots[call.results[i++]] = result; });
  stack.clear();
}

Tensors Program::run(Tensors inputs, bool may_overwrite) const {
  TORCH_CHECK(inputs.size() == inputs_.size(), "jit: got ", inputs.size(), " inputs, expected ", inputs_.size());
  const at::AutoDispatchBelowADInplaceOrView unrecorded;
  const c10::impl::ExcludeDispatchKeyGuard uncast(c10::autocast_dispatch_keyset);
  auto slots = std::move(inputs);
  slots.resize(slots_);
  for (const auto slot : unused_inputs_) slots[slot].reset();
  Stack stack;
  for (const auto& step : steps_) {
    if (const auto* call = std::get_if<Call>(&step.does)) {
      perform(*call, slots, stack, may_overwrite);
    } else {
      const auto& view = std::get<View>(step.does);
      slots[view.result] = show(view, slots);
    }
    for (const auto slot : step.last_used) slots[slot].reset();
  }
  Tensors outputs;
  outputs.reserve(outputs_.size());
  for (const auto slot : outputs_) outputs.push_back(slots[slot]);
  return outputs;
}

std::string Program::describe() const {
  std::ostringstream text;
  for (const auto& step : steps_) {
    if (const auto* call = std::get_if<Call>(&step.does)) {
      const bool always_writes = call->in_place.has_value() && !call->overwrites_input;
      text << c10::toString((always_writes ? *call->in_place : call->op).operator_name()) << '(';
      for (const auto& operand : call->operands) text << '%' << operand.slot << ' ';
      text << ") ->";
      for (const auto slot : call->results) text << " %" << slot;
    } else {
      const auto& view = std::get<View>(step.does);
      text << "view(%" << view.base << ") -> %" << view.result << ' ' << at::IntArrayRef(view.layout.sizes);
    }
    text << '\n';
  }
  return text.str();
}

}  // namespace functorch_lite
