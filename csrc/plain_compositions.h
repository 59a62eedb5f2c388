// Operators as compositions of plain ones, for levels that need every derivative or batching rule of them. PyTorch's
// own compositions and formulas choose fused kernels, write in place where one argument is batched and another is not,
// or look at values.
#pragma once

#include <ATen/core/Tensor.h>

#include "op_args.h"

namespace functorch_lite {

// Takes and leaves boxed arguments.
using PlainComposition = void (*)(const c10::OperatorHandle& op, Stack& stack);

// Operators of aten, as "lstm.input", with their compositions. Both kinds of level use them.
struct PlainRow {
  const char* op;
  PlainComposition composition;
};
const std::vector<PlainRow>& attention_compositions();
const std::vector<PlainRow>& recurrent_compositions();
const std::vector<PlainRow>& indexing_compositions();
const std::vector<PlainRow>& loss_compositions();

// The composition of an operator, or null.
PlainComposition find_plain_composition(const c10::OperatorName& name);

// nn.TransformerEncoder makes one of its padded input, as a faster path.
constexpr auto kNoNestedTensors =
    "A nested tensor cannot be a batch of examples. Make the nn.TransformerEncoder with enable_nested_tensor=False.";

// int64[n] on the CPU.
at::Tensor tensor_of(const std::vector<int64_t>& numbers);

// The boxed arguments of a composition, by name.
class NamedArguments {
 public:
  NamedArguments(const c10::OperatorHandle& op, const Stack& stack) : op_(op), stack_(stack) {}
  const c10::IValue& operator[](const char* name) const {
    const auto index = op_.schema().argumentIndexWithName(name);
    TORCH_INTERNAL_ASSERT(index.has_value(), op_.operator_name(), " has no argument '", name, "'");
    return stack_[stack_.size() - count_arguments(op_) + *index];
  }
  at::Tensor tensor(const char* name) const { return (*this)[name].toTensor(); }
  bool flag(const char* name) const { return (*this)[name].toBool(); }
  bool has(const char* name) const { return op_.schema().argumentIndexWithName(name).has_value(); }
  // The tensor, or none if it is left out in any of the ways that PyTorch has for it.
  std::optional<at::Tensor> optional_tensor(const char* name) const {
    const auto& value = (*this)[name];
    return value.isTensor() && value.toTensor().defined() ? std::optional(value.toTensor()) : std::nullopt;
  }

 private:
  const c10::OperatorHandle& op_;
  const Stack& stack_;
};

}  // namespace functorch_lite
