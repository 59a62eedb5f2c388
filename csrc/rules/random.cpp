// Random operators under the three settings of vmap's `randomness`. docs/randomness.md says what each means.
//
// With "different" an operator draws for the whole batch, in one contiguous tensor with the batch in front, whichever
// layout the arguments have; a chunk takes its part. With "same" it draws once, as for one example.
#include <ATen/ExpandUtils.h>
#include <ATen/OpMathType.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/_assert_async.h>
#include <ATen/ops/bernoulli.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/detach.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/exponential.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/normal.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/reshape.h>
#include <ATen/ops/topk.h>
#include <ATen/ops/where.h>

#include <algorithm>

#include "../fallback.h"
#include "../generators.h"
#include "rules.h"

namespace functorch_lite {
namespace {

void check_allowed(const BatchCall& call) { check_randomness(call.op(), call.level()); }

bool different(const BatchCall& call) { return call.level().randomness() == VmapLevel::Randomness::kDifferent; }

std::optional<at::Generator> given_generator(BatchCall& call) {
  const auto position = call.find("generator");
  return position.has_value() ? call.arg(*position).toOptional<at::Generator>() : std::nullopt;
}

// As torch.rand. The overload with a generator does not trace with symbolic sizes.
at::Tensor draw_uniform(BatchCall& call, c10::SymIntArrayRef sizes, const c10::TensorOptions& options) {
  const auto generator = given_generator(call);
  return generator.has_value() ? at::rand_symint(sizes, generator, options) : at::rand_symint(sizes, options);
}

c10::SymInt whole_batch(const BatchCall& call) {
  const auto* chunks = call.level().chunks().get();
  return chunks != nullptr ? c10::SymInt(chunks->total()) : call.batch_size();
}

// y[whole batch,*] -> y[B,*]
at::Tensor part_of(const BatchCall& call, const at::Tensor& y) {
  const auto* chunks = call.level().chunks().get();
  return chunks != nullptr ? y.narrow_symint(0, chunks->start(), call.batch_size()) : y;
}

// x[B,*] -> x[whole batch,*], contiguous; examples of other chunks look like the first of this one.
at::Tensor in_whole_batch(const BatchCall& call, const at::Tensor& x) {
  const auto* chunks = call.level().chunks().get();
  if (chunks == nullptr) return x.contiguous();
  const auto others = [&](const c10::SymInt& count) { return expand_batch(x.select(0, 0), count); };
  const auto end = call.batch_size() + chunks->start();
  return at::cat({others(chunks->start()), x, others(whole_batch(call) - end)}).contiguous();
}

// x[B?,*] -> e[*], in the layout of one example and without its values.
at::Tensor like_one_example(BatchCall& call, size_t i) {
  const auto& x = call.to_front(i);
  if (!call.is_batched(i)) return at::empty_like(x);
  if (call.batch_size() == 0) return at::empty_symint(x.sym_sizes().slice(1), x.options());
  return at::empty_like(x.select(0, 0));
}

// x[B?,*] -> e[whole batch,*]
at::Tensor like_whole_batch(BatchCall& call, size_t i) {
  auto sizes = call.to_front(i).sym_sizes().vec();
  if (call.is_batched(i)) sizes.erase(sizes.begin());
  sizes.insert(sizes.begin(), whole_batch(call));
  return at::empty_symint(sizes, call.tensor(i).options());
}

// With "different", whose result is y[whole batch,*].
void finish_part(BatchCall& call) {
  call.result() = part_of(call, call.result().toTensor());
  call.finish();
}

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
    sizes.insert(sizes.begin(), whole_batch(call));
    call.arg(size) = sizes;
    call.call();
    finish_part(call);
  }
};

