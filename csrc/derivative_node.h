// Nodes of our own in PyTorch's autograd graph.
#pragma once

#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/autograd/function.h>

#include <memory>
#include <type_traits>
#include <utility>

namespace functorch_lite {

// Releases of PyTorch differ in the pointer by which they hold nodes.
using NodePtr = decltype(torch::autograd::Edge::function);

template <class OurNode, class... Args>
auto make_node(Args&&... args) {
  if constexpr (std::is_same_v<NodePtr, std::shared_ptr<torch::autograd::Node>>) {
    return std::make_shared<OurNode>(std::forward<Args>(args)...);
  } else {
    return c10::make_intrusive<OurNode>(std::forward<Args>(args)...);
  }
}

}  // namespace functorch_lite
