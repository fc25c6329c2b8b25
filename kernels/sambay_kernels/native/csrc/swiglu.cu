// silu(gate) * value on a GPU, forward and backward: one pass, 16 bytes a thread and tensor.

#include "cuda_common.cuh"

namespace sambay {

template <typename T>
struct SwigluForward {
  int64_t count, width;  // rows, elements of a row
  Rows<T> gate, value;
  T* out;  // (count, width)
};

template <typename T>
struct SwigluBackward {
  int64_t count, width;
  Rows<T> grad, gate, value;
  WritableRows<T> of_gate, of_value;
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

  __device__ __forceinline__ void store(T* to, const Vector<T>& values) const {
    to += column;
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
__global__ void __launch_bounds__(kThreads) swiglu_forward_kernel(Aligned<SwigluForward<T>> given) {
  const SwigluForward<T>& args = given.args;
  const Piece<T> piece(args.width, given.vectors);
  const Vector<T> gate = piece.load(args.gate), value = piece.load(args.value);
  Vector<T> out;
#pragma unroll
  for (int i = 0; i < Vector<T>::kSize; ++i)
    out.value[i] = from_float<T>(swiglu_value(to_float(gate.value[i]), to_float(value.value[i])));
  piece.store(args.out + piece.row * args.width, out);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) swiglu_backward_kernel(Aligned<SwigluBackward<T>> given) {
  const SwigluBackward<T>& args = given.args;
  const Piece<T> piece(args.width, given.vectors);
  const Vector<T> grad = piece.load(args.grad), gate = piece.load(args.gate), value = piece.load(args.value);
  Vector<T> of_gate, of_value;
#pragma unroll
  for (int i = 0; i < Vector<T>::kSize; ++i) {
    const SwigluGrads<float> out =
        swiglu_backward_value(to_float(grad.value[i]), to_float(gate.value[i]), to_float(value.value[i]));
    of_gate.value[i] = from_float<T>(out.gate);
    of_value.value[i] = from_float<T>(out.value);
  }
  piece.store(args.of_gate.at(piece.row), of_gate);
  piece.store(args.of_value.at(piece.row), of_value);
}

bool starts_aligned(const void* data, int64_t stride, int64_t size) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * size % 16 == 0;
}

template <typename Matrix>
bool starts_aligned(const Matrix& rows) {
  return starts_aligned(rows.data, rows.stride, sizeof(*rows.data));
}

template <typename T>
int64_t blocks_of(int64_t count, int64_t width) {
  return count * divide_up(width, kThreads * Vector<T>::kSize);
}

template <typename T>
cudaError_t swiglu_forward(const SwigluForward<T>& args, void* stream) {
  const bool vectors = starts_aligned(args.gate) && starts_aligned(args.value) &&
                       starts_aligned(args.out, args.width, sizeof(T));
  const Aligned<SwigluForward<T>> all{args, vectors};
  return launch(swiglu_forward_kernel<T>, blocks_of<T>(args.count, args.width), 1, kThreads, 0, all, stream);
}

template <typename T>
cudaError_t swiglu_backward(const SwigluBackward<T>& args, void* stream) {
  const bool vectors = starts_aligned(args.grad) && starts_aligned(args.gate) && starts_aligned(args.value) &&
                       starts_aligned(args.of_gate) && starts_aligned(args.of_value);
  const Aligned<SwigluBackward<T>> all{args, vectors};
  return launch(swiglu_backward_kernel<T>, blocks_of<T>(args.count, args.width), 1, kThreads, 0, all, stream);
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

extern "C" int sambay_cuda_swiglu_forward(const void* args, size_t size, int type, int device, void* stream) {
  return sambay::with_type<sambay::SwigluForward>(args, size, type, device, [=](const auto& given) {
    return sambay::swiglu_forward(given, stream);
  });
}

extern "C" int sambay_cuda_swiglu_backward(const void* args, size_t size, int type, int device, void* stream) {
  return sambay::with_type<sambay::SwigluBackward>(args, size, type, device, [=](const auto& given) {
    return sambay::swiglu_backward(given, stream);
  });
}
