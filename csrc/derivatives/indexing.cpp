// Derivatives of operators that gather and scatter. See derivative_rules.h first.
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/gather.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/scatter_add.h>
#include <ATen/ops/scatter_reduce.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include "../derivative_rules.h"
#include "../transposition.h"

namespace functorch_lite {
namespace {

using at::Tensor;

// A copy of x, in which the part seen by these strides is src. PyTorch's derivative by x counts that part too.
void as_strided_scatter(AutodiffLevel&, const Operator&, Stack& stack) {
  CallArguments arguments(stack, 5);
  const auto y = arguments.tensor().clone();
  const auto src = arguments.tensor();
  const auto size = arguments.next().toSymIntVector();
  const auto stride = arguments.next().toSymIntVector();
  const auto& offset = arguments.next();
  const auto start = offset.isNone() ? std::nullopt : std::make_optional(offset.toSymInt());
  y.as_strided_symint(size, stride, start).copy_(src);
  torch::jit::push(stack, y);
}

bool reduces_by_product(const Operator&, const Stack& stack) { return stack[stack.size() - 2].toStringRef() == "prod"; }

// Operators on (x, src, ...) that put src into a copy of x: PyTorch's derivative by a real src in a complex x is
// complex.
bool has_real_source(const Operator& op, const Stack& stack) {
  const auto* arguments = stack.data() + stack.size() - count_arguments(op);
  return arguments[0].toTensor().is_complex() && !arguments[1].toTensor().is_complex();
}
void with_converted_source(AutodiffLevel&, const Operator& op, Stack& stack) {
  auto* arguments = stack.data() + stack.size() - count_arguments(op);
  arguments[1] = arguments[1].toTensor().to(arguments[0].toTensor().scalar_type());
  op.callBoxed(&stack);
}

// The bag of each of indices[K]. PyTorch leaves it out where its kernels do not need it.
Tensor bags_of(const Tensor& indices, const Tensor& offsets, const Tensor& known) {
  if (known.numel() > 0 || indices.numel() == 0) return known;
  const auto places = at::arange(indices.size(0), offsets.options());
  return at::searchsorted(offsets, places, /*out_int32=*/false, /*right=*/true) - 1;
}

// g[B,D], weight[V,D] -> the cotangents of the samples' weights [K]
void per_sample_weights_backward(AutodiffLevel&, const Operator&, Stack& stack) {
  CallArguments arguments(stack, 7);
  const auto grad = arguments.tensor();
  const auto weight = arguments.tensor();
  const auto indices = arguments.tensor();
  const auto offsets = arguments.tensor();
  const auto bags = bags_of(indices, offsets, arguments.tensor());
  arguments.next();  // the mode: per-sample weights are for sums only
  const auto padding = arguments.next().toInt();
  const auto products = (grad.index_select(0, bags) * weight.index_select(0, indices)).sum(-1);
  torch::jit::push(stack, at::where(indices == padding, at::zeros_like(products), products));
}

// g[B,D] -> the cotangent of weight[V,D], dense
void embedding_bag_backward(AutodiffLevel&, const Operator&, Stack& stack) {
  enum Mode : int64_t { kSum, kMean, kMax };
  CallArguments arguments(stack, 12);
  const auto grad = arguments.tensor();
  const auto indices = arguments.tensor();
  const auto offsets = arguments.tensor();
  const auto bags = bags_of(indices, offsets, arguments.tensor());
  const auto bag_size = arguments.tensor();
  const auto maximum_indices = arguments.tensor();
  const auto rows = arguments.next().toSymInt();
  const bool by_frequency = arguments.next().toBool();
  const auto mode = arguments.next().toInt();
  arguments.next();  // sparse: the same numbers
  const auto sample_weights = arguments.optional_tensor();
  const auto padding = arguments.next().toInt();
  const auto zeros = at::zeros_symint({rows, grad.sym_size(-1)}, grad.options());
  if (mode == kMax) {
    const auto found = (maximum_indices >= 0).to(grad.scalar_type());
    const auto chosen = maximum_indices.clamp_min(0).to(c10::kLong);
    const auto filled = (bag_size.unsqueeze(-1) > 0).to(grad.scalar_type());
    return torch::jit::push(stack, zeros.scatter_add(0, chosen, grad * found * filled));
  }
  auto scale = (indices != padding).to(grad.scalar_type());
  if (sample_weights.defined()) scale = scale * sample_weights;
  if (mode == kMean) scale = scale / bag_size.index_select(0, bags).clamp_min(1);
  if (by_frequency) {
    const auto same = indices.unsqueeze(0) == indices.unsqueeze(1);
    scale = scale / same.sum(0);
  }
  torch::jit::push(stack, zeros.index_add(0, indices, grad.index_select(0, bags) * scale.unsqueeze(-1)));
}

// Which segment each place along the axis of data belongs to, in the shape of the data.
Tensor segments_of(const Tensor& data, const Tensor& lengths, const Tensor& offsets, int64_t axis) {
  const auto ends = lengths.defined() ? lengths.cumsum(axis) : offsets.narrow(axis, 1, offsets.size(axis) - 1);
  auto shape = data.sizes().slice(0, axis + 1).vec();
  const auto places = at::arange(data.size(axis), ends.options()).expand(shape).contiguous();
  auto segments = at::searchsorted(ends.contiguous(), places, /*out_int32=*/false, /*right=*/true);
  for (auto d = axis + 1; d < data.dim(); ++d) segments = segments.unsqueeze(-1);
  return segments.expand(data.sizes());
}

void segment_reduce_backward(AutodiffLevel&, const Operator&, Stack& stack) {
  CallArguments arguments(stack, 8);
  const auto grad = arguments.tensor();
  const auto output = arguments.tensor();
  const auto data = arguments.tensor();
  const auto reduce = arguments.next().toStringRef();
  const auto lengths = arguments.optional_tensor();
  const auto offsets = arguments.optional_tensor();
  const auto axis = arguments.next().toInt();
  const auto segments = segments_of(data, lengths, offsets, axis);
  const auto spread = [&](const Tensor& x) { return at::gather(x, axis, segments); };
  const auto summed = [&](const Tensor& x) { return at::zeros_like(output).scatter_add(axis, segments, x); };
  auto g = spread(grad);
  if (reduce == "mean") {
    g = g / spread(summed(at::ones_like(data)));
  } else if (reduce == "max" || reduce == "min") {
    const auto chosen = (data == spread(output)).to(data.scalar_type());
    g = g * chosen / spread(summed(chosen)).clamp_min(1);
  } else if (reduce == "prod") {
    const auto product = [&](const Tensor& x) {
      return at::scatter_reduce(at::ones_like(output), axis, segments, x, "prod");
    };
    return torch::jit::push(stack, pull_back(product, data, grad));
  }
  torch::jit::push(stack, g);
}

}  // namespace

const std::vector<DerivativeRow>& indexing_derivatives() {
  static const std::vector<DerivativeRow> rows{
      always("as_strided_scatter", as_strided_scatter),
      {"diagonal_scatter", with_converted_source, with_converted_source, 0, has_real_source},
      {"select_scatter", with_converted_source, with_converted_source, 0, has_real_source},
      {"slice_scatter", with_converted_source, with_converted_source, 0, has_real_source},
      {"scatter_reduce.two", push_forward_by_transposing, nullptr, 0, reduces_by_product},
      {"scatter_reduce_.two", write_functional_result, nullptr, 0, reduces_by_product},
      only_forward("index_reduce_", write_functional_result),
      always("_embedding_bag_backward", embedding_bag_backward),
      always("_embedding_bag_per_sample_weights_backward", per_sample_weights_backward),
      always("_segment_reduce_backward", segment_reduce_backward),
  };
  return rows;
}

}  // namespace functorch_lite
