// Indexing as compositions of plain operators. See plain_compositions.h first.
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/gather.h>
#include <ATen/ops/index_fill.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/tensor_split.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include "fallback.h"
#include "plain_compositions.h"
#include "wrapper.h"

namespace functorch_lite {
namespace {

using at::Tensor;

// x.narrow(dim, start, length) where `start` is a tensor: PyTorch makes a number of it, which may differ between
// examples.
void narrow_from_tensor(const c10::OperatorHandle& op, Stack& stack) {
  const auto begin = stack.size() - count_arguments(op);
  if (as_wrapper(stack[begin + 2].toTensor()) == nullptr) {
    return op.callBoxedForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd, stack);
  }
  const auto arguments = torch::jit::pop(stack, 4);
  const auto& x = arguments[0].toTensor();
  const auto dim = arguments[1].toInt();
  const auto& start = arguments[2].toTensor();
  TORCH_CHECK(start.dim() == 0 && at::isIntegralType(start.scalar_type(), /*includeBool=*/false),
              "narrow(): expected `start` to be an integer tensor of 0 dimensions");
  const auto first = at::where(start < 0, start + x.sym_size(dim), start);
  const auto steps = at::arange(arguments[3].toSymInt(), start.options());
  torch::jit::push(stack, at::index_select(x, dim, first + steps));
}

// x.tensor_split(indices or sections) where those are a tensor: pieces have one shape only if all examples agree.
void split_at_tensor(const c10::OperatorHandle& op, Stack& stack) {
  const auto arguments = torch::jit::pop(stack, 3);
  const auto& x = arguments[0].toTensor();
  const auto& places = arguments[1].toTensor();
  const auto dim = arguments[2].toInt();
  TORCH_CHECK(places.dim() <= 1 && places.scalar_type() == c10::kLong,
              "tensor_split(): expected a tensor of type long with 0 or 1 dimensions");
  if (places.dim() == 0) return torch::jit::push(stack, at::tensor_split(x, common_size(op, places), dim));
  std::vector<int64_t> indices;
  for (const auto& place : places.unbind()) indices.push_back(common_size(op, place));
  torch::jit::push(stack, at::tensor_split(x, indices, dim));
}

// Without a dimension, in the flattened tensor: an example may be contiguous where the batch is not, so that it has no
// flat view.
void take_along_dim(const c10::OperatorHandle& op, Stack& stack) {
  if (!stack.back().isNone()) {
    return op.callBoxedForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd, stack);
  }
  const auto arguments = torch::jit::pop(stack, 3);
  torch::jit::push(stack, at::gather(arguments[0].toTensor().reshape(-1), 0, arguments[1].toTensor().reshape(-1)));
}

// PyTorch's derivative for the value needs the distinct indices, and their number may differ between examples.
Tensor fill_along(const Tensor& x, int64_t dim, const Tensor& index, const Tensor& value) {
  TORCH_CHECK(value.dim() == 0, "index_fill(): expected a value of 0 dimensions, got ", value.dim());
  auto mask = at::zeros_symint({x.dim() == 0 ? 1 : x.sym_size(dim)}, x.options().dtype(c10::kBool));
  mask = at::index_fill(mask, 0, index, 1);
  if (x.dim() == 0) return at::where(mask.squeeze(0), value.to(x.scalar_type()), x);
  for (auto d = c10::maybe_wrap_dim(dim, x.dim()) + 1; d < x.dim(); ++d) mask = mask.unsqueeze(-1);
  return at::where(mask, value.to(x.scalar_type()), x);
}
void index_fill_with_tensor(const c10::OperatorHandle&, Stack& stack) {
  const auto arguments = torch::jit::pop(stack, 4);
  const auto& x = arguments[0].toTensor();
  torch::jit::push(stack, fill_along(x, arguments[1].toInt(), arguments[2].toTensor(), arguments[3].toTensor()));
}
void index_fill_in_place(const c10::OperatorHandle&, Stack& stack) {
  const auto arguments = torch::jit::pop(stack, 4);
  const auto& x = arguments[0].toTensor();
  torch::jit::push(stack,
                   x.copy_(fill_along(x, arguments[1].toInt(), arguments[2].toTensor(), arguments[3].toTensor())));
}

}  // namespace

const std::vector<PlainRow>& indexing_compositions() {
  static const std::vector<PlainRow> rows{
      {"narrow.Tensor", narrow_from_tensor},
      {"tensor_split.tensor_indices_or_sections", split_at_tensor},
      {"take_along_dim", take_along_dim},
      {"index_fill.int_Tensor", index_fill_with_tensor},
      {"index_fill_.int_Tensor", index_fill_in_place},
  };
  return rows;
}

}  // namespace functorch_lite
