// An operator call whose tensors are slots: numbers of tensors that are found elsewhere when it runs again.
#pragma once

#include "op_args.h"

namespace functorch_lite {

using Slot = int64_t;

// Where a call has a tensor, in place of which there is a slot.
struct SlotOperand {
  size_t argument;
  int64_t element;  // of a list, otherwise -1
  Slot slot;
};

// Every place for a tensor in values[0..n), also an empty one.
template <class Visit>
void for_each_place(const c10::IValue* values, size_t n, Visit&& visit) {
  for (size_t i = 0; i < n; ++i) {
    if (values[i].isTensor()) {
      visit(values[i].toTensor());
    } else if (values[i].isList() && holds_tensor_list(values[i])) {
      for (const auto& element : values[i].toListRef()) visit(element.isTensor() ? element.toTensor() : at::Tensor());
    }
  }
}

// The results that are not arguments written in place.
template <class Visit>
void for_each_new_result(const c10::FunctionSchema& schema, const c10::IValue* results, Visit&& visit) {
  for (size_t i = 0; i < schema.returns().size(); ++i) {
    if (written_argument(schema, i) < 0) for_each_place(results + i, 1, visit);
  }
}

// Takes the tensors out of `arguments`, which must not be the caller's.
template <class SlotOf>
std::vector<SlotOperand> take_operands(Stack& arguments, SlotOf&& slot_of) {
  std::vector<SlotOperand> operands;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto given = arguments[i];
    const bool is_list = !given.isTensor();
    if (is_list && holds_tensor_list(given)) arguments[i] = given.toList().copy();
    int64_t element = 0;
    for_each_place(&given, 1, [&](const at::Tensor& tensor) {
      const auto place = is_list ? element++ : -1;
      if (!tensor.defined() || tensor.unsafeGetTensorImpl()->is_wrapped_number()) return;
      operands.push_back({i, place, slot_of(tensor)});
      if (is_list) {
        arguments[i].toList().set(place, at::Tensor());
      } else {
        arguments[i] = at::Tensor();
      }
    });
  }
  return operands;
}

// Puts the arguments on the stack, with tensors from slots.
inline void push_arguments(Stack& stack, const Stack& arguments, const std::vector<SlotOperand>& operands,
                           const std::vector<at::Tensor>& slots) {
  const auto begin = stack.size();
  stack.insert(stack.end(), arguments.begin(), arguments.end());
  for (const auto& operand : operands) {
    auto& argument = stack[begin + operand.argument];
    if (operand.element < 0) {
      argument = slots[operand.slot];
      continue;
    }
    // The list belongs to `arguments` until it has been copied.
    if (argument.is(arguments[operand.argument])) argument = argument.toList().copy();
    argument.toList().set(operand.element, slots[operand.slot]);
  }
}

}  // namespace functorch_lite