// n -> permutation[B,n]. The keys have 53 random bits: equal ones, which would keep their order, do not happen.
void randperm_rule(BatchCall& call) {
  check_allowed(call);
  if (!different(call)) {
    call.call();
    return call.finish_unbatched();
  }
  auto options = c10::TensorOptions(c10::kDouble);
  if (!call.arg("device").isNone()) options = options.device(call.arg("device").toDevice());
  const auto keys = draw_uniform(call, {whole_batch(call), call.arg("n").toSymInt()}, options);
  const auto dtype = call.arg("dtype").isNone() ? c10::kLong : call.arg("dtype").toScalarType();
  call.set_results(keys.argsort(/*stable=*/true, -1).to(dtype));
  finish_part(call);
}

// In the shape of x[B?,*], from a distribution that is the same for all examples: y[B,*] or y[*].
void random_like_rule(BatchCall& call) {
  check_allowed(call);
  if (!different(call)) {
    if (call.is_batched(0)) call.arg(0) = like_one_example(call, 0);
    call.call();
    return call.finish_unbatched();
  }
  call.arg(0) = like_whole_batch(call, 0);
  // A format of the user's is for one example.
  if (const auto format = call.find("memory_format")) call.arg(*format) = c10::MemoryFormat::Contiguous;
  call.call();
  finish_part(call);
}

int64_t largest_rank(BatchCall& call) {
  int64_t rank = 0;
  for (size_t i = 0; i < call.size(); ++i) {
    if (call.is_tensor(i)) rank = std::max(rank, call.rank(i));
  }
  return rank;
}

// Operators draw in the order of memory.
void expand_all(BatchCall& call) {
  const auto rank = largest_rank(call);
  for (size_t i = 0; i < call.size(); ++i) {
    if (call.is_tensor(i)) call.arg(i) = call.expand_to_front(i, rank).contiguous();
  }
}

// From a distribution with parameters x[B?,*], which do not change how much is drawn: y[B,*].
void random_draw_rule(BatchCall& call) {
  check_allowed(call);
  if (!different(call)) return draw_each_example(call);
  expand_all(call);
  for (size_t i = 0; i < call.size(); ++i) {
    if (call.is_tensor(i)) call.arg(i) = in_whole_batch(call, call.tensor(i));
  }
  call.call();
  finish_part(call);
}

bool is_inside_vmap(const Level& level) {
  const auto* outer = level.parent();
  return outer != nullptr && (typeid(*outer) == typeid(VmapLevel) || is_inside_vmap(*outer));
}

// The same where they do. Streams of several levels cannot be one stream, so that an inner vmap draws example by
// example.
void sampler_rule(BatchCall& call) {
  check_allowed(call);
  if (!different(call)) return draw_each_example(call);
  expand_all(call);
  if (!call.tensor(0).device().is_cpu()) return random_draw_rule(call);
  if (is_inside_vmap(call.level())) return draw_each_example(call);
  {
    const OwnStream stream(call);
    call.call();
  }
  call.finish();
}

// high[B] differs between examples
void randint_like_rule(BatchCall& call) {
  check_allowed(call);
  call.is_batched(call.position("high")) ? draw_each_example(call) : random_like_rule(call);
}

// p[B?,*] -> y[B,*], true where the numbers are below p
void bernoulli_rule(BatchCall& call) {
  const auto p_position = call.find("p").value_or(0);
  if (different(call) || !call.is_batched(p_position)) {
    // Of x in bernoulli(x, p), only the shape counts.
    return different(call) || p_position == 0 ? random_draw_rule(call) : random_like_rule(call);
  }
  check_allowed(call);
  const auto like = like_one_example(call, 0);
  const auto& p = call.to_front(p_position, like.dim());
  const auto dtype = p.scalar_type() == c10::kDouble ? c10::kDouble : c10::kFloat;
  const auto u = draw_uniform(call, like.sym_sizes(), p.options().dtype(dtype));
  at::_assert_async(((p >= 0) & (p <= 1)).all(), "Expected p_in >= 0 && p_in <= 1 to be true, but got false.");
  call.set_results((u < p).to(like.scalar_type()));
  call.finish();
}

