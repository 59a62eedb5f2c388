// Operators that no function of PyTorch's Python interface calls by name: internals of others, forms of single
// backends, pieces of quantisation. Most are compositions of plain operators.
#include <ATen/TensorOperators.h>
#include <ATen/ops/_cdist_backward.h>
#include <ATen/ops/affine_grid_generator.h>
#include <ATen/ops/affine_grid_generator_backward.h>
#include <ATen/ops/all.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/einsum.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/tensordot.h>
#include <ATen/ops/triu_indices.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include "../fallback.h"
#include "rules.h"

namespace functorch_lite {
namespace {

// The arguments of a composition, taken off the stack.
class Arguments {
 public:
  Arguments(const c10::OperatorHandle& op, Stack& stack)
      : schema_(op.schema()), values_(torch::jit::pop(stack, count_arguments(op))) {}
  bool has(const char* name) const {
    const auto index = schema_.argumentIndexWithName(name);
    return index.has_value() && !values_[*index].isNone();
  }
  const c10::IValue& operator[](const char* name) const { return values_[position_of(schema_, name)]; }
  at::Tensor tensor(const char* name) const { return (*this)[name].toTensor(); }
  std::optional<at::Tensor> optional(const char* name) const {
    return has(name) ? std::optional(tensor(name)) : std::nullopt;
  }
  std::vector<c10::SymInt> sizes(const char* name) const { return (*this)[name].toSymIntVector(); }
  std::vector<c10::SymInt> sizes_or(const char* name, int64_t rank, int64_t value) const {
    return has(name) ? sizes(name) : std::vector<c10::SymInt>(rank, value);
  }

