// Derivatives of norms. See derivative_rules.h first.
//
// PyTorch's forward over reverse mode is wrong in the mixed derivatives, by input and weight, and its third derivative
// of layer norm is wrong in reverse mode too. native_group_norm_backward has no derivative.
#include <ATen/TensorOperators.h>

#include "../derivative_rules.h"

namespace functorch_lite {
namespace {

using at::Tensor;

std::vector<int64_t> last_dims(int64_t count) {
  std::vector<int64_t> dims;
  for (int64_t d = -count; d < 0; ++d) dims.push_back(d);
  return dims;
}

// bfloat16 and float16 are too coarse for statistics.
Tensor for_statistics(const Tensor& x) {
  return x.scalar_type() == c10::kBFloat16 || x.scalar_type() == c10::kHalf ? x.to(c10::kFloat) : x;
}

struct Normalized {
  Tensor value;  // (x - mean) * rstd
  Tensor mean;
  Tensor rstd;
};

Normalized normalize(const Tensor& x, at::IntArrayRef dims, double eps) {
  const auto mean = x.mean(dims, /*keepdim=*/true);
  const auto centered = x - mean;
  const auto rstd = ((centered * centered).mean(dims, /*keepdim=*/true) + eps).rsqrt();
  return {centered * rstd, mean, rstd};
}

// The derivative of normalize: g, normalized -> rstd * (g - mean(g) - n * mean(g * n))
Tensor normalize_backward(const Tensor& grad, const Tensor& normalized, const Tensor& rstd, at::IntArrayRef dims) {
  return rstd * (grad - grad.mean(dims, true) - normalized * (grad * normalized).mean(dims, true));
}

Tensor scale_and_shift(Tensor x, const Tensor& weight, const Tensor& bias) {
  if (weight.defined()) x = x * weight;
  return bias.defined() ? x + bias : x;
}

// x[*,n], weight[n]?, bias[n]? -> y[*,n], mean[*,1], rstd[*,1]
void layer_norm(AutodiffLevel&, const Operator&, Stack& stack) {
  CallArguments arguments(stack, 5);
  const auto input = arguments.tensor();
  const auto dims = last_dims(static_cast<int64_t>(arguments.next().toSymIntVector().size()));
  const auto weight = arguments.optional_tensor();
  const auto bias = arguments.optional_tensor();
  const auto n = normalize(for_statistics(input), dims, arguments.next().toDouble());
  torch::jit::push(stack, scale_and_shift(n.value, weight, bias).to(input.scalar_type()), n.mean, n.rstd);
}

void layer_norm_backward(AutodiffLevel&, const Operator&, Stack& stack) {
  CallArguments arguments(stack, 8);
  const auto grad = arguments.tensor();
  const auto input = arguments.tensor();
  const auto rank = static_cast<int64_t>(arguments.next().toSymIntVector().size());
  const auto dims = last_dims(rank);
  const auto mean = arguments.tensor();
  const auto rstd = arguments.tensor();
  const auto weight = arguments.optional_tensor();
  const auto bias = arguments.optional_tensor();
  const auto mask = arguments.next().toBoolList();
  const auto normalized = (for_statistics(input) - mean) * rstd;
  const auto g = for_statistics(grad);
  std::vector<int64_t> outer;
  for (int64_t d = 0; d < input.dim() - rank; ++d) outer.push_back(d);
  const auto over_examples = [&](const Tensor& x) { return outer.empty() ? x : x.sum(outer); };
  Tensor grad_input;
  Tensor grad_weight;
  Tensor grad_bias;
  if (mask[0])
    grad_input = normalize_backward(weight.defined() ? g * weight : g, normalized, rstd, dims).to(input.scalar_type());
  if (mask[1] && weight.defined()) grad_weight = over_examples(g * normalized).to(weight.scalar_type());
  if (mask[2] && bias.defined()) grad_bias = over_examples(g).to(bias.scalar_type());
  torch::jit::push(stack, grad_input, grad_weight, grad_bias);
}

// v[C] -> v[1,C,1..] to broadcast with x[N,C,*]
Tensor per_channel(const Tensor& v, const Tensor& x) {
  if (!v.defined()) return v;
  std::vector<c10::SymInt> shape(x.dim(), 1);
  shape[1] = v.sym_numel();
  return v.reshape_symint(shape);
}

// x[N,C,*] in G groups -> y[N,C,*], mean[N,G], rstd[N,G]
void group_norm(AutodiffLevel&, const Operator&, Stack& stack) {
  CallArguments arguments(stack, 8);
  const auto input = arguments.tensor();
  const auto weight = arguments.optional_tensor();
  const auto bias = arguments.optional_tensor();
  const auto examples = arguments.next().toSymInt();
  for (int skipped = 0; skipped < 2; ++skipped) arguments.next();  // C and HxW follow from the input
  const auto groups = c10::SymInt(arguments.next().toInt());
  const auto n = normalize(for_statistics(input).reshape_symint({examples, groups, c10::SymInt(-1)}), {-1},
                           arguments.next().toDouble());
  const auto y =
      scale_and_shift(n.value.reshape_symint(input.sym_sizes()), per_channel(weight, input), per_channel(bias, input));
  torch::jit::push(stack, y.to(input.scalar_type()), n.mean.squeeze(-1), n.rstd.squeeze(-1));
}

std::vector<int64_t> all_but_channels(const Tensor& x) {
  std::vector<int64_t> dims;
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (d != 1) dims.push_back(d);
  }
  return dims;
}

struct BatchNorm {
  Tensor input, weight, bias, running_mean, running_var;
  bool training;
  double momentum, eps;

