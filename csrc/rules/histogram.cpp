// Histograms: the bin of each element, and a sum over the elements of each bin.
#include <ATen/TensorOperators.h>
#include <ATen/ops/aminmax.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/diff.h>
#include <ATen/ops/flatten.h>
#include <ATen/ops/linspace.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/scatter_add.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include "data_dependent.h"
#include "rules.h"

namespace functorch_lite {
namespace {

// Where the first bin begins and the last ends: numbers if they are given, otherwise the least and greatest of the
// values x[B,n], each [B,1]. An empty range grows by `margin` on both sides.
struct BinRange {
  std::optional<std::pair<double, double>> given;
  at::Tensor low, high;

  BinRange(BatchCall& call, const at::Tensor& x, std::optional<std::pair<double, double>> range, double margin)
      : given(range) {
    if (given.has_value()) {
      auto& [from, to] = *given;
      TORCH_CHECK(from <= to, call.name(), ": expected min <= max, got ", from, " and ", to);
      if (from == to) given = {from - margin, to + margin};
      low = at::scalar_tensor(from, x.options());
      high = at::scalar_tensor(to, x.options());
    } else {
      const auto [least, greatest] = at::aminmax(x.to(c10::kDouble), /*dim=*/1, /*keepdim=*/true);
      TORCH_CHECK(!has_values(least) || innermost_value(greatest - least).isfinite().all().item<bool>(), call.name(),
                  ": the range of the values is not finite");
      const auto grow = (least == greatest) * margin;
      low = (least - grow).to(x.scalar_type());
      high = (greatest + grow).to(x.scalar_type());
    }
  }

