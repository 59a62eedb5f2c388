// The families of batching rules. See families.h first.
#include "families.h"

#include <ATen/native/TypeProperties.h>
#include <ATen/ops/reshape.h>
#include <ATen/ops/squeeze.h>
#include <ATen/ops/unsqueeze.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "fallback.h"

namespace functorch_lite {
namespace {

// The arguments that take part in type promotion.
std::vector<size_t> promoted_arguments(BatchCall& call) {
  std::vector<size_t> operands;
  for (size_t i = 0; i < call.size(); ++i) {
    const auto& name = call.schema().arguments()[i].name();
    if (call.is_tensor(i) && name != "condition" && name != "mask") operands.push_back(i);
  }
  return operands;
}

}  // namespace

c10::ScalarType dtype_as_seen(BatchCall& call) {
  at::native::ResultTypeState seen;
  for (auto i : promoted_arguments(call)) {
    const auto& x = call.tensor(i);
    const bool batched_scalar = call.is_batched(i) && call.rank(i) == 0;
    if (!batched_scalar) {
      seen = at::native::update_result_type_state(x, seen);
    } else if (seen.zeroResult == c10::ScalarType::Undefined) {
      seen.zeroResult = x.scalar_type();
    } else {
      seen.zeroResult = c10::promoteTypes(seen.zeroResult, x.scalar_type());
    }
  }
  return at::native::result_type(seen);
}

void promote_as_seen(BatchCall& call) {
  bool mixed = false;
  std::optional<c10::ScalarType> first;
  for (size_t i = 0; i < call.size(); ++i) {
    if (!call.is_tensor(i)) continue;
    const auto& x = call.tensor(i);
    if (first.has_value()) mixed |= x.scalar_type() != *first;
    first = x.scalar_type();
  }
  if (C10_LIKELY(!mixed)) return;
  const auto operands = promoted_arguments(call);
  at::native::ResultTypeState physical;
  for (auto i : operands) physical = at::native::update_result_type_state(call.tensor(i), physical);
  const auto dtype = dtype_as_seen(call);
  if (dtype == at::native::result_type(physical)) return;
  for (auto i : operands) {
    const auto* alias = call.schema().arguments()[i].alias_info();
    if (alias != nullptr && alias->isWrite()) continue;  // a copy of it would take the result
    if (call.is_batched(i)) {
      call.arg(i) = call.tensor(i).to(dtype);
    } else if (call.schema().is_mutable() && call.rank(i) == 0) {
      call.expand_to_front(i);  // counts as much as the batched scalar that is written into
    }
  }
}

namespace {

// A number on the CPU may meet tensors of any device. A batch of them may not.
void move_numbers(BatchCall& call) {
  std::optional<c10::Device> home;
  for (size_t i = 0; i < call.size(); ++i) {
    if (call.is_tensor(i) && !call.tensor(i).is_cpu()) home = call.tensor(i).device();
  }
  if (!home.has_value()) return;
  for (size_t i = 0; i < call.size(); ++i) {
    if (!call.is_batched(i) || call.rank(i) > 0 || !call.tensor(i).is_cpu()) continue;
    const auto* alias = call.schema().arguments()[i].alias_info();
    if (alias == nullptr || !alias->isWrite()) call.arg(i) = call.tensor(i).to(*home);
  }
}

void run_pointwise(BatchCall& call) {
  int64_t rank = 0;
  int64_t bdim = kNoBatchDim;
  bool aligned = true;  // all batched arguments have one rank and one batch dimension, the others are scalars
  bool has_scalar = false;
  for (size_t i = 0; i < call.size(); ++i) {
    if (!call.is_tensor(i)) continue;
    const auto r = call.rank(i);
    has_scalar |= call.is_batched(i) && r == 0;
    if (call.is_batched(i)) {
      aligned &= bdim == kNoBatchDim || (bdim == call.bdim(i) && r == rank);
      bdim = call.bdim(i);
    } else {
      aligned &= r == 0;
    }
    rank = std::max(rank, r);
  }
  if (C10_UNLIKELY(has_scalar)) {
    promote_as_seen(call);
    move_numbers(call);
  }
  if (aligned) {
    for (size_t i = 0; i < call.size() && aligned; ++i) aligned = !call.is_batched(i) || call.rank(i) == rank;
  }
  if (!aligned) {
    for (size_t i = 0; i < call.size(); ++i) {
      if (call.is_batched(i)) call.to_front(i, rank);
    }
    bdim = 0;
  }
  call.call();
  call.finish(bdim);
}

void run_front(BatchCall& call) {
  for (size_t i = 0; i < call.size(); ++i) {
    if (call.is_batched(i)) call.to_front(i);
  }
  call.call();
  call.finish();
}

void run_expanded(BatchCall& call) {
  for (size_t i = 0; i < call.size(); ++i) {
    if (call.is_tensor(i)) call.expand_to_front(i);
  }
  call.call();
  call.finish();
}

void shift_dims(c10::IValue& dims, int64_t rank) {
  if (dims.isInt()) {
    dims = shift_dim(dims.toInt(), rank);
  } else if (dims.isIntList()) {
    auto shifted = dims.toIntVector();
    for (auto& d : shifted) d = shift_dim(d, rank);
    dims = shifted;
  }
}

// A scalar, seen as x[B,1] for the length of a call along its only dimension.
bool lend_dimension(BatchCall& call) {
  call.to_front(0);
  if (call.rank(0) > 0) return false;
  call.arg(0) = at::unsqueeze(call.tensor(0), 1);
  return true;
}
void take_dimension_back(BatchCall& call) {
  for (size_t i = 0; i < call.count_results(); ++i) {
    auto& result = call.result(i);
    if (result.isTensor() && result.toTensor().dim() == 2) result = at::squeeze(result.toTensor(), 1);
  }
}

struct Along {
  std::vector<size_t> dims;
  bool expands = false;  // every tensor argument has the rank of the first
  void operator()(BatchCall& call) const {
    const bool lent = call.rank(0) == 0;
    for (size_t i = 0; i < call.size() && expands; ++i) {
      if (call.is_tensor(i)) call.expand_to_front(i, 1);
    }
    call.to_front(0, 1);
    for (auto position : dims) shift_dims(call.arg(position), call.rank(0));
    call.call();
    if (lent) take_dimension_back(call);
    call.finish();
  }
};

struct Reduce {
  size_t dim;
  std::optional<size_t> keepdim;
  bool one_dim;  // the argument is a single optional int