 private:
  const c10::FunctionSchema& schema_;
  Stack values_;
};

// --- Convolutions of single backends, as the general one ---

// x[N,g*i,*] or x[g*i,*], weight[g*o,i,*], bias[g*o] -> y[N,g*o,*] or y[g*o,*]; for some plus alpha * z, then relu.
void backend_convolution(const c10::OperatorHandle& op, Stack& stack) {
  const Arguments args(op, stack);
  const auto& name = op.schema().name();
  const auto x = args.tensor(args.has("input") ? "input" : "self");
  const auto weight = args.tensor("weight");
  const auto rank = weight.dim() - 2;
  const bool one_image = x.dim() == rank + 1;
  auto y = at::convolution_symint(one_image ? x.unsqueeze(0) : x, weight, args.optional("bias"),
                                  args.sizes_or("stride", rank, 1), args.sizes_or("padding", rank, 0),
                                  args.sizes_or("dilation", rank, 1), name.find("transpose") != std::string::npos,
                                  args.sizes_or("output_padding", rank, 0),
                                  args.has("groups") ? args["groups"].toSymInt() : c10::SymInt(1));
  if (one_image) y = y.squeeze(0);
  if (args.has("z")) y = y + args.tensor("z") * (args.has("alpha") ? args["alpha"].toScalar() : at::Scalar(1));
  if (name.find("relu") != std::string::npos) y = y.relu();
  stack.emplace_back(y);
}

// grad[N,o,*], x[N,i,*], weight[o,i,*] -> the gradients of x, weight and bias that the mask asks for
void backend_convolution_backward(const c10::OperatorHandle& op, Stack& stack) {
  const Arguments args(op, stack);
  const auto mask = args["output_mask"].toBoolList();
  const auto grad = args.tensor("grad_output");
  const auto x = args.tensor("self");
  const bool one_image = x.dim() == args.tensor("weight").dim() - 1;
  const auto rank = args.tensor("weight").dim() - 2;
  auto [grad_x, grad_weight, grad_bias] = at::convolution_backward_symint(
      one_image ? grad.unsqueeze(0) : grad, one_image ? x.unsqueeze(0) : x, args.tensor("weight"),
      std::vector<c10::SymInt>{args.tensor("weight").sym_size(0)}, args.sizes("stride"), args.sizes("padding"),
      args.sizes_or("dilation", rank, 1), false, std::vector<c10::SymInt>(rank, 0),
      args.has("groups") ? args["groups"].toSymInt() : c10::SymInt(1), {mask[0], mask[1], mask.size() > 2 && mask[2]});
  if (one_image && grad_x.defined()) grad_x = grad_x.squeeze(0);
  torch::jit::push(stack, grad_x, grad_weight, grad_bias);
}

// x[*,i], grad[*,o], weight[o,i] -> the gradients of x, weight and bias that the mask asks for
void linear_backward(const c10::OperatorHandle& op, Stack& stack) {
  const Arguments args(op, stack);
  const auto mask = args["output_mask"].toBoolList();
  const auto grad = args.tensor("grad_output");
  const auto rows = [](const at::Tensor& x) { return x.reshape_symint({-1, x.sym_size(-1)}); };
  at::Tensor grad_x, grad_weight, grad_bias;
  if (mask[0]) grad_x = at::matmul(grad, args.tensor("weight"));
  if (mask[1]) grad_weight = at::matmul(rows(grad).t(), rows(args.tensor("self")));
  if (mask[2]) grad_bias = rows(grad).sum(0);
  torch::jit::push(stack, grad_x, grad_weight, grad_bias);
}

// theta[N,2,3] -> grid[N,H,W,2], and the gradient of it
void cudnn_affine_grid(const c10::OperatorHandle& op, Stack& stack) {
  const Arguments args(op, stack);
  const std::vector<int64_t> size{args["N"].toInt(), args["C"].toInt(), args["H"].toInt(), args["W"].toInt()};
  stack.emplace_back(args.has("theta")
                         ? at::affine_grid_generator(args.tensor("theta"), size, /*align_corners=*/true)
                         : at::affine_grid_generator_backward(args.tensor("grad"), size, /*align_corners=*/true));
}

// --- Products ---

// a[*,m,k], b[*,k,n] -> c[*,m,n], computed in the dtype of the result.
void product_of_dtype(const c10::OperatorHandle& op, Stack& stack) {
  const Arguments args(op, stack);
  const auto dtype = args.has("out_dtype") ? args["out_dtype"].toScalarType() : c10::kInt;
  stack.emplace_back(at::matmul(args.tensor("self").to(dtype), args.tensor("mat2").to(dtype)));
}

// x[B,m,k] and a packed weight -> y[B,m,n]: the rows of all examples meet the weight at once.
void packed_weight_rule(BatchCall& call) {
  for (size_t i = 1; i < call.size(); ++i) {
    if (!call.is_batched(i)) continue;
    refuse_operator(call.op(), "A packed weight is one matrix. Map over the activations only.");
  }
  if (finish_without_examples(call)) return;
  call.arg(0) = fold_batch(call.tensor(0), call.bdim(0), 0);
  call.call();
  call.result() = unfold_batch(call.result().toTensor(), 0, call.batch_size());
  call.finish();
}

// x[t,*], coefficients[*,t] -> the sums over t
void linear_combination(const c10::OperatorHandle& op, Stack& stack) {
  const Arguments args(op, stack);
  stack.emplace_back(at::tensordot(args.tensor("coefficients"), args.tensor("input"), {-1}, {0}));
}

// grad[n*(n-1)/2], x[n,d] -> grad_x[n,d], as for the matrix of all distances, half of which count twice.
void pdist_backward(const c10::OperatorHandle& op, Stack& stack) {
  const Arguments args(op, stack);
  const auto x = args.tensor("self");
  const auto n = x.size(0);
  const auto pairs = at::triu_indices(n, n, 1, x.options().dtype(c10::kLong));
  const auto square = [&](const at::Tensor& condensed) {
    const c10::List<std::optional<at::Tensor>> upper({pairs.select(0, 0), pairs.select(0, 1)});
    const auto half = at::zeros({n, n}, condensed.options()).index_put(upper, condensed);
    return half + half.t();
  };
  stack.emplace_back(
      at::_cdist_backward(square(args.tensor("grad")), x, x, args["p"].toDouble(), square(args.tensor("pdist"))));
}

// grad[*], v[*], g, norms -> the gradients of v and g where w = v * g / norm(v), over all dimensions but `dim`
void weight_norm_backward(const c10::OperatorHandle& op, Stack& stack) {
  const Arguments args(op, stack);
  const auto v = args.tensor("saved_v"), g = args.tensor("saved_g"), norms = args.tensor("saved_norms");
  const auto grad = args.tensor("grad_w");
  std::vector<int64_t> others;
  for (int64_t d = 0; d < v.dim(); ++d) {
    if (d != args["dim"].toInt()) others.push_back(d);
  }
  const auto along_v = (grad.to(norms.scalar_type()) * v).sum(others, /*keepdim=*/true) / norms;
  const auto grad_v = g / norms * (grad - v * along_v / norms);
  torch::jit::push(stack, grad_v.to(v.scalar_type()), along_v.to(g.scalar_type()));
}

// --- Along dimensions ---

// scores[B?,*], mask[B?,..] -> y[B,*]. The mask may be one for all rows [L,L] or for the keys of each item [N,L]. The
// kernel takes both for contiguous.
void masked_softmax_rule(BatchCall& call) {
  constexpr int64_t kScores = 0, kKeys = 1, kGeneral = 2;
  const auto x = call.expand_to_front(0).contiguous();
  call.arg(0) = x;
  const auto& type = call.arg("mask_type");
  auto mask = call.expand_to_front(1);
  if (type.isInt() && type.toInt() == kScores) mask = mask.unsqueeze(1).unsqueeze(1);
  if (type.isInt() && type.toInt() == kKeys) mask = mask.unsqueeze(2).unsqueeze(2);
  call.arg(1) = mask.expand_symint(x.sym_sizes()).contiguous();
  call.arg("mask_type") = kGeneral;
  if (call.arg("dim").isNone()) call.arg("dim") = -1;
  call.arg("dim") = shift_dim(call.arg("dim").toInt(), call.rank(0));
  call.call();
  call.finish();
}

// rows[nnz], in order, of a matrix with n rows -> where each row starts, [n+1]
void rows_to_starts(const c10::OperatorHandle& op, Stack& stack) {
  const Arguments args(op, stack);
  const auto rows = args.tensor("self");
  const auto numbers = at::arange(args["size"].toInt() + 1, rows.options());
  stack.emplace_back(at::searchsorted(rows, numbers, args["out_int32"].toBool()));
}

// --- Assertions ---

// x[B], one number for each example: raises unless all are true.
void assert_rule(BatchCall& call) {
  const auto& x = call.to_front(0);
  TORCH_CHECK_VALUE(x.sym_numel() == call.batch_size(), call.name(), ": expected one number, got the shape ",
                    x.sym_sizes().slice(1));
  call.arg(0) = at::all(x);
  call.call();
  const auto token = call.find("dep_token");
  call.finish(token.has_value() ? call.bdim(*token) : kNoBatchDim);
}

// Sizes and dtype are those that user code sees.
void assert_metadata(const c10::OperatorHandle& op, Stack& stack) {
  op.callBoxedForDispatchKey(c10::DispatchKey::CompositeExplicitAutograd, stack);
}

void reshape_copy(const c10::OperatorHandle& op, Stack& stack) {
  const Arguments args(op, stack);
  stack.emplace_back(args.tensor("self").reshape_symint(args.sizes("size")).clone());
}

// --- Fake quantisation: rounding to a grid, in ordinary tensors ---

// x[B?,*,c,*], scale[B?,c], zero_point[B?,c], axis -> like x, and in the backward operator like scale: B*c channels.
void fake_quantize_channels(BatchCall& call, const c10::OperatorHandle& op, int64_t axis, Stack arguments) {
  std::vector<bool> is_channels;
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (!arguments[i].isTensor()) continue;
    const auto& name = op.schema().arguments()[i].name();
    const bool channels = name == "scale" || name == "zero_point";
    arguments[i] = fold_batch(arguments[i].toTensor(), 0, channels ? 0 : axis);
  }
  call.call(op, std::move(arguments));
  for (size_t i = 0; i < call.count_results(); ++i) {
    const bool channels = op.schema().returns().size() == 3 && i > 0;
    call.result(i) = unfold_batch(call.result(i).toTensor(), channels ? 0 : axis, call.batch_size());
  }
}

void fake_quantize_channel_rule(BatchCall& call) {
  if (finish_without_examples(call)) return;
  const auto axis = call.arg("axis").toInt();
  Stack arguments;
  for (size_t i = 0; i < call.size(); ++i) {
    arguments.push_back(call.is_tensor(i) ? c10::IValue(call.expand_to_front(i)) : call.arg(i));
  }
  fake_quantize_channels(call, call.op(), axis, std::move(arguments));
  call.finish();
}

// x[B?,*], scale[B?] or scale[B?,1], zero_point likewise -> like x, and in the backward operator [B,1]: each example is
// a channel of the sibling operator.
void fake_quantize_tensor_rule(BatchCall& call) {
  if (finish_without_examples(call)) return;
  const auto name = call.schema().name();
  const bool learnable = name.find("learnable") != std::string::npos;
  const bool backward = name.find("backward") != std::string::npos;
  const auto sibling = find_operator(!learnable ? "fake_quantize_per_channel_affine_cachemask"
                                     : backward ? "_fake_quantize_learnable_per_channel_affine_backward"
                                                : "_fake_quantize_learnable_per_channel_affine");
  std::vector<std::pair<std::string_view, c10::IValue>> tensors{{"axis", int64_t{0}}};
  for (const char* argument : {"self", "grad", "scale", "zero_point"}) {
    const auto i = call.find(argument);
    if (!i.has_value()) continue;
    auto x = call.expand_to_front(*i);
    const bool is_number = std::string_view(argument) == "scale" || std::string_view(argument) == "zero_point";
    tensors.emplace_back(argument, is_number ? x.reshape_symint({call.batch_size()}) : x);
  }
  const auto x = call.tensor(call.position("self"));
  const auto enabled = call.find("fake_quant_enabled");
  const auto is_enabled =
      enabled ? pad_rank(call.expand_to_front(*enabled).reshape_symint({call.batch_size()}) != 0, x.dim() - 1)
              : at::Tensor();
  call.call(sibling, arguments_for(sibling, call, tensors));
  if (enabled) {
    call.result(0) = at::where(is_enabled, call.result(0).toTensor(), x);
    call.result(1) = call.result(1).toTensor().logical_or(is_enabled.logical_not());
  }
  for (size_t i = 1; i < call.count_results() && backward; ++i) {
    call.result(i) = call.result(i).toTensor().unsqueeze(-1);
  }
  call.finish();
}

constexpr const char* kQuantized =
    "A quantized tensor is more than its numbers, and cannot be one example of a batch. Quantize outside vmap, or use "
    "torch.fake_quantize_per_tensor_affine, which gives an ordinary tensor.";
constexpr const char* kSparse =
    "One example of a batch is a dense tensor, and has no sparse parts. Make or take apart sparse tensors outside "
    "vmap; "
    "a sparse matrix that is the same for all examples may be multiplied with.";
constexpr const char* kNested =
    "A nested tensor cannot be one example of a batch. Use a padded tensor with a mask, or call it outside vmap.";
constexpr const char* kBackend =
    "It is internal to one of PyTorch's backends, and works on that backend's own tensors. Call the function of "
    "torch or torch.nn.functional that it is part of.";
constexpr const char* kMemory =
    "It gives a tensor other memory or another shape in its place. Use the out-of-place form, for example "
    "x.reshape(...) or x[:n].";

}  // namespace

