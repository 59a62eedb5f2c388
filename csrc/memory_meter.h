// Counts what PyTorch's allocators hand out to this thread, with kernels' own buffers.
#pragma once

#include <ATen/record_function.h>
#include <c10/core/Allocator.h>
#include <torch/csrc/profiler/orchestration/observer.h>

#include <algorithm>
#include <memory>
#include <optional>

namespace functorch_lite {

// Allocators report to whatever is installed as the thread's profiler, from where it is passed on to what was there
// before: another meter, or a profiler of the user's. That expects to find itself there when an operator begins, so it
// does not see the operators that are measured.
class MemoryMeter {
 public:
  explicit MemoryMeter(c10::DeviceType device) : counter_(std::make_shared<Counter>(device)) {}

  void start() {
    without_profiler_.emplace();
    const auto before = c10::ThreadLocalDebugInfo::get(c10::DebugInfoKind::PROFILER_STATE);
    counter_->before = dynamic_cast<c10::MemoryReportingInfoBase*>(before);
    installed_.emplace(c10::DebugInfoKind::PROFILER_STATE, counter_);
  }
  void stop() {
    installed_.reset();
    without_profiler_.reset();
  }
  // Bytes that are allocated since the start, and the most that ever were.
  int64_t live() const { return counter_->live; }
  int64_t peak() const { return counter_->peak; }

 private:
  // PyTorch takes what is installed there for a profiler, and asks for its configuration.
  struct Counter final : torch::profiler::impl::ProfilerStateBase {
    explicit Counter(c10::DeviceType type)
        : ProfilerStateBase(torch::profiler::impl::ProfilerConfig(torch::profiler::impl::ProfilerState::Disabled,
                                                                  /*report_input_shapes=*/false,
                                                                  /*profile_memory=*/true)),
          device(type) {}
    torch::profiler::impl::ActiveProfilerType profilerType() override {
      return torch::profiler::impl::ActiveProfilerType::NONE;
    }
    void reportMemoryUsage(void* memory, int64_t bytes, size_t allocated, size_t reserved, c10::Device where) override {
      if (before != nullptr && before->memoryProfilingEnabled()) {
        before->reportMemoryUsage(memory, bytes, allocated, reserved, where);
      }
      if (where.type() != device) return;
      live += bytes;
      peak = std::max(peak, live);
    }

    c10::MemoryReportingInfoBase* before = nullptr;
    c10::DeviceType device;
    int64_t live = 0;
    int64_t peak = 0;
  };

  std::shared_ptr<Counter> counter_;
  std::optional<at::DisableRecordFunctionGuard> without_profiler_;
  std::optional<c10::DebugInfoGuard> installed_;
};

}  // namespace functorch_lite
