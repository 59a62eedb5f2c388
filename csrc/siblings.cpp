// Operators that do the work of another one. See siblings.h first.
#include "siblings.h"

#include <mutex>
#include <optional>
#include <string_view>
#include <unordered_map>

namespace functorch_lite {
namespace {

constexpr std::string_view kForeach = "aten::_foreach_";

bool is_out_argument(const c10::Argument& argument) {
  return argument.kwarg_only() && argument.alias_info() != nullptr && argument.alias_info()->isWrite();
}

// Foreach operators whose operator for one element has another name.
std::string name_for_elements(std::string name) {
  static const std::unordered_map<std::string, std::string> others{
      {"norm", "linalg_vector_norm"}, {"powsum", "linalg__powsum"}, {"maximum", "clamp_min"}, {"minimum", "clamp_max"}};
  const bool in_place = name.back() == '_';
  if (in_place) name.pop_back();
  const auto other = others.find(name);
  return "aten::" + (other != others.end() ? other->second : name) + (in_place ? "_" : "");
}

// Arguments are taken in order, each by the next one of its type; the others need defaults.
std::optional<Sibling> match(const c10::OperatorHandle& op, const std::vector<std::string>& types) {
  Sibling sibling{op, {}};
  size_t next = 0;
  for (const auto& argument : op.schema().arguments()) {
    const bool fits = next < types.size() && argument.real_type()->str() == types[next];
    if (!fits && !argument.default_value().has_value()) return std::nullopt;
    sibling.positions.push_back(fits ? static_cast<int64_t>(next++) : -1);
  }
  return next == types.size() ? std::make_optional(std::move(sibling)) : std::nullopt;
}

std::optional<Sibling> search(const c10::FunctionSchema& schema) {
  auto name = schema.name();
  std::vector<std::string> types;
  for (const auto& argument : schema.arguments()) {
    if (!is_out_argument(argument)) types.push_back(argument.real_type()->str());
  }
  const auto results = is_out_form(schema) ? schema.arguments().size() - types.size() : 1;
  if (!is_out_form(schema)) {
    if (name.rfind(kForeach, 0) != 0) return std::nullopt;
    name = name_for_elements(name.substr(kForeach.size()));
    for (auto& type : types) {
      if (type == "Tensor[]" || type == "Scalar[]") type.resize(type.size() - 2);
    }
  }
  std::optional<Sibling> best;
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& candidate : dispatcher.getAllOpNames()) {
    if (candidate.name != name) continue;
    const auto op = dispatcher.findSchema(candidate);
    if (!op.has_value() || op->schema().returns().size() != results || is_out_form(op->schema())) continue;
    auto sibling = match(*op, types);
    // An overload with fewer arguments is the closer one: `sum` and not `sum.dim_IntList`.
    const bool better = !best.has_value() || (sibling && sibling->positions.size() < best->positions.size());
    if (sibling.has_value() && better) best = std::move(sibling);
  }
  return best;
}

}  // namespace

Stack Sibling::arguments(const Stack& originals) const {
  Stack result;
  for (size_t i = 0; i < positions.size(); ++i) {
    result.push_back(positions[i] >= 0 ? originals[positions[i]] : *op.schema().arguments()[i].default_value());
  }
  return result;
}

bool is_out_form(const c10::FunctionSchema& schema) {
  return !schema.arguments().empty() && is_out_argument(schema.arguments().back());
}

const Sibling* find_sibling(const c10::OperatorHandle& op) {
  // Operators of other libraries may go away, and these handles stay.
  if (op.operator_name().getNamespace() != "aten") return nullptr;
  static std::mutex mutex;
  static auto* known = new std::unordered_map<c10::OperatorName, std::optional<Sibling>>();
  std::lock_guard<std::mutex> lock(mutex);
  auto entry = known->find(op.operator_name());
  if (entry == known->end()) entry = known->emplace(op.operator_name(), search(op.schema())).first;
  return entry->second.has_value() ? &*entry->second : nullptr;
}

}  // namespace functorch_lite