void add_remaining_rules(RuleTable& rules) {
  rules.add(&backend_convolution, {"_conv_depthwise2d",
                                   "conv_depthwise3d",
                                   "_slow_conv2d_forward",
                                   "slow_conv3d_forward",
                                   "slow_conv_dilated2d",
                                   "slow_conv_dilated3d",
                                   "slow_conv_transpose2d",
                                   "slow_conv_transpose3d",
                                   "_nnpack_spatial_convolution",
                                   "mkldnn_convolution",
                                   "cudnn_convolution",
                                   "cudnn_convolution_relu",
                                   "cudnn_convolution_add_relu",
                                   "cudnn_convolution_transpose",
                                   "miopen_convolution",
                                   "miopen_convolution_relu",
                                   "miopen_convolution_add_relu",
                                   "miopen_convolution_transpose",
                                   "miopen_depthwise_convolution",
                                   "_mps_convolution",
                                   "_mps_convolution_transpose"});
  rules.add(&backend_convolution_backward, {"_slow_conv2d_backward.output_mask", "mps_convolution_backward"});
  rules.add(&linear_backward, {"linear_backward"});
  rules.add(&cudnn_affine_grid, {"cudnn_affine_grid_generator", "cudnn_affine_grid_generator_backward"});
  rules.add(&product_of_dtype, {"_int_mm", "mm.dtype", "bmm.dtype"});
  rules.add(&packed_weight_rule, {"_weight_int8pack_mm", "_weight_int4pack_mm", "_weight_int4pack_mm_for_cpu",
                                  "_weight_int4pack_mm_with_scales_and_zeros", "_dyn_quant_matmul_4bit"});
  rules.add(&linear_combination, {"_compute_linear_combination"});
  rules.add(&pdist_backward, {"_pdist_backward"});
  rules.add(&weight_norm_backward, {"_weight_norm_interface_backward"});
  rules.add(&masked_softmax_rule, {"_masked_softmax"});
  rules.add(&rows_to_starts, {"_convert_indices_from_coo_to_csr"});
  rules.add(&assert_rule, {"_assert_async", "_assert_async.msg", "_functional_assert_async.msg"});
  rules.add(&assert_metadata, {"_assert_tensor_metadata"});
  rules.add(&reshape_copy, {"_reshape_alias_copy"});
  rules.add(&fake_quantize_channel_rule,
            {"fake_quantize_per_channel_affine_cachemask", "_fake_quantize_learnable_per_channel_affine",
             "_fake_quantize_learnable_per_channel_affine_backward"});
  rules.add(&fake_quantize_tensor_rule,
            {"_fake_quantize_per_tensor_affine_cachemask_tensor_qparams", "_fake_quantize_learnable_per_tensor_affine",
             "_fake_quantize_learnable_per_tensor_affine_backward"});
  rules.add(pointwise(),
            {"_coalesce", "_to_dense", "_add_relu.Scalar", "_add_relu.Tensor", "_add_relu_.Scalar", "_add_relu_.Tensor",
             "_fw_primal_copy", "_lazy_clone", "_pin_memory", "detach_copy", "dequantize.self",
             "fake_quantize_per_tensor_affine_cachemask", "int_repr", "quantize_per_tensor"});
  rules.add(front(),
            {"_functional_assert_scalar", "_functional_sym_constrain_range", "_functional_sym_constrain_range_for_size",
             "_has_same_storage_numel", "is_pinned", "is_set_to", "record_stream", "view_as_complex_copy"});
  rules.add(along({"dim"}), {"_aminmax.dim", "_logcumsumexp"});
  rules.add(expanded_along({"dim"}), {"_masked_softmax_backward", "glu_backward_jvp"});
  rules.add(reduce_all("_aminmax.dim"), {"_aminmax"});

  rules.add(forbid("Tangents belong to jvp. Use functorch_lite.jvp."), {"_make_dual", "_make_dual_copy"});
  rules.add(forbid(kMemory), {"_resize_output", "_resize_output_", "resize", "set", "set.source_Storage",
                              "set.source_Storage_storage_offset", "set.source_Tensor"});
  rules.add(forbid(kQuantized), {"_empty_per_channel_affine_quantized",
                                 "_make_per_channel_quantized_tensor",
                                 "_make_per_tensor_quantized_tensor",
                                 "dequantize.tensors",
                                 "empty_quantized",
                                 "q_per_channel_axis",
                                 "q_per_channel_scales",
                                 "q_per_channel_zero_points",
                                 "q_scale",
                                 "q_zero_point",
                                 "qscheme",
                                 "quantize_per_channel",
                                 "quantize_per_tensor.tensor_qparams",
                                 "quantize_per_tensor.tensors",
                                 "quantize_per_tensor_dynamic",
                                 "quantized_batch_norm",
                                 "quantized_gru.data",
                                 "quantized_gru.data_legacy",
                                 "quantized_gru.input",
                                 "quantized_gru.input_legacy",
                                 "quantized_lstm.data",
                                 "quantized_lstm.data_legacy",
                                 "quantized_lstm.input",
                                 "quantized_lstm.input_legacy",
                                 "quantized_max_pool1d",
                                 "quantized_max_pool2d",
                                 "quantized_max_pool3d"});
  rules.add(forbid(kSparse), {"_coalesced",
                              "_coalesced_",
                              "_dimI",
                              "_dimV",
                              "_indices",
                              "_indices_copy",
                              "_nnz",
                              "_sparse_broadcast_to",
                              "_sparse_broadcast_to_copy",
                              "_sparse_coo_tensor_with_dims_and_tensors",
                              "_sparse_csr_prod.dim_dtype",
                              "_sparse_csr_sum.dim_dtype",
                              "_sparse_log_softmax",
                              "_sparse_log_softmax_backward_data",
                              "_sparse_mask_projection",
                              "_sparse_semi_structured_apply",
                              "_sparse_semi_structured_apply_dense",
                              "_sparse_semi_structured_tile",
                              "_sparse_softmax",
                              "_sparse_softmax_backward_data",
                              "_sparse_sparse_matmul",
                              "_sparse_sum.dim",
                              "_sparse_sum_backward",
                              "_spdiags",
                              "_to_sparse_semi_structured",
                              "_validate_compressed_sparse_indices",
                              "_values",
                              "_values_copy",
                              "ccol_indices",
                              "ccol_indices_copy",
                              "col_indices",
                              "col_indices_copy",
                              "copy_sparse_to_sparse",
                              "copy_sparse_to_sparse_",
                              "crow_indices",
                              "crow_indices_copy",
                              "dense_dim",
                              "indices",
                              "indices_copy",
                              "is_coalesced",
                              "native_norm",
                              "native_norm.ScalarOpt_dim_dtype",
                              "resize_as_sparse",
                              "resize_as_sparse_",
                              "row_indices",
                              "row_indices_copy",
                              "sparse_compressed_tensor.comp_plain_value",
                              "sparse_compressed_tensor.comp_plain_value_size",
                              "sparse_dim",
                              "sparse_mask",
                              "sparse_resize",
                              "sparse_resize_",
                              "sparse_resize_and_clear",
                              "sparse_resize_and_clear_",
                              "values",
                              "values_copy"});
  rules.add(forbid(kNested), {"_nested_compute_contiguous_strides_offsets",
                              "_nested_from_padded",
                              "_nested_from_padded_and_nested_example",
                              "_nested_from_padded_tensor",
                              "_nested_get_jagged_dummy",
                              "_nested_get_lengths",
                              "_nested_get_max_seqlen",
                              "_nested_get_min_seqlen",
                              "_nested_get_offsets",
                              "_nested_get_ragged_idx",
                              "_nested_get_values",
                              "_nested_get_values_copy",
                              "_nested_select_backward",
                              "_nested_sum_backward",
                              "_nested_tensor_from_tensor_list",
                              "_nested_tensor_size",
                              "_nested_tensor_softmax_with_shape",
                              "_nested_tensor_storage_offsets",
                              "_nested_tensor_strides",
                              "_nested_view_from_buffer",
                              "_nested_view_from_buffer_copy",
                              "_nested_view_from_jagged",
                              "_nested_view_from_jagged_copy",
                              "matmul_backward",
                              "to_padded_tensor"});
  rules.add(
      forbid(kBackend),
      {"_copy_from", "_copy_from_and_resize", "_mkldnn_reshape", "_mkldnn_transpose", "_mkldnn_transpose_",
       "max_pool2d_backward", "mkldnn_adaptive_avg_pool2d", "mkldnn_adaptive_avg_pool2d_backward", "mkldnn_linear",
       "mkldnn_linear_backward", "mkldnn_linear_backward_input", "mkldnn_linear_backward_weights", "mkldnn_max_pool2d",
       "mkldnn_max_pool2d_backward", "mkldnn_max_pool3d", "mkldnn_max_pool3d_backward", "mkldnn_reorder_conv2d_weight",
       "mkldnn_reorder_conv3d_weight", "mps_convolution_transpose_backward"});
}

}  // namespace functorch_lite
