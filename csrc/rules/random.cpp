// Random operators under the three settings of vmap's `randomness`.
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/native_dropout.h>
#include <ATen/ops/rand.h>

#include "../fallback.h"
#include "rules.h"

namespace functorch_lite {
namespace {

void check_allowed(const BatchCall& call) {
  if (call.level().randomness() != VmapLevel::Randomness::kError) return;
  const auto where = python_hooks().user_location();
  TORCH_CHECK(false, "vmap: the function called the random operator ", call.name(),
              where.empty() ? "" : " (at " + where + ")",
              ", and randomness='error'. Pass randomness='different' to vmap for other numbers in each example, or "
              "randomness='same' for the same numbers in all.");
}

bool different(const BatchCall& call) { return call.level().randomness() == VmapLevel::Randomness::kDifferent; }

// size -> x[B,size] or x[size]
struct RandomFactory {
  size_t size;
  void operator()(BatchCall& call) const {
    check_allowed(call);
    if (!different(call)) {
      call.call();
      return call.finish_unbatched();
    }
    auto sizes = call.arg(size).toSymIntVector();
    sizes.insert(sizes.begin(), call.batch_size());
    call.arg(size) = sizes;
    call.call();
    call.finish();
  }
};

// n -> permutation[B,n]
void randperm_rule(BatchCall& call) {
  check_allowed(call);
  if (!different(call)) {
    call.call();
    return call.finish_unbatched();
  }
  const auto n = call.arg("n").toSymInt();
  auto options = c10::TensorOptions();
  if (!call.arg("device").isNone()) options = options.device(call.arg("device").toDevice());
  const auto generator = call.find("generator");
  auto keys = at::rand_symint({call.batch_size(), n},
                              generator ? call.arg(*generator).toOptional<at::Generator>() : std::nullopt, options);
  const auto dtype = call.arg("dtype").isNone() ? c10::kLong : call.arg("dtype").toScalarType();
  call.set_results(keys.argsort(/*stable=*/true, -1).to(dtype));
  call.finish();
}

// In the shape of x[B?,*]: y[B,*] or y[*].
void random_like_rule(BatchCall& call) {
  check_allowed(call);
  if (different(call)) {
    call.expand_to_front(0);
    call.call();
    return call.finish();
  }
  if (call.is_batched(0)) call.arg(0) = call.to_front(0).select(0, 0);
  call.call();
  call.finish_unbatched();
}

// From a distribution with parameters x[B?,*]: y[B,*].
void random_draw_rule(BatchCall& call) {
  check_allowed(call);
  bool any_batched = false;
  for (size_t i = 0; i < call.size(); ++i) {
    any_batched |= call.is_batched(i);
    if (call.is_tensor(i) && different(call)) call.expand_to_front(i);
  }
  TORCH_CHECK_NOT_IMPLEMENTED(different(call) || !any_batched, "vmap: ", call.name(),
                              " with randomness='same' draws from a distribution that differs between examples, so the "
                              "numbers cannot be the same. Pass randomness='different', or draw the uniform or normal "
                              "numbers outside vmap and transform them inside.");
  call.call();
  different(call) ? call.finish() : call.finish_unbatched();
}

// x[B,*] filled in place.
void random_fill_rule(BatchCall& call) {
  check_allowed(call);
  if (!call.is_batched(0)) {
    TORCH_CHECK_VALUE(!different(call), "vmap: ", call.name(),
                      " with randomness='different' fills a tensor that is not batched: every example would need its "
                      "own copy. Make the tensor from a batched one, for example with torch.empty_like(x).");
    call.call();
    return call.finish();
  }
  const auto x = call.to_front(0);
  if (different(call)) {
    call.call();
  } else {
    call.arg(0) = at::empty_symint(x.select(0, 0).sym_sizes(), x.options());
    call.call();
    x.copy_(call.result().toTensor());
  }
  call.finish();
}

// x[B?,*] -> mask with the distribution of one number p; mask[B,*] or mask[*].
at::Tensor keep_mask(BatchCall& call, double p) {
  const auto& x = call.tensor(0);
  const auto shaped = different(call) || !call.is_batched(0) ? x : x.select(0, 0);
  return at::empty_symint(shaped.sym_sizes(), shaped.options().dtype(c10::kBool)).bernoulli_(1 - p);
}

// x[B?,*], p -> x[B,*], mask[B,*]
void native_dropout_rule(BatchCall& call) {
  const auto p = call.arg("p").toDouble();
  const bool train = call.arg("train").isNone() || call.arg("train").toBool();
  if (!train) {
    const auto& x = call.to_front(0);
    call.set_results(x.clone(), at::empty_symint(x.sym_sizes(), x.options().dtype(c10::kBool)).fill_(true));
    return call.finish();
  }
  check_allowed(call);
  const auto& x = different(call) ? call.expand_to_front(0) : call.to_front(0);
  auto mask = keep_mask(call, p);
  const double scale = p == 1 ? 0.0 : 1.0 / (1.0 - p);
  auto result = x * mask * scale;
  if (!call.is_batched(0)) {
    call.set_results(result, mask);
    return call.finish_unbatched();
  }
  call.set_results(result, mask.expand_symint(x.sym_sizes()));
  call.finish();
}

}  // namespace

void add_random_rules(RuleTable& rules) {
  const Family random_factory{
      "random", [](const c10::FunctionSchema& schema) -> Rule { return RandomFactory{position_of(schema, "size")}; }};
  rules.add(random_factory, {"rand", "rand.generator", "randn", "randn.generator", "randint", "randint.generator",
                             "randint.low", "randint.low_generator", "normal.float_float"});
  rules.add(&randperm_rule, {"randperm", "randperm.generator"});
  rules.add(&random_like_rule, {"rand_like", "rand_like.generator", "randn_like", "randn_like.generator",
                                "randint_like", "randint_like.low_dtype", "bernoulli.p"});
  rules.add(&random_draw_rule, {"bernoulli", "poisson", "normal.Tensor_float", "normal.float_Tensor",
                                "normal.Tensor_Tensor", "_standard_gamma", "binomial", "_sample_dirichlet"});
  rules.add(&random_fill_rule, {"bernoulli_.float", "normal_", "uniform_", "random_", "random_.from", "random_.to",
                                "exponential_", "geometric_", "cauchy_", "log_normal_"});
  rules.add(&native_dropout_rule, {"native_dropout"});
}

}  // namespace functorch_lite
