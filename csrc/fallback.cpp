// What vmap does with an operator that has no batching rule: decompose it, or loop, or refuse. See fallback.h first.
#include "fallback.h"

#include <ATen/core/enum_tag.h>
#include <ATen/ops/aminmax.h>
#include <ATen/ops/select.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <functional>

#include "batch_call.h"
#include "generators.h"
#include "keys.h"
#include "out_forms.h"
#include "rule.h"

namespace functorch_lite {
namespace {

// Tensor, Tensor?, Tensor[] or Tensor?[]
bool is_tensor_type(const c10::Type& type) {
  if (type.kind() == c10::TypeKind::TensorType) return true;
  const auto inner = type.containedTypes();
  return inner.size() == 1 && is_tensor_type(*inner[0]);
}

using Slice = std::function<at::Tensor(const at::Tensor& x, int64_t bdim)>;

// The call for one example: every batched tensor is replaced by its slice.
Stack slice_arguments(BatchCall& call, const Slice& slice) {
  Stack arguments;
  for (size_t i = 0; i < call.size(); ++i) {
    c10::IValue value = call.arg(i);
    if (call.is_batched(i)) {
      value = slice(call.tensor(i), call.bdim(i));
    } else if (call.is_list_batched(i)) {
      size_t k = 0;
      replace_tensors(&value, 1,
                      [&](const at::Tensor& x) { return call.is_element_batched(i, k++) ? slice(x, 0) : x; });
    }
    arguments.push_back(std::move(value));
  }
  return arguments;
}

// An empty batch has no example. Shapes and dtypes come from a run on meta tensors, which hold no numbers, or on zeros
// where the operator needs some.
Stack run_example_of_empty_batch(BatchCall& call) {
  const auto run_on = [&](std::optional<c10::Device> device) {
    auto arguments = slice_arguments(call, [&](const at::Tensor& x, int64_t bdim) {
      auto sizes = x.sym_sizes().vec();
      sizes.erase(sizes.begin() + bdim);
      return at::zeros_symint(sizes, x.options().device(device.value_or(x.device())));
    });
    if (device.has_value()) {
      replace_tensors(arguments.data(), arguments.size(), [&](const at::Tensor& x) { return x.to(*device); });
    }
    call.op().callBoxed(&arguments);
    return arguments;
  };
  c10::Device home = c10::kCPU;
  for (size_t i = 0; i < call.size(); ++i)
    for_each_tensor(&call.arg(i), 1, [&](const at::Tensor& x) { home = x.device(); });
  Stack results;
  try {
    results = run_on(c10::Device(c10::kMeta));
  } catch (const std::exception&) {
    return run_on(std::nullopt);
  }
  replace_tensors(results.data(), results.size(), [&](const at::Tensor& x) {
    return x.is_meta() ? at::zeros_symint(x.sym_sizes(), x.options().device(home)) : x;
  });
  return results;
}

template <class Pick>
at::Tensor stack_examples(const c10::OperatorHandle& op, const std::vector<Stack>& examples, bool empty_batch,
                          Pick&& pick) {
  std::vector<at::Tensor> tensors;
  for (const auto& example : examples) {
    tensors.push_back(pick(example).toTensor());
    const auto& [first, last] = std::tie(tensors.front(), tensors.back());
    if (first.sym_sizes() == last.sym_sizes()) continue;
    refuse_operator(
        op, c10::str("The shape of its result depends on the data: it is ", first.sym_sizes(), " in example 0 and ",
                     last.sym_sizes(), " in example ", tensors.size() - 1,
                     ". Use an operation of fixed shape, for example torch.where, or call it outside vmap."));
  }
  auto stacked = at::stack(tensors);
  return empty_batch ? stacked.narrow(0, 0, 0) : stacked;
}

void loop(const c10::OperatorHandle& op, Stack& stack) {
  const bool is_random = op.hasTag(at::Tag::nondeterministic_seeded);
  if (is_random) check_randomness(op, current_vmap_level());
  python_hooks().warn_loop(op.operator_name());
  BatchCall call(op, stack);
  is_random ? draw_each_example(call) : run_each_example(call);
}

constexpr const char* kPythonValue =
    "It turns tensor values into Python values (as .item(), bool(tensor) or `if tensor:` do), and each example has "
    "another value. Use torch.where in place of `if`, and keep values in tensors.";
constexpr auto kImplicit = c10::DispatchKey::CompositeImplicitAutograd;
constexpr auto kExplicit = c10::DispatchKey::CompositeExplicitAutograd;

void without_rule(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  const auto plan = plan_without_rule(op);
  switch (plan.handling) {
    case Handling::kOutForm:
      return run_out_form(op, *stack);
    case Handling::kComposition:
      return op.callBoxedForDispatchKey(kImplicit, *stack);
    case Handling::kPrimitive:
      return op.callBoxedForDispatchKey(kExplicit, *stack);
    case Handling::kRefusal:
      refuse_operator(op, plan.detail);
    case Handling::kDecomposition:
      python_hooks().install_decomposition(op.operator_name());
      return op.redispatchBoxed(c10::DispatchKeySet(kBatchingRules), stack);
    default:
      loop(op, *stack);
  }
}

TORCH_LIBRARY_IMPL(_, TESTING_ONLY_GenericWrapper, m) {
  static_assert(kBatchingRules == c10::DispatchKey::TESTING_ONLY_GenericWrapper);
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&without_rule>());
}

}  // namespace

