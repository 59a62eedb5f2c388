// What vmap does with an operator that has no batching rule: decompose it, or loop, or refuse. See fallback.h first.
#include "fallback.h"

#include <ATen/core/enum_tag.h>
#include <ATen/ops/select.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "batch_call.h"
#include "keys.h"

namespace functorch_lite {
namespace {

// The call for one example: every batched tensor is the slice x[i].
Stack slice_arguments(BatchCall& call, int64_t index, bool empty_batch) {
  const auto slice = [&](const at::Tensor& x, int64_t bdim) {
    if (!empty_batch) return at::select(x, bdim, index);
    auto sizes = x.sym_sizes().vec();
    sizes.erase(sizes.begin() + bdim);
    return at::zeros_symint(sizes, x.options());
  };
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

at::Tensor stack_examples(const std::vector<Stack>& examples, size_t result, bool empty_batch) {
  std::vector<at::Tensor> tensors;
  for (const auto& example : examples) tensors.push_back(example[result].toTensor());
  auto stacked = at::stack(tensors);
  return empty_batch ? stacked.narrow(0, 0, 0) : stacked;
}

void loop(const c10::OperatorHandle& op, Stack& stack) {
  python_hooks().warn_loop(op.operator_name());
  BatchCall call(op, stack);
  const auto batch_size = call.batch_size().guard_int(__FILE__, __LINE__);
  const bool empty_batch = batch_size == 0;
  std::vector<Stack> examples;
  for (int64_t i = 0; i < std::max<int64_t>(batch_size, 1); ++i) {
    examples.push_back(slice_arguments(call, i, empty_batch));
    op.callBoxed(&examples.back());
  }
  Stack results;
  for (size_t r = 0; r < op.schema().returns().size(); ++r) {
    const auto& first = examples[0][r];
    if (first.isTensor()) {
      results.emplace_back(first.toTensor().defined() ? stack_examples(examples, r, empty_batch) : at::Tensor());
    } else if (first.isTensorList()) {
      std::vector<at::Tensor> list;
      for (size_t k = 0; k < first.toListRef().size(); ++k) {
        std::vector<at::Tensor> tensors;
        for (const auto& example : examples) tensors.push_back(example[r].toListRef()[k].toTensor());
        auto stacked = at::stack(tensors);
        list.push_back(empty_batch ? stacked.narrow(0, 0, 0) : stacked);
      }
      results.emplace_back(list);
    } else {
      refuse_operator(op, "Its result is not a tensor, so it cannot differ between examples.");
    }
  }
  call.take_results(std::move(results));
  call.finish();
}

void without_rule(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  constexpr auto kComposite = c10::DispatchKey::CompositeImplicitAutograd;
  if (op.hasKernelForDispatchKey(kComposite)) return op.callBoxedForDispatchKey(kComposite, *stack);
  if (op.hasTag(at::Tag::dynamic_output_shape)) {
    refuse_operator(op,
                    "The shape of its result depends on the data, so it would differ between examples. Use an "
                    "operation of fixed shape, for example torch.where, or call it outside vmap.");
  }
  if (op.hasTag(at::Tag::data_dependent_output)) {
    refuse_operator(op,
                    "It turns tensor values into Python values (as .item(), bool(tensor) or `if tensor:` do), and "
                    "each example has another value. Use torch.where in place of `if`, and keep values in tensors.");
  }
  if (python_hooks().install_decomposition(op.operator_name())) {
    return op.redispatchBoxed(c10::DispatchKeySet(kBatchingRules), stack);
  }
  loop(op, *stack);
}

TORCH_LIBRARY_IMPL(_, TESTING_ONLY_GenericWrapper, m) {
  static_assert(kBatchingRules == c10::DispatchKey::TESTING_ONLY_GenericWrapper);
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&without_rule>());
}

}  // namespace

void refuse_operator(const c10::OperatorHandle& op, const std::string& advice) {
  const auto where = python_hooks().user_location();
  TORCH_CHECK_NOT_IMPLEMENTED(false, "vmap: ", op.operator_name(), " cannot run on batched values",
                              where.empty() ? "" : " (at " + where + ")", ". ", advice);
}

PythonHooks& python_hooks() {
  static PythonHooks hooks;
  return hooks;
}

}  // namespace functorch_lite
