// The memory behind functional tensors, and the views that PyTorch does not have or has wrong.
#pragma once

#include <ATen/FunctionalTensorWrapper.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_to_copy.h>
#include <ATen/ops/alias.h>
#include <ATen/ops/alias_copy.h>
#include <ATen/ops/as_strided.h>
#include <ATen/ops/as_strided_copy.h>
#include <ATen/ops/as_strided_scatter.h>
#include <ATen/ops/clone.h>
#include <ATen/ops/detach.h>
#include <ATen/ops/detach_copy.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>

#include "autodiff_level.h"
#include "functionalize_level.h"

namespace functorch_lite {

namespace functional = at::functionalization::impl;

inline at::FunctionalTensorWrapper& impl_of(const at::Tensor& tensor) {
  return *functional::unsafeGetFunctionalWrapper(tensor);
}

inline at::functionalization::FunctionalStorageImpl& memory_behind(const at::Tensor& tensor) {
  auto* storage = tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
  return *static_cast<at::functionalization::FunctionalStorageImpl*>(storage);
}

inline MemoryPlace place_of(const at::Tensor& tensor) {
  return MemoryPlace(tensor.unsafeGetTensorImpl()->unsafe_storage().getWeakStorageImpl());
}

inline void replace(const at::Tensor& tensor, const at::Tensor& value) {
  functional::replace_(tensor, value);
  functional::commit_update(tensor);
  functional::sync(tensor);
}

struct Derivatives {
  bool reverse;
  bool forward;
  bool may_be_of(const at::Tensor& tensor) const {
    return may_be_differentiated(tensor, {.grad = reverse, .forward_grad = forward, .inference = false});
  }
};

// The numbers of `value` with the derivatives of `source`.
inline at::Tensor with_derivatives_of(const at::Tensor& source, const at::Tensor& value, Derivatives which) {
  at::Tensor result;
  {
    const at::AutoGradMode record(true);
    result = at::clone(source);
  }
  const at::AutoGradMode record(false);
  const c10::AutoFwGradMode push(!which.forward && AutogradModes::current().forward_grad);
  return result.copy_(value);
}

// A view that is cut off from derivatives of its memory: detach() from all, one that is made without recording from
// those of reverse mode.
class DetachedView final : public at::functionalization::ViewMeta {
 public:
  DetachedView(Derivatives cut, bool keep_views)
      : ViewMeta(/*has_symbolic_inputs=*/false), cut_(cut), keep_views_(keep_views) {}

  at::Tensor forward(const at::Tensor& base) override {
    if (is_open_) return base;
    if (cut_.forward) return keep_views_ ? at::detach(base) : at::detach_copy(base);
    const at::AutoGradMode record(false);
    return keep_views_ ? at::alias(base) : at::alias_copy(base);
  }

  at::Tensor reverse(const at::Tensor& base, const at::Tensor& view) override {
    if (is_open_) return view;
    TORCH_CHECK_VALUE(
        !cut_.may_be_of(view),
        "functionalize: a value that is differentiated is written in place into a tensor that detach() or "
        "no_grad has cut off, and that shares its memory with one that is not. Write into a clone, for "
        "example x.detach().clone().");
    const Derivatives kept{cut_.reverse && at::GradMode::is_enabled(), cut_.forward};
    return kept.may_be_of(base) ? with_derivatives_of(base, view, kept) : view;
  }

  // To be called when no tensor of the memory is seen without this view any more, and the memory has been cut off.
  void open() { is_open_ = true; }
  bool is_open() const { return is_open_; }

 private:
  Derivatives cut_;
  bool keep_views_;
  bool is_open_ = false;
};

// as_strided, without PyTorch's formula for the derivative of its inverse, which is wrong. Levels have one of their
// own.
class StridedView final : public at::functionalization::ViewMeta {
 public:
  StridedView(std::vector<c10::SymInt> sizes, std::vector<c10::SymInt> strides, std::optional<c10::SymInt> offset,
              bool is_symbolic, bool keep_views)
      : ViewMeta(is_symbolic, /*is_multi_output=*/false, /*is_as_strided=*/true),
        sizes_(std::move(sizes)),
        strides_(std::move(strides)),
        offset_(std::move(offset)),
        keep_views_(keep_views) {}

