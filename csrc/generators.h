// The random number generators that vmap draws from, and what keeps the numbers the same with and without chunks.
//
// When a vmap runs in chunks, each chunk starts with the generators in the state that the first one found, and its
// random operators draw for the whole batch and use their part. So all chunks see one and the same sequence, and the
// last one leaves it where a vmap without chunks does. That works where the number of draws does not depend on values.
// On the CPU, operators that reject some draws ("samplers": poisson, gamma, ...) draw from a stream of their own
// instead, of which a chunk takes up where the one before stopped.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <deque>

namespace functorch_lite {

class BatchCall;
class Level;

// What the chunks of one vmap call share.
class Chunks final : public c10::intrusive_ptr_target {
 public:
  // `generators`: those in use before the first chunk.
  Chunks(int64_t total, const std::vector<at::Generator>& generators);

  // The size of the whole batch, and where the examples of the chunk that runs begin in it.
  int64_t total() const { return total_; }
  int64_t start() const { return start_; }

  // The next chunk begins, of this size: rewinds the generators.
  void begin(int64_t size);
  // This generator will be drawn from, perhaps for the first time.
  void remember(const at::Generator& generator);
  // What the operator that comes next in each chunk has kept for itself, undefined in the first.
  at::Tensor& kept_state();

 private:
  int64_t total_;
  int64_t start_ = 0;
  int64_t end_ = 0;
  std::vector<std::pair<at::Generator, at::Tensor>> found_;
  std::deque<at::Tensor> kept_;
  size_t used_ = 0;
};

at::Tensor generator_state(at::Generator& generator);
void set_generator_state(at::Generator& generator, const at::Tensor& state);

// The generator that a random operator draws from: its argument, or that of the device. None on meta tensors.
std::optional<at::Generator> generator_of(c10::ArrayRef<c10::IValue> arguments);

// To be called before anything is drawn: `innermost` and the vmaps around it may have to rewind this generator.
void remember_generator(const Level& innermost, c10::ArrayRef<c10::IValue> arguments);

// A stream for the enclosed draws, seeded by one number of the generator and continued from chunk to chunk.
class OwnStream {
 public:
  explicit OwnStream(BatchCall& call);
  ~OwnStream();
  OwnStream(const OwnStream&) = delete;
  OwnStream& operator=(const OwnStream&) = delete;

 private:
  at::Generator generator_;
  at::Tensor* kept_;
  at::Tensor outer_state_;
};

// Calls the operator once for each example. With randomness='same' each finds the generator in the same state, and it
// is left as the first example of the batch leaves it. With 'different' each has a stream of its own.
void draw_each_example(BatchCall& call);

}  // namespace functorch_lite
