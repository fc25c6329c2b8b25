// The emulator's scheduler. See cuda_runtime.h.

#include "cuda_runtime.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <numeric>
#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;

constexpr size_t kWarp = 32, kStack = 128 * 1024, kStatic = 48 * 1024, kMost = 227 * 1024;
float4 sambay_shared[kMost / sizeof(float4) + 1];

namespace {

enum State { kReady, kAtBarrier, kAtShuffle, kGone };

struct Thread {
  ucontext_t context;
  std::vector<char> stack;
  State state;
  size_t exchanges;  // so far; the number of the one it waits for
};

struct Warp {
  size_t arrivals;           // at exchanges, of all lanes; 32 for each exchange
  int mask;                  // of the exchange that lanes are meeting at
  float values[2][kWarp];    // even exchanges, odd exchanges
};

std::vector<Thread> threads;
std::vector<Warp> warps;
std::map<const void*, int> allowed;
ucontext_t scheduler;
size_t current, at_barrier, gone, order_seed;
const char* failure;
emulator::Body body;
const void *kernel, *arguments;

void fail(const char* what) {
  if (!failure) std::fprintf(stderr, "CUDA emulator: %s\n", what);
  failure = what;
}

// To the scheduler and back; after a failure nobody comes back.
void pause(State state) {
  threads[current].state = state;
  swapcontext(&threads[current].context, &scheduler);
}

void start() {
  body(kernel, arguments);
  threads[current].state = kGone;
  ++gone;
}

bool may_go(const Thread& thread, size_t index) {
  if (thread.state == kAtShuffle) return warps[index / kWarp].arrivals >= kWarp * (thread.exchanges + 1);
  return thread.state == kReady;
}

void resume(size_t index) {
  current = index;
  threadIdx = dim3(static_cast<unsigned>(index));
  threads[index].state = kReady;
  swapcontext(&scheduler, &threads[index].context);
}

void prepare(size_t count) {
  threads.resize(count);
  warps.assign((count + kWarp - 1) / kWarp, Warp{});
  at_barrier = gone = 0;
  for (Thread& thread : threads) {
    thread.stack.resize(kStack);
    thread.state = kReady;
    thread.exchanges = 0;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = &scheduler;
    makecontext(&thread.context, start, 0);
  }
}

void open_barrier() {
  if (gone) return fail("threads wait at __syncthreads for threads that have left");
  at_barrier = 0;
  for (Thread& thread : threads) thread.state = kReady;
}

void run_block(size_t count, size_t shared) {
  char* bytes = reinterpret_cast<char*>(sambay_shared);
  std::memset(bytes, 0xff, sizeof(sambay_shared));  // NaN
  prepare(count);
  std::vector<size_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (order_seed == 1) std::reverse(order.begin(), order.end());
  if (order_seed > 1) std::rotate(order.begin(), order.begin() + order_seed * kWarp % count, order.end());
  while (gone < count && !failure) {
    bool moved = false;
    for (size_t i = 0; i < count && !failure; ++i) {
      if (!may_go(threads[order[i]], order[i])) continue;
      resume(order[i]);
      moved = true;
      // Out of turn, the first that can go on goes on: warps run as far ahead of each other as they are let.
      if (order_seed > 0 && i % kWarp == kWarp - 1) i -= kWarp;
    }
    if (at_barrier && at_barrier + gone == count)
      open_barrier();
    else if (!moved)
      fail("threads wait for each other for ever");
  }
  for (size_t i = shared; i < sizeof(sambay_shared); ++i)
    if (bytes[i] != '\xff') return fail("a kernel wrote beyond the shared memory it had asked for");
}

}  // namespace

namespace emulator {

void wait_for_block() {
  ++at_barrier;
  pause(kAtBarrier);
}

float exchange(float value, int mask) {
  Thread& self = threads[current];
  Warp& warp = warps[current / kWarp];
  const size_t lane = current % kWarp, parity = self.exchanges % 2;
  if (warp.arrivals % kWarp == 0) warp.mask = mask;
  if (warp.mask != mask) fail("lanes of a warp meet at different shuffles");
  warp.values[parity][lane] = value;
  ++warp.arrivals;
  pause(kAtShuffle);
  ++self.exchanges;
  return warp.values[parity][lane ^ static_cast<size_t>(mask)];
}

cudaError_t allow_shared(const void* function, int bytes) {
  if (static_cast<size_t>(bytes) > kMost) return cudaErrorInvalidValue;
  allowed[function] = bytes;
  return cudaSuccess;
}

cudaError_t launch(Body run, const void* function, const void* args, dim3 grid, dim3 block, size_t shared) {
  const size_t most = std::max<size_t>(kStatic, allowed[function]);
  const bool fits = grid.x > 0 && grid.x <= 2147483647u && grid.y > 0 && grid.y <= 65535 && shared <= most;
  if (!fits) return cudaErrorInvalidValue;
  body = run, kernel = function, arguments = args, failure = nullptr, gridDim = grid, blockDim = block;
  for (unsigned y = 0; y < grid.y && !failure; ++y)
    for (unsigned x = 0; x < grid.x && !failure; ++x) {
      blockIdx = dim3(x, y);
      run_block(block.x, shared);
    }
  return failure ? cudaErrorLaunchFailure : cudaSuccess;
}

}  // namespace emulator

cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }

const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorLaunchFailure && failure) return failure;
  return error == cudaErrorInvalidDevice ? "invalid device ordinal" : "invalid argument";
}

// The order in which threads run: 0 in turn; 1 the last warp first and as far as it can; 2, 3, .. another warp first.
extern "C" void emulator_order(int seed) { order_seed = static_cast<size_t>(seed); }
