// The level of grad, vjp and jvp. Its wrappers carry their own autograd metadata, so PyTorch's derivative formulas,
// reverse and forward, do the calculus at every level.
#pragma once

#include "level.h"
#include "wrapper.h"

namespace functorch_lite {

// For a tensor that is to be written into. If its memory was written through another view, autograd knows its new place
// in the graph only once it has been asked for it, and would take it for a leaf.
inline void bring_graph_up_to_date(const at::Tensor& target) {
  if (target.requires_grad()) target.grad_fn();
}

// Whether the tensor has a forward-mode derivative, of whatever level.
bool has_tangent(const at::Tensor& tensor);

// Whether a level that the tensor is wrapped for, or plain PyTorch, could differentiate through it in these modes.
bool may_be_differentiated(const at::Tensor& tensor,
                           const AutogradModes& modes = {.grad = true, .forward_grad = true, .inference = false});

class AutodiffLevel final : public Level {
 public:
  enum class Mode : uint8_t { kReverse, kForward };

  // `transform`: what messages call it, if it is not plainly grad or jvp.
  explicit AutodiffLevel(Mode mode, std::string transform = "");

  void run(const c10::OperatorHandle& op, torch::jit::Stack& stack) override;
  bool differentiates() const override { return true; }
  bool has_variables() const override { return has_variables_; }
  const char* kind() const override { return is_forward() ? "jvp" : "grad"; }
  bool is_forward() const override { return mode_ == Mode::kForward; }
  std::string transform() const { return transform_.empty() ? kind() : transform_; }

  // Lifts an input and marks it as a variable of this level.
  at::Tensor lift_variable(const at::Tensor& value);
  // Lifts an input and gives it a tangent.
  at::Tensor lift_dual(const at::Tensor& primal, const at::Tensor& tangent);
  // A constant of this level, with a tangent that is one too.
  at::Tensor with_tangent(at::Tensor constant, const at::Tensor& tangent);
  // The tangent of a result, or an undefined tensor.
  at::Tensor tangent_of(const at::Tensor& dual);
  // Makes `target`, a wrapper of this level whose value was written into, depend on what `result` depends on.
  void take_derivative(const at::Tensor& target, const at::Tensor& result);
  // The value of a result; lower wrappers and plain tensors are their own value.
  at::Tensor value_of(const at::Tensor& tensor);

  // The cotangents of `inputs`, undefined where an output does not depend on one. To be called when the level is
  // closed: formulas run on values. Grad mode is on while they do if anybody outside can differentiate the result: some
  // choose a shortcut without derivative otherwise.
  std::vector<at::Tensor> backward(const std::vector<at::Tensor>& outputs, const std::vector<at::Tensor>& cotangents,
                                   const std::vector<at::Tensor>& inputs, bool keep_graph);

  // torch.autograd.grad, for code that runs at the level.
  static std::vector<at::Tensor> gradients(const std::vector<at::Tensor>& outputs,
                                           const std::vector<at::Tensor>& cotangents,
                                           const std::vector<at::Tensor>& inputs, bool keep_graph, bool create_graph,
                                           bool allow_unused);

  struct Below {
    bool may_be_captured = false;  // a result may share memory with an argument from outside the level
    bool same_keys = false;        // see BelowKeys
    bool is_recorded = false;      // autograd has been passed at this level, so it is one operator with a kernel
  };
  // Whether the tensor, a wrapper of this level, has a derivative.
  bool needs_derivative(const at::Tensor& tensor) const {
    return is_forward() ? has_tangent(tensor) : tensor.requires_grad();
  }
  // Runs the call on values and wraps the results.
  void run_below(const c10::OperatorHandle& op, torch::jit::Stack& stack, Below how);

 protected:
  void on_open() override;
  void on_close() override;

 private:
  Mode mode_;
  bool has_variables_ = false;
  std::string transform_;
};

// Whether autograd, seeing this tensor beside those of a level, would take another level's derivative for its own.
inline bool carries_foreign_derivative(const at::Tensor& tensor) {
  return tensor.requires_grad() || has_tangent(tensor);
}

// Where PyTorch's autograd kernels arrive once they have recorded a call at the innermost level.
void below_autograd(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack);

// Called once, at import.
void register_below_autograd();

}  // namespace functorch_lite
