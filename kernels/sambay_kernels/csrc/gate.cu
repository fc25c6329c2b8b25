// The gate silu(gate) * memory on a GPU, forward and backward: one pass, 16 bytes a thread and tensor.

#include "cuda_common.cuh"

namespace sambay {

template <typename T>
struct GateForward {
  int64_t count, width;  // rows, elements of a row
  Rows<T> gate, memory;
  T* out;  // (count, width)
};

template <typename T>
struct GateBackward {
  int64_t count, width;
  Rows<T> grad, gate, memory;
  T *grad_gate, *grad_memory;  // (count, width)
};

namespace {

constexpr int kThreads = 256;

template <typename T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T value[kSize];
};

// The elements of one thread: `count` of a row from `column` on; `whole` if they may be read and written as a vector.
template <typename T>
struct Piece {
  int64_t row, column;
  int count;
  bool whole;

  __device__ __forceinline__ Piece(int64_t width, bool aligned) {
    constexpr int kSize = Vector<T>::kSize;
    const unsigned blocks = static_cast<unsigned>((width + kThreads * kSize - 1) / (kThreads * kSize));
    row = blockIdx.x / blocks;
    column = (static_cast<int64_t>(blockIdx.x % blocks) * kThreads + threadIdx.x) * kSize;
    const int64_t left = width - column;
    count = left < 0 ? 0 : left < kSize ? static_cast<int>(left) : kSize;
    whole = aligned && count == kSize;
  }

  __device__ __forceinline__ Vector<T> load(const Rows<T>& rows) const {
    const T* from = rows.at(row) + column;
    if (whole) return *reinterpret_cast<const Vector<T>*>(from);
    Vector<T> out;
#pragma unroll
    for (int i = 0; i < Vector<T>::kSize; ++i) out.value[i] = i < count ? from[i] : from_float<T>(0.f);
    return out;
  }

  __device__ __forceinline__ void store(T* to, int64_t width, const Vector<T>& values) const {
    to += row * width + column;
    if (whole) {
      *reinterpret_cast<Vector<T>*>(to) = values;
      return;
    }
#pragma unroll
    for (int i = 0; i < Vector<T>::kSize; ++i)
      if (i < count) to[i] = values.value[i];
  }
};

template <typename Args>
struct Aligned {
  Args args;
  bool vectors;  // every row of every tensor starts at a multiple of 16 bytes
};

template <typename T>
__global__ void __launch_bounds__(kThreads) gate_forward_kernel(Aligned<GateForward<T>> given) {
  const GateForward<T>& args = given.args;
  const Piece<T> piece(args.width, given.vectors);
  const Vector<T> gate = piece.load(args.gate), memory = piece.load(args.memory);
  Vector<T> out;
#pragma unroll
  for (int i = 0; i < Vector<T>::kSize; ++i)
    out.value[i] = from_float<T>(gate_value(to_float(gate.value[i]), to_float(memory.value[i])));
  piece.store(args.out, args.width, out);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) gate_backward_kernel(Aligned<GateBackward<T>> given) {
  const GateBackward<T>& args = given.args;
  const Piece<T> piece(args.width, given.vectors);
  const Vector<T> grad = piece.load(args.grad), gate = piece.load(args.gate), memory = piece.load(args.memory);
  Vector<T> of_gate, of_memory;
#pragma unroll
  for (int i = 0; i < Vector<T>::kSize; ++i) {
    const GateGrads<float> out =
        gate_backward_value(to_float(grad.value[i]), to_float(gate.value[i]), to_float(memory.value[i]));
    of_gate.value[i] = from_float<T>(out.gate);
    of_memory.value[i] = from_float<T>(out.memory);
  }
  piece.store(args.grad_gate, args.width, of_gate);
  piece.store(args.grad_memory, args.width, of_memory);
}

bool starts_aligned(const void* data, int64_t stride, int64_t size) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * size % 16 == 0;
}

template <typename T>
bool starts_aligned(const Rows<T>& rows) {
  return starts_aligned(rows.data, rows.stride, sizeof(T));
}

template <typename T>
int64_t blocks_of(int64_t count, int64_t width) {
  return count * divide_up(width, kThreads * Vector<T>::kSize);
}

template <typename T>
cudaError_t gate_forward(const GateForward<T>& args, void* stream) {
  const bool vectors = starts_aligned(args.gate) && starts_aligned(args.memory) &&
                       starts_aligned(args.out, args.width, sizeof(T));
  const Aligned<GateForward<T>> all{args, vectors};
  return launch(gate_forward_kernel<T>, blocks_of<T>(args.count, args.width), 1, kThreads, 0, all, stream);
}

template <typename T>
cudaError_t gate_backward(const GateBackward<T>& args, void* stream) {
  const bool vectors = starts_aligned(args.grad) && starts_aligned(args.gate) && starts_aligned(args.memory) &&
                       starts_aligned(args.grad_gate, args.width, sizeof(T)) &&
                       starts_aligned(args.grad_memory, args.width, sizeof(T));
  const Aligned<GateBackward<T>> all{args, vectors};
  return launch(gate_backward_kernel<T>, blocks_of<T>(args.count, args.width), 1, kThreads, 0, all, stream);
}

template <template <typename> class Args, typename Run>
int with_type(const void* args, size_t size, int type, int device, const Run& run) {
  if (size != sizeof(Args<float>)) return cudaErrorInvalidValue;
  if (const cudaError_t error = cudaSetDevice(device)) return error;
  if (type == kFloat32) return run(*static_cast<const Args<float>*>(args));
  if (type == kBfloat16) return run(*static_cast<const Args<__nv_bfloat16>*>(args));
  if (type == kFloat16) return run(*static_cast<const Args<__half>*>(args));
  return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace sambay

extern "C" int sambay_cuda_gate_forward(const void* args, size_t size, int type, int device, void* stream) {
  return sambay::with_type<sambay::GateForward>(args, size, type, device, [=](const auto& given) {
    return sambay::gate_forward(given, stream);
  });
}

extern "C" int sambay_cuda_gate_backward(const void* args, size_t size, int type, int device, void* stream) {
  return sambay::with_type<sambay::GateBackward>(args, size, type, device, [=](const auto& given) {
    return sambay::gate_backward(given, stream);
  });
}
