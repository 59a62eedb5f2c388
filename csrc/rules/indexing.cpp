// Indexing by tensors: index, index_put, gather, scatter, index_select and their relatives.
#include <ATen/ExpandUtils.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/List.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cumsum.h>
#include <ATen/ops/gather.h>
#include <ATen/ops/index.h>
#include <ATen/ops/index_put.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/permute.h>
#include <ATen/ops/reshape.h>
#include <ATen/ops/scatter.h>
#include <ATen/ops/scatter_add.h>
#include <ATen/ops/scatter_reduce.h>
#include <ATen/ops/where.h>

#include <algorithm>

#include "../fallback.h"
#include "../plain_compositions.h"
#include "data_dependent.h"
#include "rules.h"

namespace functorch_lite {
namespace {

using Indices = c10::List<std::optional<at::Tensor>>;

// x with its dimensions in this order, a view; x itself if that is the order they are in.
at::Tensor in_order(const at::Tensor& x, const std::vector<int64_t>& order) {
  return std::is_sorted(order.begin(), order.end()) ? x : at::permute(x, order);
}

// x[d0, i1, i2, d3..] in normal form: the indexed dimensions first, right behind the batch.
struct IndexCall {
  BatchCall& call;
  std::vector<at::Tensor> indices;  // the given ones: i[B?,I]
  std::vector<bool> batched;
  std::vector<int64_t> indexed;    // their logical dimensions in x
  std::vector<int64_t> kept;       // the other logical dimensions of x
  std::vector<c10::SymInt> shape;  // I, what the indices broadcast to
  bool any_batched = false;

  explicit IndexCall(BatchCall& c) : call(c) {
    const auto given = call.arg(1).toOptionalTensorVector();
    int64_t dim = 0;
    for (size_t k = 0; k < given.size(); ++k) {
      if (!given[k].has_value() || !given[k]->defined()) {
        kept.push_back(dim++);
        continue;
      }
      const bool is_batched = call.is_element_batched(1, k);
      if (is_mask(*given[k])) {
        check_mask(*given[k], is_batched, dim, k);
        const auto positions = is_batched ? positions_of_true(call, *given[k]) : given[k]->nonzero();
        for (const auto& index : positions.unbind(-1)) add(index, is_batched, dim++);
      } else {
        add(*given[k], is_batched, dim++);
      }
    }
    while (dim < call.rank(0)) kept.push_back(dim++);
    for (size_t k = 0; k < indices.size(); ++k) {
      const auto sizes = indices[k].sym_sizes();
      shape = at::infer_size_symint(shape, batched[k] ? sizes.slice(1) : sizes);
    }
  }

  static bool is_mask(const at::Tensor& index) {
    return index.scalar_type() == c10::kBool || index.scalar_type() == c10::kByte;
  }

  // A mask stands for as many dimensions of x as it has.
  void check_mask(const at::Tensor& mask, bool is_batched, int64_t dim, size_t k) const {
    const auto x = call.tensor(0).sym_sizes().slice(call.is_batched(0) ? 1 : 0);
    const auto sizes = mask.sym_sizes().slice(is_batched ? 1 : 0);
    for (size_t d = 0; d < sizes.size(); ++d) {
      TORCH_CHECK_INDEX(dim + d < x.size() && sizes[d] == x[dim + d], "The shape of the mask ", sizes, " at index ", k,
                        " does not match the shape of the indexed tensor ", x, " at index ", dim + d);
    }
  }

  void add(const at::Tensor& index, bool is_batched, int64_t dim) {
    indices.push_back(index);
    batched.push_back(is_batched);
    indexed.push_back(dim);
    any_batched |= is_batched;
  }

  // Where I stands in the result as user code sees it: in the place of adjacent indices, otherwise in front.
  int64_t position() const {
    for (size_t k = 1; k < indexed.size(); ++k) {
      if (indexed[k] != indexed[k - 1] + 1) return 0;
    }
    return indexed[0];
  }

