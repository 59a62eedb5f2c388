// The dispatch keys this package occupies and why. No other file names one of PyTorch's keys for our use.
#pragma once

#include <c10/core/DispatchKey.h>
#include <c10/core/DispatchKeySet.h>

namespace functorch_lite {

// The door. In thread-local state while a level is open, and carried by every wrapper tensor. It stands above
// autocast and autograd, and nothing in PyTorch registers on it.
constexpr auto kFront = c10::DispatchKey::DeferredInit;

// A table, never on a tensor and never in thread-local state: batching rules are ordinary registrations on it,
// and its fallback is what happens to an operator without a rule.
constexpr auto kBatchingRules = c10::DispatchKey::TESTING_ONLY_GenericWrapper;

// The "backend" of autodiff wrappers: PyTorch's autograd kernels redispatch here once they have recorded.
constexpr auto kBelowAutograd = c10::DispatchKey::PrivateUse3;
constexpr auto kAutograd = c10::DispatchKey::AutogradPrivateUse3;

// PyTorch's derivative formulas avoid .item() and in-place tricks on tensors that carry this key. It is a mark
// only: the front comes first. Where PyTorch shuts the front out (torch.tensor of tensors does), the key leads to an
// error of PyTorch's, which functorch_lite/_boundary.py puts into other words.
constexpr auto kSubclassMark = c10::DispatchKey::Batched;

// PyTorch's indexing makes a number of an integer tensor without dimensions, as in x[i], unless that carries this key
// of torch.func's. On such tensors only, and a mark again: torch.func inside a transform of ours raises when it meets
// one.
constexpr auto kIndexMark = c10::DispatchKey::FuncTorchBatched;

// torch.func's own. In thread-local state while one of its transforms is innermost, and on what its grad, vjp and jvp
// have wrapped.
constexpr auto kTorchFuncIsInnermost = c10::DispatchKey::FuncTorchDynamicLayerFrontMode;
constexpr auto kLeftByTorchFunc = c10::DispatchKey::FuncTorchGradWrapper;

// Where torch.export records operators as the program calls them. What a level is given is not of the program that is
// exported, so the key is excluded while a level is innermost: it gets what arrives below all levels.
constexpr auto kExport = c10::DispatchKey::PreDispatch;

// Where an autodiff level sends an operator: record, track views and versions, then kBelowAutograd.
inline const c10::DispatchKeySet kAutodiffKeys = c10::DispatchKeySet(kAutograd) | c10::DispatchKeySet(kBelowAutograd) |
                                                 c10::DispatchKeySet(c10::DispatchKey::ADInplaceOrView);

// What PyTorch's autograd guards exclude while a recorded operator runs.
inline const c10::DispatchKeySet kRecordingKeys = c10::autograd_dispatch_keyset_with_ADInplaceOrView;

}  // namespace functorch_lite