  void run(Stack& stack) const {
    const auto x = for_statistics(input);
    const auto dims = all_but_channels(input);
    if (!training) {
      const auto rstd = (running_var + eps).rsqrt();
      const auto y = (x - per_channel(running_mean, x)) * per_channel(rstd, x);
      const auto none = input.new_empty_symint({c10::SymInt(0)});
      return finish(stack, y, none, none);
    }
    const auto n = normalize(x, dims, eps);
    if (running_mean.defined()) update(running_mean, n.mean.flatten());
    if (running_var.defined()) update(running_var, x.detach().var(dims, /*unbiased=*/true));
    finish(stack, n.value, n.mean.flatten(), n.rstd.flatten());
  }
  void update(const Tensor& running, const Tensor& current) const {
    running.mul_(1 - momentum).add_(current.detach().to(running.scalar_type()), momentum);
  }
  void finish(Stack& stack, const Tensor& y, const Tensor& mean, const Tensor& rstd) const {
    const auto result = scale_and_shift(y, per_channel(weight, input), per_channel(bias, input));
    torch::jit::push(stack, result.to(input.scalar_type()), mean, rstd);
  }
};

void native_batch_norm(AutodiffLevel&, const Operator&, Stack& stack) {
  CallArguments a(stack, 8);
  BatchNorm{a.tensor(),          a.optional_tensor(), a.optional_tensor(), a.optional_tensor(),
            a.optional_tensor(), a.next().toBool(),   a.next().toDouble(), a.next().toDouble()}
      .run(stack);
}

// Kernels that keep something for their backward pass return it last.
Tensor nothing_reserved(const Tensor& like) { return like.new_empty_symint({c10::SymInt(0)}, c10::kByte); }

void cudnn_batch_norm(AutodiffLevel& level, const Operator& op, Stack& stack) {
  const auto input = stack[stack.size() - 8].toTensor();
  native_batch_norm(level, op, stack);
  torch::jit::push(stack, nothing_reserved(input));
}

void batch_norm_with_update(AutodiffLevel&, const Operator&, Stack& stack) {
  CallArguments a(stack, 7);
  const auto input = a.tensor();
  BatchNorm{input,
            a.optional_tensor(),
            a.optional_tensor(),
            a.tensor(),
            a.tensor(),
            /*training=*/true,
            a.next().toDouble(),
            a.next().toDouble()}
      .run(stack);
  torch::jit::push(stack, nothing_reserved(input));
}

void batch_norm_without_statistics(AutodiffLevel&, const Operator&, Stack& stack) {
  CallArguments a(stack, 6);
  BatchNorm{a.tensor(), a.optional_tensor(), a.optional_tensor(), Tensor(),
            Tensor(),   a.next().toBool(),   a.next().toDouble(), a.next().toDouble()}
      .run(stack);
}

struct BatchNormBackward {
  Tensor grad, input, weight, running_mean, running_var, save_mean, save_rstd;
  bool training;
  double eps;
  std::vector<bool> mask{true, true, true};