  // x[B?,*] -> x[B?,indexed,kept], a view.
  at::Tensor normal_form(const at::Tensor& x, bool has_batch) const {
    std::vector<int64_t> order;
    if (has_batch) order.push_back(0);
    for (auto d : indexed) order.push_back(d + has_batch);
    for (auto d : kept) order.push_back(d + has_batch);
    return in_order(x, order);
  }

  // The inverse, for x[B,*].
  at::Tensor from_normal_form(const at::Tensor& y) const {
    std::vector<int64_t> order(y.dim());
    int64_t position = 1;
    for (auto d : indexed) order[d + 1] = position++;
    for (auto d : kept) order[d + 1] = position++;
    return in_order(y, order);
  }

  // The indices for x[B?,indexed,kept].
  Indices normal_indices(bool x_has_batch) const {
    Indices result;
    const auto rank = static_cast<int64_t>(shape.size());
    if (x_has_batch && any_batched) {
      auto examples = at::arange(call.batch_size(), indices[0].options().dtype(c10::kLong));
      for (int64_t r = 0; r < rank; ++r) examples = examples.unsqueeze(-1);
      result.push_back(examples);
    } else if (x_has_batch) {
      result.push_back(std::nullopt);
    }
    for (size_t k = 0; k < indices.size(); ++k) result.push_back(batched[k] ? pad_rank(indices[k], rank) : indices[k]);
    return result;
  }

