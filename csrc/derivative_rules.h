// Derivative rules of our own, for operators where PyTorch has none or a formula that is wrong one derivative later.
//
// Most are compositions of operators whose formulas are right to every order; the composition runs at the level itself,
// so it needs no formula at all. They are judged by finite differences and nested double backward
// (tests/support/derivatives.py).
#pragma once

#include <utility>
#include <vector>

#include "autodiff_level.h"
#include "op_args.h"

namespace functorch_lite {

using Operator = c10::OperatorHandle;

// Takes the arguments off the stack and leaves the results, differentiable at the level.
using DerivativeRule = void (*)(AutodiffLevel& level, const Operator& op, Stack& stack);

// The rule for a call at a level, or null: then PyTorch's formula serves.
DerivativeRule find_derivative_rule(const Operator& op, const AutodiffLevel& level, const Stack& stack);

struct DerivativeRow {
  const char* op;
  DerivativeRule forward;
  DerivativeRule reverse;
  // How many derivatives are taken outside when reverse mode first needs the rule.
  int reverse_from;
  // Whether a call needs the rule, if not all do.
  bool (*applies)(const AutodiffLevel& level, const Operator& op, const Stack& stack) = nullptr;
};

// PyTorch's formula in forward mode is missing, wrong, or wrong one derivative later.
inline DerivativeRow only_forward(const char* op, DerivativeRule rule) { return {op, rule, nullptr, 1000}; }
// So is that in reverse mode. A single reverse mode, which nobody differentiates, keeps PyTorch's fused kernels.
inline DerivativeRow nested(const char* op, DerivativeRule rule) { return {op, rule, rule, 1}; }
// PyTorch has no right formula at all: operators of backward passes, mostly.
inline DerivativeRow always(const char* op, DerivativeRule rule) { return {op, rule, rule, 0}; }

// For an operator that writes its result into its first argument: by the form that returns it.
void write_functional_result(AutodiffLevel& level, const Operator& op, Stack& stack);

// The rows of each file in derivatives/.
const std::vector<DerivativeRow>& norm_derivatives();
const std::vector<DerivativeRow>& linalg_derivatives();
const std::vector<DerivativeRow>& loss_derivatives();
const std::vector<DerivativeRow>& distance_derivatives();
const std::vector<DerivativeRow>& elementwise_derivatives();
const std::vector<DerivativeRow>& forward_derivatives();
const std::vector<DerivativeRow>& indexing_derivatives();
const std::vector<DerivativeRow>& special_derivatives();
const std::vector<DerivativeRow>& attention_derivatives();

// The arguments of one call, taken off the stack in order.
class CallArguments {
 public:
  CallArguments(Stack& stack, size_t n) : values_(torch::jit::pop(stack, n)) {}
  c10::IValue& next() { return values_[next_++]; }
  at::Tensor tensor() { return next().toTensor(); }
  at::Tensor optional_tensor() {
    auto& value = next();
    return value.isNone() ? at::Tensor() : value.toTensor();
  }

 private:
  std::vector<c10::IValue> values_;
  size_t next_ = 0;
};

// A primal and its tangent, zeros if it has none.
struct Dual {
  at::Tensor primal;
  at::Tensor tangent;
  Dual(AutodiffLevel& level, const at::Tensor& x);
};

// The cotangent of x for the cotangent of f(x).
template <class Function>
at::Tensor pull_back(Function&& f, const at::Tensor& x, const at::Tensor& cotangent) {
  const auto level = c10::make_intrusive<AutodiffLevel>(AutodiffLevel::Mode::kReverse);
  at::Tensor variable;
  at::Tensor y;
  {
    const OpenLevel recording(*level);
    variable = level->lift_variable(x);
    y = f(variable);
  }
  return level->backward({y}, {cotangent}, {variable}, /*keep_graph=*/false)[0];
}

}  // namespace functorch_lite
