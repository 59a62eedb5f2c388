// Recording and simplifying a program. See recorder.h first.
#include "recorder.h"

#include <ATen/core/enum_tag.h>
#include <ATen/ops/clone.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/full_like.h>

#include <algorithm>
#include <unordered_set>

#include "wrapper.h"
#include "written_arguments.h"

namespace functorch_lite {
namespace {

// Larger ones are computed in each run rather than kept.
constexpr size_t kLargestConstant = size_t{1} << 20;

const std::string& name_of(const c10::OperatorHandle& op) { return op.operator_name().name; }

bool is_random(const c10::OperatorHandle& op) { return op.hasTag(at::Tag::nondeterministic_seeded); }

bool has_effect(const c10::OperatorHandle& op) { return is_random(op) || aliasing_of(op.schema()).writes; }

// Operators whose results depend on the shape of their argument only.
bool reads_shape_only(const c10::OperatorHandle& op) {
  static const std::unordered_set<std::string> names = {
      "aten::zeros_like", "aten::ones_like", "aten::full_like", "aten::empty_like",       "aten::new_zeros",
      "aten::new_ones",   "aten::new_full",  "aten::new_empty", "aten::new_empty_strided"};
  return names.count(name_of(op)) != 0;
}

// `mul_` for `mul`, if it takes the same arguments.
std::optional<c10::OperatorHandle> in_place_form(const c10::OperatorHandle& op) {
  const auto& schema = op.schema();
  const auto form = c10::Dispatcher::singleton().findSchema({name_of(op) + "_", op.operator_name().overload_name});
  if (!form.has_value() || aliasing_of(schema).any || schema.returns().size() != 1) return std::nullopt;
  const auto& arguments = form->schema().arguments();
  if (written_argument(form->schema(), 0) != 0 || arguments.size() != schema.arguments().size()) return std::nullopt;
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (*arguments[i].type() != *schema.arguments()[i].type()) return std::nullopt;
  }
  return form;
}

bool is_full_of(const at::Tensor& constant, double number) {
  return constant.defined() && at::equal(constant, at::full_like(constant, number));
}

bool is_identity_matrix(const at::Tensor& constant) {
  if (!constant.defined() || constant.dim() != 2 || constant.size(0) != constant.size(1)) return false;
  return at::equal(constant, at::eye(constant.size(0), constant.options()));
}

// The layout of the dimensions that have more than one element, or none.
Layout without_ones(const at::Tensor& tensor) {
  Layout layout;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    if (tensor.size(dim) == 1) continue;
    layout.sizes.push_back(tensor.size(dim));
    layout.strides.push_back(tensor.stride(dim));
  }
  return layout;
}

// Whether another tensor of the same dtype in the memory of `base` is described by its layout.
bool shows(const at::Tensor& tensor, const at::Tensor& base) {
  return tensor.has_storage() && base.has_storage() && tensor.storage().is_alias_of(base.storage()) &&
         tensor.scalar_type() == base.scalar_type() && tensor.is_conj() == base.is_conj() &&
         tensor.is_neg() == base.is_neg();
}

}  // namespace

Recorder::Recorder(bool simplifies)
    : Level(/*sets_modes=*/false), simplifies_(simplifies), program_(c10::make_intrusive<Program>()) {}

Slot Recorder::add(const at::Tensor& tensor) {
  const auto slot = static_cast<Slot>(values_.size());
  Value value{.layout = {},
              .dense_dtype = {},
              .base = slot,
              .offset = 0,
              .memory = slot,
              .same_as = slot,
              .constant = {},
              .is_input = false};
  if (tensor.defined() && is_dense(tensor)) {
    value.layout = Layout::of(tensor);
    if (tensor.is_non_overlapping_and_dense()) value.dense_dtype = tensor.scalar_type();
  }
  values_.push_back(std::move(value));
  return slot;
}

at::Tensor Recorder::lift(const at::Tensor& input) {
  const auto slot = add(input);
  values_[slot].is_input = true;
  program_->inputs_.push_back(values_[slot].layout);
  auto result = wrap(input, *this);
  as_wrapper(result)->slot = slot;
  return result;
}