  // [B,I,kept] <-> the order of dimensions that user code sees, with the batch in front.
  std::vector<int64_t> seen_order() const {
    const auto rank = static_cast<int64_t>(shape.size());
    std::vector<int64_t> order{0};
    for (int64_t d = 0; d < position(); ++d) order.push_back(1 + rank + d);
    for (int64_t d = 0; d < rank; ++d) order.push_back(1 + d);
    for (auto d = position(); d < static_cast<int64_t>(kept.size()); ++d) order.push_back(1 + rank + d);
    return order;
  }
};

void index_rule(BatchCall& call) {
  const bool has_batch = call.is_batched(0);
  const auto x = call.to_front(0);
  const IndexCall index(call);
  const auto picked = at::index(index.normal_form(x, has_batch), index.normal_indices(has_batch));
  call.set_results(in_order(picked, index.seen_order()));
  call.finish();
}

// x[.., mask, ..] = values that do not vary along the mask: how much it selects does not matter then, and may differ
// between examples. x[B,*], mask[B,*], values[B?,*] -> y[B,*], or nothing if this is another assignment.
std::optional<at::Tensor> put_by_mask(BatchCall& call, const at::Tensor& x) {
  const auto given = call.arg(1).toOptionalTensorVector();
  std::optional<size_t> place;
  for (size_t k = 0; k < given.size(); ++k) {
    if (!given[k].has_value() || !given[k]->defined()) continue;
    if (place.has_value() || !IndexCall::is_mask(*given[k]) || !call.is_element_batched(1, k)) return {};
    place = k;
  }
  auto mask = *given[*place];
  const auto covered = mask.dim() - 1;
  const auto behind = call.rank(0) - static_cast<int64_t>(*place) - covered;
  if (covered == 0 || behind < 0 || call.tensor(2).scalar_type() != x.scalar_type()) return {};
  auto values = call.to_front(2);
  if (call.rank(2) > behind) {
    const auto along_mask = values.dim() - behind - 1;
    if (values.sym_size(along_mask) != 1) return {};
    for (int64_t d = 1; d < covered; ++d) values = values.unsqueeze(along_mask);
  }
  if (call.is_batched(2)) values = pad_rank(values, call.rank(0));
  for (size_t d = 0; d < *place; ++d) mask = mask.unsqueeze(1);
  for (int64_t d = 0; d < behind; ++d) mask = mask.unsqueeze(-1);
  return at::where(mask.to(c10::kBool), call.arg("accumulate").toBool() ? x + values : values, x);
}

void index_put_rule(BatchCall& call) {
  const bool in_place = call.schema().is_mutable();
  const auto x = in_place ? call.to_front(0) : call.expand_to_front(0);
  if (const auto result = put_by_mask(call, x)) {
    call.set_results(in_place ? x.copy_(*result) : *result);
    return call.finish();
  }
  const IndexCall index(call);
  // values[B?,..] -> what user code sees as x[indices], then to the normal form.
  std::vector<c10::SymInt> sizes{call.batch_size()};
  const auto p = index.position();
  for (int64_t d = 0; d < p; ++d) sizes.push_back(x.sym_size(index.kept[d] + 1));
  sizes.insert(sizes.end(), index.shape.begin(), index.shape.end());
  for (size_t d = p; d < index.kept.size(); ++d) sizes.push_back(x.sym_size(index.kept[d] + 1));
  const auto rank = static_cast<int64_t>(sizes.size()) - 1;
  const auto values = call.to_front(2, rank).expand_symint(sizes);
  const auto order = index.seen_order();
  std::vector<int64_t> inverse(order.size());
  for (size_t d = 0; d < order.size(); ++d) inverse[order[d]] = static_cast<int64_t>(d);
  auto view = index.normal_form(x, true);
  const auto indices = index.normal_indices(true);
  const auto accumulate = call.arg("accumulate").toBool();
  if (in_place) {
    at::index_put_(view, indices, in_order(values, inverse), accumulate);
    call.set_results(x);
  } else {
    const auto result = at::index_put(view, indices, in_order(values, inverse), accumulate);
    call.set_results(index.from_normal_form(result));
  }
  call.finish();
}

// x[B?,*,n,*], dim, index[B?,*,k,*] -> y[B,*,k,*]. A scalar counts as one element.
void gather_rule(BatchCall& call) {
  const bool scalar = call.rank(2) == 0;
  const auto dim = shift_dim(call.arg("dim").toInt(), call.rank(0));
  const auto y = at::gather(call.expand_to_front(0, 1), dim, call.expand_to_front(2, 1));
  call.set_results(scalar ? y.squeeze(1) : y);
  call.finish();
}

// x[B?,*,n,*], dim, index[B?,k] -> y[B,*,k,*]
void index_select_rule(BatchCall& call) {
  const bool scalar = call.rank(0) == 0;
  auto index = call.to_front(2, 1);
  const auto rank = std::max<int64_t>(call.rank(0), 1);
  const auto dim = shift_dim(call.arg("dim").toInt(), rank);
  at::Tensor y;
  if (!call.is_batched(2)) {
    y = at::index_select(call.to_front(0, rank), dim, index);
  } else if (!call.is_batched(0)) {
    const auto x = scalar ? call.tensor(0).unsqueeze(0) : call.tensor(0);
    auto sizes = x.sym_sizes().vec();
    sizes[dim - 1] = call.batch_size();
    sizes.insert(sizes.begin() + dim, index.sym_size(1));
    const auto picked = at::index_select(x, dim - 1, index.flatten());
    y = move_dim(at::reshape_symint(picked, sizes), dim - 1, 0);
  } else {
    const auto x = call.to_front(0, rank);
    auto sizes = x.sym_sizes().vec();
    sizes[dim] = index.sym_size(1);
    for (int64_t d = 1; d < dim; ++d) index = index.unsqueeze(1);
    while (index.dim() < x.dim()) index = index.unsqueeze(-1);
    y = at::gather(x, dim, index.expand_symint(sizes));
  }
  if (scalar) y = y.squeeze(1);
  call.set_results(y);
  call.finish();
}

// The in-place form writes the same result into its first argument x[B,*].
void finish_write(BatchCall& call, const at::Tensor& x, const at::Tensor& result) {
  call.set_results(call.schema().is_mutable() ? x.copy_(result) : result);
  call.finish();
}

// What writes along a dimension have in common: x[B?,*,n,*], dim, index[B?,k], source[B?,*,k,*] -> x[B,*,n,*], where a
// scalar counts as one element.
struct WriteAlong {
  BatchCall& call;
  bool scalar;
  int64_t rank;
  int64_t dim;
  at::Tensor x;

  explicit WriteAlong(BatchCall& c)
      : call(c),
        scalar(c.rank(0) == 0),
        rank(std::max<int64_t>(c.rank(0), 1)),
        dim(shift_dim(c.arg("dim").toInt(), rank)),
        x(c.expand_to_front(0, rank)) {}

