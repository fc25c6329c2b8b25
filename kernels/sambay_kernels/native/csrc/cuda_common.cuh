// What the CUDA files share: half-precision types in and out, matrices with strides, launches by the C interface.
//
// Kernels take one structure by value. Nothing here or in the kernels is beyond C++17 and plain runtime functions,
// so that the tests can compile the same files for the CPU, with the threads of a block as coroutines.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "scan_core.h"

namespace sambay {

// Type codes of the C interface; TYPES in cuda_call.py.
enum Type : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half(x);
}

template <typename T>
struct Rows {  // (rows, width), rows `stride` elements apart; data may be null
  const T* data;
  int64_t stride;
  __device__ __forceinline__ const T* at(int64_t row) const { return data + row * stride; }
};

template <typename T>
struct WritableRows {  // the same, to be written
  T* data;
  int64_t stride;
  __device__ __forceinline__ T* at(int64_t row) const { return data + row * stride; }
};

constexpr size_t kStaticShared = 48 * 1024;  // more has to be asked for

// Launch a kernel on a grid; a grid without blocks is no launch.
template <typename Args>
cudaError_t launch(void (*kernel)(Args), int64_t x, int64_t y, int threads, size_t shared, Args args, void* stream) {
  if (x == 0 || y == 0) return cudaSuccess;
  if (shared > kStaticShared) {
    const int size = static_cast<int>(shared);
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, size);
    if (error != cudaSuccess) return error;
  }
  void* list[] = {&args};
  const dim3 grid(static_cast<unsigned>(x), static_cast<unsigned>(y));
  return cudaLaunchKernel(kernel, grid, dim3(threads), list, shared, static_cast<cudaStream_t>(stream));
}

inline int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

}  // namespace sambay