// mean[B?,*], std[B?,*] -> y[B,*] = z * std + mean, with the same normal numbers z[*]; either may be a number.
void normal_rule(BatchCall& call) {
  if (different(call) || !(call.is_batched(0) || call.is_batched(1))) return random_draw_rule(call);
  check_allowed(call);
  const auto rank = largest_rank(call);
  std::vector<c10::SymInt> sizes;
  for (size_t i : {0, 1}) {
    if (!call.is_tensor(i)) continue;
    const auto x = call.to_front(i, rank).sym_sizes();
    sizes = at::infer_size_symint(sizes, call.is_batched(i) ? x.slice(1) : x);
    call.arg(i) = at::detach(call.tensor(i));  // as in PyTorch, the numbers have no derivative
  }
  const auto options = call.tensor(call.is_tensor(0) ? 0 : 1).options();
  const auto dtype = c10::typeMetaToScalarType(options.dtype());
  const auto& mean = call.arg(0);
  const auto& std = call.arg(1);
  const double scale = std.isTensor() ? 1 : std.toDouble();
  auto y = at::normal_symint(0, scale, sizes, given_generator(call), options);
  if (std.isTensor()) {
    at::_assert_async((std.toTensor() >= 0).all(), "normal expects all elements of std >= 0.0");
    y = (y * std.toTensor()).to(dtype);
  }
  y = mean.isTensor() ? (y + mean.toTensor()).to(dtype) : y + mean.toDouble();
  call.set_results(y);
  call.finish();
}

// weights[B?,n] or [B?,m,n] -> categories[B,*,num_samples]
void multinomial_rule(BatchCall& call) {
  check_allowed(call);
  const auto samples = call.arg("num_samples").toSymInt();
  const bool many = call.arg("replacement").toBool() && samples != 1;
  if (different(call)) {
    const auto x = in_whole_batch(call, call.expand_to_front(0));
    auto sizes = x.sym_sizes().vec();
    const auto categories = sizes.back();
    sizes.back() = samples;
    if (call.batch_size() == 0) {
      call.set_results(at::empty_symint(sizes, x.options().dtype(c10::kLong)));
      return call.finish();
    }
    call.arg(0) = at::reshape_symint(x, {-1, categories});
    call.call();
    call.result() = at::reshape_symint(call.result().toTensor(), sizes);
    return finish_part(call);
  }
  if (many || !call.is_batched(0)) return draw_each_example(call);
  // Without replacement PyTorch runs a race of exponential times: the largest weight / time wins.
  const auto& weights = call.to_front(0);
  const auto valid = (weights >= 0).all() & weights.isfinite().all() & (weights.sum(-1) > 0).all();
  at::_assert_async(valid, "multinomial: the weights must be finite, not negative, and not all zero");
  const auto times = at::exponential(like_one_example(call, 0), 1, given_generator(call));
  const auto scores = weights / times;
  call.set_results(samples == 1 ? scores.argmax(-1, /*keepdim=*/true)
                                : std::get<1>(at::topk_symint(scores, samples, -1)));
  call.finish();
}

// x[B?,*] -> e[whole batch,*] or e[*]
at::Tensor like_what_is_drawn(BatchCall& call, c10::ScalarType dtype) {
  const auto like = different(call) ? like_whole_batch(call, 0) : like_one_example(call, 0);
  return at::empty_symint(like.sym_sizes(), like.options().dtype(dtype));
}

// x[B?,*] -> mask[B,*] or mask[*], each element kept with this probability
at::Tensor keep_mask(BatchCall& call, double probability, c10::ScalarType dtype) {
  const auto mask = at::bernoulli(like_what_is_drawn(call, dtype), probability, given_generator(call));
  return different(call) ? part_of(call, mask) : mask;
}

// x[B?,*], p -> y[B,*], multiplied as PyTorch does, so that the results agree to the last bit. Where nothing is dropped
// it is x itself, which may be written into.
void dropout(const c10::OperatorHandle& op, Stack& stack) {
  const auto p = torch::jit::peek(stack, 1, 3).toDouble();
  const bool train = torch::jit::peek(stack, 2, 3).toBool();
  TORCH_CHECK_VALUE(p >= 0 && p <= 1, "dropout: p is a probability, got ", p);
  if (!train || p == 0) return torch::jit::drop(stack, 2);
  BatchCall call(op, stack);
  if (p == 1) {
    call.set_results(call.tensor(0) * 0);
    return call.finish(call.bdim(0));
  }
  check_allowed(call);
  const auto& x = different(call) ? call.expand_to_front(0) : call.to_front(0);
  call.set_results(x * (keep_mask(call, 1 - p, x.scalar_type()) / (1 - p)));
  call.finish(call.bdim(0));
}

