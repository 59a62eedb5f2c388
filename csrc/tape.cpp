// Recording operator calls and running them again. See tape.h first.
#include "tape.h"

#include <ATen/Context.h>
#include <ATen/ops/clone.h>

#include <algorithm>

#include "autodiff_level.h"
#include "generators.h"
#include "keys.h"
#include "wrapper.h"
#include "written_arguments.h"

// ATen/autocast_mode.h includes all operators.
namespace at::autocast {
TORCH_API ScalarType get_autocast_dtype(DeviceType device_type);
TORCH_API void set_autocast_dtype(DeviceType device_type, ScalarType dtype);
TORCH_API bool is_autocast_cache_enabled();
TORCH_API void set_autocast_cache_enabled(bool enabled);
TORCH_API DeviceType get_device_type_of_autocast_key(c10::DispatchKey key);
}  // namespace at::autocast

namespace functorch_lite {
namespace {

c10::DeviceType device_of(c10::DispatchKeySet autocast_keys) {
  return autocast_keys.has(c10::DispatchKey::AutocastCUDA) ? c10::kCUDA : c10::kCPU;
}

c10::DispatchKeySet active_autocast() {
  return c10::autocast_dispatch_keyset - c10::impl::tls_local_dispatch_key_set().excluded_;
}

// What a step depended on, for the enclosed code.
class TheseModes {
 public:
  TheseModes(const AutogradModes& autograd, c10::DispatchKeySet autocast, at::ScalarType dtype)
      : autograd_(AutogradModes::current()),
        keys_(c10::impl::tls_local_dispatch_key_set()),
        device_(device_of(autocast)),
        dtype_(at::autocast::get_autocast_dtype(device_)) {
    // What the code asked not to be differentiated is not, nor is what the caller asked for now.
    AutogradModes{autograd.grad && autograd_.grad, autograd.forward_grad && autograd_.forward_grad, autograd_.inference}
        .make_current();
    auto keys = keys_;
    keys.excluded_ = (keys.excluded_ | c10::autocast_dispatch_keyset) - autocast;
    c10::impl::_force_tls_local_dispatch_key_set(keys);
    at::autocast::set_autocast_dtype(device_, dtype);
  }
  ~TheseModes() {
    at::autocast::set_autocast_dtype(device_, dtype_);
    c10::impl::_force_tls_local_dispatch_key_set(keys_);
    autograd_.make_current();
  }
  TheseModes(const TheseModes&) = delete;
  TheseModes& operator=(const TheseModes&) = delete;

 private:
  AutogradModes autograd_;
  c10::impl::LocalDispatchKeySet keys_;
  c10::DeviceType device_;
  at::ScalarType dtype_;
};

// Casts are kept by the tensor that was cast, until autocast ends: that would hold what is not to be held.
class NoAutocastCache {
 public:
  NoAutocastCache() : before_(at::autocast::is_autocast_cache_enabled()) {
    at::autocast::set_autocast_cache_enabled(false);
  }
  ~NoAutocastCache() { at::autocast::set_autocast_cache_enabled(before_); }
  NoAutocastCache(const NoAutocastCache&) = delete;
  NoAutocastCache& operator=(const NoAutocastCache&) = delete;

 private:
  bool before_;
};

// Puts generators into the states in which the recorded run found them. Afterwards they are as before, but inside
// another replay as the recorded run left them, for the steps that come next there.
class TheseGenerators {
 public:
  explicit TheseGenerators(const std::vector<std::pair<at::Generator, at::Tensor>>& states) {
    for (const auto& [generator, state] : states) {
      auto handle = generator;
      if (replays == 0) before_.emplace_back(handle, generator_state(handle));
      set_generator_state(handle, state);
    }
    ++replays;
  }
  ~TheseGenerators() {
    --replays;
    for (auto& [generator, state] : before_) set_generator_state(generator, state);
  }
  TheseGenerators(const TheseGenerators&) = delete;
  TheseGenerators& operator=(const TheseGenerators&) = delete;

