// The backward pass of one level, node by node in the calling thread.
//
// PyTorch's engine serves all threads and devices at once: for each node it saves and restores the whole thread-local
// state, takes locks, and asks for streams, which costs more than the formula of a small operator. A level's graph
// lives on one thread, and nearly always needs none of that.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

namespace functorch_lite {

// The roots of a graph with their cotangents, and what is asked of it.
struct BackwardRequest {
  const std::vector<at::Tensor>& outputs;
  std::vector<at::Tensor>& cotangents;
  const std::vector<at::Tensor>& inputs;
  bool keep_graph;
  bool create_graph;
};

// The cotangents of the inputs, undefined where no output depends on one; the same numbers as PyTorch's engine finds,
// in the same order. Nothing, and nothing has run, if the graph needs that engine: for hooks, other devices than the
// CPU, anomaly mode, dispatch modes (tracing asks the engine which node runs), a pass inside of another one, leaves
// beside the inputs, or inputs that are no leaves.
std::optional<std::vector<at::Tensor>> try_backward_pass(const BackwardRequest& request);

}  // namespace functorch_lite