// x[B?,*] -> y[B,*], mask[B,*]
void drop(BatchCall& call, double keep, c10::ScalarType mask_dtype) {
  check_allowed(call);
  const auto& x = different(call) ? call.expand_to_front(0) : call.to_front(0);
  const auto mask = keep_mask(call, keep, c10::kBool);
  call.set_results(x * mask * (keep == 0 ? 0.0 : 1.0 / keep), mask.to(mask_dtype));
  call.finish_each({call.bdim(0), different(call) ? 0 : kNoBatchDim});
}

void native_dropout_rule(BatchCall& call) {
  if (call.arg("train").isNone() || call.arg("train").toBool()) {
    return drop(call, 1 - call.arg("p").toDouble(), c10::kBool);
  }
  const auto& x = call.to_front(0);
  call.set_results(x.clone(), at::empty_symint(x.sym_sizes(), x.options().dtype(c10::kBool)).fill_(true));
  call.finish(call.bdim(0));
}

// p is the probability to keep an element
void fused_dropout_rule(BatchCall& call) { drop(call, call.arg("p").toDouble(), c10::kByte); }

// The factors r of x[B,*]: r[B,*]. PyTorch draws only where x <= 0, in the order of the elements, so with "same" the
// example's first such element gets the first number, and so on. The bounds have the precision of x, the numbers more.
at::Tensor rrelu_factors(BatchCall& call, const at::Tensor& negative) {
  const auto precision = at::toOpMathType(call.tensor(0).scalar_type());
  const auto bound = [&](const char* name) {
    const auto value = call.arg(name).toScalar();
    return precision == c10::kDouble ? value.toDouble() : value.toFloat();
  };
  const auto like = like_what_is_drawn(call, c10::kDouble);
  const auto u = draw_uniform(call, like.sym_sizes(), like.options());
  const auto r = (u * (bound("upper") - bound("lower")) + bound("lower")).to(precision);
  if (different(call)) return part_of(call, r);
  const auto order = flatten_examples(negative).cumsum(1) - 1;
  return r.take(order.clamp_min(0)).view_symint(negative.sym_sizes());
}

// x[B?,*] -> y[B,*] = x where x > 0, else x * r; and the factors, which the derivative needs
void rrelu_rule(BatchCall& call) {
  const auto noise = call.position("noise");
  if (!call.arg("training").toBool()) {
    const auto slope = (call.arg("lower").toScalar().toDouble() + call.arg("upper").toScalar().toDouble()) / 2;
    call.set_results(at::leaky_relu(call.tensor(0), slope), at::Tensor(call.tensor(noise)));
    return call.finish_each({call.bdim(0), call.bdim(noise)});
  }
  check_allowed(call);
  if (!different(call) && !call.is_batched(0)) {
    call.arg(noise) = at::empty_like(call.tensor(0));
    call.call();
    return call.finish_unbatched();
  }
  const auto x = different(call) ? call.expand_to_front(0) : call.to_front(0);
  const auto negative = x <= 0;
  const auto r = rrelu_factors(call, negative);
  call.set_results(at::where(negative, (x * r).to(x.scalar_type()), x),
                   at::where(negative, r, at::ones_like(r)).to(x.scalar_type()));
  call.finish();
}

