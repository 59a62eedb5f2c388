// Forward mode by transposing reverse mode. See transposition.h first.
#include "transposition.h"

#include <ATen/core/enum_tag.h>
#include <ATen/ops/zeros_like.h>

#include <cstring>
#include <mutex>
#include <optional>
#include <unordered_map>

#include "autodiff_level.h"
#include "generators.h"

namespace functorch_lite {
namespace {

using at::Tensor;

c10::intrusive_ptr<AutodiffLevel> reverse_level() {
  return c10::make_intrusive<AutodiffLevel>(AutodiffLevel::Mode::kReverse);
}

// The tangents of `outputs`, wrappers of the closed reverse level `level`; undefined for those that have none.
std::vector<Tensor> transpose_twice(AutodiffLevel& level, const std::vector<Tensor>& outputs,
                                    const std::vector<Tensor>& inputs, const std::vector<Tensor>& tangents) {
  const auto transposed = reverse_level();
  std::vector<Tensor> cotangents;
  std::vector<Tensor> pulled;
  {
    const OpenLevel recording(*transposed);
    for (const auto& y : outputs) {
      cotangents.push_back(transposed->lift_variable(at::zeros_like(level.value_of(y))));
    }
    pulled = level.backward(outputs, cotangents, inputs, /*keep_graph=*/false);
  }
  std::vector<Tensor> roots;
  std::vector<Tensor> directions;
  for (size_t i = 0; i < pulled.size(); ++i) {
    if (!pulled[i].defined()) continue;
    roots.push_back(pulled[i]);
    directions.push_back(tangents[i]);
  }
  return transposed->backward(roots, directions, cotangents, /*keep_graph=*/false);
}

// Whether PyTorch has a forward mode of an operator. It says so only when it has run the operator.
class ForwardModes {
 public:
  std::optional<bool> has(const c10::OperatorHandle& op) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = known_.find(op);
    return found == known_.end() ? std::nullopt : std::make_optional(found->second);
  }
  void remember(const c10::OperatorHandle& op, bool has) {
    std::lock_guard<std::mutex> lock(mutex_);
    known_.insert_or_assign(op, has);
  }

 private:
  std::mutex mutex_;
  std::unordered_map<c10::OperatorHandle, bool> known_;
};
ForwardModes forward_modes;

bool says_no_forward_mode(const std::exception& error) {
  return std::strstr(error.what(), "Trying to use forward AD with") != nullptr;
}

}  // namespace

void push_forward_by_transposing(AutodiffLevel& level, const c10::OperatorHandle& op, Stack& stack) {
  const auto n = count_arguments(op);
  const auto count = op.schema().returns().size();
  auto* arguments = stack.data() + stack.size() - n;
  const auto reverse = reverse_level();
  std::vector<Tensor> inputs;
  std::vector<Tensor> tangents;
  std::vector<Tensor> outputs;
  std::vector<Tensor> tangents_out;
  {
    const RunBelow below(level);
    {
      const OpenLevel recording(*reverse);
      replace_tensors(arguments, n, [&](const Tensor& x) {
        const auto tangent = level.tangent_of(x);
        if (!tangent.defined()) return level.value_of(x);
        inputs.push_back(reverse->lift_variable(level.value_of(x)));
        tangents.push_back(tangent);
        return inputs.back();
      });
      op.callBoxed(&stack);
    }
    for_each_tensor(stack.data() + stack.size() - count, count, [&](const Tensor& y) {
      if (y.requires_grad() && wrapper_at(y, reverse.get()) != nullptr) outputs.push_back(y);
    });
    tangents_out = transpose_twice(*reverse, outputs, inputs, tangents);
  }
  size_t next = 0;
  replace_tensors(stack.data() + stack.size() - count, count, [&](const Tensor& y) {
    auto result = wrap(reverse->value_of(y), level);
    if (next == outputs.size() || !outputs[next].is_same(y)) return result;
    const auto& tangent = tangents_out[next++];
    return tangent.defined() ? level.with_tangent(result, wrap(tangent, level)) : result;
  });
}

void push_forward(AutodiffLevel& level, const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack& stack) {
  const auto has_formula = forward_modes.has(op);
  if (has_formula == false) return push_forward_by_transposing(level, op, stack);
  if (has_formula == true) return op.redispatchBoxed(keys, &stack);
  const auto n = count_arguments(op);
  const auto below = stack.size() - n;
  const Stack arguments(stack.begin() + static_cast<int64_t>(below), stack.end());
  const auto generator =
      op.hasTag(at::Tag::nondeterministic_seeded) ? generator_of(arguments) : std::optional<at::Generator>();
  const auto state = generator.has_value() ? generator->get_state() : Tensor();
  try {
    op.redispatchBoxed(keys, &stack);
    forward_modes.remember(op, true);
    return;
  } catch (const c10::NotImplementedError& error) {
    if (!says_no_forward_mode(error)) throw;
  }
  forward_modes.remember(op, false);
  if (state.defined()) at::Generator(*generator).set_state(state);
  stack.resize(below);
  stack.insert(stack.end(), arguments.begin(), arguments.end());
  push_forward_by_transposing(level, op, stack);
}

}  // namespace functorch_lite
