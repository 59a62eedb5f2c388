// The Python face of the extension. Typed in functorch_lite/_C.pyi.
#include <ATen/FunctionalTensorWrapper.h>
#include <pybind11/functional.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include "autodiff_level.h"
#include "call_cache.h"
#include "donation.h"
#include "errors.h"
#include "fallback.h"
#include "front.h"
#include "functionalize_level.h"
#include "fused_attention.h"
#include "memory_meter.h"
#include "recorder.h"
#include "rule.h"
#include "tape.h"
#include "trees.h"
#include "vmap_level.h"
#include "wrapper.h"

namespace py = pybind11;

// torch/csrc/jit/python/pybind_utils.h includes all operators.
namespace torch::jit {
TORCH_PYTHON_API py::object toPyObject(IValue ivalue);
}  // namespace torch::jit

namespace functorch_lite {
namespace {

// Python functions and classes that C++ calls; never destroyed, for tensors may outlive the interpreter's objects.
struct PythonSide {
  py::object has_decomposition;
  py::object install_decomposition;
  py::object warn_loop;
  py::object user_location;
  py::object name_of_tensor;
  py::object escaped_tensor_error;
  py::object attend_in_chunks;
  py::object attend_backward;
  py::object call_auto_functionalized;
};
PythonSide& python_side() {
  static auto* side = new PythonSide();
  return *side;
}

class EscapedTensorError final : public torch::PyTorchError {
 public:
  using PyTorchError::PyTorchError;
  PyObject* python_type() override { return python_side().escaped_tensor_error.ptr(); }
};

// Calls into Python from inside an operator, where an error must travel through C++ as PyTorch's own do.
template <class Call>
auto call_python(Call&& call) {
  py::gil_scoped_acquire gil;
  try {
    return call();
  } catch (py::error_already_set& error) {
    error.restore();
    python_error wrapped;
    wrapped.persist();
    throw wrapped;
  }
}

void set_python_side(py::object has_decomposition, py::object install_decomposition, py::object warn_loop,
                     py::object user_location, py::object name_of_tensor, py::object escaped_tensor_error,
                     py::object attend_in_chunks, py::object attend_backward, py::object call_auto_functionalized) {
  python_side() = {std::move(has_decomposition), std::move(install_decomposition), std::move(warn_loop),
                   std::move(user_location),     std::move(name_of_tensor),        std::move(escaped_tensor_error),
                   std::move(attend_in_chunks),  std::move(attend_backward),       std::move(call_auto_functionalized)};
  auto& hooks = python_hooks();
  hooks.has_decomposition = [](const c10::OperatorName& name) {
    return call_python([&] { return python_side().has_decomposition(c10::toString(name)).cast<bool>(); });
  };
  hooks.install_decomposition = [](const c10::OperatorName& name) {
    call_python([&] { python_side().install_decomposition(c10::toString(name)); });
  };
  hooks.warn_loop = [](const c10::OperatorName& name) {
    call_python([&] { python_side().warn_loop(c10::toString(name)); });
  };
  hooks.user_location = [] { return call_python([] { return python_side().user_location().cast<std::string>(); }); };
  hooks.name_of_tensor = [](const at::Tensor& tensor) {
    return call_python([&] { return python_side().name_of_tensor(tensor).cast<std::string>(); });
  };
  hooks.attend_in_chunks = [](const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                              const std::optional<at::Tensor>& mask, const AttentionOptions& o) {
    return call_python([&] {
      return python_side()
          .attend_in_chunks(query, key, value, mask, o.dropout_p, o.is_causal, o.scale, o.enable_gqa, o.rows)
          .cast<at::Tensor>();
    });
  };
  hooks.attend_backward = [](const at::Tensor& grad, const std::vector<at::Tensor>& inputs, const AttentionOptions& o) {
    return call_python([&] {
      return python_side()
          .attend_backward(grad, inputs, o.is_causal, o.scale, o.enable_gqa, o.rows)
          .cast<std::vector<at::Tensor>>();
    });
  };
  hooks.call_auto_functionalized = [](const c10::OperatorHandle& op, Stack& stack) {
    return call_python([&]() -> std::optional<Tensors> {
      const auto n = count_arguments(op);
      py::list arguments;
      for (const auto& argument : torch::jit::last(stack, n)) arguments.append(torch::jit::toPyObject(argument));
      const auto called =
          python_side().call_auto_functionalized(op.operator_name().name, op.operator_name().overload_name, arguments);
      if (called.is_none()) return std::nullopt;
      auto [results, values] = called.cast<std::pair<Tensors, Tensors>>();
      torch::jit::drop(stack, n);
      for (auto& result : results) torch::jit::push(stack, std::move(result));
      return values;
    });
  };
}

at::Tensor lift_batched(VmapLevel& level, const at::Tensor& value, int64_t dim) { return wrap(value, level, dim); }

// (value, batch dimension) of a result; the dimension is None if the result is the same for all examples.
std::pair<at::Tensor, std::optional<int64_t>> unwrap_batched(const VmapLevel& level, const at::Tensor& result) {
  const auto* wrapper = wrapper_at(result, &level);
  if (wrapper == nullptr) return {result, std::nullopt};
  if (wrapper->bdim() == kNoBatchDim) return {wrapper->value(), std::nullopt};
  return {wrapper->value(), wrapper->bdim()};
}

Tensors record_call(TapeLevel& level, const py::object& function, const Tensors& arguments, const Tensors& results) {
  // Shared, for the tape may copy it and be freed where Python's lock is not held.
  const std::shared_ptr<py::object> held(new py::object(function), [](py::object* owned) {
    py::gil_scoped_acquire gil;
    delete owned;
  });
  const auto call = [held](const Tensors& arguments) {
    return call_python([&] { return (*held)(arguments).cast<Tensors>(); });
  };
  return level.record(call, arguments, results);
}

struct OutsideContext {
  std::optional<Outside> outside;
  void enter() { outside.emplace(); }
  void exit() { outside.reset(); }
};

struct BelowContext {
  std::optional<RunBelow> below;
  void enter() {
    TORCH_CHECK(current_level() != nullptr, "functorch_lite._C.Below: no level is open");
    below.emplace(*current_level());
  }
  void exit() { below.reset(); }
};

struct AgainContext {
  const BelowContext& below;
  std::optional<RunAgain> again;
  void enter() {
    TORCH_CHECK(below.below.has_value(), "functorch_lite._C.Below.undone: not below the level");
    again.emplace(*below.below);
  }
  void exit() { again.reset(); }
};

// A warning of the pass, as of anomaly mode, is Python's, which needs the lock that the pass does not hold.
std::vector<at::Tensor> backward_with_warnings(AutodiffLevel& level, const std::vector<at::Tensor>& outputs,
                                               const std::vector<at::Tensor>& cotangents,
                                               const std::vector<at::Tensor>& inputs, bool keep_graph) {
  torch::PyWarningHandler handler;
  try {
    py::gil_scoped_release no_gil;
    return level.backward(outputs, cotangents, inputs, keep_graph);
  } catch (...) {
    handler.set_in_exception();
    throw;
  }
}

using Reshape = std::function<void()>;

// (outside, inside, whether all writes were made without recording, whether it has another memory now, what changes its
// shape)
std::vector<std::tuple<at::Tensor, at::Tensor, bool, bool, std::vector<Reshape>>> tensors_from_outside(
    const FunctionalizeLevel& level) {
  std::vector<std::tuple<at::Tensor, at::Tensor, bool, bool, std::vector<Reshape>>> result;
  for (const auto& [outside, inside, memory, reshaped] : level.from_outside()) {
    std::vector<Reshape> reshapes;
    for (const auto& [op, arguments] : reshaped) {
      Stack stack{outside};
      stack.insert(stack.end(), arguments.begin(), arguments.end());
      reshapes.emplace_back([op = op, stack] {
        auto copy = stack;
        op.callBoxed(&copy);
      });
    }
    const auto& functional = as_wrapper(inside)->functional();
    const auto* now = functional.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
    const auto* impl = at::functionalization::impl::unsafeGetFunctionalWrapper(functional);
    result.emplace_back(outside, inside, impl->are_all_mutations_under_no_grad_or_inference_mode(),
                        now != memory._unsafe_get_target(), std::move(reshapes));
  }
  return result;
}

// The innermost level with its own Python type, or None.
py::object innermost_level() {
  auto* level = current_level();
  if (level == nullptr) return py::none();
  if (auto* vmap = dynamic_cast<VmapLevel*>(level)) {
    return py::cast(c10::intrusive_ptr<VmapLevel>::unsafe_reclaim_from_nonowning(vmap));
  }
  if (auto* tape = dynamic_cast<TapeLevel*>(level)) {
    return py::cast(c10::intrusive_ptr<TapeLevel>::unsafe_reclaim_from_nonowning(tape));
  }
  if (auto* functionalize = dynamic_cast<FunctionalizeLevel*>(level)) {
    return py::cast(c10::intrusive_ptr<FunctionalizeLevel>::unsafe_reclaim_from_nonowning(functionalize));
  }
  if (auto* recorder = dynamic_cast<Recorder*>(level)) {
    return py::cast(c10::intrusive_ptr<Recorder>::unsafe_reclaim_from_nonowning(recorder));
  }
  return py::cast(c10::intrusive_ptr<AutodiffLevel>::unsafe_reclaim_from_nonowning(static_cast<AutodiffLevel*>(level)));
}

// Whether a level below the innermost, or plain PyTorch, differentiates with respect to this tensor.
bool is_differentiated_below(const at::Tensor& tensor) {
  return may_be_differentiated(value_at(tensor, current_level()));
}

py::object describe(const at::Tensor& tensor) {
  const auto* wrapper = as_wrapper(tensor);
  if (wrapper == nullptr) return py::none();
  const auto* level = wrapper->level();
  std::optional<int64_t> bdim;
  if (wrapper->bdim() != kNoBatchDim) bdim = wrapper->bdim();
  return py::make_tuple(level->kind(), level->depth(), is_active(level), bdim, wrapper->value());
}

std::vector<std::pair<std::string, std::string>> batching_rules() {
  std::vector<std::pair<std::string, std::string>> result;
  for (const auto& row : RuleTable::rows()) result.emplace_back(row.op, row.family);
  return result;
}

// (handling, detail, file with the rule or an empty string)
std::tuple<Handling, std::string, std::string> plan(const std::string& name, const std::string& overload) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str());
  const auto plan = plan_of(op);
  const auto* row = RuleTable::find(op.operator_name());
  return {plan.handling, plan.detail, row == nullptr ? "" : row->file};
}

}  // namespace

