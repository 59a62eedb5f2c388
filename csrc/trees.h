// Nested arguments of transforms, taken apart and put together again.
//
// Tuples, lists and dicts of tensors and plain Python values are handled here. Anything else, such as a class that
// somebody registered, is left to torch.utils._pytree, whose structures these are.
#pragma once

#include <pybind11/pybind11.h>

namespace functorch_lite {

namespace py = pybind11;

// (leaves, structure)
py::tuple flatten_tree(py::handle tree);

// The inverse.
py::object unflatten_tree(py::handle leaves, py::handle structure);

// A dimension for each leaf of the tree: `dims` is an int or None, or a tree of these that is a prefix of the other.
// None if it is no prefix, or one of the trees is not of the kind that is handled here.
py::object broadcast_dims(py::handle dims, py::handle tree);

}  // namespace functorch_lite