  // n + 1 equally spaced edges [B?,n+1].
  at::Tensor edges(int64_t n) const {
    if (given.has_value()) return at::linspace(given->first, given->second, n + 1, low.options());
    const auto i = at::arange(n + 1, low.options());
    const auto step = (high - low) / n;
    return at::where(i < (n + 1) / 2, low + step * i, high - step * (n - i));
  }
};

// bins[B,n] of m, inside[B,n], weights[B,n] -> sums[B,m]
at::Tensor sum_by_bin(const at::Tensor& bins, const at::Tensor& inside, const at::Tensor& weights,
                      const c10::SymInt& m) {
  const auto sums = weights.new_zeros_symint({weights.sym_size(0), m + 1});  // the last for what is outside
  return at::scatter_add(sums, 1, at::where(inside, bins, at::Scalar(m)), weights).narrow_symint(1, 0, m);
}

// x[B,*] -> counts[B,bins]
void histc_rule(BatchCall& call) {
  const auto x = flatten_examples(call.to_front(0));
  const auto bins = call.arg("bins").toInt();
  TORCH_CHECK(bins > 0, "histc(): expected bins > 0, got ", bins);
  std::optional<std::pair<double, double>> given{
      {call.arg("min").toScalar().toDouble(), call.arg("max").toScalar().toDouble()}};
  if (given->first == given->second && x.sym_size(1) != 0) given.reset();
  const BinRange range(call, x, given, 1);
  const auto inside = (x >= range.low) & (x <= range.high);
  const auto position = (x - range.low) * bins / (range.high - range.low);
  const auto bin = at::where(inside, position, 0).to(c10::kLong).clamp_max(bins - 1);
  call.set_results(sum_by_bin(bin, inside, at::ones_like(x), bins));
  call.finish();
}

// x[B,n,D], edges[B?,m_d+1] of the bins along each of the D dimensions, weights[B?,n] -> sums[B,m_1,..m_D]
at::Tensor sum_in_bins(BatchCall& call, const at::Tensor& x, std::vector<at::Tensor> edges) {
  std::vector<c10::SymInt> sizes{call.batch_size()};
  c10::SymInt total = 1;
  auto bins = at::zeros_like(x.select(2, 0), c10::kLong);
  auto inside = at::ones_like(bins, c10::kBool);
  for (size_t d = 0; d < edges.size(); ++d) {
    TORCH_CHECK(edges[d].scalar_type() == x.scalar_type(), call.name(), ": expected bins of dtype ", x.scalar_type(),
                ", got ", edges[d].scalar_type());
    if (edges[d].dim() == 1) edges[d] = expand_batch(edges[d], call.batch_size());
    const auto m = edges[d].sym_size(1) - 1;
    TORCH_CHECK(edges[d].dim() == 2 && m > 0, call.name(), ": expected a vector of at least two edges");
    const auto values = x.select(2, static_cast<int64_t>(d)).contiguous();
    const auto bin = at::searchsorted(edges[d].contiguous(), values, /*out_int32=*/false, /*right=*/true) - 1;
    inside = inside & (values >= edges[d].narrow(1, 0, 1)) & (values <= edges[d].narrow_symint(1, m, 1));
    bins = bins * at::Scalar(m) + bin.clamp_max(m - 1);
    sizes.push_back(m);
    total = total * m;
  }
  const auto weight = call.position("weight");
  const auto weights =
      call.is_tensor(weight) ? flatten_examples(call.expand_to_front(weight)) : at::ones_like(x.select(2, 0));
  TORCH_CHECK(weights.scalar_type() == x.scalar_type() && weights.sym_size(1) == x.sym_size(1), call.name(),
              ": expected one weight of dtype ", x.scalar_type(), " for each value");
  const auto sums = sum_by_bin(bins, inside, weights, total);
  if (!call.arg("density").toBool()) return sums.reshape_symint(sizes);
  auto density = (sums / at::sum(sums, {1}, /*keepdim=*/true)).reshape_symint(sizes);
  for (size_t d = 0; d < edges.size(); ++d) {
    auto widths = pad_rank(at::diff(edges[d]), static_cast<int64_t>(d) + 1);
    while (widths.dim() < density.dim()) widths = widths.unsqueeze(-1);
    density = density / widths;
  }
  return density;
}

// x[B,n,D] -> equally spaced edges along each of the D dimensions, [B?,m_d+1].
std::vector<at::Tensor> equal_bins(BatchCall& call, const at::Tensor& x, const std::vector<int64_t>& bins) {
  const auto range = call.arg("range").isNone() ? std::vector<double>() : call.arg("range").toDoubleVector();
  TORCH_CHECK(range.empty() || range.size() == 2 * bins.size(), call.name(), ": expected ", 2 * bins.size(),
              " limits of the range, got ", range.size());
  std::vector<at::Tensor> edges;
  for (size_t d = 0; d < bins.size(); ++d) {
    TORCH_CHECK(bins[d] > 0, call.name(), ": expected bins > 0, got ", bins[d]);
    std::optional<std::pair<double, double>> given;
    if (!range.empty()) given = {range[2 * d], range[2 * d + 1]};
    if (range.empty() && x.sym_size(1) == 0) given = {0, 1};
    edges.push_back(BinRange(call, x.select(2, static_cast<int64_t>(d)), given, 0.5).edges(bins[d]));
  }
  return edges;
}

// Edges that are the same for all examples stay as they are.
int64_t bdim_of_edges(const std::vector<at::Tensor>& edges) { return edges[0].dim() == 1 ? kNoBatchDim : 0; }

// x[B?,*] -> [B,n,1]
at::Tensor as_points(BatchCall& call) { return flatten_examples(call.expand_to_front(0)).unsqueeze(-1); }

// x[B?,*,D] -> [B,n,D], where `bins` has an entry for each dimension.
at::Tensor points(BatchCall& call) {
  const auto dims = static_cast<int64_t>(call.arg("bins").toListRef().size());
  const auto& x = call.expand_to_front(0);
  TORCH_CHECK(call.rank(0) >= 2 && x.sym_size(-1) == dims, call.name(), ": expected points in ", dims,
              " dimensions, as many as `bins` has, got a tensor of shape ", x.sym_sizes().slice(1));
  return at::flatten(x, 1, -2);
}

// x[B?,*], weights[B?,*] -> sums[B,bins], edges[B?,bins+1]
void histogram_rule(BatchCall& call) {
  const auto x = as_points(call);
  const auto edges = equal_bins(call, x, {call.arg("bins").toInt()});
  call.set_results(sum_in_bins(call, x, edges), edges[0]);
  call.finish_each({0, bdim_of_edges(edges)});
}

// x[B?,*], edges[B?,m+1], weights[B?,*] -> sums[B,m], edges
void histogram_in_rule(BatchCall& call) {
  const auto edges = call.to_front(1);
  const auto bdim = call.is_batched(1) ? 0 : kNoBatchDim;
  call.set_results(sum_in_bins(call, as_points(call), {edges}), edges.clone());
  call.finish_each({0, bdim});
}

void histogramdd_edges_rule(BatchCall& call) {
  const auto edges = equal_bins(call, points(call), call.arg("bins").toIntVector());
  call.set_results(edges);
  call.finish(bdim_of_edges(edges));
}

void histogramdd_rule(BatchCall& call) {
  const auto x = points(call);
  call.set_results(sum_in_bins(call, x, equal_bins(call, x, call.arg("bins").toIntVector())));
  call.finish();
}

void histogramdd_in_rule(BatchCall& call) {
  const auto x = points(call);
  call.set_results(sum_in_bins(call, x, call.arg("bins").toTensorVector()));
  call.finish();
}

}  // namespace

void add_histogram_rules(RuleTable& rules) {
  rules.add(&histc_rule, {"histc"});
  rules.add(&histogram_rule, {"histogram.bin_ct"});
  rules.add(&histogram_in_rule, {"histogram.bins_tensor"});
  rules.add(&histogramdd_edges_rule, {"_histogramdd_bin_edges"});
  rules.add(&histogramdd_rule, {"_histogramdd_from_bin_cts"});
  rules.add(&histogramdd_in_rule, {"_histogramdd_from_bin_tensors"});
}

}  // namespace functorch_lite