Slot Recorder::slot_of(const at::Tensor& tensor) {
  if (const auto* wrapper = wrapper_at(tensor, this)) return wrapper->slot;
  const auto [known, is_new] = outside_.emplace(tensor.unsafeGetTensorImpl(), 0);
  if (is_new) {
    known->second = add(tensor);
    values_[known->second].constant = tensor;
  }
  return known->second;
}

bool Recorder::is_constant(const Recorded& recorded) const {
  const auto& op = recorded.call.op;
  if (!simplifies_ || is_random(op)) return false;
  return reads_shape_only(op) || std::all_of(recorded.call.operands.begin(), recorded.call.operands.end(),
                                             [&](const SlotOperand& o) { return value_of(o).constant.defined(); });
}

// The operand that the result repeats. An added zero counts as nothing, though it makes 0 of -0, and so does the
// identity matrix, though infinity times its zeros is NaN.
std::optional<Slot> Recorder::equal_operand(const Recorded& recorded, const at::Tensor& result) const {
  const auto& call = recorded.call;
  if (!simplifies_ || call.operands.size() != 2 || !is_dense(result)) return std::nullopt;
  const auto& name = name_of(call.op);
  const bool adds = name == "aten::add" || name == "aten::sub";
  const bool multiplies = name == "aten::mul" || name == "aten::div";
  const bool contracts = name == "aten::mm";
  if (!adds && !multiplies && !contracts) return std::nullopt;
  const RunBelow below(*this);
  for (const size_t kept : {0, 1}) {
    if (kept == 1 && (name == "aten::sub" || name == "aten::div")) continue;
    const auto& constant = value_of(call.operands[1 - kept]).constant;
    if (kept == 1 && adds && call.arguments.back() != c10::IValue(1)) continue;
    if (contracts ? !is_identity_matrix(constant) : !is_full_of(constant, adds ? 0 : 1)) continue;
    const auto& same = recorded.operands[kept];
    if (same.scalar_type() == result.scalar_type() && Layout::of(same) == Layout::of(result)) {
      return call.operands[kept].slot;
    }
  }
  return std::nullopt;
}

// Whether the call is a sum along dimensions of size 1: its operand, seen in another way.
bool Recorder::sums_nothing(const Recorded& recorded, const at::Tensor& result) const {
  if (!simplifies_ || name_of(recorded.call.op) != "aten::sum" || recorded.operands.size() != 1) return false;
  const auto& x = recorded.operands[0];
  if (!is_dense(x) || !is_dense(result) || x.scalar_type() != result.scalar_type()) return false;
  return !x.is_conj() && !x.is_neg() && without_ones(x) == without_ones(result);
}

Slot Recorder::add_result(const Recorded& recorded, const at::Tensor& result, bool is_constant) {
  const auto slot = add(result);
  auto& value = values_[slot];
  if (!result.defined()) return slot;
  if (is_constant && (!result.has_storage() || result.storage().nbytes() <= kLargestConstant)) value.constant = result;
  for (size_t i = 0; i < recorded.operands.size(); ++i) {
    const auto& operand = recorded.operands[i];
    if (!result.has_storage() || !operand.has_storage() || !result.storage().is_alias_of(operand.storage())) continue;
    const auto& source = value_of(recorded.call.operands[i]);
    value.memory = values_[recorded.call.operands[i].slot].memory;
    if (!shows(result, operand)) break;
    value.base = source.base;
    value.offset = source.offset + result.storage_offset() - operand.storage_offset();
    return slot;
  }
  if (const auto same = equal_operand(recorded, result)) value.same_as = values_[*same].same_as;
  if (sums_nothing(recorded, result)) {
    const auto& source = value_of(recorded.call.operands[0]);
    value.base = source.base;
    value.offset = source.offset;
  }
  return slot;
}

