// The level of grad, vjp and jvp. Its wrappers carry their own autograd metadata, so PyTorch's derivative formulas,
// reverse and forward, do the calculus at every level.
#pragma once

#include "level.h"
#include "wrapper.h"

namespace functorch_lite {

// Whether the tensor has a forward-mode derivative, of whatever level.
bool has_tangent(const at::Tensor& tensor);

class AutodiffLevel final : public Level {
 public:
  enum class Mode : uint8_t { kReverse, kForward };

  explicit AutodiffLevel(Mode mode);
  ~AutodiffLevel() override;

  void run(const c10::OperatorHandle& op, torch::jit::Stack& stack) override;
  const char* kind() const override { return forward() ? "jvp" : "grad"; }
  bool forward() const { return mode_ == Mode::kForward; }

  // Lifts an input and marks it as a variable of this level.
  at::Tensor lift_variable(const at::Tensor& value);
  // Lifts an input and gives it a tangent.
  at::Tensor lift_dual(const at::Tensor& primal, const at::Tensor& tangent);
  // The tangent of a result, or an undefined tensor.
  at::Tensor tangent_of(const at::Tensor& dual);
  // The value of a result; lower wrappers and plain tensors are their own value.
  at::Tensor value_of(const at::Tensor& tensor);

  // Runs the call on values and wraps the results. `may_be_captured`: a result may share memory with an argument
  // from outside the level.
  void run_below(const c10::OperatorHandle& op, torch::jit::Stack& stack, bool may_be_captured);

 private:
  void lift_fresh(const c10::OperatorHandle& op, torch::jit::Stack& stack, bool is_here);
  bool needs_derivative(const at::Tensor& tensor) const;
  Mode mode_;
};

// Called once, at import.
void register_below_autograd();

}  // namespace functorch_lite
