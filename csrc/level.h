// A level is one active application of a transform. The levels of a thread form a stack; the innermost one gets
// every operator call, does its part, and calls the same operator again one level down.
#pragma once

#include <ATen/core/stack.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/intrusive_ptr.h>

#include <memory>
#include <optional>

namespace c10 {
class OperatorHandle;
}

namespace functorch_lite {

// The part of PyTorch's thread-local autograd state that a level sets and restores.
struct AutogradModes {
  bool grad;
  bool forward_grad;
  bool inference;
  static AutogradModes current();
  void make_current() const;
};

class Level : public c10::intrusive_ptr_target {
 public:
  // `sets_modes`: code inside has autograd modes of its own, and code one level down those from outside.
  explicit Level(bool sets_modes) : sets_modes_(sets_modes) {}

  // Runs one operator call with this level innermost. Arguments are the top of `stack`; results replace them.
  virtual void run(const c10::OperatorHandle& op, torch::jit::Stack& stack) = 0;
  // The transform, as messages and `repr` name it.
  virtual const char* kind() const = 0;

  virtual bool differentiates() const { return false; }
  // Whether there is something with respect to which it does.
  virtual bool has_variables() const { return false; }
  // Whether it does so in forward mode.
  virtual bool is_forward() const { return false; }

  // Whether its wrappers keep their derivatives when it closes. Otherwise they must not be used any more if they have
  // one.
  virtual bool keeps_derivatives() const { return true; }

  // Pushes this level on the calling thread's stack; `close` pops it, and any level left open above it.
  void open();
  void close();

  // 1 for the outermost open level, 0 once closed.
  int64_t depth() const { return depth_; }
  Level* parent() const { return parent_.get(); }

 protected:
  virtual void on_open() {}
  virtual void on_close() {}
  // The modes in which code one level below `level` runs.
  static AutogradModes& modes_around(Level& level) { return level.outer_modes_; }

 private:
  friend class RunAgain;
  friend class RunBelow;

  bool sets_modes_;
  int64_t depth_ = 0;
  c10::intrusive_ptr<Level> parent_;
  c10::impl::LocalDispatchKeySet outer_keys_ = c10::impl::tls_local_dispatch_key_set();
  AutogradModes outer_modes_{};
};

using LevelPtr = c10::intrusive_ptr<Level>;

// Has the level open while the enclosed code runs.
class OpenLevel {
 public:
  explicit OpenLevel(Level& level) : level_(level) { level_.open(); }
  ~OpenLevel() { level_.close(); }
  OpenLevel(const OpenLevel&) = delete;
  OpenLevel& operator=(const OpenLevel&) = delete;

 private:
  Level& level_;
};

// The innermost level of this thread, or null.
Level* current_level();
int64_t level_depth();
// Whether `level` is on this thread's stack, counted from the innermost level that is running now.
bool is_active(const Level* level);

// What is excluded from dispatch one level down: what was when the level was opened, for autograd's own exclusions are
// those of the level that recorded; what is excluded now; or all of autograd, as in inference mode, where plain PyTorch
// runs operators that have nothing to record. (Views and writes are tracked by another key.)
enum class BelowKeys : uint8_t { kOuter, kSame, kPastAutograd };

// Runs the enclosed code one level below `level`.
class RunBelow {
 public:
  explicit RunBelow(const Level& level, BelowKeys which = BelowKeys::kOuter);
  ~RunBelow();
  RunBelow(const RunBelow&) = delete;
  RunBelow& operator=(const RunBelow&) = delete;

 private:
  friend class RunAgain;
  const Level& level_;
  Level* saved_level_;
  c10::impl::LocalDispatchKeySet saved_keys_;
  AutogradModes saved_modes_;
};

// Runs the enclosed code one level below `level`, from any level further in. If it is closed, runs it where it is.
class RunBelowAll {
 public:
  explicit RunBelowAll(const Level& level) {
    if (!is_active(&level)) return;
    below_.emplace(*current_level());
    further_ = std::make_unique<RunBelowAll>(level);
  }

 private:
  std::optional<RunBelow> below_;
  std::unique_ptr<RunBelowAll> further_;
};

// Runs the enclosed code at the level that a `RunBelow` left, for functions that use its tensors. Nothing but that may
// have changed the stack in between.
class RunAgain {
 public:
  explicit RunAgain(const RunBelow& below);
  ~RunAgain();
  RunAgain(const RunAgain&) = delete;
  RunAgain& operator=(const RunAgain&) = delete;

 private:
  bool sets_modes_;
  Level* saved_level_;
  c10::impl::LocalDispatchKeySet saved_keys_;
  AutogradModes saved_modes_;
};

// Has operators come to the door first though no level is open, where torch.export records: the formulas of a level
// that is closed use its wrappers, which are to be unwrapped before they are seen.
class DoorBeforeExport {
 public:
  DoorBeforeExport();
  ~DoorBeforeExport();
  DoorBeforeExport(const DoorBeforeExport&) = delete;
  DoorBeforeExport& operator=(const DoorBeforeExport&) = delete;

 private:
  c10::impl::LocalDispatchKeySet saved_keys_;
};

// Past the door, where no level is open, or none is meant.
class PastTheDoor {
 public:
  PastTheDoor();
  ~PastTheDoor();
  PastTheDoor(const PastTheDoor&) = delete;
  PastTheDoor& operator=(const PastTheDoor&) = delete;

 private:
  c10::impl::LocalDispatchKeySet saved_keys_;
};

// Runs the enclosed code outside all levels, as plain PyTorch.
class Outside {
 public:
  Outside();
  ~Outside();
  Outside(const Outside&) = delete;
  Outside& operator=(const Outside&) = delete;

 private:
  Level* saved_level_;
  c10::impl::LocalDispatchKeySet saved_keys_;
};

}  // namespace functorch_lite
