// Operators that treat every image, or every channel of it, alike: pooling, padding, resampling, patches.
#include <algorithm>

#include "rules.h"

namespace functorch_lite {
namespace {

// x[B?,C,*] or x[B?,N,C,*]: the batch becomes N, or joins it.
struct Images {
  size_t channel_rank;              // the rank of x[C,*]
  std::vector<size_t> sizes;        // arguments that repeat the shape [N,..]
  std::vector<size_t> with_images;  // tensors that have N even if x does not

  void operator()(BatchCall& call) const {
    if (finish_without_examples(call)) return;
    const bool joins = call.rank(0) != static_cast<int64_t>(channel_rank);
    for (size_t i = 0; i < call.size(); ++i) {
      if (!call.is_tensor(i)) continue;
      call.expand_to_front(i);
      const bool has_images = joins || std::find(with_images.begin(), with_images.end(), i) != with_images.end();
      if (has_images) call.arg(i) = merge_dims(call.tensor(i), 0);
      // Some kernels read memory that is not theirs when indices have strides.
      if (call.schema().arguments()[i].name() == "indices") call.arg(i) = call.tensor(i).contiguous();
    }
    for (auto i : sizes) {
      auto shape = call.arg(i).toSymIntVector();
      shape[0] = shape[0] * call.batch_size();
      call.arg(i) = shape;
    }
    call.call();
    for (size_t i = 0; i < call.count_results() && joins; ++i) {
      auto& result = call.result(i);
      if (result.isTensor() && result.toTensor().defined()) {
        result = unfold_batch(result.toTensor(), 0, call.batch_size());
      }
    }
    call.finish();
  }
};

// For operators whose first tensor may come as x[C,*] of this rank, or with images in front.
Family images(size_t channel_rank) {
  return {"images", [channel_rank](const c10::FunctionSchema& schema) -> Rule {
            Images rule{channel_rank, {}, {}};
            if (const auto samples = schema.argumentIndexWithName("random_samples"))
              rule.with_images.push_back(*samples);
            return rule;
          }};
}

// For operators whose tensors always have the dimension N; the named argument repeats their shape.
Family batched_images(const char* size = nullptr) {
  return {"images", [size](const c10::FunctionSchema& schema) -> Rule {
            Images rule{0, {}, {}};
            if (size != nullptr) rule.sizes = {position_of(schema, size)};
            return rule;
          }};
}

}  // namespace

void add_pooling_rules(RuleTable& rules) {
  // The composite adaptive average reads the memory layout and max_pool1d reads memory, which are those of the whole
  // batch: they get rows too.
  rules.add(images(2), {"max_pool1d", "reflection_pad1d", "reflection_pad1d_backward", "replication_pad1d",
                        "replication_pad1d_backward", "col2im"});
  rules.add(images(3),
            {"avg_pool2d", "avg_pool2d_backward", "max_pool2d_with_indices", "max_pool2d_with_indices_backward",
             "max_unpool2d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d", "_adaptive_avg_pool2d_backward",
             "adaptive_max_pool2d", "adaptive_max_pool2d_backward", "fractional_max_pool2d",
             "fractional_max_pool2d_backward", "reflection_pad2d", "reflection_pad2d_backward", "replication_pad2d",
             "replication_pad2d_backward", "im2col", "pixel_shuffle", "pixel_unshuffle"});
  rules.add(
      images(4),
      {"avg_pool3d", "avg_pool3d_backward", "max_pool3d_with_indices", "max_pool3d_with_indices_backward",
       "max_unpool3d", "adaptive_avg_pool3d", "_adaptive_avg_pool3d", "_adaptive_avg_pool3d_backward",
       "adaptive_max_pool3d", "adaptive_max_pool3d_backward", "fractional_max_pool3d", "fractional_max_pool3d_backward",
       "reflection_pad3d", "reflection_pad3d_backward", "replication_pad3d", "replication_pad3d_backward"});
  rules.add(front(), {"constant_pad_nd"});
  rules.add(batched_images(), {"channel_shuffle",
                               "upsample_nearest1d",
                               "upsample_nearest2d",
                               "upsample_nearest3d",
                               "_upsample_nearest_exact1d",
                               "_upsample_nearest_exact2d",
                               "_upsample_nearest_exact3d",
                               "upsample_linear1d",
                               "upsample_bilinear2d",
                               "upsample_bicubic2d",
                               "upsample_trilinear3d",
                               "_upsample_bilinear2d_aa",
                               "_upsample_bicubic2d_aa",
                               "_upsample_lanczos2d_aa",
                               "grid_sampler_2d",
                               "grid_sampler_2d_backward",
                               "grid_sampler_3d",
                               "grid_sampler_3d_backward",
                               "cudnn_grid_sampler",
                               "cudnn_grid_sampler_backward",
                               "_grid_sampler_2d_cpu_fallback",
                               "_grid_sampler_2d_cpu_fallback_backward"});
  rules.add(batched_images("input_size"),
            {"upsample_nearest1d_backward", "upsample_nearest2d_backward", "upsample_nearest3d_backward",
             "_upsample_nearest_exact1d_backward", "_upsample_nearest_exact2d_backward",
             "_upsample_nearest_exact3d_backward", "upsample_linear1d_backward", "upsample_bilinear2d_backward",
             "upsample_bicubic2d_backward", "upsample_trilinear3d_backward", "_upsample_bilinear2d_aa_backward",
             "_upsample_bicubic2d_aa_backward", "_upsample_lanczos2d_aa_backward"});
  rules.add(batched_images("size"), {"affine_grid_generator"});
}

}  // namespace functorch_lite
