// How batching rules are written down.
//
// A rule is a function of a BatchCall. A family makes a rule for each operator of its kind from the operator's schema;
// a row of the table gives a family, or a rule, and the operators it serves. Rows become ordinary registrations on
// the batching-rule key, so that anyone can list and override them.
#pragma once

#include <functional>
#include <source_location>
#include <string>
#include <vector>

#include "batch_call.h"

namespace functorch_lite {

using Rule = std::function<void(BatchCall&)>;

// A family by name, for listings, with the function that makes a rule from a schema.
struct Family {
  const char* name;
  std::function<Rule(const c10::FunctionSchema&)> rule_for;
  const char* advice = nullptr;  // of families that refuse
};

// A composition of other operators on wrappers, run at the vmap level itself. Takes and leaves boxed arguments.
using Composition = void (*)(const c10::OperatorHandle& op, Stack& stack);

class RuleTable {
 public:
  using Here = std::source_location;  // of the row, for listings
  // Operators are named without "aten::". One that this PyTorch does not have is remembered, not an error:
  // the set differs between releases.
  void add(const Family& family, const std::vector<const char*>& operators, Here here = Here::current());
  void add(void (*rule)(BatchCall&), const std::vector<const char*>& operators, Here here = Here::current());
  void add(Composition composition, const std::vector<const char*>& operators, Here here = Here::current());
  // Same as `family` for one operator given by its handle, unless it has a rule.
  void add_default(const Family& family, const c10::OperatorHandle& op, Here here = Here::current());

  struct Row {
    std::string op;
    const char* family;
    const char* advice;  // null unless the row refuses the operator
    const char* file;    // that has the row
  };
  static const std::vector<Row>& rows();
  static const std::vector<std::string>& unknown_operators();
  // The row of an operator, or null.
  static const Row* find(const c10::OperatorName& name);
};

// Position of a named argument; a wrong name fails at import.
size_t position_of(const c10::FunctionSchema& schema, std::string_view name);

void register_batching_rules();

}  // namespace functorch_lite
