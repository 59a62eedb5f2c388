// The results of an operator that are arguments, written in place.
#pragma once

#include <ATen/core/enum_tag.h>
#include <ATen/ops/alias.h>

#include "op_args.h"
#include "wrapper.h"

namespace functorch_lite {

// Remembers such arguments as user code holds them, while the operator runs on their values.
class WrittenArguments {
 public:
  WrittenArguments(const c10::FunctionSchema& schema, const c10::IValue* arguments) {
    for (size_t i = 0; i < schema.returns().size(); ++i) {
      const auto index = written_argument(schema, i);
      if (index < 0) continue;
      by_result_.resize(schema.returns().size());
      by_result_[i] = arguments[index];
    }
  }

  // If result i is an argument, puts that in its place, brings its wrappers of `level` up to date, and returns true.
  bool restore(size_t i, c10::IValue& result, const Level& level) {
    if (i >= by_result_.size() || by_result_[i].isNone()) return false;
    result = std::move(by_result_[i]);
    for_each_tensor(&result, 1, [&](const at::Tensor& tensor) {
      if (auto* wrapper = wrapper_at(tensor, &level)) wrapper->refresh();
    });
    return true;
  }

 private:
  c10::SmallVector<c10::IValue, 1> by_result_;  // None for the others
};

// `squeeze` for `squeeze_`: the operator that makes a view where this one changes the tensor object.
inline std::optional<c10::OperatorHandle> view_form(const c10::OperatorHandle& op) {
  if (!op.hasTag(at::Tag::inplace_view)) return std::nullopt;
  auto name = op.operator_name();
  if (name.name.back() != '_') return std::nullopt;
  name.name.pop_back();
  if (name.name == "aten::transpose") name.overload_name = "int";
  const auto view = c10::Dispatcher::singleton().findSchema(name);
  const bool is_view = view.has_value() && view->schema().returns()[0].alias_info() != nullptr;
  return is_view ? view : std::nullopt;
}

// How to run an operator, or a rule made of operators, one level below `level` on the values of these arguments.
inline BelowKeys keys_below(const Level& level, const c10::IValue* arguments, size_t n) {
  if (level.parent() != nullptr || a_mode_is_on()) return BelowKeys::kOuter;
  bool passes = true;
  for_each_tensor(arguments, n, [&](const at::Tensor& tensor) {
    const auto* wrapper = wrapper_at(tensor, &level);
    passes = passes && passes_autograd(wrapper != nullptr ? wrapper->value() : tensor);
  });
  return passes ? BelowKeys::kPastAutograd : BelowKeys::kOuter;
}

// Runs an operator on the values of the wrappers of `level`, which must not be the innermost one any more. The wrappers
// that it writes into are still to be brought up to date.
inline void call_on_values(const c10::OperatorHandle& op, Stack& stack, const Level& level) {
  const auto n = count_arguments(op);
  auto* arguments = stack.data() + stack.size() - n;
  auto* target = n > 0 && arguments[0].isTensor() ? wrapper_at(arguments[0].toTensor(), &level) : nullptr;
  replace_tensors(arguments, n, [&](const at::Tensor& tensor) { return value_at(tensor, &level); });
  // A change of the value's own shape would be seen by those who saved it, and by tensors of outer levels.
  const auto view = target != nullptr ? view_form(op) : std::nullopt;
  if (!view.has_value()) {
    if (target != nullptr && op.hasTag(at::Tag::inplace_view)) {
      target->replace_value(at::alias(target->value()), target->bdim());
      arguments[0] = target->value();
    }
    return op.callBoxed(&stack);
  }
  view->callBoxed(&stack);
  target->replace_value(stack.back().toTensor(), target->bdim());
}

}  // namespace functorch_lite