 private:
  static thread_local int64_t replays;
  std::vector<std::pair<at::Generator, at::Tensor>> before_;
};
thread_local int64_t TheseGenerators::replays = 0;

bool writes_into(const c10::Argument& argument) {
  const auto* alias = argument.alias_info();
  // Batch norm updates its statistics in training, and not all of its schemas say so.
  return alias != nullptr ? alias->isWrite() : argument.name() == "running_mean" || argument.name() == "running_var";
}

bool can_be_differentiated(const at::Tensor& tensor) {
  return at::isFloatingType(tensor.scalar_type()) || at::isComplexType(tensor.scalar_type());
}

}  // namespace

Tensors Tape::replay(const Tensors& inputs) const {
  TORCH_INTERNAL_ASSERT(inputs.size() == input_slots_.size());
  const TheseGenerators generators(generators_);
  const NoAutocastCache no_cache;
  Tensors slots(slots_);
  for (size_t i = 0; i < inputs.size(); ++i) slots[input_slots_[i]] = inputs[i];
  for (const auto& constant : constants_) slots[constant.slot] = constant.tensor;
  for (const auto slot : written_) slots[slot] = at::clone(slots[slot]);
  for (const auto& step : steps_) {
    const TheseModes modes(step.modes.autograd, step.modes.autocast, step.modes.autocast_dtype);
    run(step, slots);
    for (const auto slot : step.last_used) slots[slot].reset();
  }
  Tensors outputs;
  for (const auto slot : outputs_) outputs.push_back(slots[slot]);
  return outputs;
}

void Tape::run(const Step& step, Tensors& slots) {
  if (!step.op.has_value()) {
    Tensors arguments;
    for (const auto& operand : step.operands) arguments.push_back(slots[operand.slot]);
    const auto results = step.call(arguments);
    for (size_t i = 0; i < results.size(); ++i) slots[step.results[i]] = results[i];
    return;
  }
  Stack stack;
  push_arguments(stack, step.arguments, step.operands, slots);
  step.op->callBoxed(&stack);
  size_t i = 0;
  for_each_new_result(step.op->schema(), stack.data(),
                      [&](const at::Tensor& result) { slots[step.results[i++]] = result; });
}

void Tape::find_last_uses() {
  std::vector<bool> used_later(slots_);
  for (const auto slot : outputs_) used_later[slot] = true;
  for (auto step = steps_.rbegin(); step != steps_.rend(); ++step) {
    const auto last = [&](Slot slot) {
      if (!used_later[slot]) step->last_used.push_back(slot);
      used_later[slot] = true;
    };
    for (const auto slot : step->results) last(slot);
    for (const auto& operand : step->operands) last(operand.slot);
  }
}

TapeLevel::TapeLevel(bool repeats_random_numbers)
    : Level(/*sets_modes=*/true),
      tape_(c10::make_intrusive<Tape>()),
      repeats_random_numbers_(repeats_random_numbers),
      autocast_cache_(at::autocast::is_autocast_cache_enabled()) {}

void TapeLevel::on_open() {
  for (Level* level = this; level != nullptr; level = level->parent()) {
    auto& modes = modes_around(*level);
    recorded_around_.push_back(modes.grad);
    modes.grad = false;
    if (level != this && typeid(*level) == typeid(TapeLevel)) ++static_cast<TapeLevel*>(level)->paused_;
  }
  at::autocast::set_autocast_cache_enabled(false);
  if (repeats_random_numbers_) remember_generators({});
}

void TapeLevel::on_close() {
  at::autocast::set_autocast_cache_enabled(autocast_cache_);
  size_t i = 0;
  for (Level* level = this; level != nullptr; level = level->parent()) {
    modes_around(*level).grad = recorded_around_[i++];
    if (level != this && typeid(*level) == typeid(TapeLevel)) --static_cast<TapeLevel*>(level)->paused_;
  }
}

Tape::Modes TapeLevel::current_modes() {
  const auto autocast = active_autocast();
  return {AutogradModes::current(), autocast, at::autocast::get_autocast_dtype(device_of(autocast))};
}

// The CPU's generator may be drawn from at any time; one of another device only by a call that has a tensor there.
void TapeLevel::remember_generators(c10::ArrayRef<c10::IValue> arguments) {
  auto generator = generator_of(arguments);
  if (!generator.has_value()) return;
  auto& known = tape_->generators_;
  const auto is_this = [&](const auto& entry) { return entry.first == *generator; };
  if (std::none_of(known.begin(), known.end(), is_this)) known.emplace_back(*generator, generator_state(*generator));
}

at::Tensor TapeLevel::value_of(const at::Tensor& tensor) const { return value_at(tensor, this); }

bool TapeLevel::is_from_outside(const at::Tensor& tensor) const {
  auto* wrapper = wrapper_at(tensor, this);
  return wrapper == nullptr || wrapper->is_captured;
}

at::Tensor TapeLevel::wrap_result(const at::Tensor& value, bool differentiated) {
  auto result = wrap(value, *this);
  if (differentiated && can_be_differentiated(value)) result.unsafeGetTensorImpl()->set_requires_grad(true);
  return result;
}

at::Tensor TapeLevel::lift(const at::Tensor& argument) {
  const auto slot = slot_of(argument);
  auto result = wrap_result(argument, may_be_differentiated(argument));
  as_wrapper(result)->slot = slot;
  as_wrapper(result)->is_captured = true;
  return result;
}

Slot TapeLevel::slot_of(const at::Tensor& tensor) {
  if (const auto* wrapper = wrapper_at(tensor, this)) {
    TORCH_CHECK(wrapper->slot >= 0, "checkpoint: a tensor of shape ", tensor.sym_sizes(),
                " that was made inside a nested checkpoint is used after it. Return it from the function.");
    return wrapper->slot;
  }
  const auto [known, is_new] = seen_.emplace(tensor.unsafeGetTensorImpl(), tape_->slots_);
  if (!is_new) return known->second;
  from_outside_.push_back(tensor);
  const auto slot = tape_->new_slot();
  if (as_wrapper(tensor) != nullptr || may_be_differentiated(tensor)) {
    tape_->inputs_.push_back(tensor);
    tape_->input_slots_.push_back(slot);
  } else {
    tape_->constants_.push_back({slot, tensor});
  }
  return slot;
}

void TapeLevel::save_before_write(const at::Tensor& target) {
  const auto save = [&](Slot slot, at::Tensor& tensor) {
    auto& written = tape_->written_;
    if (!have_one_storage(tensor, target) || std::find(written.begin(), written.end(), slot) != written.end()) return;
    written.push_back(slot);
    const RunBelow below(*this);
    tensor = at::clone(tensor);
  };
  for (size_t i = 0; i < tape_->inputs_.size(); ++i) save(tape_->input_slots_[i], tape_->inputs_[i]);
  for (auto& constant : tape_->constants_) save(constant.slot, constant.tensor);
}

// What was there before must be found again by the next run. If it takes a value that is differentiated, code that
// reads it later would have no derivative.
void TapeLevel::keep_from_writes(const c10::OperatorHandle& op, const c10::IValue* arguments, bool differentiated) {
  const auto& schema = op.schema();
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    if (!writes_into(schema.arguments()[i])) continue;
    for_each_tensor(arguments + i, 1, [&](const at::Tensor& target) {
      const bool loses_derivative =
          differentiated && can_be_differentiated(target) && !writes_beside_results(schema, i);
      if (!is_from_outside(target)) {
        if (loses_derivative) target.unsafeGetTensorImpl()->set_requires_grad(true);
        return;
      }
      TORCH_CHECK_VALUE(!loses_derivative, "checkpoint: the function calls the in-place operator ",
                        op.operator_name().name,
                        " to write a value that is differentiated into a tensor from outside (shape ",
                        target.sym_sizes(), ", dtype ", target.scalar_type(),
                        "). It would be written again when the function is computed again. Write into a clone, and "
                        "return it from the function.");
      slot_of(target);
      save_before_write(target);
    });
  }
}

