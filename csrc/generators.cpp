// The random number generators that vmap draws from. See generators.h first.
#include "generators.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>

#include <algorithm>
#include <mutex>

#include "batch_call.h"
#include "fallback.h"

namespace functorch_lite {

at::Tensor generator_state(at::Generator& generator) {
  const std::lock_guard<std::mutex> lock(generator.mutex());
  return generator.get_state();
}

void set_generator_state(at::Generator& generator, const at::Tensor& state) {
  const std::lock_guard<std::mutex> lock(generator.mutex());
  generator.set_state(state);
}

namespace {

void set_seed(at::Generator& generator, uint64_t seed) {
  const std::lock_guard<std::mutex> lock(generator.mutex());
  generator.set_current_seed(seed);
}

uint64_t draw_seed(at::Generator& generator) {
  const std::lock_guard<std::mutex> lock(generator.mutex());
  if (generator.device().is_cpu()) return generator.get<at::CPUGeneratorImpl>()->random64();
  // Other devices count what they have drawn, in fours.
  const auto offset = generator.get_offset();
  generator.set_offset(offset + 4);
  return at::CPUGeneratorImpl(generator.current_seed() + offset).random64();
}

Chunks* chunks_of(const BatchCall& call) { return call.level().chunks().get(); }

c10::ArrayRef<c10::IValue> arguments_of(BatchCall& call) {
  return call.size() == 0 ? c10::ArrayRef<c10::IValue>() : c10::ArrayRef<c10::IValue>(&call.arg(0), call.size());
}

}  // namespace

Chunks::Chunks(int64_t total, const std::vector<at::Generator>& generators) : total_(total) {
  for (const auto& generator : generators) remember(generator);
}

void Chunks::begin(int64_t size) {
  start_ = end_;
  end_ += size;
  used_ = 0;
  for (auto& [generator, state] : found_) set_generator_state(generator, state);
}

void Chunks::remember(const at::Generator& generator) {
  const auto is_this = [&](const auto& entry) { return entry.first == generator; };
  if (std::any_of(found_.begin(), found_.end(), is_this)) return;
  auto handle = generator;
  found_.emplace_back(generator, generator_state(handle));
}

at::Tensor& Chunks::kept_state() {
  if (used_ == kept_.size()) kept_.emplace_back();
  return kept_[used_++];
}

std::optional<at::Generator> generator_of(c10::ArrayRef<c10::IValue> arguments) {
  std::optional<c10::Device> device;
  for (const auto& argument : arguments) {
    if (argument.isGenerator()) return argument.toGenerator();
    if (argument.isDevice()) device = argument.toDevice();
    for_each_tensor(&argument, 1, [&](const at::Tensor& x) { device = device.value_or(x.device()); });
  }
  if (!device.has_value()) device = c10::kCPU;
  if (device->is_meta()) return std::nullopt;
  return at::globalContext().defaultGenerator(*device);
}

void remember_generator(const Level& innermost, c10::ArrayRef<c10::IValue> arguments) {
  std::optional<at::Generator> generator;
  for (const auto* level = &innermost; level != nullptr; level = level->parent()) {
    if (typeid(*level) != typeid(VmapLevel)) continue;
    auto* chunks = static_cast<const VmapLevel*>(level)->chunks().get();
    if (chunks == nullptr) continue;
    if (!generator.has_value()) generator = generator_of(arguments);
    if (generator.has_value()) chunks->remember(*generator);
  }
}

OwnStream::OwnStream(BatchCall& call)
    : generator_(*generator_of(arguments_of(call))),
      kept_(chunks_of(call) != nullptr ? &chunks_of(call)->kept_state() : nullptr) {
  const auto seed = draw_seed(generator_);
  outer_state_ = generator_state(generator_);
  if (kept_ != nullptr && kept_->defined()) {
    set_generator_state(generator_, *kept_);
  } else {
    set_seed(generator_, seed);
  }
}

OwnStream::~OwnStream() {
  if (kept_ != nullptr) *kept_ = generator_state(generator_);
  set_generator_state(generator_, outer_state_);
}

namespace {

void draw_the_same(BatchCall& call, at::Generator generator) {
  const auto before = generator_state(generator);
  at::Tensor after;
  run_each_example(call, [&](int64_t i) {
    if (i == 1) after = generator_state(generator);
    if (i > 0) set_generator_state(generator, before);
  });
  if (!after.defined()) after = generator_state(generator);
  if (auto* chunks = chunks_of(call)) {
    auto& kept = chunks->kept_state();
    if (!kept.defined()) kept = after;
    after = kept;
  }
  set_generator_state(generator, after);
}

void draw_differently(BatchCall& call, at::Generator generator) {
  const auto seed = draw_seed(generator);
  const auto after = generator_state(generator);
  const auto first = chunks_of(call) != nullptr ? chunks_of(call)->start() : 0;
  run_each_example(call, [&](int64_t i) { set_seed(generator, seed + first + i); });
  set_generator_state(generator, after);
}

}  // namespace

void draw_each_example(BatchCall& call) {
  const bool same = call.level().randomness() == VmapLevel::Randomness::kSame;
  bool any_batched = false;
  for (size_t i = 0; i < call.size(); ++i) any_batched |= call.is_batched(i) || call.is_list_batched(i);
  if (same && !any_batched) {
    call.call();
    return call.finish_unbatched();
  }
  auto generator = generator_of(arguments_of(call));
  if (!generator.has_value()) return run_each_example(call);
  same ? draw_the_same(call, *generator) : draw_differently(call, *generator);
}

}  // namespace functorch_lite