void Recorder::run(const c10::OperatorHandle& op, Stack& stack) {
  const auto n = count_arguments(op);
  auto* arguments = stack.data() + stack.size() - n;
  replace_tensors(arguments, n, strip_closed_levels);
  Recorded recorded{.call = {.op = op, .arguments = Stack(arguments, arguments + n), .operands = {}, .results = {}},
                    .operands = {}};
  recorded.call.operands = take_operands(recorded.call.arguments, [&](const at::Tensor& tensor) {
    recorded.operands.push_back(value_at(tensor, this));
    return slot_of(tensor);
  });
  const auto& schema = op.schema();
  WrittenArguments written(schema, arguments);
  {
    const RunBelow below(*this);
    call_on_values(op, stack, *this);
  }
  auto* results = stack.data() + stack.size() - schema.returns().size();
  const bool constant = is_constant(recorded);
  bool computes = has_effect(op);
  for (size_t i = 0; i < schema.returns().size(); ++i) {
    if (written.restore(i, results[i], *this)) continue;
    for_each_place(results + i, 1, [&](const at::Tensor& result) {
      const auto slot = add_result(recorded, result, constant);
      const auto& value = values_[slot];
      recorded.call.results.push_back(slot);
      if (value.constant.defined() || value.same_as != slot) return;
      if (value.base == slot) {
        computes = true;
      } else {
        const auto& base = values_[value.base].layout;
        program_->steps_.push_back({Program::View{value.base, base, value.layout, value.offset, slot}, {}});
      }
    });
    replace_tensors(results + i, 1, [&](const at::Tensor& result) { return wrap(result, *this); });
  }
  size_t i = 0;
  for_each_new_result(schema, results, [&](const at::Tensor& result) {
    if (result.defined()) as_wrapper(result)->slot = recorded.call.results[i];
    ++i;
  });
  if (!computes) return;
  for (auto& operand : recorded.call.operands) operand.slot = values_[operand.slot].same_as;
  program_->steps_.push_back({std::move(recorded.call), {}});
}

// An output is a tensor of its own where it was one before anything was simplified.
void Recorder::keep_outputs_apart() {
  static const auto clone = find_operator("clone");
  std::unordered_set<Slot> taken;
  for (auto& output : program_->outputs_) {
    const auto slot = values_[output].same_as;
    const auto& value = values_[slot];
    const auto& base = values_[value.base];
    const bool was_apart = values_[output].memory != value.memory || value.memory != base.memory;
    const bool is_shared = base.is_input || !taken.insert(value.base).second;
    if (!value.constant.defined() && !(was_apart && is_shared)) {
      output = slot;
      continue;
    }
    const auto copy = static_cast<Slot>(values_.size());
    values_.push_back(value);
    values_.back().base = values_.back().memory = values_.back().same_as = copy;
    values_.back().constant = at::Tensor();
    Program::Call call{
        .op = clone, .arguments = {c10::IValue(), c10::IValue()}, .operands = {{0, -1, slot}}, .results = {copy}};
    program_->steps_.push_back({std::move(call), {}});
    output = copy;
  }
}

void Recorder::leave_out_what_is_not_used() {
  std::vector<bool> used(values_.size());
  for (const auto slot : program_->outputs_) used[slot] = true;
  auto& steps = program_->steps_;
  std::vector<Program::Step> kept;
  for (auto step = steps.rbegin(); step != steps.rend(); ++step) {
    const auto last = [&](Slot slot) {
      if (!used[slot]) step->last_used.push_back(slot);
      used[slot] = true;
    };
    if (auto* call = std::get_if<Program::Call>(&step->does)) {
      const bool is_used =
          std::any_of(call->results.begin(), call->results.end(), [&](Slot slot) { return used[slot]; });
      if (!is_used && !has_effect(call->op)) continue;
      for (const auto slot : call->results) last(slot);
      for (const auto& operand : call->operands) last(operand.slot);
    } else {
      const auto& view = std::get<Program::View>(step->does);
      if (!used[view.result]) continue;
      last(view.base);
    }
    kept.push_back(std::move(*step));
  }
  std::reverse(kept.begin(), kept.end());
  steps = std::move(kept);
  for (Slot slot = 0; slot < static_cast<Slot>(program_->inputs_.size()); ++slot) {
    if (!used[slot]) program_->unused_inputs_.push_back(slot);
  }
}

// The slot whose memory this one shows.
Slot Recorder::storage_of(Slot slot) const {
  while (true) {
    const auto base = values_[values_[slot].same_as].base;
    if (values_[base].memory == base) return base;
    slot = values_[base].memory;
  }
}

