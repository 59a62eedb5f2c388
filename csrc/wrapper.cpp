// The wrapper tensor. See wrapper.h first.
#include "wrapper.h"

#include <ATen/ops/zeros.h>

#include "errors.h"
#include "functionalize_level.h"
#include "shared_memory.h"
#include "vmap_level.h"

namespace functorch_lite {
namespace {

// The constructor for tensors without storage makes a version counter, which this one leaves out: wrappers have that of
// their value. It takes the device from the storage, and Wrapper's sets it again.
c10::Storage no_memory() {
  static const auto* none =
      new c10::Storage(c10::Storage::use_byte_size_t(), 0, at::DataPtr(nullptr, c10::kCPU), nullptr, false);
  return *none;
}

}  // namespace

Wrapper::Wrapper(at::Tensor value, LevelPtr level, int64_t bdim)
    : TensorImpl(VIEW, no_memory(), c10::DispatchKeySet(kFront), value.dtype()),
      value_(std::move(value)),
      level_(std::move(level)),
      bdim_(bdim) {
  device_opt_ = value_.device();
  copy_keys_from_value();
  auto* impl = value_.unsafeGetTensorImpl();
  // Under inference mode the constructor made an inference tensor, which autograd refuses: the keys above undo it.
  set_version_counter(impl->is_inference() ? c10::VariableVersion(0) : impl->version_counter());
  refresh();
}

Wrapper::Wrapper(c10::SymIntArrayRef sizes, c10::ScalarType dtype, c10::Device device, LevelPtr level)
    : TensorImpl(c10::DispatchKeySet(kFront), c10::scalarTypeToTypeMeta(dtype), device),
      level_(std::move(level)),
      bdim_(kNoBatchDim) {
  set_storage_access_should_throw();
  key_set_ = kAutodiffKeys.add(kFront).add(kSubclassMark);
  set_version_counter(c10::VariableVersion(0));
  std::vector<c10::SymInt> strides(sizes.size(), 1);
  for (auto i = static_cast<int64_t>(sizes.size()) - 2; i >= 0; --i) {
    strides[i] = strides[i + 1] * sizes[i + 1].max(1);
  }
  set_sizes_and_strides(sizes, strides, c10::SymInt(0));
}

Wrapper::Wrapper(at::Tensor value, LevelPtr level, at::Tensor functional, const c10::VariableVersion& version)
    : TensorImpl(c10::DispatchKeySet(kFront), value.dtype(), value.device()),
      value_(std::move(value)),
      level_(std::move(level)),
      bdim_(kNoBatchDim),
      functional_(std::move(functional)) {
  copy_keys_from_value();
  // A write makes a new value, and is not one into the old one.
  set_version_counter(version);
  refresh();
  show_derivative();
}

Wrapper::~Wrapper() = default;

// What is the same for all examples can be read as outside, by .numpy() and .tolist().
void Wrapper::share_storage() {
  constexpr auto no_plain_memory =
      c10::DispatchKeySet({kFront, c10::DispatchKey::Python, c10::DispatchKey::Functionalize});
  const bool readable = is_shared() && value_.has_storage() && !value_.key_set().has_any(no_plain_memory);
  storage_ = readable ? value_.storage() : c10::Storage();
  storage_access_should_throw_ = !readable;
}

void Wrapper::copy_keys_from_value() {
  constexpr auto seen_from_outside =
      c10::DispatchKeySet({c10::DispatchKey::Conjugate, c10::DispatchKey::Negative, kIndexMark});
  constexpr auto wrapper_like = c10::DispatchKeySet({kFront, c10::DispatchKey::Python});
  const auto value_keys = value_.key_set();
  key_set_ = kAutodiffKeys.add(kFront) | (value_keys & seen_from_outside);
  // Formulas work in place on tensors without the mark. They may only where nobody else differentiates or batches.
  const bool only_ours = !level_->is_forward() && !value_keys.has_any(wrapper_like) && !value_.requires_grad();
  if (!level_->differentiates() || !only_ours) key_set_ = key_set_.add(kSubclassMark);
  const auto dtype = value_.scalar_type();
  const bool is_index = at::isIntegralType(dtype, /*includeBool=*/false) && dtype != c10::kByte;  // bytes are masks
  if (is_index && bdim_ != kNoBatchDim && value_.dim() == 1) key_set_ = key_set_.add(kIndexMark);
}

void Wrapper::refresh() {
  share_storage();
  const auto* impl = value_.unsafeGetTensorImpl();
  if (impl->has_symbolic_sizes_strides()) {
    auto sizes = impl->sym_sizes().vec();
    auto strides = impl->sym_strides().vec();
    if (bdim_ != kNoBatchDim) {
      sizes.erase(sizes.begin() + bdim_);
      strides.erase(strides.begin() + bdim_);
    }
    set_sizes_and_strides(sizes, strides, impl->sym_storage_offset());
    return;
  }
  if (C10_UNLIKELY(has_symbolic_sizes_strides_)) {  // until tracing has found what they are
    has_symbolic_sizes_strides_ = false;
    refresh_sizes_strides_policy();
  }
  if (bdim_ == kNoBatchDim) {
    set_sizes_and_strides(impl->sizes(), impl->strides(), impl->storage_offset());
    return;
  }
  const auto without_batch = [this](at::IntArrayRef all) {
    c10::SmallVector<int64_t, 6> kept(all.begin(), all.begin() + bdim_);
    kept.append(all.begin() + bdim_ + 1, all.end());
    return kept;
  };
  set_sizes_and_strides(without_batch(impl->sizes()), without_batch(impl->strides()), impl->storage_offset());
}

namespace {

// Zeros that code at `level` may write into: batched at every vmap from there outwards.
at::Tensor zeros_of_each_example(Level* level, std::vector<c10::SymInt> sizes, const c10::TensorOptions& options) {
  if (level == nullptr) {
    const Outside outside;
    return at::zeros_symint(sizes, options);
  }
  const auto* vmap = dynamic_cast<VmapLevel*>(level);
  if (vmap == nullptr) return zeros_of_each_example(level->parent(), std::move(sizes), options);
  sizes.insert(sizes.begin(), vmap->batch_size());
  return wrap(zeros_of_each_example(level->parent(), std::move(sizes), options), *level, 0);
}

}  // namespace

const at::Tensor& Wrapper::value() const {
  if (C10_UNLIKELY(functional_.defined())) const_cast<Wrapper*>(this)->follow_memory();
  if (C10_UNLIKELY(is_symbolic_zero())) {
    value_ = zeros_of_each_example(level_->parent(), sym_sizes().vec(),
                                   c10::TensorOptions().dtype(dtype()).device(device()));
  }
  return value_;
}

void Wrapper::replace_value(at::Tensor value, int64_t bdim) {
  value_ = std::move(value);
  bdim_ = bdim;
  copy_keys_from_value();
  refresh();
}

// The copy counts writes as all wrappers of this memory do, also where PyTorch offers a counter of its own: it copies
// what factories return.
c10::intrusive_ptr<c10::TensorImpl> Wrapper::shallow_copy_and_detach(const c10::VariableVersion&,
                                                                     bool allow_metadata_change) const {
  if (functional_.defined()) return detached_copy();
  auto copy = c10::make_intrusive<Wrapper>(value(), level_, bdim_);
  copy->is_captured = is_captured;
  copy->slot = slot;
  copy->set_allow_tensor_metadata_change(allow_metadata_change);
  if (is_shared()) record_alias(*copy, const_cast<Wrapper&>(*this));
  return copy;
}

c10::intrusive_ptr<c10::TensorImpl> Wrapper::shallow_copy_and_detach(c10::VariableVersion&& version,
                                                                     bool allow_metadata_change) const {
  return shallow_copy_and_detach(static_cast<const c10::VariableVersion&>(version), allow_metadata_change);
}

void Wrapper::shallow_copy_from(const c10::intrusive_ptr<c10::TensorImpl>& impl) {
  auto* other = as_wrapper(impl.get());
  TORCH_CHECK(other != nullptr && other->level() == level(),
              "tensor.data = ...: a tensor inside a transform can only take the data of another tensor of the same "
              "transform. Return the new tensor from the function instead.");
  TORCH_CHECK(view_record == nullptr || view_record->sharers->wrappers.size() == 1,
              "tensor.data = ...: there are views of this tensor inside vmap, which would go on showing its old data. "
              "Use tensor.copy_(...), which writes into all of them.");
  view_record = nullptr;
  functional_ = other->functional_;
  replace_value(other->value(), other->bdim());
  slot = other->slot;
  if (is_shared()) record_alias(*this, *other);
}

at::Tensor wrap(at::Tensor value, Level& level, int64_t bdim) {
  return at::detail::make_tensor<Wrapper>(std::move(value), LevelPtr::unsafe_reclaim_from_nonowning(&level), bdim);
}

at::Tensor make_symbolic_zero(c10::SymIntArrayRef sizes, c10::ScalarType dtype, c10::Device device, Level& level) {
  auto owner = LevelPtr::unsafe_reclaim_from_nonowning(&level);
  return at::detail::make_tensor<Wrapper>(sizes, dtype, device, std::move(owner));
}

at::Tensor strip_closed_levels(at::Tensor tensor) {
  while (auto* wrapper = as_wrapper(tensor)) {
    if (is_active(wrapper->level())) break;
    const bool loses_derivative = !wrapper->level()->keeps_derivatives() && tensor.requires_grad();
    if (loses_derivative || wrapper->bdim() != kNoBatchDim) raise_escaped(*wrapper);
    tensor = wrapper->value();
  }
  return tensor;
}

const at::Tensor& innermost_value(const at::Tensor& tensor) {
  const auto* result = &tensor;
  while (auto* wrapper = as_wrapper(*result)) result = &wrapper->value();
  return *result;
}

bool is_transformed(const at::Tensor& tensor) {
  const auto* wrapper = as_wrapper(tensor);
  return wrapper != nullptr && (!wrapper->functional().defined() || is_transformed(wrapper->value()));
}

namespace {

// At a functionalize level values do not stay in one memory, but the level knows.
const c10::StorageImpl* memory_of_all_levels(const at::Tensor& tensor) {
  const auto* inner = &tensor;
  while (true) {
    if (const auto* memory = FunctionalizeLevel::memory_of_lifted(*inner)) return memory;
    const auto* wrapper = as_wrapper(*inner);
    if (wrapper == nullptr) break;
    if (wrapper->functional().defined()) return wrapper->functional().storage().unsafeGetStorageImpl();
    inner = &wrapper->value();
  }
  return inner->has_storage() ? inner->storage().unsafeGetStorageImpl() : nullptr;
}

}  // namespace

bool have_one_storage(const at::Tensor& a, const at::Tensor& b) {
  const auto* memory = memory_of_all_levels(a);
  return memory != nullptr && memory == memory_of_all_levels(b);
}

}  // namespace functorch_lite