// The operator that returns what this one writes.
c10::OperatorHandle out_of_place(const c10::OperatorName& name) {
  const auto in_place = c10::toString(name).substr(std::string("aten::").size());
  if (in_place == "bernoulli_.float") return find_operator("bernoulli.p");
  if (in_place == "normal_") return find_operator("normal_functional");
  if (in_place.rfind("rrelu_with_noise", 0) == 0) return find_operator("rrelu_with_noise_functional");
  const auto base = name.name.substr(0, name.name.size() - 1);
  return c10::Dispatcher::singleton().findSchemaOrThrow(base.c_str(), name.overload_name.c_str());
}

// x, where only its shape counts -> x, filled with random numbers. Draws out of place, so that the numbers do not
// depend on the layout, and copies the last of the results into the arguments that are written.
void random_fill(const c10::OperatorHandle& op, Stack& stack) {
  const auto& schema = op.schema();
  auto& level = current_vmap_level();
  const auto arguments = torch::jit::pop(stack, count_arguments(op));
  const auto training = schema.argumentIndexWithName("training");
  if (!training.has_value() || arguments[*training].toBool()) check_randomness(op, level);
  std::vector<size_t> written;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto* alias = schema.arguments()[i].alias_info();
    if (alias != nullptr && alias->isWrite()) written.push_back(i);
  }
  Stack results = arguments;
  out_of_place(op.operator_name()).callBoxed(&results);
  for (size_t k = 0; k < written.size(); ++k) {
    const auto& target = arguments[written[k]].toTensor();
    const auto& value = results[results.size() - written.size() + k];
    TORCH_CHECK_VALUE(any_batched(&arguments[written[k]], 1) || !any_batched(&value, 1), "vmap: ", op.operator_name(),
                      " would write other random numbers for each example into a tensor from outside the mapped ",
                      "function (shape ", target.sym_sizes(), "): every example needs its own copy. Make the tensor ",
                      "inside, for example with torch.empty_like(x).");
    if (schema.arguments()[written[k]].name() == "noise") {
      copy_uncounted(target, value.toTensor());  // autograd saves it before
    } else {
      target.copy_(value.toTensor());
    }
  }
  for (size_t r = 0; r < schema.returns().size(); ++r) {
    const auto index = written_argument(schema, r);
    stack.push_back(index >= 0 ? arguments[index] : results[r]);
  }
}

}  // namespace

void add_random_rules(RuleTable& rules) {
  const Family random_factory{
      "random", [](const c10::FunctionSchema& schema) -> Rule { return RandomFactory{position_of(schema, "size")}; }};
  rules.add(random_factory, {"rand", "rand.generator", "randn", "randn.generator", "randint", "randint.generator",
                             "randint.low", "randint.low_generator", "normal.float_float"});
  rules.add(&randperm_rule, {"randperm", "randperm.generator"});
  rules.add(&random_like_rule,
            {"rand_like", "rand_like.generator", "randn_like", "randn_like.generator", "randint_like",
             "randint_like.generator", "randint_like.low_dtype", "randint_like.low_generator_dtype", "bernoulli.p",
             "normal_functional", "uniform", "exponential", "geometric", "cauchy", "log_normal", "random",
             "random.from", "random.to"});
  rules.add(&randint_like_rule, {"randint_like.Tensor", "randint_like.Tensor_generator"});
  rules.add(&bernoulli_rule, {"bernoulli", "bernoulli.Tensor"});
  rules.add(&normal_rule, {"normal.Tensor_float", "normal.float_Tensor", "normal.Tensor_Tensor"});
  rules.add(&multinomial_rule, {"multinomial"});
  rules.add(&sampler_rule, {"poisson", "_standard_gamma", "binomial", "_sample_dirichlet"});
  rules.add(&dropout, {"dropout"});
  rules.add(&native_dropout_rule, {"native_dropout"});
  rules.add(&fused_dropout_rule, {"_fused_dropout"});
  rules.add(&rrelu_rule, {"rrelu_with_noise_functional"});
  rules.add(&random_fill,
            {"bernoulli_.float", "bernoulli_.Tensor", "normal_", "uniform_", "random_", "random_.from", "random_.to",
             "exponential_", "geometric_", "cauchy_", "log_normal_", "rrelu_with_noise", "rrelu_with_noise_"});
}

}  // namespace functorch_lite
