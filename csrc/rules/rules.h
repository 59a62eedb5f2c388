// One function per subject; each adds its rows. See ../rule.h first.
#pragma once

#include "../families.h"
#include "../rule.h"

namespace functorch_lite {

void add_pointwise_rules(RuleTable& rules);
void add_reduction_rules(RuleTable& rules);
void add_view_rules(RuleTable& rules);
void add_factory_rules(RuleTable& rules);
void add_matmul_rules(RuleTable& rules);
void add_indexing_rules(RuleTable& rules);
void add_data_dependent_rules(RuleTable& rules);
void add_histogram_rules(RuleTable& rules);
void add_random_rules(RuleTable& rules);
void add_convolution_rules(RuleTable& rules);
void add_pooling_rules(RuleTable& rules);
void add_normalization_rules(RuleTable& rules);
void add_loss_rules(RuleTable& rules);
void add_embedding_rules(RuleTable& rules);
void add_linalg_rules(RuleTable& rules);
void add_attention_rules(RuleTable& rules);
void add_python_value_rules(RuleTable& rules);
void add_foreach_rules(RuleTable& rules);
void add_optimizer_rules(RuleTable& rules);
void add_recurrent_rules(RuleTable& rules);
void add_remaining_rules(RuleTable& rules);

}  // namespace functorch_lite
