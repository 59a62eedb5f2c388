// Operators that make a Python value of a tensor: possible only where all examples have the same one.
#include <ATen/TensorOperators.h>
#include <ATen/ops/eq.h>
#include <ATen/ops/isclose.h>
#include <ATen/ops/ne.h>

#include "../fallback.h"
#include "rules.h"

namespace functorch_lite {
namespace {

// truth[B] -> the bool that all examples have. A check that they all pass, as libraries make of their arguments and
// derivative formulas of decompositions do of gradients, stops nobody.
void finish_if_all_agree(BatchCall& call, const at::Tensor& truth) {
  const bool all = truth.all().item().toBool();
  if (!all && truth.any().item().toBool()) refuse_python_value(call.op());
  call.set_results(all);
}

void is_nonzero_rule(BatchCall& call) {
  if (call.batch_size() == 0) refuse_python_value(call.op());
  TORCH_CHECK(call.to_front(0).sym_numel() == call.batch_size(), "Boolean value of a tensor of shape ",
              call.tensor(0).sym_sizes().slice(1), " is ambiguous: only one of a single element has one.");
  finish_if_all_agree(call, at::ne(call.tensor(0), 0).flatten());
}

// Numbers are refused: a program that went on with one would depend on the batch being what it is.
void item_rule(BatchCall& call) {
  if (call.tensor(0).scalar_type() != c10::kBool || call.batch_size() == 0) refuse_python_value(call.op());
  finish_if_all_agree(call, call.to_front(0).flatten());
}

// x[B?,*], y[B?,*] -> whether they are equal
void equal_rule(BatchCall& call) {
  if (call.rank(0) != call.rank(1)) return call.set_results(false);
  const auto x = call.expand_to_front(0);
  const auto y = call.expand_to_front(1);
  if (x.sym_sizes() != y.sym_sizes()) return call.set_results(false);
  finish_if_all_agree(call, flatten_examples(at::eq(x, y)).all(1));
}

// x[B?,*], y[B?,*] -> whether they are close
void allclose_rule(BatchCall& call) {
  const auto rank = std::max(call.rank(0), call.rank(1));
  const auto close =
      at::isclose(call.expand_to_front(0, rank), call.expand_to_front(1, rank), call.arg("rtol").toDouble(),
                  call.arg("atol").toDouble(), call.arg("equal_nan").toBool());
  finish_if_all_agree(call, flatten_examples(close).all(1));
}

}  // namespace

void add_python_value_rules(RuleTable& rules) {
  rules.add(&is_nonzero_rule, {"is_nonzero"});
  rules.add(&item_rule, {"_local_scalar_dense"});
  rules.add(&equal_rule, {"equal"});
  rules.add(&allclose_rule, {"allclose"});
}

}  // namespace functorch_lite
