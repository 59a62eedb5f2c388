// One operator call as a batching rule sees it.
//
// The tensors of the call are unwrapped: a batched one is its physical value, and `bdim` tells which dimension is
// the batch. All code in a rule runs one level down. A rule edits the arguments, calls the operator (or another), and
// says where the batch dimension of the results is; `finish` wraps them.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/SmallVector.h>

#include <string_view>
#include <vector>

#include "op_args.h"
#include "vmap_level.h"
#include "wrapper.h"
#include "written_arguments.h"

namespace functorch_lite {

class BatchCall {
 public:
  // The arguments of `op` are on top of `stack`, and so are the results when the call is finished.
  BatchCall(const c10::OperatorHandle& op, Stack& stack);

  const c10::OperatorHandle& op() const { return op_; }
  const c10::FunctionSchema& schema() const { return op_.schema(); }
  std::string name() const { return c10::toString(op_.operator_name()); }
  VmapLevel& level() const { return level_; }
  const c10::SymInt& batch_size() const { return level_.batch_size(); }

  // Arguments, by position or by schema name.
  size_t size() const { return bdims_.size(); }
  size_t position(std::string_view name) const;
  std::optional<size_t> find(std::string_view name) const;
  c10::IValue& arg(size_t i) { return stack_[begin_ + i]; }
  c10::IValue& arg(std::string_view name) { return arg(position(name)); }
  bool is_tensor(size_t i) { return arg(i).isTensor() && arg(i).toTensor().defined(); }
  const at::Tensor& tensor(size_t i) { return arg(i).toTensor(); }
  bool is_batched(size_t i) const { return bdims_[i] != kNoBatchDim; }
  int64_t bdim(size_t i) const { return bdims_[i]; }
  // The rank that user code sees.
  int64_t rank(size_t i) { return tensor(i).dim() - (is_batched(i) ? 1 : 0); }

  // Moves the batch dimension of argument i to the front. With `rank`, inserts dimensions of size 1 behind it until
  // the argument has that logical rank: x[*,B,*] -> x[B,1..,*]. Unbatched arguments stay as they are.
  const at::Tensor& to_front(size_t i, int64_t rank = 0);
  // The same, and an unbatched argument is expanded: x[*] -> x[B,1..,*].
  const at::Tensor& expand_to_front(size_t i, int64_t rank = 0);
  // The elements of a tensor list, each x[B,*] if any element of it is batched.
  bool is_list_batched(size_t i) const;
  bool is_element_batched(size_t i, size_t k) const;
  std::vector<at::Tensor> expanded_list(size_t i);

  // Calls the operator on the edited arguments; its results take their place.
  void call() { op_.callBoxed(&stack_); }
  // Calls another operator on other arguments.
  void call(const c10::OperatorHandle& other, Stack arguments);
  size_t count_results() const { return stack_.size() - begin_; }
  c10::IValue& result(size_t i = 0) { return stack_[begin_ + i]; }
  void drop_last_result() { stack_.pop_back(); }
  void take_results(Stack results);
  // Takes these as the results, as if the operator had returned them.
  template <class... Results>
  void set_results(Results&&... results) {
    torch::jit::drop(stack_, stack_.size() - begin_);
    torch::jit::push(stack_, std::forward<Results>(results)...);
  }

  // Wraps all tensor results, the batch at `bdim`. The result of an in-place operator is the argument itself.
  void finish(int64_t bdim = 0);
  // The same with a batch dimension for each result.
  void finish_each(c10::ArrayRef<int64_t> bdims);
  // Results that are the same for all examples.
  void finish_unbatched() { finish(kNoBatchDim); }

 private:
  void finish_result(size_t i, int64_t bdim);
  const std::vector<bool>* batched_elements(size_t i) const;

  const c10::OperatorHandle& op_;
  Stack& stack_;
  size_t begin_;
  VmapLevel& level_;
  c10::SmallVector<int64_t, 8> bdims_;
  std::vector<std::pair<size_t, std::vector<bool>>> batched_lists_;
  WrittenArguments written_;
  RunBelow below_;
};

// Raises: `op` would write batched values into `target`, which is from outside the mapped function.
[[noreturn]] void refuse_outside_write(const c10::OperatorHandle& op, const at::Tensor& target);
// x with dimension `from` moved to `to`, a view.
at::Tensor move_dim(const at::Tensor& x, int64_t from, int64_t to);
// x[B,*] -> x[B,1..,*] of logical rank `rank`, a view.
at::Tensor pad_rank(const at::Tensor& x, int64_t rank);
// x[*] -> x[B,*], a view.
at::Tensor expand_batch(const at::Tensor& x, const c10::SymInt& batch_size);

}  // namespace functorch_lite
