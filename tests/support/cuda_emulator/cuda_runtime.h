// A CUDA runtime for the CPU, small and strict, so that tests run the very kernels of csrc/*.cu without a GPU.
//
// The blocks of a grid run one after another; the threads of a block are coroutines that take turns where they wait for
// each other: at __syncthreads and at shuffles. What is undefined on a GPU is an error here: threads that wait for ones
// that have left, lanes that meet at different shuffles, shared memory that wasn't asked for. Shared memory starts as
// NaN. The order in which threads take turns can be changed: a result that changes with it shows a race.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

enum cudaError_t : int {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchFailure = 719,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = void*;

namespace emulator {
using Body = void (*)(const void* kernel, const void* args);
cudaError_t launch(Body body, const void* kernel, const void* args, dim3 grid, dim3 block, size_t shared);
cudaError_t allow_shared(const void* kernel, int bytes);
float exchange(float value, int mask);
void wait_for_block();
}  // namespace emulator

cudaError_t cudaSetDevice(int device);
const char* cudaGetErrorString(cudaError_t error);

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int value) {
  return emulator::allow_shared(reinterpret_cast<const void*>(kernel), value);
}

struct cudaFuncAttributes {};
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return cudaSuccess;
}

template <typename Args>
cudaError_t cudaLaunchKernel(void (*kernel)(Args), dim3 grid, dim3 block, void** list, size_t shared, cudaStream_t) {
  const emulator::Body body = [](const void* function, const void* args) {
    reinterpret_cast<void (*)(Args)>(const_cast<void*>(function))(*static_cast<const Args*>(args));
  };
  return emulator::launch(body, reinterpret_cast<const void*>(kernel), list[0], grid, block, shared);
}

inline void __syncthreads() { emulator::wait_for_block(); }
inline float __shfl_xor_sync(unsigned, float value, int mask) { return emulator::exchange(value, mask); }
