// What vmap does with an operator that has no batching rule.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <functional>

namespace functorch_lite {

class BatchCall;
class VmapLevel;

// Raises: vmap cannot run `op` on batched values.
[[noreturn]] void refuse_operator(const c10::OperatorHandle& op, const std::string& advice);

// Raises: the examples have other values, and Python wants one.
[[noreturn]] void refuse_python_value(const c10::OperatorHandle& op);

// The one value of these sizes, which depend on data. Raises if examples differ in it, of whatever vmap; 0 if there are
// no examples.
int64_t common_size(const c10::OperatorHandle& op, const at::Tensor& sizes);

// Raises if the vmap that runs was not told what random operators shall do.
void check_randomness(const c10::OperatorHandle& op, const VmapLevel& level);

// Calls the operator once for each example and stacks the results, with the batch in front.
void run_each_example(BatchCall& call, const std::function<void(int64_t example)>& before_each = nullptr);

// What the Python side provides, set once, at import.
struct PythonHooks {
  // Registers a decomposition of the operator as its batching rule, if PyTorch has one.
  bool (*install_decomposition)(const c10::OperatorName& name) = nullptr;
  // Warns, once for each place in the user's program, that the operator runs as a loop.
  void (*warn_loop)(const c10::OperatorName& name) = nullptr;
  // "file.py:12", the innermost line of the user's program, or an empty string.
  std::string (*user_location)() = nullptr;
  // What the user's program calls this tensor, "weight" or "self.weight", or an empty string.
  std::string (*name_of_tensor)(const at::Tensor& tensor) = nullptr;
};
PythonHooks& python_hooks();

}  // namespace functorch_lite
