// The table of batching rules. See rule.h first.
#include "rule.h"

#include <ATen/core/enum_tag.h>

#include <unordered_map>

#include "families.h"
#include "keys.h"
#include "rules/rules.h"
#include "siblings.h"

namespace functorch_lite {
namespace {

struct Table {
  std::vector<RuleTable::Row> rows;
  std::vector<std::string> unknown;
  std::unordered_map<c10::OperatorName, size_t> index;  // into rows
  std::vector<c10::RegistrationHandleRAII> registrations;
};

Table& table() {
  static auto* instance = new Table();  // never destroyed: the dispatcher refers to it
  return *instance;
}

class RuleKernel final : public c10::OperatorKernel {
 public:
  explicit RuleKernel(Rule rule) : rule_(std::move(rule)) {}
  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
    BatchCall call(op, *stack);
    rule_(call);
  }

 private:
  Rule rule_;
};

class CompositionKernel final : public c10::OperatorKernel {
 public:
  explicit CompositionKernel(Composition composition) : composition_(composition) {}
  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) { composition_(op, *stack); }

 private:
  Composition composition_;
};

template <class Kernel>
void enter(const c10::OperatorHandle& op, const Family& family, RuleTable::Here here, std::unique_ptr<Kernel> kernel) {
  const auto& name = op.operator_name();
  TORCH_INTERNAL_ASSERT(table().index.emplace(name, table().rows.size()).second, "two batching rules for ", name);
  table().rows.push_back({c10::toString(name), family.name, family.advice, here.file_name()});
  auto boxed = c10::BoxedKernel::makeFromFunctor(std::move(kernel));
  table().registrations.push_back(c10::Dispatcher::singleton().registerImpl(
      name, kBatchingRules, c10::KernelFunction::makeFromBoxedKernel(std::move(boxed)), std::nullopt, nullptr,
      family.name));
}

template <class MakeKernel>
void add_rows(const Family& family, const std::vector<const char*>& operators, RuleTable::Here here,
              MakeKernel&& make_kernel) {
  for (const auto* operator_name : operators) {
    const auto name = aten_name(operator_name);
    const auto op = c10::Dispatcher::singleton().findSchema(name);
    if (op.has_value()) {
      enter(*op, family, here, make_kernel(*op));
    } else {
      table().unknown.push_back(c10::toString(name));
    }
  }
}

}  // namespace

void RuleTable::add(const Family& family, const std::vector<const char*>& operators, Here here) {
  add_rows(family, operators, here,
           [&](const c10::OperatorHandle& op) { return std::make_unique<RuleKernel>(family.rule_for(op.schema())); });
}

void RuleTable::add(void (*rule)(BatchCall&), const std::vector<const char*>& operators, Here here) {
  add_rows({"rule", {}}, operators, here,
           [&](const c10::OperatorHandle&) { return std::make_unique<RuleKernel>(rule); });
}

void RuleTable::add(Composition composition, const std::vector<const char*>& operators, Here here) {
  add_rows({"composition", {}}, operators, here,
           [&](const c10::OperatorHandle&) { return std::make_unique<CompositionKernel>(composition); });
}

void RuleTable::add_default(const Family& family, const c10::OperatorHandle& op, Here here) {
  if (find(op.operator_name()) != nullptr) return;
  enter(op, family, here, std::make_unique<RuleKernel>(family.rule_for(op.schema())));
}

const std::vector<RuleTable::Row>& RuleTable::rows() { return table().rows; }
const std::vector<std::string>& RuleTable::unknown_operators() { return table().unknown; }

const RuleTable::Row* RuleTable::find(const c10::OperatorName& name) {
  const auto found = table().index.find(name);
  return found == table().index.end() ? nullptr : &table().rows[found->second];
}

namespace {

// Operators that PyTorch tags as pointwise need no row, and neither do in-place forms whose twin is tagged.
void add_default_rows(RuleTable& rules) {
  const auto family = pointwise();
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getAllOpNames()) {
    const auto op = dispatcher.findSchema(name);
    if (!op.has_value() || name.name.rfind("aten::", 0) != 0) continue;
    if (op->hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd)) continue;
    if (is_out_form(op->schema())) continue;  // out_forms.h
    if (op->hasTag(at::Tag::nondeterministic_seeded) || op->hasTag(at::Tag::data_dependent_output)) continue;
    auto twin = op;
    if (name.name.back() == '_') {
      twin = dispatcher.findSchema({name.name.substr(0, name.name.size() - 1), name.overload_name});
    }
    const bool is_pointwise = op->hasTag(at::Tag::pointwise) || (twin.has_value() && twin->hasTag(at::Tag::pointwise));
    const bool takes_tensor =
        !op->schema().arguments().empty() && op->schema().arguments()[0].type()->str() != "Tensor[]";
    if (is_pointwise && takes_tensor) rules.add_default(family, *op);
  }
}

}  // namespace

void register_batching_rules() {
  RuleTable rules;
  add_pointwise_rules(rules);
  add_reduction_rules(rules);
  add_view_rules(rules);
  add_factory_rules(rules);
  add_matmul_rules(rules);
  add_indexing_rules(rules);
  add_data_dependent_rules(rules);
  add_histogram_rules(rules);
  add_random_rules(rules);
  add_convolution_rules(rules);
  add_pooling_rules(rules);
  add_normalization_rules(rules);
  add_loss_rules(rules);
  add_embedding_rules(rules);
  add_linalg_rules(rules);
  add_attention_rules(rules);
  add_python_value_rules(rules);
  add_foreach_rules(rules);
  add_optimizer_rules(rules);
  add_recurrent_rules(rules);
  add_remaining_rules(rules);
  add_default_rows(rules);
}

size_t position_of(const c10::FunctionSchema& schema, std::string_view name) {
  const auto index = schema.argumentIndexWithName(name);
  TORCH_INTERNAL_ASSERT(index.has_value(), schema.operator_name(), " has no argument '", name, "'");
  return *index;
}

}  // namespace functorch_lite
