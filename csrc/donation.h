// Arguments that a caller gives away: their memory goes to the call, which may free or overwrite it.
#pragma once

#include <ATen/core/Tensor.h>

namespace functorch_lite {

// The tensor, in a storage that has the memory from now on. Whoever still has the old storage is told when using it.
inline at::Tensor take_memory(const at::Tensor& tensor) {
  auto* old = tensor.storage().unsafeGetStorageImpl();
  const auto device = old->device();
  auto storage = c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), old->nbytes(),
                                                       old->set_data_ptr(c10::DataPtr(nullptr, device)),
                                                       old->allocator(), old->resizable());
  old->release_data_and_set_meta_custom_data_ptr_error_msg_(
      "This tensor was donated to a call of a functorch_lite.jit function, or shares the memory of one that was: it "
      "has no contents any more. Leave it out of donate_argnums, or use what the function returned.");
  auto result =
      at::detail::make_tensor<c10::TensorImpl>(c10::Storage(std::move(storage)), tensor.key_set(), tensor.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  return result;
}

}  // namespace functorch_lite