// Elementwise operators write into their first argument where nobody reads its memory later.
void Recorder::write_into_what_is_not_used_again() {
  auto& steps = program_->steps_;
  std::unordered_map<Slot, size_t> last_step;  // of each memory
  for (size_t i = 0; i < steps.size(); ++i) {
    if (const auto* call = std::get_if<Program::Call>(&steps[i].does)) {
      for (const auto& operand : call->operands) last_step[storage_of(operand.slot)] = i;
    } else {
      last_step[storage_of(std::get<Program::View>(steps[i].does).base)] = i;
    }
  }
  for (const auto output : program_->outputs_) last_step[storage_of(output)] = steps.size();
  for (size_t i = 0; i < steps.size(); ++i) {
    auto* call = std::get_if<Program::Call>(&steps[i].does);
    if (call == nullptr || call->operands.empty() || has_effect(call->op)) continue;
    if (!call->op.hasTag(at::Tag::pointwise)) continue;
    const auto form = in_place_form(call->op);
    const auto [argument, element, slot] = call->operands[0];
    if (!form.has_value() || argument != 0 || element >= 0 || call->results.size() != 1) continue;
    const auto storage = storage_of(slot);
    const auto& target = values_[slot];
    const auto& result = values_[call->results[0]];
    const bool fits = target.dense_dtype.has_value() && target.dense_dtype == result.dense_dtype &&
                      target.layout == result.layout && result.memory == call->results[0];
    const bool is_ours = storage == slot && !target.constant.defined();
    const bool is_read_by_others =
        std::any_of(call->operands.begin() + 1, call->operands.end(),
                    [&](const SlotOperand& other) { return storage_of(other.slot) == storage; });
    if (!fits || !is_ours || is_read_by_others || last_step[storage] != i) continue;
    call->in_place = form;
    call->overwrites_input = target.is_input;
    // From here on the memory is used as long as that of the result.
    last_step[storage] = std::max(i, last_step[call->results[0]]);
  }
}

// Puts the tensors that never change where the calls have them.
void Recorder::embed_constants() {
  for (auto& step : program_->steps_) {
    auto* call = std::get_if<Program::Call>(&step.does);
    if (call == nullptr) continue;
    std::vector<SlotOperand> changing;
    for (const auto& operand : call->operands) {
      const auto& constant = values_[operand.slot].constant;
      if (!constant.defined()) {
        changing.push_back(operand);
      } else if (operand.element < 0) {
        call->arguments[operand.argument] = constant;
      } else {
        call->arguments[operand.argument].toList().set(operand.element, constant);
      }
    }
    call->operands = std::move(changing);
  }
}

// Numbers the slots in the order of their use, inputs first.
void Recorder::renumber() {
  std::unordered_map<Slot, Slot> numbers;
  const auto number = [&](Slot& slot) {
    slot = numbers.emplace(slot, static_cast<Slot>(numbers.size())).first->second;
  };
  for (Slot slot = 0; slot < static_cast<Slot>(program_->inputs_.size()); ++slot) numbers.emplace(slot, slot);
  for (auto& step : program_->steps_) {
    if (auto* call = std::get_if<Program::Call>(&step.does)) {
      for (auto& operand : call->operands) number(operand.slot);
      for (auto& slot : call->results) number(slot);
    } else {
      auto& view = std::get<Program::View>(step.does);
      number(view.base);
      number(view.result);
    }
    std::erase_if(step.last_used, [&](Slot slot) { return values_[slot].constant.defined(); });
    for (auto& slot : step.last_used) number(slot);
  }
  for (auto& slot : program_->outputs_) number(slot);
  program_->slots_ = static_cast<Slot>(numbers.size());
}

std::pair<c10::intrusive_ptr<Program>, Tensors> Recorder::finish(const Tensors& outputs) {
  Tensors results;
  for (const auto& output : outputs) {
    const auto slot = slot_of(output);
    program_->outputs_.push_back(slot);
    // The program keeps what is constant.
    const auto result = value_at(output, this);
    results.push_back(values_[slot].constant.defined() ? at::clone(result) : result);
  }
  keep_outputs_apart();
  leave_out_what_is_not_used();
  if (simplifies_) write_into_what_is_not_used_again();
  embed_constants();
  renumber();
  outside_.clear();
  return {std::exchange(program_, c10::make_intrusive<Program>()), results};
}

}  // namespace functorch_lite