void raise_escaped(const Wrapper& wrapper) {
  std::ostringstream message;
  if (wrapper.bdim() == kNoBatchDim) {
    message << "A tensor of shape " << wrapper.sym_sizes() << " that was made inside torch.utils.checkpoint is used "
            << "outside of it, where it has no derivative. Return it from the checkpointed function, or detach() it "
            << "there if its derivative is not wanted.";
    throw EscapedTensorError(message.str());
  }
  message
      << "A tensor of shape " << wrapper.sym_sizes() << " that was made inside vmap is used after that vmap has "
      << "returned, or in another thread. Inside vmap a tensor stands for one example of a batch; once vmap is done "
      << "there is no such thing any more. Return the tensor from the function that vmap maps, and use what vmap "
      << "returns: it has the batch dimension.";
  throw EscapedTensorError(message.str());
}

}  // namespace functorch_lite

PYBIND11_MODULE(_C, m) {
  using namespace functorch_lite;
  register_below_autograd();
  register_batching_rules();

  py::class_<Level, c10::intrusive_ptr<Level>>(m, "Level")
      .def("__enter__",
           [](const LevelPtr& level) {
             level->open();
             return level;
           })
      .def("__exit__", [](Level& level, const py::object&, const py::object&, const py::object&) { level.close(); })
      .def_property_readonly("depth", &Level::depth)
      .def_property_readonly("tensors_alive",
                             [](const LevelPtr& level) { return static_cast<int64_t>(level.use_count()) - 1; })
      .def_property_readonly("kind", &Level::kind);
  py::enum_<VmapLevel::Randomness>(m, "Randomness")
      .value("error", VmapLevel::Randomness::kError)
      .value("same", VmapLevel::Randomness::kSame)
      .value("different", VmapLevel::Randomness::kDifferent);
  py::class_<Chunks, c10::intrusive_ptr<Chunks>>(m, "Chunks")
      .def(py::init<int64_t, std::vector<at::Generator>>())
      .def("begin", &Chunks::begin);
  py::class_<VmapLevel, Level, c10::intrusive_ptr<VmapLevel>>(m, "VmapLevel")
      .def(py::init<c10::SymInt, VmapLevel::Randomness, c10::intrusive_ptr<Chunks>>(), py::arg("batch_size"),
           py::arg("randomness"), py::arg("chunks") = c10::intrusive_ptr<Chunks>())
      .def_property_readonly("batch_size", &VmapLevel::batch_size)
      .def_property_readonly("randomness", &VmapLevel::randomness)
      .def_property_readonly("chunks", &VmapLevel::chunks)
      .def("lift", &lift_batched)
      .def("unwrap", &unwrap_batched);
  py::class_<AutodiffLevel, Level, c10::intrusive_ptr<AutodiffLevel>>(m, "AutodiffLevel")
      .def(py::init([](bool forward, std::string transform) {
             const auto mode = forward ? AutodiffLevel::Mode::kForward : AutodiffLevel::Mode::kReverse;
             return c10::make_intrusive<AutodiffLevel>(mode, std::move(transform));
           }),
           py::arg("forward"), py::arg("transform") = "")
      .def("lift_variable", &AutodiffLevel::lift_variable)
      .def("lift_dual", &AutodiffLevel::lift_dual)
      .def("lift_constant", [](AutodiffLevel& level, const at::Tensor& value) { return wrap(value, level); })
      .def("tangent_of", &AutodiffLevel::tangent_of)
      .def("value_of", &AutodiffLevel::value_of)
      .def("take_derivative", &AutodiffLevel::take_derivative)
      .def("backward", &backward_with_warnings)
      .def_static("gradients", &AutodiffLevel::gradients, py::call_guard<py::gil_scoped_release>());

  py::class_<FunctionalizeLevel, Level, c10::intrusive_ptr<FunctionalizeLevel>>(m, "FunctionalizeLevel")
      .def(py::init<bool>(), py::arg("keep_views"))
      .def_property_readonly("keep_views", &FunctionalizeLevel::keeps_views)
      .def("lift", &FunctionalizeLevel::lift)
      .def("lift_new", &FunctionalizeLevel::lift_new)
      .def("value_of", &FunctionalizeLevel::value_of)
      .def("write", &FunctionalizeLevel::write)
      .def("memory_of", &FunctionalizeLevel::memory_of)
      .def("memory_value", &FunctionalizeLevel::memory_value)
      .def("replay_views", &FunctionalizeLevel::replay_views)
      .def("is_view", &FunctionalizeLevel::is_view)
      .def("outside_of",
           [](const FunctionalizeLevel& level, const at::Tensor& tensor) -> std::optional<at::Tensor> {
             auto outside = level.outside_of(tensor);
             return outside.defined() ? std::make_optional(outside) : std::nullopt;
           })
      .def("from_outside", &tensors_from_outside);

  py::class_<Tape, c10::intrusive_ptr<Tape>>(m, "Tape")
      .def_property_readonly("inputs", &Tape::inputs)
      .def("replay", &Tape::replay, py::call_guard<py::gil_scoped_release>());
  py::class_<TapeLevel, Level, c10::intrusive_ptr<TapeLevel>>(m, "TapeLevel")
      .def(py::init<bool>())
      .def("lift", &TapeLevel::lift)
      .def("value_of", &TapeLevel::value_of)
      .def("is_from_outside", &TapeLevel::is_from_outside)
      .def("record", &record_call)
      .def_static("take_place", &TapeLevel::take_place)
      .def("finish", &TapeLevel::finish);

  py::class_<Program, c10::intrusive_ptr<Program>>(m, "Program")
      .def("run", &Program::run, py::arg("inputs"), py::arg("may_overwrite") = false,
           py::call_guard<py::gil_scoped_release>())
      .def("__repr__", &Program::describe);
  py::class_<Recorder, Level, c10::intrusive_ptr<Recorder>>(m, "Recorder")
      .def(py::init<bool>(), py::arg("simplifies"))
      .def("lift", &Recorder::lift)
      .def("finish", &Recorder::finish);

  py::class_<CallCache>(m, "CallCache")
      .def(py::init<>())
      .def("call", &CallCache::call)
      .def("add",
           [](CallCache& cache, const py::tuple& args, const py::dict& kwargs, const py::object& compute,
              Tensors captured, std::vector<std::pair<size_t, size_t>> writes, std::vector<py::tuple> outputs,
              py::object structure, std::vector<std::pair<py::object, bool>> training,
              std::vector<std::tuple<py::dict, py::object, py::object>> members, std::vector<size_t> donated) {
             const bool is_program = py::isinstance<Program>(compute);
             CallCache::Compiled compiled{
                 .program = is_program ? compute.cast<c10::intrusive_ptr<Program>>() : c10::intrusive_ptr<Program>(),
                 .function = compute,
                 .captured = std::move(captured),
                 .writes = std::move(writes),
                 .donated = std::move(donated),
                 .outputs = std::move(outputs),
                 .structure = std::move(structure)};
             cache.add(args, kwargs, std::move(compiled), {std::move(training), std::move(members)});
           })
      .def("clear", &CallCache::clear);
  m.def("take_memory", &take_memory);

  py::class_<OutsideContext>(m, "Outside")
      .def(py::init<>())
      .def("__enter__", &OutsideContext::enter)
      .def("__exit__",
           [](OutsideContext& context, const py::object&, const py::object&, const py::object&) { context.exit(); });

  py::class_<BelowContext>(m, "Below")
      .def(py::init<>())
      .def("__enter__",
           [](const py::object& self) {
             self.cast<BelowContext&>().enter();
             return self;
           })
      .def("__exit__",
           [](BelowContext& context, const py::object&, const py::object&, const py::object&) { context.exit(); })
      .def(
          "undone",
          [](const BelowContext& below) { return std::unique_ptr<AgainContext>(new AgainContext{below, {}}); },
          py::keep_alive<0, 1>());
  py::class_<AgainContext>(m, "Again")
      .def("__enter__", &AgainContext::enter)
      .def("__exit__",
           [](AgainContext& context, const py::object&, const py::object&, const py::object&) { context.exit(); });
  py::class_<MemoryMeter>(m, "MemoryMeter")
      .def(py::init([](const at::Device& device) { return std::make_unique<MemoryMeter>(device.type()); }))
      .def(
          "__enter__",
          [](MemoryMeter& meter) -> MemoryMeter& {
            meter.start();
            return meter;
          },
          py::return_value_policy::reference)
      .def("__exit__",
           [](MemoryMeter& meter, const py::object&, const py::object&, const py::object&) { meter.stop(); })
      .def_property_readonly("live", &MemoryMeter::live)
      .def_property_readonly("peak", &MemoryMeter::peak);

  m.def("flatten", &flatten_tree);
  m.def("unflatten", &unflatten_tree);
  m.def("broadcast_dims", &broadcast_dims);
  m.def("current_level", &innermost_level);
  m.def("is_differentiated_below", &is_differentiated_below);

  m.def("level_depth", &level_depth,
        "How many transforms the calling code is inside of; 0 outside all of them.\n\n"
        "Example:\n    >>> from functorch_lite import level_depth\n    >>> level_depth()\n    0\n");
  m.def("describe", &describe);
  m.def("innermost_value", &innermost_value);
  m.def("have_one_storage", &have_one_storage);
  m.def("is_wrapper", [](const at::Tensor& tensor) { return as_wrapper(tensor) != nullptr; });
  m.def("strip_closed_levels", &strip_closed_levels);
  m.def("batching_rules", &batching_rules);
  py::enum_<Handling>(m, "Handling")
      .value("one_level_down", Handling::kOneLevelDown)
      .value("rule", Handling::kRule)
      .value("out_form", Handling::kOutForm)
      .value("composition", Handling::kComposition)
      .value("primitive", Handling::kPrimitive)
      .value("refusal", Handling::kRefusal)
      .value("decomposition", Handling::kDecomposition)
      .value("loop", Handling::kLoop);
  m.def("plan", &plan);
  m.def("unknown_operators", &RuleTable::unknown_operators);
  m.def("set_fast_paths", &set_fast_paths);
  m.def("set_attention_limits", &set_attention_limits);
  m.def("set_python_side", &set_python_side);
}
