// The tensor that user code holds at a level: a value one level down, and the level it belongs to.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/TensorImpl.h>
#include <c10/core/WrapDimMinimal.h>

#include <memory>
#include <typeinfo>

#include "keys.h"
#include "level.h"

namespace functorch_lite {

constexpr int64_t kNoBatchDim = -1;

struct ViewRecord;

// One class serves every kind of level. Sizes and strides are those that user code sees (without the batch
// dimension) and may be symbolic. The version counter is the value's own, so a write is seen by every wrapper of the
// same memory. Only what is the same for all examples of a vmap, and plain below, has a storage: the value's.
class Wrapper final : public c10::TensorImpl {
  // First, and in this order: PyTorch takes a tensor with kIndexMark for a batch of torch.func, which begins so.
  mutable at::Tensor value_;
  LevelPtr level_;
  int64_t bdim_;
  at::Tensor functional_;

 public:
  Wrapper(at::Tensor value, LevelPtr level, int64_t bdim);
  // A symbolic zero.
  Wrapper(c10::SymIntArrayRef sizes, c10::ScalarType dtype, c10::Device device, LevelPtr level);
  // Of a functionalize level.
  Wrapper(at::Tensor value, LevelPtr level, at::Tensor functional, const c10::VariableVersion& version);
  ~Wrapper() override;

  const at::Tensor& value() const;
  // The dimension of `value` that a vmap level hides, or kNoBatchDim.
  int64_t bdim() const { return bdim_; }
  Level* level() const { return level_.get(); }
  // Whether all examples of a vmap have this value.
  bool is_shared() const { return bdim_ == kNoBatchDim && !level_->differentiates() && !functional_.defined(); }
  // A tangent known to be zero: the value is made only if somebody asks for it, and then it may be written into.
  bool is_symbolic_zero() const { return !value_.defined(); }
  // At a functionalize level: PyTorch's functional tensor, which knows what was written into the memory.
  const at::Tensor& functional() const { return functional_; }

  // Follows an operator that changed the value's metadata in place.
  void refresh();
  // Puts another functional tensor in the place of this one.
  void take_functional(at::Tensor functional);
  // Puts another tensor in the place of the value.
  void replace_value(at::Tensor value, int64_t bdim);

  // Memory that existed before the level opened: writing values that need a derivative here would lose them.
  bool is_captured = false;
  // For a wrapper of a tape level: its number on the tape.
  int64_t slot = -1;
  // For a wrapper of a vmap level that shares unbatched memory with others; see shared_memory.h.
  std::unique_ptr<ViewRecord> view_record;

  c10::intrusive_ptr<c10::TensorImpl> shallow_copy_and_detach(const c10::VariableVersion& version,
                                                              bool allow_metadata_change) const override;
  c10::intrusive_ptr<c10::TensorImpl> shallow_copy_and_detach(c10::VariableVersion&& version,
                                                              bool allow_metadata_change) const override;
  void shallow_copy_from(const c10::intrusive_ptr<c10::TensorImpl>& impl) override;

 private:
  // Takes the value that the functional tensor has now.
  void follow_memory();
  void show_derivative();
  c10::intrusive_ptr<c10::TensorImpl> detached_copy() const;
  void copy_keys_from_value();
  void share_storage();
};

// The wrapper behind a tensor, or null. Key sets alone do not tell: other wrappers copy them.
inline Wrapper* as_wrapper(const c10::TensorImpl* impl) {
  if (!impl->key_set().has(kFront) || typeid(*impl) != typeid(Wrapper)) return nullptr;
  return const_cast<Wrapper*>(static_cast<const Wrapper*>(impl));
}
inline Wrapper* as_wrapper(const at::TensorBase& tensor) { return as_wrapper(tensor.unsafeGetTensorImpl()); }
// Whether the tensor is what PyTorch's kernels compute with.
inline bool is_plain(const at::TensorBase& tensor) {
  constexpr auto wrapper_like = c10::DispatchKeySet({kFront, c10::DispatchKey::Python});
  return !tensor.key_set().has_any(wrapper_like);
}
// Whether plain autograd has nothing to do with the tensor as an argument: with operators on such values, RunBelow may
// pass it.
inline bool passes_autograd(const at::TensorBase& tensor) {
  return is_plain(tensor) && tensor.unsafeGetTensorImpl()->autograd_meta() == nullptr;
}
// Whether dispatch modes, as of tracing, see each call.
inline bool a_mode_is_on() { return c10::impl::tls_local_dispatch_key_set().included_.has(c10::DispatchKey::Python); }

// The wrapper if it belongs to `level`, or null.
inline Wrapper* wrapper_at(const at::TensorBase& tensor, const Level* level) {
  auto* wrapper = as_wrapper(tensor);
  return wrapper != nullptr && wrapper->level() == level ? wrapper : nullptr;
}

// The tensor one level below `level`; what belongs to another level, or to none, is its own value.
inline at::Tensor value_at(const at::Tensor& tensor, const Level* level) {
  const auto* wrapper = wrapper_at(tensor, level);
  return wrapper != nullptr ? wrapper->value() : tensor;
}

at::Tensor wrap(at::Tensor value, Level& level, int64_t bdim = kNoBatchDim);
at::Tensor make_symbolic_zero(c10::SymIntArrayRef sizes, c10::ScalarType dtype, c10::Device device, Level& level);

// The tensor as code at the current level may see it: wrappers of levels that are no longer on the stack are
// replaced by their values. Raises if such a value still has a hidden batch dimension.
at::Tensor strip_closed_levels(at::Tensor tensor);
// The tensor below all wrappers.
const at::Tensor& innermost_value(const at::Tensor& tensor);
// Whether the tensor is one of a level that batches or differentiates.
bool is_transformed(const at::Tensor& tensor);
// Whether what is below all wrappers of both lies in one memory.
bool have_one_storage(const at::Tensor& a, const at::Tensor& b);

}  // namespace functorch_lite
