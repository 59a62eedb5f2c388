// The table of derivative rules. See derivative_rules.h first.
#include "derivative_rules.h"

#include <ATen/ops/zeros_like.h>

#include <unordered_map>

#include "wrapper.h"

namespace functorch_lite {
namespace {

using DerivativeTable = std::unordered_map<Operator, DerivativeRow>;

DerivativeTable make_derivative_table() {
  DerivativeTable table;
  for (const auto* rows : {&norm_derivatives(), &linalg_derivatives(), &loss_derivatives(), &distance_derivatives(),
                           &forward_derivatives(), &elementwise_derivatives(), &indexing_derivatives(),
                           &special_derivatives(), &attention_derivatives()}) {
    for (const auto& row : *rows) table.emplace(find_operator(row.op), row);
  }
  return table;
}

// How many derivatives are taken outside the level: by levels, and by PyTorch outside of all.
int derivatives_outside(const AutodiffLevel& level, const Operator& op, const Stack& stack) {
  int count = 0;
  for (const auto* l = level.parent(); l != nullptr; l = l->parent()) count += l->has_variables();
  const auto n = count_arguments(op);
  bool plain = false;
  for_each_tensor(stack.data() + stack.size() - n, n, [&](const at::Tensor& x) {
    const auto& value = innermost_value(x);
    plain |= value.requires_grad() || has_tangent(value);
  });
  return count + plain;
}

}  // namespace

DerivativeRule find_derivative_rule(const Operator& op, const AutodiffLevel& level, const Stack& stack) {
  static const DerivativeTable table = make_derivative_table();
  const auto found = table.find(op);
  if (found == table.end()) return nullptr;
  const auto& row = found->second;
  if (row.applies != nullptr && !row.applies(level, op, stack)) return nullptr;
  if (level.is_forward()) return row.forward;
  const bool needed = row.reverse_from == 0 || derivatives_outside(level, op, stack) >= row.reverse_from;
  return needed ? row.reverse : nullptr;
}

void write_functional_result(AutodiffLevel&, const Operator& op, Stack& stack) {
  auto name = op.operator_name();
  name.name.pop_back();  // the underscore
  auto& first = stack[stack.size() - count_arguments(op)];
  const auto target = first.toTensor();
  first = target.clone();  // what autograd saves must not be what is written
  c10::Dispatcher::singleton().findSchemaOrThrow(name.name.c_str(), name.overload_name.c_str()).callBoxed(&stack);
  target.copy_(torch::jit::pop(stack).toTensor());
  torch::jit::push(stack, target);
}

Dual::Dual(AutodiffLevel& level, const at::Tensor& x) : primal(wrap(level.value_of(x), level)) {
  const auto t = level.tangent_of(x);
  tangent = t.defined() ? wrap(t, level) : at::zeros_like(primal);
}

}  // namespace functorch_lite
