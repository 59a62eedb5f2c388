// The backward pass of one level. See backward_pass.h first.
#include "backward_pass.h"

#include <ATen/ops/add.h>
#include <c10/core/GradMode.h>
#include <c10/util/flat_hash_map.h>
#include <torch/csrc/autograd/anomaly_mode.h>
#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>

#include "derivative_node.h"
#include "wrapper.h"

namespace functorch_lite {
namespace {

using at::Tensor;
using torch::autograd::Edge;
using torch::autograd::Node;
using torch::autograd::variable_list;

// Whether it can be written into, and nobody else would see that.
bool is_temporary(const Tensor& x) {
  return x.use_count() == 1 && x.layout() == c10::kStrided && is_plain(x) && !x._is_zerotensor() && x.has_storage() &&
         x.storage().use_count() == 1 && x.is_non_overlapping_and_dense();
}

void add_to(Tensor& sum, Tensor&& term) {
  if (!term.defined()) return;
  if (!sum.defined()) {
    sum = std::move(term);
  } else if (!c10::GradMode::is_enabled() && term.layout() == c10::kStrided && is_temporary(sum)) {
    sum.add_(term);
  } else {
    // Only a dense tensor takes a sparse one.
    sum = sum.is_sparse() ? at::add(term, sum) : at::add(sum, term);
  }
}

// Cotangents of what was broadcast along leading dimensions of size 1 need no sum.
void leave_out_leading_ones(const torch::autograd::edge_list& edges, variable_list& cotangents) {
  for (size_t i = 0; i < edges.size(); ++i) {
    auto& cotangent = cotangents[i];
    if (!edges[i].is_valid() || !cotangent.defined() || !is_dense(cotangent)) continue;
    const auto& metadata = edges[i].function->input_metadata(edges[i].input_nr);
    if (metadata.is_nested_tensor()) continue;
    const auto shape = metadata.shape_as_dim_vector();
    if (static_cast<size_t>(cotangent.dim()) <= shape.size()) continue;  // as nearly always
    const auto sizes = cotangent.sym_sizes();
    if (sizes.slice(sizes.size() - shape.size()) != shape) continue;
    while (static_cast<size_t>(cotangent.dim()) > shape.size() && cotangent.sym_size(0) == 1) {
      cotangent = cotangent.squeeze(0);
    }
  }
}

class BackwardPass {
 public:
  explicit BackwardPass(const BackwardRequest& request) : request_(request) {}

  // Finds the nodes, and for how many cotangents each has to wait. False if PyTorch's engine has to run them.
  bool plan() {
    for (size_t i = 0; i < request_.inputs.size(); ++i) {
      if (!request_.inputs[i].is_leaf()) return false;
      const auto edge = torch::autograd::impl::gradient_edge(request_.inputs[i]);
      if (edge.function == nullptr || needs_engine(*edge.function)) return false;
      const auto [entry, is_new] = places_.emplace(edge.function.get(), steps_.size());
      if (is_new) steps_.push_back({edge.function.get(), 0, 0, variable_list(1)});
      places_of_inputs_.push_back(entry->second);
      accumulators_.push_back(edge.function);
    }
    leaves_ = steps_.size();
    for (const auto& output : request_.outputs) {
      roots_.push_back(torch::autograd::impl::gradient_edge(output));
      if (roots_.back().function == nullptr) return false;
      root_steps_.push_back(visit(roots_.back()));
    }
    for (size_t i = leaves_; i < steps_.size(); ++i) {
      auto* node = steps_[i].node;
      if (needs_engine(*node)) return false;
      bool leads_anywhere = false;
      const auto first = followers_.size();
      for (const auto& edge : node->next_edges()) {
        leads_anywhere |= edge.is_valid();
        followers_.push_back(edge.is_valid() ? visit(edge) : 0);
      }
      if (!leads_anywhere) return false;
      auto& step = steps_[i];
      step.first_follower = first;
      step.cotangents.resize(node->num_inputs());
    }
    return true;
  }

  std::vector<Tensor> run() {
    const c10::AutoGradMode mode(request_.create_graph);
    torch::autograd::validate_outputs(roots_, request_.cotangents, [](const std::string& message) { return message; });
    for (size_t i = 0; i < roots_.size(); ++i) arrive(root_steps_[i], roots_[i], std::move(request_.cotangents[i]));
    while (!ready_.empty()) {
      std::pop_heap(ready_.begin(), ready_.end());
      const auto next = ready_.back().second;
      ready_.pop_back();
      run_step(steps_[next]);
    }
    std::vector<Tensor> results;
    for (const auto place : places_of_inputs_) results.push_back(steps_[place].cotangents[0]);
    return results;
  }

 private:
  struct Step {
    Node* node;
    size_t waits_for;       // edges that lead here and have brought nothing yet
    size_t first_follower;  // in followers_
    variable_list cotangents;
  };

  static bool needs_engine(Node& node) {
    return !node.pre_hooks().empty() || !node.tensor_pre_hooks().empty() || !node.post_hooks().empty() ||
           !node.retains_grad_hooks().empty() || !node.device().is_cpu();
  }

  size_t visit(const Edge& edge) {
    const auto [entry, is_new] = places_.emplace(edge.function.get(), steps_.size());
    if (is_new) steps_.push_back({edge.function.get(), 0, 0, {}});
    ++steps_[entry->second].waits_for;
    return entry->second;
  }

  void arrive(size_t place, const Edge& edge, Tensor&& cotangent) {
    auto& step = steps_[place];
    add_to(step.cotangents[edge.input_nr], std::move(cotangent));
    if (--step.waits_for > 0 || place < leaves_) return;
    // The newest first, as sums depend on the order.
    ready_.emplace_back(step.node->sequence_nr(), place);
    std::push_heap(ready_.begin(), ready_.end());
  }

  void run_step(Step& step) {
    auto& node = *step.node;
    if (!request_.keep_graph) node.will_release_variables();
    // Formulas do not take what they are given, and it is to be freed before the next one runs.
    auto results = node(variable_list(std::move(step.cotangents)));
    if (!request_.keep_graph) node.release_variables();
    const auto& edges = node.next_edges();
    leave_out_leading_ones(edges, results);
    torch::autograd::validate_outputs(edges, results, [&](const std::string& message) {
      return c10::str("Function ", node.name(), " returned an ", message);
    });
    for (size_t i = 0; i < edges.size(); ++i) {
      if (edges[i].is_valid()) arrive(followers_[step.first_follower + i], edges[i], std::move(results[i]));
    }
  }

  const BackwardRequest& request_;
  // First the leaves, whose cotangents are the results.
  std::vector<Step> steps_;
  size_t leaves_ = 0;
  std::vector<size_t> places_of_inputs_;
  ska::flat_hash_map<Node*, size_t> places_;
  std::vector<size_t> followers_;      // for each edge of each node, the step that it leads to
  std::vector<NodePtr> accumulators_;  // nobody else may hold them
  torch::autograd::edge_list roots_;
  std::vector<size_t> root_steps_;
  std::vector<std::pair<uint64_t, size_t>> ready_;  // a heap
};

}  // namespace

std::optional<std::vector<Tensor>> try_backward_pass(const BackwardRequest& request) {
  if (torch::autograd::AnomalyMode::is_enabled() || torch::autograd::get_current_graph_task_id() != -1) return {};
  if (a_mode_is_on()) return {};
  BackwardPass pass(request);
  if (!pass.plan()) return {};
  return pass.run();
}

}  // namespace functorch_lite
