// The way into a compiled function, from the second call on: finds what was compiled for arguments like these.
//
// An entry holds for arguments of one structure, with tensors of certain sizes, strides, dtypes and so on, under
// certain modes of PyTorch, and as long as what the function captured is as it was. Whatever is not simple (subclasses,
// shared memory, arguments that are neither tensors, numbers, strings nor containers of them) is not found here, and
// left to Python.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>

#include "replay.h"

namespace functorch_lite {

namespace py = pybind11;

class CallCache {
 public:
  // What an entry computes.
  struct Compiled {
    c10::intrusive_ptr<Program> program;
    py::object function;  // of a list of tensors, if there is no program
    Tensors captured;     // the inputs after the arguments
    // (input, result): what the function wrote, in place.
    std::vector<std::pair<size_t, size_t>> writes;
    std::vector<size_t> donated;  // inputs whose memory the caller gives away
    // (number of a result, None), (None, number of an input) or (None, None, a constant).
    std::vector<py::tuple> outputs;
    // The output: a nested structure of leaves, which are the numbers of outputs; or a function of the outputs.
    py::object structure;
  };
  // What beside the arguments it depends on.
  struct Guards {
    std::vector<std::pair<py::object, bool>> training;                  // of modules
    std::vector<std::tuple<py::dict, py::object, py::object>> members;  // of modules
  };

  CallCache();
  ~CallCache();
  CallCache(CallCache&&) noexcept;

  // What the function returns, or Python's `...` if nothing is found.
  py::object call(const py::tuple& args, const py::dict& kwargs);
  // The arguments and PyTorch's modes are those of a call that Python has answered.
  void add(const py::tuple& args, const py::dict& kwargs, Compiled compiled, Guards guards);
  void clear();

 private:
  struct Entry;
  std::vector<std::shared_ptr<Entry>> entries_;
};

}  // namespace functorch_lite