  at::Tensor source() const { return call.expand_to_front(3, rank); }
  // index[B?,k] -> index[B,1..,k,1..], expanded to these sizes.
  at::Tensor index(c10::SymIntArrayRef sizes) const {
    auto index = call.expand_to_front(2, 1);
    for (int64_t d = 1; d < dim; ++d) index = index.unsqueeze(1);
    while (index.dim() < static_cast<int64_t>(sizes.size())) index = index.unsqueeze(-1);
    return index.expand_symint(sizes);
  }
  void finish(const at::Tensor& result) const {
    finish_write(call, x, scalar && !call.schema().is_mutable() ? result.squeeze(1) : result);
  }
};

void index_add_rule(BatchCall& call) {
  const WriteAlong write(call);
  const auto source = write.source() * call.arg("alpha").toScalar();
  write.finish(at::scatter_add(write.x, write.dim, write.index(source.sym_sizes()), source.to(write.x.scalar_type())));
}

void index_reduce_rule(BatchCall& call) {
  const WriteAlong write(call);
  const auto source = write.source();
  write.finish(at::scatter_reduce(write.x, write.dim, write.index(source.sym_sizes()), source,
                                  call.arg("reduce").toStringView(), call.arg("include_self").toBool()));
}

void index_copy_rule(BatchCall& call) {
  const WriteAlong write(call);
  const auto source = write.source();
  write.finish(at::scatter(write.x, write.dim, write.index(source.sym_sizes()), source));
}

// x[B?,*], dim, index[B?,k], value -> y[B,*]
void index_fill_rule(BatchCall& call) {
  const WriteAlong write(call);
  auto sizes = write.x.sym_sizes().vec();
  sizes[write.dim] = call.is_batched(2) ? call.to_front(2, 1).sym_size(1) : call.tensor(2).sym_numel();
  const auto index = write.index(sizes);
  const auto wrapped = at::where(index < 0, index + write.x.sym_size(write.dim), index);
  write.finish(at::scatter(write.x, write.dim, wrapped, call.arg(3).toScalar()));
}

// index[B,*] -> positions[B,k] in x[B,n], negative ones counted from the end.
at::Tensor flat_positions(const at::Tensor& index, const at::Tensor& x) {
  const auto flat = flatten_examples(index);
  return at::where(flat < 0, flat + x.size(1), flat);
}

// x[B?,*], index[B?,*] -> y[B,*]: elements of the flattened example.
void take_rule(BatchCall& call) {
  const auto index = call.expand_to_front(1);
  const auto x = flatten_examples(call.expand_to_front(0));
  call.set_results(at::gather(x, 1, flat_positions(index, x)).reshape_symint(index.sym_sizes()));
  call.finish();
}

// x[B?,*], index[B?,*], source[B?,*] -> y[B,*]: elements of the flattened example replaced, or added to.
void put_rule(BatchCall& call) {
  const bool in_place = call.schema().is_mutable();
  const auto x = in_place ? call.to_front(0) : call.expand_to_front(0);
  const auto flat = flatten_examples(x);
  const auto index = flat_positions(call.expand_to_front(1), flat);
  const auto source = flatten_examples(call.expand_to_front(2));
  const auto y =
      call.arg("accumulate").toBool() ? at::scatter_add(flat, 1, index, source) : at::scatter(flat, 1, index, source);
  finish_write(call, x, y.reshape_symint(x.sym_sizes()));
}

// x[B?,*], mask[B?,*], source[B?,*] -> y[B,*]: the elements under the mask are those of the source, in order.
void masked_scatter_rule(BatchCall& call) {
  TORCH_CHECK(call.tensor(0).scalar_type() == call.tensor(2).scalar_type(),
              "masked_scatter(): expected a source of dtype ", call.tensor(0).scalar_type(), ", got ",
              call.tensor(2).scalar_type());
  const bool in_place = call.schema().is_mutable();
  const auto rank = in_place ? call.rank(0) : std::max(call.rank(0), call.rank(1));
  auto x = in_place ? call.to_front(0) : call.expand_to_front(0, rank);
  auto mask = call.expand_to_front(1, rank);
  const auto sizes = at::infer_size_symint(x.sym_sizes(), mask.sym_sizes());
  mask = mask.expand_symint(sizes);
  const auto source = flatten_examples(call.expand_to_front(2));
  auto y = x.expand_symint(sizes);
  if (source.sym_size(1) != 0) {
    const auto nth = at::cumsum(flatten_examples(mask), 1) - 1;
    y = at::where(mask, at::gather(source, 1, nth.clamp_min(0)).reshape_symint(sizes), y);
  } else {
    y = y.clone();
  }
  finish_write(call, x, y);
}

// grad[B?,*], mask[B?,*] -> source[B,n]: what the elements under the mask come from, in order; 0 where none does.
void masked_scatter_backward_rule(BatchCall& call) {
  const auto rank = std::max(call.rank(0), call.rank(1));
  const auto grad = flatten_examples(call.expand_to_front(0, rank));
  const auto mask = flatten_examples(call.expand_to_front(1, rank).expand_symint(call.tensor(0).sym_sizes()));
  auto sizes = call.arg("sizes").toSymIntVector();
  c10::SymInt n = 1;
  for (const auto& size : sizes) n = n * size;
  const auto slot = at::where(mask, at::cumsum(mask, 1) - 1, at::Scalar(n));
  const auto slots = grad.new_zeros_symint({call.batch_size(), n + 1});  // the last for what is not under the mask
  sizes.insert(sizes.begin(), call.batch_size());
  call.set_results(at::scatter(slots, 1, slot, grad).narrow_symint(1, 0, n).reshape_symint(sizes));
  call.finish();
}

// x[B?,*] with src[B?,*] written into part of it; dims count in x.
struct ScatterView {
  std::vector<size_t> dims;
  void operator()(BatchCall& call) const {
    const auto rank = call.rank(0);
    call.expand_to_front(0);
    call.expand_to_front(1);
    for (auto d : dims) call.arg(d) = shift_dim(call.arg(d).toInt(), rank);
    call.call();
    call.finish();
  }
};

}  // namespace

void add_indexing_rules(RuleTable& rules) {
  for (const auto& [op, composition] : indexing_compositions()) rules.add(composition, {op});
  rules.add(&index_rule, {"index.Tensor", "_unsafe_index.Tensor"});
  rules.add(&index_put_rule, {"index_put", "index_put_", "_index_put_impl", "_index_put_impl_", "_unsafe_index_put"});
  rules.add(expanded_along({"dim"}),
            {"scatter.src", "scatter_.src", "scatter.value", "scatter_.value", "scatter.reduce", "scatter_.reduce",
             "scatter.value_reduce", "scatter_.value_reduce", "scatter_add", "scatter_add_", "scatter_reduce.two",
             "scatter_reduce_.two"});
  rules.add(&gather_rule, {"gather"});
  rules.add(&index_select_rule, {"index_select"});
  rules.add(&index_add_rule, {"index_add", "index_add_"});
  rules.add(&index_copy_rule, {"index_copy", "index_copy_"});
  rules.add(&index_fill_rule, {"index_fill.int_Scalar", "index_fill_.int_Scalar"});
  rules.add(&index_reduce_rule, {"index_reduce", "index_reduce_"});
  rules.add(&take_rule, {"take"});
  rules.add(&put_rule, {"put", "put_"});
  rules.add(&masked_scatter_rule, {"masked_scatter", "masked_scatter_"});
  rules.add(&masked_scatter_backward_rule, {"masked_scatter_backward"});
  const auto scatter_view = [](std::vector<std::string> names) {
    return Family{"scatter_view", [names](const c10::FunctionSchema& schema) -> Rule {
                    std::vector<size_t> dims;
                    for (const auto& name : names) dims.push_back(position_of(schema, name));
                    return ScatterView{dims};
                  }};
  };
  rules.add(scatter_view({"dim"}), {"select_scatter", "slice_scatter"});
  rules.add(scatter_view({"dim1", "dim2"}), {"diagonal_scatter"});
}

}  // namespace functorch_lite
