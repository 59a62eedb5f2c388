// One operator call as a batching rule sees it. See batch_call.h first.
#include "batch_call.h"

#include <ATen/ops/expand.h>
#include <ATen/ops/permute.h>
#include <ATen/ops/unsqueeze.h>

#include "fallback.h"

namespace functorch_lite {

void refuse_outside_write(const c10::OperatorHandle& op, const at::Tensor& target) {
  const auto name = python_hooks().name_of_tensor(target);
  const auto known = name.empty() ? "x" : name;
  TORCH_CHECK_VALUE(false, "vmap: the in-place operator ", op.operator_name().name, " writes batched values into ",
                    name.empty() ? "a tensor" : "`" + name + "`, a tensor", " from outside the mapped function (shape ",
                    target.sym_sizes(), ", dtype ", target.scalar_type(), "). It is there once, for all examples, and ",
                    "cannot hold a value of each. Write into a copy, as in ", known, " = ", known,
                    ".clone(), and return it; or pass ", known, " as an argument that vmap maps.");
}

BatchCall::BatchCall(const c10::OperatorHandle& op, Stack& stack)
    : op_(op),
      stack_(stack),
      begin_(stack.size() - count_arguments(op)),
      level_(current_vmap_level()),
      bdims_(stack.size() - begin_, kNoBatchDim),
      written_(op.schema(), stack.data() + begin_),
      below_(level_, keys_below(level_, stack.data() + begin_, bdims_.size())) {
  const auto& schema = op.schema();
  const auto refuse_captured_target = [&](size_t i, const c10::IValue& target) {
    const auto* alias = schema.arguments()[i].alias_info();
    if (C10_LIKELY(alias == nullptr || !alias->isWrite()) || op.hasTag(at::Tag::nondeterministic_seeded)) return;
    if (target.isTensor() && target.toTensor().defined()) refuse_outside_write(op, target.toTensor());
  };
  for (size_t i = 0; i < bdims_.size(); ++i) {
    auto& value = arg(i);
    if (value.isTensor()) {
      if (const auto* wrapper = value.toTensor().defined() ? wrapper_at(value.toTensor(), &level_) : nullptr) {
        bdims_[i] = wrapper->bdim();
        value = at::Tensor(wrapper->value());
      } else {
        refuse_captured_target(i, value);
      }
    } else if (value.isList() && holds_tensor_list(value)) {
      std::vector<bool> batched;
      bool any = false;
      for (const auto& e : value.toListRef()) {
        const auto* wrapper = e.isTensor() && e.toTensor().defined() ? wrapper_at(e.toTensor(), &level_) : nullptr;
        batched.push_back(wrapper != nullptr && wrapper->bdim() != kNoBatchDim);
        any |= batched.back();
        if (wrapper == nullptr) refuse_captured_target(i, e);
      }
      replace_tensors(&value, 1, [&](const at::Tensor& tensor) {
        const auto* wrapper = wrapper_at(tensor, &level_);
        if (wrapper == nullptr) return tensor;
        return wrapper->bdim() == kNoBatchDim ? wrapper->value() : move_dim(wrapper->value(), wrapper->bdim(), 0);
      });
      if (any) batched_lists_.emplace_back(i, std::move(batched));
    }
  }
}

std::optional<size_t> BatchCall::find(std::string_view name) const {
  const auto& arguments = schema().arguments();
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (arguments[i].name() == name) return i;
  }
  return std::nullopt;
}

size_t BatchCall::position(std::string_view name) const {
  const auto index = find(name);
  TORCH_INTERNAL_ASSERT(index.has_value(), op_.operator_name(), " has no argument '", name, "'");
  return *index;
}

const at::Tensor& BatchCall::to_front(size_t i, int64_t rank) {
  if (!is_batched(i)) return tensor(i);
  const bool moves = bdims_[i] != 0;
  const bool pads = tensor(i).dim() - 1 < rank;
  if (moves || pads) {
    auto x = move_dim(tensor(i), bdims_[i], 0);
    arg(i) = pads ? pad_rank(x, rank) : std::move(x);
    bdims_[i] = 0;
  }
  return tensor(i);
}

const at::Tensor& BatchCall::expand_to_front(size_t i, int64_t rank) {
  if (!is_batched(i)) {
    arg(i) = expand_batch(tensor(i), batch_size());
    bdims_[i] = 0;
  }
  return to_front(i, rank);
}

const std::vector<bool>* BatchCall::batched_elements(size_t i) const {
  for (const auto& [position, batched] : batched_lists_) {
    if (position == i) return &batched;
  }
  return nullptr;
}

bool BatchCall::is_list_batched(size_t i) const { return batched_elements(i) != nullptr; }

bool BatchCall::is_element_batched(size_t i, size_t k) const {
  const auto* batched = batched_elements(i);
  return batched != nullptr && (*batched)[k];
}

std::vector<at::Tensor> BatchCall::expanded_list(size_t i) {
  auto tensors = arg(i).toTensorVector();
  for (size_t k = 0; k < tensors.size(); ++k) {
    if (!is_element_batched(i, k)) tensors[k] = expand_batch(tensors[k], batch_size());
  }
  return tensors;
}

void BatchCall::call(const c10::OperatorHandle& other, Stack arguments) {
  other.callBoxed(&arguments);
  take_results(std::move(arguments));
}

void BatchCall::take_results(Stack results) {
  torch::jit::drop(stack_, stack_.size() - begin_);
  for (auto& result : results) stack_.push_back(std::move(result));
}

void BatchCall::finish(int64_t bdim) {
  for (size_t i = 0; i < count_results(); ++i) finish_result(i, bdim);
}

void BatchCall::finish_each(c10::ArrayRef<int64_t> bdims) {
  TORCH_INTERNAL_ASSERT(bdims.size() == count_results());
  for (size_t i = 0; i < count_results(); ++i) finish_result(i, bdims[i]);
}

void BatchCall::finish_result(size_t i, int64_t bdim) {
  if (written_.restore(i, result(i), level_)) return;
  if (result(i).isTensor()) {
    auto& tensor = result(i).toTensor();
    if (tensor.defined()) tensor = wrap(std::move(tensor), level_, bdim);
  } else {
    replace_tensors(&result(i), 1, [&](const at::Tensor& tensor) { return wrap(tensor, level_, bdim); });
  }
}

at::Tensor move_dim(const at::Tensor& x, int64_t from, int64_t to) {
  if (from == to) return x;
  c10::SmallVector<int64_t, 8> order;
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (d != from) order.push_back(d);
  }
  order.insert(order.begin() + to, from);
  return at::permute(x, order);
}

at::Tensor pad_rank(const at::Tensor& x, int64_t rank) {
  auto result = x;
  for (auto r = x.dim() - 1; r < rank; ++r) result = at::unsqueeze(result, 1);
  return result;
}

at::Tensor expand_batch(const at::Tensor& x, const c10::SymInt& batch_size) {
  auto sizes = x.sym_sizes().vec();
  sizes.insert(sizes.begin(), batch_size);
  return x.expand_symint(sizes);
}

}  // namespace functorch_lite
