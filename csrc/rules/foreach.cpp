// Operators on lists of tensors: the operator for one element, applied to each.
#include <ATen/TensorOperators.h>

#include "../siblings.h"
#include "rules.h"

namespace functorch_lite {
namespace {

// Each element by its own operator, on the wrappers. Everything that broadcasts, promotes or writes is that one's part.
void foreach_elements(const c10::OperatorHandle& op, Stack& stack) {
  const auto* sibling = find_sibling(op);
  TORCH_INTERNAL_ASSERT(sibling != nullptr, op.operator_name(), " has no operator for one element");
  const Stack arguments = torch::jit::pop(stack, count_arguments(op));
  std::optional<size_t> length;
  for (const auto& argument : arguments) {
    if (!argument.isList()) continue;
    const auto n = argument.toListRef().size();
    TORCH_CHECK_VALUE(!length.has_value() || n == *length, "vmap: ", op.operator_name().name, " got lists of ", *length,
                      " and of ", n, " elements. All lists must have one length.");
    length = n;
  }
  std::vector<at::Tensor> results;
  for (size_t k = 0; k < *length; ++k) {
    auto element = arguments;
    for (auto& argument : element) {
      if (argument.isList()) argument = c10::IValue(argument.toListRef()[k]);
    }
    auto call = sibling->arguments(element);
    sibling->op.callBoxed(&call);
    results.push_back(call[0].toTensor());
  }
  if (!op.schema().returns().empty()) torch::jit::push(stack, std::move(results));
}

// Whether the lists agree in where the batch is, in rank and in dtype, so that pointwise arithmetic sees no difference
// between the elements and their values. `batched` gets the elements of the first list.
bool are_aligned(c10::ArrayRef<c10::IValue> arguments, const Level& level, std::vector<const Wrapper*>& batched) {
  for (const auto& argument : arguments) {
    if (argument.isTensor()) return false;
    if (!holds_tensor_list(argument)) continue;
    const auto& list = argument.toListRef();
    for (size_t k = 0; k < list.size(); ++k) {
      const auto* element = wrapper_at(list[k].toTensor(), &level);
      if (element == nullptr || element->bdim() == kNoBatchDim) return false;
      if (k == batched.size()) batched.push_back(element);
      const auto& first = *batched[k];
      const bool agree =
          element->bdim() == first.bdim() && element->dim() == first.dim() && element->dtype() == first.dtype();
      if (!agree) return false;
    }
  }
  return true;
}

// x[k][..,B,..], y[k][..,B,..] -> z[k][..,B,..] in one call, which a GPU runs as one kernel; otherwise each by itself.
void foreach_pointwise(const c10::OperatorHandle& op, Stack& stack) {
  auto& level = current_vmap_level();
  const auto n = count_arguments(op);
  auto* arguments = stack.data() + stack.size() - n;
  std::vector<const Wrapper*> batched;
  if (!are_aligned(c10::ArrayRef<c10::IValue>(arguments, n), level, batched)) return foreach_elements(op, stack);
  std::vector<int64_t> bdims;
  for (const auto* element : batched) bdims.push_back(element->bdim());
  {
    RunBelow below(level);
    replace_tensors(arguments, n, [&](const at::Tensor& x) { return wrapper_at(x, &level)->value(); });
    op.callBoxed(&stack);
  }
  size_t k = 0;
  const auto results = op.schema().returns().size();
  replace_tensors(stack.data() + stack.size() - results, results,
                  [&](const at::Tensor& y) { return wrap(y, level, bdims[k++]); });
}

// x + s[k] * y * z, where the numbers s are the elements of a tensor: x + (s[k] * y) * z. For addcdiv the same.
void foreach_scaled_by_tensor(const c10::OperatorHandle& op, Stack& stack) {
  const auto scalars = torch::jit::pop(stack).toTensor().unbind();
  auto& scaled = torch::jit::peek(stack, 0, 2);
  auto tensors = scaled.toTensorVector();
  TORCH_CHECK_VALUE(tensors.size() == scalars.size(), "vmap: ", op.operator_name().name, " got ", tensors.size(),
                    " tensors and ", scalars.size(), " scalars. There must be one scalar for each tensor.");
  for (size_t k = 0; k < tensors.size(); ++k) tensors[k] = tensors[k] * scalars[k].to(tensors[k].scalar_type());
  scaled = tensors;
  torch::jit::push(stack, at::Scalar(1));
  c10::Dispatcher::singleton().findSchemaOrThrow(op.operator_name().name.c_str(), "Scalar").callBoxed(&stack);
}

}  // namespace

void add_foreach_rules(RuleTable& rules) {
  rules.add(&foreach_elements, {"_foreach_norm.Scalar", "_foreach_powsum.Scalar", "_foreach_max", "_foreach_mm"});
  rules.add(&foreach_scaled_by_tensor, {"_foreach_addcmul.Tensor", "_foreach_addcmul_.Tensor",
                                        "_foreach_addcdiv.Tensor", "_foreach_addcdiv_.Tensor"});
  // All others are pointwise.
  const std::string prefix = "aten::_foreach_";
  for (const auto& name : c10::Dispatcher::singleton().getAllOpNames()) {
    if (name.name.rfind(prefix, 0) != 0 || RuleTable::find(name) != nullptr) continue;
    const auto op = c10::Dispatcher::singleton().findSchema(name);
    if (!op.has_value() || is_out_form(op->schema())) continue;
    const auto row = c10::toString(name).substr(std::string("aten::").size());
    rules.add(&foreach_pointwise, {row.c_str()});
  }
}

}  // namespace functorch_lite
