// Random operators under the three settings of vmap's `randomness`.
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/reshape.h>
#include <ATen/ops/where.h>

#include "../fallback.h"
#include "rules.h"

namespace functorch_lite {
namespace {

void check_allowed(const BatchCall& call) { check_randomness(call.op(), call.level()); }

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

// weights[B?,*,n] -> categories[B,*,num_samples]
void multinomial_rule(BatchCall& call) {
  if (call.rank(0) == 1 || !different(call)) return random_draw_rule(call);
  const auto x = call.expand_to_front(0);
  call.arg(0) = at::reshape_symint(x, {x.sym_size(0) * x.sym_size(1), x.sym_size(2)});
  call.call();
  const auto& y = call.result().toTensor();
  call.result() = at::reshape_symint(y, {x.sym_size(0), x.sym_size(1), y.sym_size(1)});
  call.finish();
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

// x[B?,*], p -> y[B,*]
void dropout_rule(BatchCall& call) {
  const auto p = call.arg("p").toDouble();
  TORCH_CHECK_VALUE(p >= 0 && p <= 1, "dropout: p is a probability, got ", p);
  if (p > 0 && call.arg("train").toBool()) {
    native_dropout_rule(call);
    return call.drop_last_result();
  }
  call.set_results(call.tensor(0));
  call.finish(call.bdim(0));
}

// x[B?,*], noise[B?,*] -> x where x > 0, else x * noise, the noise uniform and kept for the derivative.
void rrelu_rule(BatchCall& call) {
  const auto lower = call.arg("lower").toScalar().toDouble();
  const auto upper = call.arg("upper").toScalar().toDouble();
  const auto noise = call.find("noise");
  const bool in_place = call.schema().name().back() == '_';
  at::Tensor x = call.to_front(0);
  bool batched = call.is_batched(0);
  at::Tensor slope;
  if (call.arg("training").toBool()) {
    check_allowed(call);
    if (different(call) && in_place && !batched) refuse_operator(call.op(), "Each example needs its own copy of x.");
    if (different(call)) x = call.expand_to_front(0);
    batched = call.is_batched(0);
    const auto shaped = different(call) || !batched ? x : x.select(0, 0);
    slope = at::empty_symint(shaped.sym_sizes(), shaped.options()).uniform_(lower, upper);
    slope = at::where(x > 0, at::ones_like(x), slope);
  } else {
    slope = at::where(x > 0, at::ones_like(x), at::ones_like(x) * ((lower + upper) / 2));
  }
  TORCH_CHECK_NOT_IMPLEMENTED(!noise || call.is_batched(*noise) == batched, "vmap: ", call.name(),
                              " with a noise tensor that is not batched as x is. Call torch.nn.functional.rrelu.");
  if (noise && call.arg("training").toBool()) call.to_front(*noise).copy_(slope);
  const auto y = x * slope;
  call.set_results(in_place ? x.copy_(y) : y);
  batched ? call.finish() : call.finish_unbatched();
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
  rules.add(&multinomial_rule, {"multinomial"});
  rules.add(&rrelu_rule, {"rrelu", "rrelu_", "rrelu_with_noise", "rrelu_with_noise_"});
  rules.add(&dropout_rule, {"dropout"});
  rules.add(&random_fill_rule, {"bernoulli_.float", "normal_", "uniform_", "random_", "random_.from", "random_.to",
                                "exponential_", "geometric_", "cauchy_", "log_normal_"});
  rules.add(&native_dropout_rule, {"native_dropout"});
}

}  // namespace functorch_lite