Plan plan_without_rule(const c10::OperatorHandle& op) {
  if (has_functional_form(op)) return {Handling::kOutForm};
  if (op.hasKernelForDispatchKey(kImplicit)) return {Handling::kComposition};
  if (op.hasTag(at::Tag::data_dependent_output)) {
    return {Handling::kRefusal, kPythonValue};
  }
  if (op.hasTag(at::Tag::inplace_view)) {
    return {Handling::kRefusal,
            "It gives a tensor another shape in place. Use the out-of-place form, for example x.reshape(...) or "
            "x[:n]."};
  }
  const auto& name = op.operator_name();
  if (name.getNamespace() == "prims" && op.hasKernelForDispatchKey(kExplicit)) return {Handling::kPrimitive};
  if (python_hooks().has_decomposition(name)) return {Handling::kDecomposition};
  for (const auto& result : op.schema().returns()) {
    if (is_tensor_type(*result.type())) continue;
    return {Handling::kRefusal, "Its result is not a tensor, so it cannot differ between examples."};
  }
  return {Handling::kLoop};
}

Plan plan_of(const c10::OperatorHandle& op) {
  const auto& arguments = op.schema().arguments();
  const bool takes_tensor = std::any_of(arguments.begin(), arguments.end(),
                                        [](const c10::Argument& argument) { return is_tensor_type(*argument.type()); });
  if (!takes_tensor && !op.hasTag(at::Tag::nondeterministic_seeded)) return {Handling::kOneLevelDown};
  if (const auto* row = RuleTable::find(op.operator_name())) {
    return {row->advice == nullptr ? Handling::kRule : Handling::kRefusal,
            row->advice == nullptr ? row->family : row->advice};
  }
  return plan_without_rule(op);
}

void run_each_example(BatchCall& call, const std::function<void(int64_t example)>& before_each) {
  const auto batch_size = call.batch_size().guard_int(__FILE__, __LINE__);
  const bool empty_batch = batch_size == 0;
  std::vector<Stack> examples;
  if (empty_batch) examples.push_back(run_example_of_empty_batch(call));
  for (int64_t i = 0; i < batch_size; ++i) {
    if (before_each) before_each(i);
    examples.push_back(
        slice_arguments(call, [&](const at::Tensor& x, int64_t bdim) { return at::select(x, bdim, i); }));
    call.op().callBoxed(&examples.back());
  }
  Stack results;
  for (size_t r = 0; r < call.schema().returns().size(); ++r) {
    const auto result = [&](const Stack& example) -> const c10::IValue& { return example[r]; };
    const auto& first = result(examples[0]);
    if (first.isTensor()) {
      results.emplace_back(first.toTensor().defined() ? stack_examples(call.op(), examples, empty_batch, result)
                                                      : at::Tensor());
    } else {
      std::vector<at::Tensor> list;
      for (size_t k = 0; k < first.toListRef().size(); ++k) {
        list.push_back(stack_examples(call.op(), examples, empty_batch,
                                      [&](const Stack& example) { return result(example).toListRef()[k]; }));
      }
      results.emplace_back(list);
    }
  }
  call.take_results(std::move(results));
  call.finish();
}

void refuse_operator(const c10::OperatorHandle& op, const std::string& advice) {
  const auto where = python_hooks().user_location();
  TORCH_CHECK_NOT_IMPLEMENTED(false, "vmap: ", op.operator_name(), " cannot run on batched values",
                              where.empty() ? "" : " (at " + where + ")", ". ", advice);
}

void refuse_python_value(const c10::OperatorHandle& op) { refuse_operator(op, kPythonValue); }

int64_t common_size(const c10::OperatorHandle& op, const at::Tensor& sizes) {
  const auto& values = innermost_value(sizes);
  if (values.numel() == 0) return 0;
  const auto [low, high] = at::aminmax(values);
  const auto smallest = low.item<int64_t>();
  const auto largest = high.item<int64_t>();
  if (smallest != largest) {
    refuse_operator(
        op, c10::str("The size of its result depends on the data: it is ", smallest, " in one example and ", largest,
                     " in another, and all must have one shape. Use an operation of fixed shape, "
                     "for example torch.where, or call it outside vmap."));
  }
  return smallest;
}

void check_randomness(const c10::OperatorHandle& op, const VmapLevel& level) {
  if (level.randomness() != VmapLevel::Randomness::kError) return;
  const auto where = python_hooks().user_location();
  TORCH_CHECK(false, "vmap: the function called the random operator ", op.operator_name(),
              where.empty() ? "" : " (at " + where + ")",
              ", and randomness='error'. Pass randomness='different' to vmap for other numbers in each example, or "
              "randomness='same' for the same numbers in all.");
}

PythonHooks& python_hooks() {
  static PythonHooks hooks;
  return hooks;
}

}  // namespace functorch_lite
