// The level of vmap: finds the batching rule of each operator.
#pragma once

#include <c10/core/SymInt.h>

#include "generators.h"
#include "level.h"

namespace functorch_lite {

class VmapLevel final : public Level {
 public:
  enum class Randomness : uint8_t { kError, kSame, kDifferent };

  // `chunks`: if this level runs one of them.
  VmapLevel(c10::SymInt batch_size, Randomness randomness, c10::intrusive_ptr<Chunks> chunks = {})
      : Level(/*sets_modes=*/false),
        batch_size_(std::move(batch_size)),
        randomness_(randomness),
        chunks_(std::move(chunks)) {}

  void run(const c10::OperatorHandle& op, torch::jit::Stack& stack) override;
  const char* kind() const override { return "vmap"; }
  const c10::SymInt& batch_size() const { return batch_size_; }
  Randomness randomness() const { return randomness_; }
  // Null if the whole batch runs at once.
  const c10::intrusive_ptr<Chunks>& chunks() const { return chunks_; }

 private:
  // For a call without batched arguments; `any_here` if it has arguments of this level.
  void run_once(const c10::OperatorHandle& op, torch::jit::Stack& stack, bool any_here);

  c10::SymInt batch_size_;
  Randomness randomness_;
  c10::intrusive_ptr<Chunks> chunks_;
};

// The innermost level, which must be a vmap: for code that batching rules call.
VmapLevel& current_vmap_level();

}  // namespace functorch_lite