  void operator()(BatchCall& call) const {
    const bool lent = lend_dimension(call);
    const auto rank = call.rank(0);
    auto& dims = call.arg(dim);
    const bool all = dims.isNone() || (dims.isIntList() && dims.toIntVector().empty());
    if (!all) {
      shift_dims(dims, rank);
    } else if (one_dim) {
      call.arg(0) = flatten_examples(call.tensor(0));
      dims = 1;
    } else {
      std::vector<int64_t> everything(rank);
      for (int64_t d = 0; d < rank; ++d) everything[d] = d + 1;
      dims = everything;
    }
    const bool keeps = keepdim.has_value() && call.arg(*keepdim).toBool();
    call.call();
    if (lent) take_dimension_back(call);
    if (all && one_dim && keeps && !lent) call.result() = pad_rank(call.result().toTensor(), rank);
    call.finish();
  }
};

struct ReduceAll {
  c10::OperatorHandle sibling;
  bool wants_list;  // of dimensions
  void operator()(BatchCall& call) const {
    const auto& x = call.to_front(0);
    if (wants_list && x.dim() > 1) {
      std::vector<int64_t> dims;
      for (int64_t d = 1; d < x.dim(); ++d) dims.push_back(d);
      call.call(sibling, arguments_for(sibling, call, {{"self", x}, {"dim", dims}}));
    } else {
      const c10::IValue dim = wants_list ? c10::IValue(std::vector<int64_t>{1}) : c10::IValue(1);
      call.call(sibling, arguments_for(sibling, call, {{"self", flatten_examples(x)}, {"dim", dim}}));
    }
    while (call.count_results() > call.schema().returns().size()) call.drop_last_result();
    call.finish();
  }
};

c10::SymInt count_elements(c10::SymIntArrayRef sizes) {
  c10::SymInt n = 1;
  for (const auto& size : sizes) n = n * size;
  return n;
}

// Replaces a size of -1 by the one that makes n elements: with an empty batch nobody could tell it later.
void infer_size(std::vector<c10::SymInt>& sizes, const c10::SymInt& n) {
  for (auto& size : sizes) {
    if (size != -1) continue;
    const auto others = -count_elements(sizes);
    if (others > 0 && n % others == 0) size = n / others;
    return;
  }
}

struct Shaped {
  size_t size;
  std::vector<size_t> dims;
  bool pads;    // the size may have more dimensions than the tensor
  bool infers;  // a size of -1 stands for what is left
  void operator()(BatchCall& call) const {
    auto sizes = call.arg(size).toSymIntVector();
    const auto rank = static_cast<int64_t>(sizes.size());
    for (size_t i = 0; i < call.size(); ++i) {
      if (call.is_batched(i)) call.to_front(i, pads ? rank : 0);
    }
    if (infers) infer_size(sizes, count_elements(call.tensor(0).sym_sizes().slice(1)));
    sizes.insert(sizes.begin(), call.batch_size());
    call.arg(size) = sizes;
    for (auto position : dims) shift_dims(call.arg(position), rank);
    call.call();
    call.finish();
  }
};

std::vector<size_t> positions_of(const c10::FunctionSchema& schema, const std::vector<std::string>& names) {
  std::vector<size_t> positions;
  for (const auto& name : names) positions.push_back(position_of(schema, name));
  return positions;
}

}  // namespace

Family pointwise() {
  return {"pointwise", [](const c10::FunctionSchema&) -> Rule { return run_pointwise; }};
}

Family front() {
  return {"front", [](const c10::FunctionSchema&) -> Rule { return run_front; }};
}

Family expanded() {
  return {"expanded", [](const c10::FunctionSchema&) -> Rule { return run_expanded; }};
}

Family along(std::vector<std::string> dims) {
  return {"along", [dims = std::move(dims)](const c10::FunctionSchema& schema) -> Rule {
            return Along{positions_of(schema, dims)};
          }};
}

Family expanded_along(std::vector<std::string> dims) {
  return {"along", [dims = std::move(dims)](const c10::FunctionSchema& schema) -> Rule {
            return Along{positions_of(schema, dims), /*expands=*/true};
          }};
}

Family reduce(std::string dim) {
  return {"reduce", [dim = std::move(dim)](const c10::FunctionSchema& schema) -> Rule {
            std::optional<size_t> keepdim;
            if (const auto index = schema.argumentIndexWithName("keepdim")) keepdim = *index;
            const auto position = position_of(schema, dim);
            const auto type = schema.arguments()[position].type()->str();
            return Reduce{position, keepdim, type == "int" || type == "int?"};
          }};
}

Family reduce_all(const char* sibling) {
  return {"reduce_all", [sibling](const c10::FunctionSchema&) -> Rule {
            const auto op = find_operator(sibling);
            return ReduceAll{op, op.schema().arguments()[position_of(op.schema(), "dim")].type()->str() != "int"};
          }};
}

Family shaped(std::string size, std::vector<std::string> dims) {
  return {"shaped", [size = std::move(size), dims = std::move(dims)](const c10::FunctionSchema& schema) -> Rule {
            const auto name = schema.name();
            const bool pads = name == "aten::expand" || name == "aten::expand_copy";
            const bool infers = name.find("view") != std::string::npos || name.find("reshape") != std::string::npos;
            return Shaped{position_of(schema, size), positions_of(schema, dims), pads, infers};
          }};
}

Family forbid(const char* advice) {
  return {"forbid",
          [advice](const c10::FunctionSchema&) -> Rule {
            return [advice](BatchCall& call) { refuse_operator(call.op(), advice); };
          },
          advice};
}

bool any_batched(const c10::IValue* values, size_t n) {
  const auto& level = current_vmap_level();
  bool any = false;
  for_each_tensor(values, n, [&](const at::Tensor& tensor) {
    const auto* wrapper = wrapper_at(tensor, &level);
    any |= wrapper != nullptr && wrapper->bdim() != kNoBatchDim;
  });
  return any;
}

void copy_uncounted(const at::Tensor& target, const at::Tensor& value) {
  auto counter = target.unsafeGetTensorImpl()->version_counter();
  const auto version = counter.enabled() ? counter.current_version() : 0;
  target.copy_(value);
  if (counter.enabled()) counter.set_version(version);
}

int64_t shift_dim(int64_t dim, int64_t rank) { return c10::maybe_wrap_dim(dim, rank, /*wrap_scalar=*/true) + 1; }

at::Tensor merge_dims(const at::Tensor& x, int64_t dim) {
  auto sizes = x.sym_sizes().vec();
  sizes[dim] = sizes[dim] * sizes[dim + 1];
  sizes.erase(sizes.begin() + dim + 1);
  return at::reshape_symint(x, sizes);
}

at::Tensor flatten_examples(const at::Tensor& x) {
  return at::reshape_symint(x, {x.sym_size(0), count_elements(x.sym_sizes().slice(1))});
}

namespace {

// x[..,n*m,..] -> x[..,n,m,..], for n > 0.
at::Tensor split_evenly(const at::Tensor& x, int64_t dim, const c10::SymInt& n) {
  auto sizes = x.sym_sizes().vec();
  sizes.insert(sizes.begin() + dim, n);
  sizes[dim + 1] = sizes[dim + 1] / n;
  return at::reshape_symint(x, sizes);
}

}  // namespace

at::Tensor fold_batch(const at::Tensor& x, int64_t bdim, int64_t dim, const c10::SymInt& groups) {
  if (groups == 1) return merge_dims(move_dim(x, bdim, dim), dim);
  const auto front = move_dim(x, bdim, 0);
  const auto grouped = move_dim(split_evenly(front, dim + 1, groups), 0, dim + 1);  // [..,g,B,c,..]
  return merge_dims(merge_dims(grouped, dim), dim);
}

at::Tensor unfold_batch(const at::Tensor& y, int64_t dim, const c10::SymInt& batch_size, const c10::SymInt& groups) {
  if (groups == 1) return move_dim(split_evenly(y, dim, batch_size), dim, 0);
  const auto grouped = split_evenly(split_evenly(y, dim, groups), dim + 1, batch_size);  // [..,g,B,c,..]
  return merge_dims(move_dim(grouped, dim + 1, 0), dim + 1);
}

bool finish_without_examples(BatchCall& call) {
  if (call.batch_size() != 0) return false;
  const auto example = [](const at::Tensor& x, int64_t bdim) {
    auto sizes = x.sym_sizes().vec();
    sizes.erase(sizes.begin() + bdim);
    return at::zeros_symint(sizes, x.options());
  };
  for (size_t i = 0; i < call.size(); ++i) {
    if (call.is_batched(i)) {
      call.arg(i) = example(call.tensor(i), call.bdim(i));
    } else if (call.is_list_batched(i)) {
      size_t k = 0;
      replace_tensors(&call.arg(i), 1,
                      [&](const at::Tensor& x) { return call.is_element_batched(i, k++) ? example(x, 0) : x; });
    }
  }
  call.call();
  for (size_t i = 0; i < call.count_results(); ++i) {
    auto& result = call.result(i);
    if (result.isTensor() && result.toTensor().defined()) {
      result = at::unsqueeze(result.toTensor(), 0).narrow(0, 0, 0);
    }
  }
  call.finish();
  return true;
}

Stack arguments_for(const c10::OperatorHandle& other, BatchCall& call,
                    const std::vector<std::pair<std::string_view, c10::IValue>>& overrides) {
  Stack arguments;
  for (const auto& argument : other.schema().arguments()) {
    const auto override = std::find_if(overrides.begin(), overrides.end(),
                                       [&](const auto& entry) { return entry.first == argument.name(); });
    if (override != overrides.end()) {
      arguments.push_back(override->second);
    } else if (const auto index = call.schema().argumentIndexWithName(argument.name())) {
      arguments.push_back(call.arg(*index));
    } else {
      arguments.push_back(argument.default_value().value_or(c10::IValue()));
    }
  }
  return arguments;
}

}  // namespace functorch_lite
