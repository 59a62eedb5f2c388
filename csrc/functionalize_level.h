// The functionalize level: what a function writes in place is computed as a new value.
//
// Which tensors show one memory, and how the value of one follows from a write through another, is kept by PyTorch's
// functional tensors (ATen/FunctionalTensorWrapper.h). Each wrapper of the level has one, with values one level down.
#pragma once

#include <c10/core/Storage.h>

#include <optional>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "level.h"
#include "op_args.h"
#include "wrapper.h"

namespace functorch_lite {

// The identity of a memory. It holds the place, so that no other memory gets it, and not the memory.
using Memory = const c10::StorageImpl*;
using MemoryPlace = c10::weak_intrusive_ptr<c10::StorageImpl>;

// A tensor that was there before, and what it is for the function.
struct FromOutside {
  at::Tensor outside;
  at::Tensor inside;
  MemoryPlace memory;
  // What changed its shape in place, with the arguments behind the first.
  std::vector<std::pair<c10::OperatorHandle, Stack>> reshaped;
};

class FunctionalizeLevel final : public Level {
 public:
  // `keep_views`: views stay views. Otherwise they become copies.
  explicit FunctionalizeLevel(bool keep_views) : Level(/*sets_modes=*/false), keep_views_(keep_views) {}

  void run(const c10::OperatorHandle& op, Stack& stack) override;
  const char* kind() const override { return "functionalize"; }
  bool keeps_views() const { return keep_views_; }

  // A tensor from outside, with memory of its own; the same tensor again gives the same memory.
  at::Tensor lift(const at::Tensor& outside);
  // A tensor that was made one level down for the function.
  at::Tensor lift_new(const at::Tensor& value);
  // The tensor one level down, with all that was written into its memory.
  at::Tensor value_of(const at::Tensor& tensor) const;
  // Puts a value, one level down, in the place of all that the tensor shows.
  void write(const at::Tensor& target, const at::Tensor& value);

  // A number that tensors of one memory have in common; none for a tensor of another level.
  std::optional<int64_t> memory_of(const at::Tensor& tensor) const;
  // The whole memory behind the tensor, one level down.
  at::Tensor memory_value(const at::Tensor& tensor) const;
  // Applies to `base`, a tensor one level down, the views that made `tensor` from its memory.
  at::Tensor replay_views(const at::Tensor& tensor, const at::Tensor& base) const;
  bool is_view(const at::Tensor& tensor) const;

  // What was lifted.
  const std::vector<FromOutside>& from_outside() const { return from_outside_; }
  // The tensor from outside whose memory this one shows, or an undefined tensor.
  at::Tensor outside_of(const at::Tensor& tensor) const;

  // Brings a functional tensor of the level up to date with its memory.
  void sync(const at::Tensor& functional) const;
  // A functional tensor of the same memory, cut off from what is differentiated.
  at::Tensor detached(const at::Tensor& functional) const;
  // The memory that a tensor has at the innermost functionalize level where it has been lifted, or null.
  static Memory memory_of_lifted(const at::Tensor& tensor);

 protected:
  void on_open() override;
  void on_close() override;

 private:
  void run_composition(const c10::OperatorHandle& op, Stack& stack);
  void run_without_aliases(const c10::OperatorHandle& op, Stack& stack);
  void run_detach(const c10::OperatorHandle& op, Stack& stack);
  void run_functionalized(const c10::OperatorHandle& op, Stack& stack);
  void run_on_copies(const c10::OperatorHandle& op, Stack& stack);
  bool is_differentiated_below(const c10::IValue* arguments, size_t n) const;
  void run_on_values(const c10::OperatorHandle& op, Stack& stack);

  at::Tensor wrap_functional(at::Tensor functional, const c10::VariableVersion& version);
  const FromOutside* find_outside(Memory memory) const;
  void remember_shape(const c10::OperatorHandle& op, const at::Tensor& inside, Stack arguments);
  // What an operator gets to read.
  at::Tensor readable(const at::Tensor& tensor) const;
  void refuse_stale(const at::Tensor& tensor) const;
  at::Tensor prepare_write(const at::Tensor& inside);
  // `counted`: for autograd, which then knows that what it has saved is out of date.
  void finish_write(const at::Tensor& inside, bool counted = true);
  void refuse_moved(const at::Tensor& functional, bool has_offset) const;
  void restore_derivative(const at::Tensor& functional) const;

  bool keep_views_;
  std::vector<FromOutside> from_outside_;
  std::unordered_map<const c10::TensorImpl*, size_t> by_tensor_;
  std::unordered_map<Memory, size_t> by_memory_;
  // The memories of tensors from outside that were written.
  std::unordered_set<Memory> written_outside_;
  // What was written without recording, and the value that has the derivative.
  mutable std::unordered_map<Memory, std::pair<MemoryPlace, at::Tensor>> before_no_grad_;
  // How memories that were written were laid out before: strides and offset.
  std::unordered_map<Memory, std::pair<MemoryPlace, std::vector<c10::SymInt>>> layouts_;
};

}  // namespace functorch_lite
