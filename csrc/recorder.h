// Records a program from one run of a graph, and simplifies it. See replay.h first.
#pragma once

#include <unordered_map>

#include "level.h"
#include "replay.h"

namespace functorch_lite {

// While it is open, the calls on what it has lifted are recorded, and run one level down.
class Recorder final : public Level {
 public:
  // `simplifies`: whether no operator of the graph writes into its arguments.
  explicit Recorder(bool simplifies);

  void run(const c10::OperatorHandle& op, Stack& stack) override;
  const char* kind() const override { return "jit"; }

  // The next input of the program.
  at::Tensor lift(const at::Tensor& input);
  // The program, and its outputs for the inputs that it was recorded with.
  std::pair<c10::intrusive_ptr<Program>, Tensors> finish(const Tensors& outputs);

 private:
  // What is known of a tensor.
  struct Value {
    Layout layout;
    // The dtype, if it lies in memory without gaps and overlaps.
    std::optional<c10::ScalarType> dense_dtype;
    // The tensor in whose memory this one lies, `offset` elements further on, and whose layout is known; or itself.
    Slot base;
    int64_t offset;
    // Whose memory it was before anything was simplified.
    Slot memory;
    // Another one with the same contents and layout, or itself.
    Slot same_as;
    // The contents, if they are the same in each run.
    at::Tensor constant;
    bool is_input;
  };
  // A call, and the values of its tensors, in the order of the operands.
  struct Recorded {
    Program::Call call;
    Tensors operands;
  };

  Slot add(const at::Tensor& tensor);
  Slot slot_of(const at::Tensor& tensor);
  const Value& value_of(const SlotOperand& operand) const { return values_[values_[operand.slot].same_as]; }

  Slot add_result(const Recorded& recorded, const at::Tensor& result, bool is_constant);
  bool is_constant(const Recorded& recorded) const;
  std::optional<Slot> equal_operand(const Recorded& recorded, const at::Tensor& result) const;
  bool sums_nothing(const Recorded& recorded, const at::Tensor& result) const;

  Slot storage_of(Slot slot) const;

  void keep_outputs_apart();
  void leave_out_what_is_not_used();
  void write_into_what_is_not_used_again();
  void embed_constants();
  void renumber();

  bool simplifies_;
  c10::intrusive_ptr<Program> program_;
  std::vector<Value> values_;
  // Tensors that the graph holds, by identity.
  std::unordered_map<const c10::TensorImpl*, Slot> outside_;
};

}  // namespace functorch_lite