  void run(Stack& stack) const {
    const auto x = for_statistics(input);
    const auto g = for_statistics(grad);
    const auto mean = per_channel(training ? save_mean : running_mean, x);
    const auto rstd = per_channel(training ? save_rstd : (running_var + eps).rsqrt(), x);
    const auto normalized = (x - mean) * rstd;
    const auto dims = all_but_channels(input);
    Tensor grad_input;
    Tensor grad_weight;
    Tensor grad_bias;
    if (mask[0]) {
      const auto scaled = weight.defined() ? g * per_channel(weight, x) : g;
      grad_input =
          (training ? normalize_backward(scaled, normalized, rstd, dims) : scaled * rstd).to(input.scalar_type());
    }
    if (mask[1]) grad_weight = (g * normalized).sum(dims);
    if (mask[2]) grad_bias = g.sum(dims);
    torch::jit::push(stack, grad_input, grad_weight, grad_bias);
  }
};

std::vector<bool> flags(const c10::IValue& value) {
  const auto list = value.toBoolList();
  return {list.begin(), list.end()};
}

void native_batch_norm_backward(AutodiffLevel&, const Operator&, Stack& stack) {
  CallArguments a(stack, 10);
  BatchNormBackward{a.tensor(),          a.tensor(),          a.optional_tensor(), a.optional_tensor(),
                    a.optional_tensor(), a.optional_tensor(), a.optional_tensor(), a.next().toBool(),
                    a.next().toDouble(), flags(a.next())}
      .run(stack);
}

// As the native one, with what was reserved at the end.
void batch_norm_backward(AutodiffLevel& level, const Operator& op, Stack& stack) {
  torch::jit::drop(stack, 1);
  native_batch_norm_backward(level, op, stack);
}

void cudnn_batch_norm_backward(AutodiffLevel&, const Operator&, Stack& stack) {
  CallArguments a(stack, 9);
  const auto input = a.tensor();
  BatchNormBackward{a.tensor(),          input,
                    a.optional_tensor(), a.optional_tensor(),
                    a.optional_tensor(), a.optional_tensor(),
                    a.optional_tensor(), /*training=*/true,
                    a.next().toDouble()}
      .run(stack);
}

void group_norm_backward(AutodiffLevel&, const Operator&, Stack& stack) {
  CallArguments arguments(stack, 10);
  const auto grad = arguments.tensor();
  const auto input = arguments.tensor();
  const auto mean = arguments.tensor();
  const auto rstd = arguments.tensor();
  const auto weight = arguments.optional_tensor();
  const auto examples = arguments.next().toSymInt();
  for (int skipped = 0; skipped < 2; ++skipped) arguments.next();  // C and HxW follow from the input
  const auto groups = c10::SymInt(arguments.next().toInt());
  const auto mask = flags(arguments.next());
  const auto in_groups = [&](const Tensor& x) { return x.reshape_symint({examples, groups, c10::SymInt(-1)}); };
  const auto g = for_statistics(grad);
  const auto normalized = (in_groups(for_statistics(input)) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1);
  const auto dims = all_but_channels(input);
  Tensor grad_input;
  Tensor grad_weight;
  Tensor grad_bias;
  if (mask[0]) {
    const auto scaled = in_groups(weight.defined() ? g * per_channel(weight, input) : g);
    grad_input = normalize_backward(scaled, normalized, rstd.unsqueeze(-1), {-1})
                     .reshape_symint(input.sym_sizes())
                     .to(input.scalar_type());
  }
  if (mask[1]) grad_weight = (g * normalized.reshape_symint(input.sym_sizes())).sum(dims);
  if (mask[2]) grad_bias = g.sum(dims);
  torch::jit::push(stack, grad_input, grad_weight, grad_bias);
}

}  // namespace

const std::vector<DerivativeRow>& norm_derivatives() {
  static const std::vector<DerivativeRow> rows{
      nested("native_layer_norm", layer_norm),
      nested("native_layer_norm_backward", layer_norm_backward),
      nested("native_group_norm", group_norm),
      always("native_group_norm_backward", group_norm_backward),
      nested("native_batch_norm", native_batch_norm),
      nested("_native_batch_norm_legit", native_batch_norm),
      nested("_native_batch_norm_legit.no_stats", batch_norm_without_statistics),
      nested("native_batch_norm_backward", native_batch_norm_backward),
      nested("_batch_norm_with_update", batch_norm_with_update),
      nested("batch_norm_backward", batch_norm_backward),
      nested("cudnn_batch_norm", cudnn_batch_norm),
      nested("cudnn_batch_norm_backward", cudnn_batch_norm_backward),
  };
  return rows;
}

}  // namespace functorch_lite
