// The stack of levels of each thread. See level.h first.
#include "level.h"

#include <c10/core/AutogradState.h>
#include <c10/util/Exception.h>

#include "keys.h"

namespace functorch_lite {
namespace {

thread_local Level* innermost = nullptr;

void set_innermost(Level* level, c10::impl::LocalDispatchKeySet keys) {
  innermost = level;
  keys.included_ = level != nullptr ? keys.included_.add(kFront) : keys.included_.remove(kFront);
  keys.excluded_ = level != nullptr ? keys.excluded_.add(kExport) : keys.excluded_.remove(kExport);
  c10::impl::_force_tls_local_dispatch_key_set(keys);
}

}  // namespace

AutogradModes AutogradModes::current() {
  const auto& state = c10::AutogradState::get_tls_state();
  return {state.get_grad_mode(), state.get_fw_grad_mode(), state.get_inference_mode()};
}

void AutogradModes::make_current() const {
  auto& state = c10::AutogradState::get_tls_state();
  state.set_grad_mode(grad);
  state.set_fw_grad_mode(forward_grad);
  state.set_inference_mode(inference);
}

Level* current_level() { return innermost; }

int64_t level_depth() {
  auto* level = current_level();
  return level != nullptr ? level->depth() : 0;
}

bool is_active(const Level* level) {
  for (auto* l = innermost; l != nullptr; l = l->parent()) {
    if (l == level) return true;
  }
  return false;
}

void Level::open() {
  outer_keys_ = c10::impl::tls_local_dispatch_key_set();
  TORCH_CHECK(!(outer_keys_.included_ - outer_keys_.excluded_).has(kTorchFuncIsInnermost), kind(),
              ": got a call inside a transform of torch.func, which would see each operation before functorch_lite, "
              "expected one outside. Use functorch_lite's transform in the place of torch.func's, or "
              "functorch_lite.overlay(), which puts ours in the places of theirs. (torch.func inside functorch_lite "
              "works.)");
  outer_modes_ = AutogradModes::current();
  TORCH_INTERNAL_ASSERT(depth_ == 0, "this level is open already");
  depth_ = level_depth() + 1;
  if (innermost != nullptr) parent_ = LevelPtr::unsafe_reclaim_from_nonowning(innermost);
  set_innermost(this, c10::impl::tls_local_dispatch_key_set());
  on_open();
  if (!sets_modes_) return;
  auto keys = c10::impl::tls_local_dispatch_key_set();
  keys.excluded_ = keys.excluded_ - kRecordingKeys;
  keys.included_ = keys.included_.add(c10::DispatchKey::ADInplaceOrView);
  c10::impl::_force_tls_local_dispatch_key_set(keys);
  AutogradModes{true, true, false}.make_current();
}

void Level::close() {
  if (!is_active(this)) return;
  while (innermost != this) innermost->close();
  on_close();
  if (sets_modes_) {
    c10::impl::_force_tls_local_dispatch_key_set(outer_keys_);
    outer_modes_.make_current();
  }
  const auto parent = std::move(parent_);
  depth_ = 0;
  set_innermost(parent.get(), c10::impl::tls_local_dispatch_key_set());
}

RunBelow::RunBelow(const Level& level, BelowKeys which)
    : level_(level),
      saved_level_(innermost),
      saved_keys_(c10::impl::tls_local_dispatch_key_set()),
      saved_modes_(level.sets_modes_ ? AutogradModes::current() : AutogradModes{}) {
  auto keys = saved_keys_;
  if (level.sets_modes_ && which != BelowKeys::kSame) {
    const auto& outer = level.outer_keys_;
    keys.excluded_ = (keys.excluded_ - kRecordingKeys) | (outer.excluded_ & kRecordingKeys);
    keys.included_ = (keys.included_ - kRecordingKeys) | (outer.included_ & kRecordingKeys);
  }
  if (which == BelowKeys::kPastAutograd) keys.excluded_ = keys.excluded_ | c10::autograd_dispatch_keyset;
  if (level.sets_modes_) level.outer_modes_.make_current();
  set_innermost(level.parent(), keys);
}

RunBelow::~RunBelow() {
  innermost = saved_level_;
  c10::impl::_force_tls_local_dispatch_key_set(saved_keys_);
  if (level_.sets_modes_) saved_modes_.make_current();
}

RunAgain::RunAgain(const RunBelow& below)
    : sets_modes_(below.level_.sets_modes_),
      saved_level_(innermost),
      saved_keys_(c10::impl::tls_local_dispatch_key_set()),
      saved_modes_(AutogradModes::current()) {
  TORCH_INTERNAL_ASSERT(innermost == below.level_.parent(), "a level is resumed on top of another");
  set_innermost(below.saved_level_, below.saved_keys_);
  if (sets_modes_) below.saved_modes_.make_current();
}

RunAgain::~RunAgain() {
  innermost = saved_level_;
  c10::impl::_force_tls_local_dispatch_key_set(saved_keys_);
  if (sets_modes_) saved_modes_.make_current();
}

DoorBeforeExport::DoorBeforeExport() : saved_keys_(c10::impl::tls_local_dispatch_key_set()) {
  if (innermost != nullptr || !saved_keys_.included_.has(kExport)) return;
  auto keys = saved_keys_;
  keys.included_ = keys.included_.add(kFront);
  keys.excluded_ = keys.excluded_.add(kExport);
  c10::impl::_force_tls_local_dispatch_key_set(keys);
}

DoorBeforeExport::~DoorBeforeExport() { c10::impl::_force_tls_local_dispatch_key_set(saved_keys_); }

PastTheDoor::PastTheDoor() : saved_keys_(c10::impl::tls_local_dispatch_key_set()) {
  auto keys = saved_keys_;
  keys.excluded_ = keys.excluded_.add(kFront);
  if (innermost == nullptr) keys.excluded_ = keys.excluded_.remove(kExport);
  c10::impl::_force_tls_local_dispatch_key_set(keys);
}

PastTheDoor::~PastTheDoor() { c10::impl::_force_tls_local_dispatch_key_set(saved_keys_); }

Outside::Outside() : saved_level_(innermost), saved_keys_(c10::impl::tls_local_dispatch_key_set()) {
  set_innermost(nullptr, saved_keys_);
}

Outside::~Outside() {
  innermost = saved_level_;
  c10::impl::_force_tls_local_dispatch_key_set(saved_keys_);
}

}  // namespace functorch_lite
