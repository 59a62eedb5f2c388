// Operators with `out` arguments. See out_forms.h first.
#include "out_forms.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/clone.h>
#include <ATen/ops/resize.h>

#include "batch_call.h"
#include "shared_memory.h"
#include "siblings.h"

namespace functorch_lite {
namespace {

// Whether somebody else reads or writes the memory of a result: it is an argument or a view of one, or autograd has
// saved it.
bool is_used_elsewhere(const at::Tensor& result, const Stack& arguments) {
  bool shared = false;
  const auto* memory = &result;
  while (const auto* wrapper = as_wrapper(*memory)) {
    memory = &wrapper->value();
    shared |= memory->use_count() > 1;
  }
  shared |= !memory->has_storage() || memory->storage().use_count() > 1;
  for_each_tensor(arguments.data(), arguments.size(),
                  [&](const at::Tensor& argument) { shared |= innermost_value(argument).is_same(*memory); });
  return shared;
}

// Gives `out` the result as its contents, in the shape of the result and the dtype of `out`.
void write_out(const c10::OperatorHandle& op, const Stack& arguments, const at::Tensor& out, const at::Tensor& result) {
  TORCH_CHECK_TYPE(c10::canCast(result.scalar_type(), out.scalar_type()), "vmap: ", op.operator_name().name,
                   " has a result of dtype ", result.scalar_type(), ", and the tensor given as out is of dtype ",
                   out.scalar_type(), ", to which that cannot be cast. Pass an out tensor of the dtype of the result.");
  auto& level = current_vmap_level();
  auto* wrapper = wrapper_at(out, &level);
  const auto is_batched = [&](const at::Tensor& x) {
    const auto* candidate = wrapper_at(x, &level);
    return candidate != nullptr && candidate->bdim() != kNoBatchDim;
  };
  if (wrapper == nullptr && is_batched(result)) refuse_outside_write(op, out);
  if (out.sym_sizes() == result.sym_sizes()) {
    out.copy_(result);
    return;
  }
  if (out.sym_numel() != 0) {
    TORCH_WARN("vmap: ", op.operator_name().name, " resizes the tensor given as out, of shape ", out.sym_sizes(),
               ", to the shape ", result.sym_sizes(), " of the result. Pass one of that shape, or an empty one.");
  }
  if (wrapper == nullptr) {
    out.resize__symint(result.sym_sizes());
    out.copy_(result);
    return;
  }
  // As resize_ does: out stays the same tensor and gets other contents.
  auto contents = result.to(out.scalar_type());
  if (is_used_elsewhere(contents, arguments)) contents = at::clone(contents);
  out.unsafeGetTensorImpl()->bump_version();
  const auto* source = wrapper_at(contents, &level);
  if (is_batched(contents)) return replace_value(*wrapper, source->value(), source->bdim());
  const auto& value = source != nullptr ? source->value() : contents;
  const RunBelow below(level);
  replace_value(*wrapper, at::clone(expand_batch(value, level.batch_size())), 0);
}

// Factories make, and sums add up in, what is given as `out` if nothing else is said.
void set_options(const Sibling& functional, const at::Tensor& out, Stack& arguments) {
  const auto& schema = functional.op.schema();
  const auto dtype = schema.argumentIndexWithName("dtype");
  const auto device = schema.argumentIndexWithName("device");
  if (dtype.has_value() && arguments[*dtype].isNone()) {
    // That of a norm is the one of its numbers, and the norm of complex numbers is real.
    const bool is_norm = schema.name().find("norm") != std::string::npos;
    const bool is_complex = is_norm && arguments[0].toTensor().is_complex();
    arguments[*dtype] = is_complex ? c10::toComplexType(out.scalar_type()) : out.scalar_type();
  }
  if (device.has_value() && arguments[*device].isNone()) arguments[*device] = out.device();
}

}  // namespace

bool has_functional_form(const c10::OperatorHandle& op) {
  return is_out_form(op.schema()) && find_sibling(op) != nullptr;
}

void run_out_form(const c10::OperatorHandle& op, Stack& stack) {
  const auto* functional = find_sibling(op);
  const Stack arguments = torch::jit::pop(stack, count_arguments(op));
  auto results = functional->arguments(arguments);
  const auto first_out = arguments.size() - functional->op.schema().returns().size();
  if (arguments[first_out].isTensor()) set_options(*functional, arguments[first_out].toTensor(), results);
  functional->op.callBoxed(&results);
  for (size_t i = 0; i < results.size(); ++i) {
    const auto& out = arguments[first_out + i];
    if (out.isTensor()) {
      write_out(op, arguments, out.toTensor(), results[i].toTensor());
    } else {
      const auto outs = out.toTensorVector();
      const auto tensors = results[i].toTensorVector();
      TORCH_CHECK_VALUE(outs.size() == tensors.size(), "vmap: ", op.operator_name().name, " has ", tensors.size(),
                        " results, and out is a list of ", outs.size(), " tensors. Pass one for each result.");
      for (size_t k = 0; k < outs.size(); ++k) write_out(op, arguments, outs[k], tensors[k]);
    }
    if (!op.schema().returns().empty()) stack.push_back(out);
  }
}

}  // namespace functorch_lite
