// A tape: the operator calls of one run of a function, which can be run again on other tensors, at other levels.
//
// It is what activation checkpointing computes again: the calls, not the Python code, so it does not matter what the
// function read beside its arguments, nor whether that is still there.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <functional>
#include <unordered_map>

#include "level.h"
#include "recorded_call.h"

namespace functorch_lite {

using Tensors = std::vector<at::Tensor>;
// A step that is not an operator but a function of Python.
using Call = std::function<Tensors(const Tensors&)>;

class Tape final : public c10::intrusive_ptr_target {
 public:
  // What the function read from outside and others may differentiate or map: its arguments, then what it captured.
  const Tensors& inputs() const { return inputs_; }
  // The results of the function for these inputs, with the random numbers of the run that was recorded.
  Tensors replay(const Tensors& inputs) const;

 private:
  friend class TapeLevel;
  // What the calls depended on beside their arguments. Autocast is on for the keys.
  struct Modes {
    AutogradModes autograd;
    c10::DispatchKeySet autocast;
    at::ScalarType autocast_dtype;
  };
  struct Step {
    std::optional<c10::OperatorHandle> op;
    Call call;
    Stack arguments;
    std::vector<SlotOperand> operands;
    std::vector<Slot> results;
    std::vector<Slot> last_used;
    Modes modes;
  };
  struct Constant {
    Slot slot;
    at::Tensor tensor;
  };

  Slot new_slot() { return slots_++; }
  // Lets go of each tensor after the last step that uses it.
  void find_last_uses();
  static void run(const Step& step, Tensors& slots);

  int64_t slots_ = 0;
  std::vector<Step> steps_;
  Tensors inputs_;
  std::vector<Slot> input_slots_;
  std::vector<Constant> constants_;
  // Slots of what was there before, and is written: each run writes into a copy.
  std::vector<Slot> written_;
  std::vector<Slot> outputs_;
  std::vector<std::pair<at::Generator, at::Tensor>> generators_;
};

// While it is open the calls are recorded on a tape and run one level down, where nobody records them in reverse mode.
// Its wrappers say that they require grad if they depend on something that is differentiated, for code that asks.
class TapeLevel final : public Level {
 public:
  explicit TapeLevel(bool repeats_random_numbers);

  void run(const c10::OperatorHandle& op, Stack& stack) override;
  const char* kind() const override { return "checkpoint"; }
  bool keeps_derivatives() const override { return false; }

  at::Tensor lift(const at::Tensor& argument);
  at::Tensor value_of(const at::Tensor& tensor) const;
  bool is_from_outside(const at::Tensor& tensor) const;
  // Records a step, with the values that it has one level down. Returns them lifted.
  Tensors record(Call call, const Tensors& arguments, const Tensors& results);
  // From now on `target`, which a step wrote into, is what the step returned for it.
  static void take_place(const at::Tensor& target, const at::Tensor& result);
  // The tape, and the values of the outputs one level down.
  std::pair<c10::intrusive_ptr<Tape>, Tensors> finish(const Tensors& outputs);

 protected:
  void on_open() override;
  void on_close() override;

 private:
  Slot slot_of(const at::Tensor& tensor);
  void keep_from_writes(const c10::OperatorHandle& op, const c10::IValue* arguments, bool differentiated);
  void save_before_write(const at::Tensor& target);
  void remember_generators(c10::ArrayRef<c10::IValue> arguments);
  // The call on the tape, without the results.
  Tape::Step step_for(const c10::OperatorHandle& op, c10::IValue* arguments);
  at::Tensor wrap_result(const at::Tensor& value, bool differentiated);
  static Tape::Modes current_modes();

  c10::intrusive_ptr<Tape> tape_;
  bool repeats_random_numbers_;
  // Number of tapes that are being recorded further in: their results are recorded here as one step each.
  int64_t paused_ = 0;
  // Tensors from outside, by identity; the tape holds them, or this list where it has a copy.
  std::unordered_map<const c10::TensorImpl*, Slot> seen_;
  Tensors from_outside_;
  bool autocast_cache_;
  std::vector<bool> recorded_around_;
};

}  // namespace functorch_lite
