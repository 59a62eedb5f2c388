// Memory that all examples of a vmap share. See shared_memory.h first.
#include "shared_memory.h"

#include <ATen/ops/new_empty_strided.h>

#include <algorithm>

#include "vmap_level.h"

namespace functorch_lite {
namespace {

const c10::intrusive_ptr<Sharers>& sharers_of(Wrapper& wrapper) {
  if (wrapper.view_record == nullptr) {
    wrapper.view_record = std::make_unique<ViewRecord>(wrapper, c10::make_intrusive<Sharers>());
  }
  return wrapper.view_record->sharers;
}

// x[*] -> y[B,*], each example laid out as x is.
at::Tensor copy_for_each_example(const at::Tensor& x, const c10::SymInt& batch_size) {
  auto sizes = x.sym_sizes().vec();
  auto strides = x.sym_strides().vec();
  c10::SymInt extent = 1;
  for (size_t d = 0; d < sizes.size(); ++d) extent = extent + strides[d] * (sizes[d] - 1).max(0);
  sizes.insert(sizes.begin(), batch_size);
  strides.insert(strides.begin(), extent);
  return x.new_empty_strided_symint(sizes, strides).copy_(x);
}

at::Tensor make_view_again(const ViewRecord& record) {
  auto stack = record.arguments;
  record.op->callBoxed(&stack);
  const auto& result = stack[record.result];
  return result.isTensor() ? result.toTensor() : result.toListRef()[record.element].toTensor();
}

}  // namespace

void replace_value(Wrapper& wrapper, at::Tensor value, int64_t bdim) {
  for (const auto* inner = &value;; inner = &as_wrapper(*inner)->value()) {
    auto* impl = inner->unsafeGetTensorImpl();
    if (!impl->is_inference()) impl->set_version_counter(wrapper.version_counter());
    const auto* below = as_wrapper(impl);
    if (below == nullptr || below->functional().defined()) break;
  }
  wrapper.replace_value(std::move(value), bdim);
}

ViewRecord::ViewRecord(Wrapper& of, c10::intrusive_ptr<Sharers> with) : wrapper(of), sharers(std::move(with)) {
  sharers->wrappers.push_back(&wrapper);
}

ViewRecord::~ViewRecord() {
  auto& wrappers = sharers->wrappers;
  const auto last = std::find(wrappers.rbegin(), wrappers.rend(), &wrapper);  // views die young
  if (last != wrappers.rend()) wrappers.erase(std::next(last).base());
}

void wrap_views(const c10::OperatorHandle& op, const Stack& arguments, Wrapper& source, c10::IValue* results) {
  auto& level = *source.level();
  for (size_t i = 0; i < op.schema().returns().size(); ++i) {
    size_t element = 0;
    replace_tensors(results + i, 1, [&](const at::Tensor& value) {
      auto view = wrap(value, level);
      auto record = std::make_unique<ViewRecord>(*as_wrapper(view), sharers_of(source));
      record->op = op;
      record->arguments = arguments;
      record->result = i;
      record->element = element++;
      as_wrapper(view)->view_record = std::move(record);
      return view;
    });
  }
}

void record_alias(Wrapper& copy, Wrapper& source) {
  static const auto alias = find_operator("alias");
  auto record = std::make_unique<ViewRecord>(copy, sharers_of(source));
  record->op = alias;
  record->arguments = {at::Tensor(c10::intrusive_ptr<c10::TensorImpl>::unsafe_reclaim_from_nonowning(&source))};
  copy.view_record = std::move(record);
}

bool is_seen_through_others(Wrapper& wrapper) {
  const auto& record = wrapper.view_record;
  if (record == nullptr) return false;
  const auto& all = record->sharers->wrappers;
  // What factories return is a copy of a tensor that nobody else has.
  const bool is_copy = all.size() == 2 && &wrapper != all.front() && record->arguments[0].toTensor().use_count() == 1;
  if (all.size() > 1 && !is_copy) return true;
  wrapper.view_record = nullptr;
  return false;
}

void make_batched(Wrapper& wrapper, VmapLevel& level) {
  const auto sharers = sharers_of(wrapper);
  auto& root = *sharers->wrappers.front();
  at::Tensor copy;
  {
    const RunBelow below(level);
    copy = copy_for_each_example(root.value(), level.batch_size());
  }
  replace_value(root, std::move(copy), 0);
  const auto wrappers = sharers->wrappers;
  for (auto* view : wrappers) {
    if (view == &root) continue;
    const auto made_again = make_view_again(*view->view_record);
    const auto* batched = wrapper_at(made_again, &level);
    replace_value(*view, batched->value(), batched->bdim());
  }
  // Not before all are batched: a record keeps the source of its view alive.
  std::vector<std::unique_ptr<ViewRecord>> done;
  for (auto* view : wrappers) done.push_back(std::move(view->view_record));
}

}  // namespace functorch_lite
