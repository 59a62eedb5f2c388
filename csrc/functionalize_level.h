// The functionalize level: what the function writes in place is computed as a new value.
//
// Which tensors show one memory, and how a value changes when it is written through another one, is kept by PyTorch's
// functional tensors (ATen/FunctionalTensorWrapper.h). Each wrapper of the level has one, whose values are those one
// level down.
#pragma once

#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "level.h"
#include "wrapper.h"

namespace functorch_lite {

class FunctionalizeLevel final : public Level {
 public:
  // `keep_views`: views stay views. Otherwise they become copies.
  explicit FunctionalizeLevel(bool keep_views) : Level(/*sets_modes=*/false), keep_views_(keep_views) {}

  void run(const c10::OperatorHandle& op, torch::jit::Stack& stack) override;
  const char* kind() const override { return "functionalize"; }

  // The tensor with memory of its own at this level; the same tensor again gives the same memory.
  at::Tensor lift(const at::Tensor& value);
  // The tensor one level down, with all that was written into its memory.
  at::Tensor value_of(const at::Tensor& tensor) const { return value_at(tensor, this); }
  // A number that tensors of one memory have in common; none for a tensor of another level.
  std::optional<int64_t> memory_of(const at::Tensor& tensor) const;
  // The whole memory behind the tensor, one level down.
  at::Tensor memory_value(const at::Tensor& tensor);
  // Applies to `base`, a tensor one level down, the views that made `tensor` from its memory.
  at::Tensor replay_views(const at::Tensor& tensor, const at::Tensor& base);
  bool is_view(const at::Tensor& tensor) const;

  // Applies pending writes to a functional tensor of this level.
  void sync(const at::Tensor& functional) const;

 protected:
  void on_close() override;

 private:
  void run_without_aliases(const c10::OperatorHandle& op, torch::jit::Stack& stack);
  void run_functionalized(const c10::OperatorHandle& op, torch::jit::Stack& stack);
  at::Tensor wrap_functional(at::Tensor functional, const c10::VariableVersion& version);
  at::Tensor wrap_new(const at::Tensor& value);
  // The tensor one level down, also if it is one from outside that has been lifted.
  at::Tensor current_value(const at::Tensor& tensor) const;

  bool keep_views_;
  // Tensors from outside by identity, and what they are at this level.
  std::unordered_map<const c10::TensorImpl*, std::pair<at::Tensor, at::Tensor>> lifted_;
};

}  // namespace functorch_lite
