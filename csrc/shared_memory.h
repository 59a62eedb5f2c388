// Memory that all examples of a vmap share.
//
// What the mapped function makes without a batched value is the same for all examples: it is computed once, and its
// wrapper has no batch dimension. When a batched value is written into it, each example needs memory of its own. The
// wrapper then becomes batched, and so do all others that show the same memory: views know how they were made, and are
// made again.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <vector>

#include "op_args.h"
#include "wrapper.h"

namespace functorch_lite {

class VmapLevel;

// The wrappers of one memory, in the order in which they were made: first the one that is not a view.
struct Sharers final : c10::intrusive_ptr_target {
  std::vector<Wrapper*> wrappers;
};

// How a wrapper was made from another one of the same memory.
struct ViewRecord {
  ViewRecord(Wrapper& of, c10::intrusive_ptr<Sharers> with);
  ~ViewRecord();
  ViewRecord(const ViewRecord&) = delete;
  ViewRecord& operator=(const ViewRecord&) = delete;

  Wrapper& wrapper;
  c10::intrusive_ptr<Sharers> sharers;
  // None for the one that is not a view. The source is among the arguments, which keep it alive.
  std::optional<c10::OperatorHandle> op;
  Stack arguments;
  size_t result = 0;   // which result of the operator
  size_t element = 0;  // and which element, if that is a list
};

// Gives the wrapper another value. Who counts writes to the old one is to see those to the new, which nobody else has.
void replace_value(Wrapper& wrapper, at::Tensor value, int64_t bdim);

// Wraps the results of the view operator `op`, called with `arguments`, one of which is the wrapper `source`.
void wrap_views(const c10::OperatorHandle& op, const Stack& arguments, Wrapper& source, c10::IValue* results);

// The wrapper `copy` shows what `source` shows.
void record_alias(Wrapper& copy, Wrapper& source);

// Whether there are other tensors that show this memory. If not, the wrapper forgets how it was made.
bool is_seen_through_others(Wrapper& wrapper);

// Gives each example its own copy of the memory behind `wrapper`, which must belong to `level`, the innermost one.
void make_batched(Wrapper& wrapper, VmapLevel& level);

}  // namespace functorch_lite
