// The results of an operator that are arguments, written in place.
#pragma once

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

}  // namespace functorch_lite
