// A program: the operator calls of a graph, run by one loop without Python, levels and autograd.
//
// It is recorded from one run of the graph, for tensors of certain sizes and strides (`recorder.h`). What did not
// depend on the inputs was computed then; views are not operators any more but descriptions of memory.
#pragma once

#include <ATen/core/Tensor.h>

#include <variant>

#include "recorded_call.h"

namespace functorch_lite {

using Tensors = std::vector<at::Tensor>;

// How a tensor lies in memory.
struct Layout {
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;

  static Layout of(const at::Tensor& tensor) { return {tensor.sizes().vec(), tensor.strides().vec()}; }
  bool fits(const at::Tensor& tensor) const { return tensor.sizes() == sizes && tensor.strides() == strides; }
  bool operator==(const Layout&) const = default;
};

class Program final : public c10::intrusive_ptr_target {
 public:
  // The outputs. An input is freed after its last use, unless somebody else holds it, and may be overwritten if
  // `may_overwrite`, unless somebody else holds it or its storage.
  Tensors run(Tensors inputs, bool may_overwrite = false) const;
  // One line for each step.
  std::string describe() const;

 private:
  friend class Recorder;

  // Tensors that are the same in each run stand in the arguments.
  struct Call {
    c10::OperatorHandle op;
    Stack arguments;
    std::vector<SlotOperand> operands;
    std::vector<Slot> results;
    // The operator that writes the result into the first argument, which is not used again.
    std::optional<c10::OperatorHandle> in_place = {};
    bool overwrites_input = false;
  };
  // A tensor in the memory of another one, `offset` elements after its beginning.
  struct View {
    Slot base;
    Layout base_layout;
    Layout layout;
    int64_t offset;
    Slot result;
  };
  struct Step {
    std::variant<Call, View> does;
    std::vector<Slot> last_used;
  };

  static void perform(const Call& call, Tensors& slots, Stack& stack, bool may_overwrite);
  static at::Tensor show(const View& view, const Tensors& slots);

  std::vector<Layout> inputs_;  // the first slots
  Slot slots_ = 0;
  std::vector<Step> steps_;
  std::vector<Slot> unused_inputs_;
  std::vector<Slot> outputs_;
};

}  // namespace functorch_lite
