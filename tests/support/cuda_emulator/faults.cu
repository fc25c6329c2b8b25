// Kernels that are wrong in the ways the emulator is there to find; test_cuda_emulator.py expects each to be found.

#include <cuda_runtime.h>

extern __shared__ float4 sambay_shared[];

namespace {

struct Args {
  float* out;
};

float* shared() { return reinterpret_cast<float*>(sambay_shared); }

// Right: every thread reads what its neighbour wrote.
__global__ void neighbour(Args args) {
  shared()[threadIdx.x] = static_cast<float>(threadIdx.x);
  __syncthreads();
  args.out[threadIdx.x] = shared()[(threadIdx.x + 1) % blockDim.x];
}

__global__ void without_a_barrier(Args args) {
  shared()[threadIdx.x] = static_cast<float>(threadIdx.x);
  args.out[threadIdx.x] = shared()[(threadIdx.x + 1) % blockDim.x];
}

__global__ void barrier_for_some(Args) {
  if (threadIdx.x > 0) __syncthreads();
}

__global__ void shuffle_for_some(Args args) {
  if (threadIdx.x > 0) args.out[threadIdx.x] = __shfl_xor_sync(~0u, 1.f, 1);
}

__global__ void different_shuffles(Args args) {
  args.out[threadIdx.x] = __shfl_xor_sync(~0u, 1.f, threadIdx.x % 2 ? 1 : 2);
}

__global__ void beyond_shared(Args) { shared()[1024 + threadIdx.x] = 0.f; }

constexpr decltype(&neighbour) kKernels[] = {neighbour,        without_a_barrier,  barrier_for_some,
                                             shuffle_for_some, different_shuffles, beyond_shared};

}  // namespace

// Run a kernel on one block of 64 threads.
extern "C" int run_fault(int kernel, float* out, int shared_bytes) {
  Args args{out};
  void* list[] = {&args};
  return cudaLaunchKernel(kKernels[kernel], dim3(1), dim3(64), list, static_cast<size_t>(shared_bytes), nullptr);
}
