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

// How vmap runs an operator on batched values.
enum class Handling : uint8_t {
  kOneLevelDown,   // it takes no tensor, so nothing of it can be batched
  kRule,           // by its batching rule
  kOutForm,        // as the form without `out`, whose results are written into the arguments
  kComposition,    // as PyTorch composes it of other operators
  kPrimitive,      // as one of the steps in which PyTorch writes its decompositions
  kRefusal,        // it cannot: `detail` is the advice to the user
  kDecomposition,  // as PyTorch decomposes it for tracing
  kLoop,           // once for each example
};
struct Plan {
  Handling handling;
  const char* detail = "";
};
// For operators without a batching rule.
Plan plan_without_rule(const c10::OperatorHandle& op);
// For any operator, where nobody but this package has registered rules: what docs/coverage.md lists.
Plan plan_of(const c10::OperatorHandle& op);

// How to attend, other than to what.
struct AttentionOptions {
  double dropout_p;
  bool is_causal;
  std::optional<double> scale;
  bool enable_gqa;
  int64_t rows;  // of queries in a chunk
};

// What the Python side provides, set once, at import.
struct PythonHooks {
  // Whether PyTorch has a decomposition of the operator.
  bool (*has_decomposition)(const c10::OperatorName& name) = nullptr;
  // Registers it as the operator's batching rule.
  void (*install_decomposition)(const c10::OperatorName& name) = nullptr;
  // Warns, once for each place in the user's program, that the operator runs as a loop.
  void (*warn_loop)(const c10::OperatorName& name) = nullptr;
  // "file.py:12", the innermost line of the user's program, or an empty string.
  std::string (*user_location)() = nullptr;
  // What the user's program calls this tensor, "weight" or "self.weight", or an empty string.
  std::string (*name_of_tensor)(const at::Tensor& tensor) = nullptr;
  // scaled_dot_product_attention in memory that is linear in the length of the sequences, at any order of
  // differentiation.
  at::Tensor (*attend_in_chunks)(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                 const std::optional<at::Tensor>& mask, const AttentionOptions& options) = nullptr;
  // The cotangents of query, key, value and, if there is a fourth, mask: differentiable, and linear in memory too.
  std::vector<at::Tensor> (*attend_backward)(const at::Tensor& grad, const std::vector<at::Tensor>& inputs,
                                             const AttentionOptions& options) = nullptr;
  // Calls an operator that writes into arguments as the functional one that can be traced. Leaves the results on the
  // stack, and returns the new values of the arguments; or nothing if PyTorch cannot.
  std::optional<std::vector<at::Tensor>> (*call_auto_functionalized)(const c10::OperatorHandle& op,
                                                                     std::vector<c10::IValue>& stack) = nullptr;
};
PythonHooks& python_hooks();

}  // namespace functorch_lite