Tape::Step TapeLevel::step_for(const c10::OperatorHandle& op, c10::IValue* arguments) {
  const auto n = count_arguments(op);
  Tape::Step step{.op = op,
                  .call = {},
                  .arguments = Stack(arguments, arguments + n),
                  .operands = {},
                  .results = {},
                  .last_used = {},
                  .modes = current_modes()};
  step.operands = take_operands(step.arguments, [&](const at::Tensor& tensor) { return slot_of(tensor); });
  return step;
}

void TapeLevel::run(const c10::OperatorHandle& op, Stack& stack) {
  static const auto lift_fresh = find_operator("lift_fresh");
  static const auto clone = find_operator("clone");
  if (op == lift_fresh) {  // what torch.tensor has made just now, to be made again
    stack.emplace_back();
    return run(clone, stack);
  }
  const auto& schema = op.schema();
  const auto n = count_arguments(op);
  auto* arguments = stack.data() + stack.size() - n;
  replace_tensors(arguments, n, strip_closed_levels);
  bool differentiated = false;
  Tensors from_outside;
  for_each_tensor(arguments, n, [&](const at::Tensor& tensor) {
    differentiated |= wrapper_at(tensor, this) != nullptr ? tensor.requires_grad() : may_be_differentiated(tensor);
    if (is_from_outside(tensor)) from_outside.push_back(tensor);
  });
  differentiated = differentiated && AutogradModes::current().grad && op.operator_name().name != "aten::detach";
  const auto aliasing = aliasing_of(schema);
  if (!aliasing.any) from_outside.clear();

  std::optional<Tape::Step> step;
  if (paused_ == 0) {
    keep_from_writes(op, arguments, differentiated);
    if (repeats_random_numbers_) remember_generators(c10::ArrayRef<c10::IValue>(arguments, n));
    step = step_for(op, arguments);
  }
  WrittenArguments written(schema, arguments);
  {
    const RunBelow below(*this);
    call_on_values(op, stack, *this);
  }
  auto* results = stack.data() + stack.size() - schema.returns().size();
  for (size_t i = 0; i < schema.returns().size(); ++i) {
    if (written.restore(i, results[i], *this)) continue;
    replace_tensors(results + i, 1, [&](const at::Tensor& tensor) {
      auto result = wrap_result(tensor, differentiated);
      for (const auto& source : from_outside) as_wrapper(result)->is_captured |= have_one_storage(tensor, source);
      return result;
    });
  }
  if (!step.has_value()) return;
  bool has_effect = aliasing.writes;
  for_each_new_result(schema, results, [&](const at::Tensor& result) {
    step->results.push_back(tape_->new_slot());
    if (!result.defined()) return;
    as_wrapper(result)->slot = step->results.back();
    has_effect = true;
  });
  if (has_effect) tape_->steps_.push_back(std::move(*step));
}