  at::Tensor forward(const at::Tensor& base) override {
    if (!keep_views_) return at::as_strided_copy_symint(base, sizes_, strides_, offset_);
    return at::as_strided_symint(base, sizes_, strides_, offset_);
  }

  at::Tensor reverse(const at::Tensor& base, const at::Tensor& view) override {
    if (current_level() != nullptr || !(base.requires_grad() || view.requires_grad())) {
      return at::as_strided_scatter_symint(base, view, sizes_, strides_, offset_);
    }
    auto result = at::clone(base);
    at::as_strided_symint(result, sizes_, strides_, offset_).copy_(view);
    return result;
  }

 private:
  std::vector<c10::SymInt> sizes_;
  std::vector<c10::SymInt> strides_;
  std::optional<c10::SymInt> offset_;
  bool keep_views_;
};

[[noreturn]] void refuse_overlap(const at::Tensor& tensor) {
  TORCH_CHECK(false, "functionalize: an in-place operator writes into a tensor of shape ", tensor.sym_sizes(),
              " in which several elements are one place in memory, as after expand(). Write into its clone().");
}

// Marks a copy that stands for a view larger than its memory: the strides do not tell.
class ExpandedCopy final : public at::functionalization::ViewMeta {
 public:
  ExpandedCopy() : ViewMeta(/*has_symbolic_inputs=*/false) {}
  at::Tensor forward(const at::Tensor& base) override { return base; }
  at::Tensor reverse(const at::Tensor&, const at::Tensor& view) override { refuse_overlap(view); }
};

// The detached view through which all tensors of this memory are seen, or null.
inline DetachedView* common_detached_view(const at::Tensor& tensor) {
  for (const auto& view : impl_of(tensor).view_metas()) {
    auto* detached = dynamic_cast<DetachedView*>(view.get());
    const bool is_common = view.use_count() == static_cast<int64_t>(tensor.storage().use_count());
    if (detached != nullptr && !detached->is_open() && is_common) return detached;
  }
  return nullptr;
}

// Below the level of the functional tensor.
inline at::Tensor cut_off(const at::Tensor& tensor, Derivatives which, bool keep_views) {
  auto view = std::make_shared<DetachedView>(which, keep_views);
  const auto value = view->forward(impl_of(tensor).value());
  return at::detail::make_tensor<at::FunctionalTensorWrapper>(value, &impl_of(tensor), std::move(view));
}

// Where the memory of a plain tensor begins and ends, in bytes.
inline std::pair<int64_t, int64_t> extent(const at::Tensor& tensor) {
  int64_t last = tensor.storage_offset();
  for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
  const auto size = static_cast<int64_t>(tensor.itemsize());
  return {tensor.storage_offset() * size, (last + 1) * size};
}

inline bool may_overlap(const at::Tensor& a, const at::Tensor& b) {
  if (!have_one_storage(a, b)) return false;
  const auto& plain_a = innermost_value(a);
  const auto& plain_b = innermost_value(b);
  for (const auto* plain : {&plain_a, &plain_b}) {
    if (plain->unsafeGetTensorImpl()->has_symbolic_sizes_strides()) return true;
    if (plain->numel() == 0) return false;
  }
  const auto [begin_a, end_a] = extent(plain_a);
  const auto [begin_b, end_b] = extent(plain_b);
  return begin_a < end_b && begin_b < end_a;
}

// What `target.copy_(source)` leaves, where it is differentiated: PyTorch's own `copy` has no derivative. The strides
// are those of `target`, for later code may view it.
inline at::Tensor differentiable_copy(const at::Tensor& target, const at::Tensor& source) {
  const auto same_type = at::_to_copy(source, target.options());
  return at::where(at::ones_like(target, at::kBool), same_type, target);
}

inline std::vector<c10::SymInt> layout_of(const at::Tensor& value) {
  auto layout = value.sym_strides().vec();
  layout.push_back(value.sym_storage_offset());
  return layout;
}

}  // namespace functorch_lite
