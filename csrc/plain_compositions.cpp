// The compositions of plain operators by name. See plain_compositions.h first.
#include "plain_compositions.h"

#include <unordered_map>

namespace functorch_lite {

PlainComposition find_plain_composition(const c10::OperatorName& name) {
  static const auto table = [] {
    std::unordered_map<c10::OperatorName, PlainComposition> by_name;
    for (const auto* rows :
         {&attention_compositions(), &recurrent_compositions(), &indexing_compositions(), &loss_compositions()}) {
      for (const auto& [op, composition] : *rows) by_name.emplace(aten_name(op), composition);
    }
    return by_name;
  }();
  const auto found = table.find(name);
  return found == table.end() ? nullptr : found->second;
}

}  // namespace functorch_lite