void TapeLevel::take_place(const at::Tensor& target, const at::Tensor& result) {
  as_wrapper(target)->slot = as_wrapper(result)->slot;
}

Tensors TapeLevel::record(Call call, const Tensors& arguments, const Tensors& results) {
  const bool records = paused_ == 0;
  Tape::Step step{.op = std::nullopt,
                  .call = std::move(call),
                  .arguments = {},
                  .operands = {},
                  .results = {},
                  .last_used = {},
                  .modes = current_modes()};
  bool differentiated = false;
  for (const auto& argument : arguments) {
    if (records) step.operands.push_back({0, -1, slot_of(argument)});
    differentiated |= argument.requires_grad() || may_be_differentiated(value_of(argument));
  }
  Tensors lifted;
  for (const auto& result : results) {
    lifted.push_back(wrap_result(result, differentiated));
    auto* wrapper = as_wrapper(lifted.back());
    for (const auto& argument : arguments) {
      wrapper->is_captured |= is_from_outside(argument) && have_one_storage(result, argument);
    }
    if (records) step.results.push_back(wrapper->slot = tape_->new_slot());
  }
  if (records) tape_->steps_.push_back(std::move(step));
  return lifted;
}

std::pair<c10::intrusive_ptr<Tape>, Tensors> TapeLevel::finish(const Tensors& outputs) {
  // To share memory with an argument is something that only an operator can do that autograd knows as a view.
  Tensors known = from_outside_;
  Tensors values;
  for (auto output : outputs) {
    output = strip_closed_levels(std::move(output));
    const auto shares = [&](const at::Tensor& other) { return have_one_storage(output, other); };
    if (std::any_of(known.begin(), known.end(), shares)) output = at::clone(output);
    known.push_back(output);
    tape_->outputs_.push_back(slot_of(output));
    values.push_back(value_of(output));
  }
  tape_->find_last_uses();
  from_outside_.clear();
  seen_.clear();
  return {std::exchange(tape_, c10::make_intrusive<Tape>()), values};
}

}  // namespace functorch_lite
