// CPU backend: differential attention of packed documents, forward and backward, for float, double and bfloat16.
//
// A block of queries of one document meets one pair of key heads: all query heads that read the pair stand side by side
// as rows, ordered by position. Scores lie transposed, (keys, rows), so that what belongs to a row (its maximum, its
// sum, its mask) lies in lanes. They are kept for one block at a time. The maps are subtracted before they meet the
// values, maps[0] - lambda maps[1], which saves every second product with the values, in the backward too: there the
// second map's gradient is the first's times -lambda.
//
// Scores are in powers of two: queries are scaled by scale * log2(e). A block depends on its document's length alone,
// so a document's result does not depend on the pack. Gradients of keys are summed by the chunk of queries, the chunks
// in their order: the same bits for any number of threads.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <tuple>
#include <type_traits>
#include <vector>

#include "compute_type.h"
#include "cpu_common.h"
#include "products.h"

namespace sambay {

template <typename E>
struct Heads {  // (tokens, heads, width), the elements of a head side by side
  const E* data;
  int64_t token, head;  // strides
  const E* at(int64_t t, int64_t h) const { return data + t * token + h * head; }
};

// E: the type of the tensors, T: that of all arithmetic.
template <typename E, typename T>
struct AttentionArgs {
  int64_t documents, heads, key_heads, width;
  const int32_t *borders_q, *borders_k;
  int64_t window;  // 0: none
  double scale, lambda_init, eps;
  Heads<E> q, k, v;
  const T *lambda, *weight;  // 1, 2 width
};

template <typename E, typename T>
struct AttentionForward {
  AttentionArgs<E, T> in;
  E *out, *mixed;  // both (Tq, heads / 2, 2 width); mixed: before the norm
  T* softmax;      // (Tq, heads, 2): each map's highest score, and 1 / sum of powers of two
};

template <typename E, typename T>
struct AttentionBackward {
  AttentionArgs<E, T> in;
  const E *grad, *mixed;
  const T* softmax;
  E *q, *k, *v;         // (Tq, heads, width), (Tk, key_heads, width)
  T *lambda, *weight;
};

template <typename E, typename T>
struct AttentionStep {
  AttentionArgs<E, T> in;   // documents: one token each, without borders; k and v by their place in the cache
  int64_t keys, row_keys;   // of a sequence, and how many places its first key is behind that of the one before
  const bool* mask;         // (documents, keys), whether a key may be seen; null: all
  int64_t mask_row;
  E* out;  // (documents, heads / 2, 2 width)
};

namespace {

constexpr int64_t kRows = 64;          // of a block, about
constexpr int64_t kKeys = 64;          // whose scores are made and used at once
constexpr int64_t kChunkQueries = 512;  // of a chunk at least
constexpr int64_t kChunks = 16;        // at most, of one document and all pairs of heads, each with its own sums
constexpr int64_t kSumKeys = 256;      // of one task that sums over chunks
constexpr size_t kKept = 4 << 20;      // bytes that a thread keeps for its next call

template <typename E, typename T>
SAMBAY_FN void write(E* to, const T* from, int64_t count, T factor) {
  SAMBAY_SIMD
  for (int64_t e = 0; e < count; ++e) to[e] = narrow<E>(from[e] * factor);
}

constexpr std::align_val_t kAligned{64};

// A thread's memory; what is not large is kept for its next call.
struct Memory {
  void* data = nullptr;
  size_t bytes = 0;
  ~Memory() { release(); }
  void release() {
    ::operator delete(data, kAligned);
    data = nullptr, bytes = 0;
  }
  void* take(size_t wanted) {
    if (wanted > bytes) {
      release();
      data = ::operator new(wanted, kAligned);
      bytes = wanted;
      std::memset(data, 0, wanted);
    }
    return data;
  }
};

thread_local Memory memory;

// Arrays of these sizes, in the memory of this thread: one worker of a thread has them at a time.
template <typename T, size_t N>
std::array<T*, N> scratch(std::array<int64_t, N> sizes) {
  constexpr int64_t kStep = 64 / sizeof(T);
  int64_t total = 0;
  for (int64_t& size : sizes) total += size = (size + kStep - 1) / kStep * kStep;
  T* next = static_cast<T*>(memory.take(total * sizeof(T)));
  std::array<T*, N> out;
  for (size_t i = 0; i < N; next += sizes[i], ++i) out[i] = next;
  return out;
}

struct Document {
  int64_t query, queries, key, keys;  // first rows and counts

  template <typename Args>
  Document(const Args& in, int64_t s)
      : query(in.borders_q[s]),
        queries(in.borders_q[s + 1] - query),
        key(in.borders_k[s]),
        keys(in.borders_k[s + 1] - key) {}
};

// Queries [first, first + count) of a document and the keys that any of them sees. Row r is query r / group.
template <typename T>
struct Block {
  static constexpr int64_t kLanes = Simd<T>::kLanes;
  int64_t query, count, key, keys;  // first row of q and of k, counts
  int64_t ahead, window;            // first query's position among the keys; of the last keys seen
  int64_t group, rows, padded;
  const bool* visible = nullptr;  // of the keys; null: all

  // One query behind all its keys.
  Block(int64_t query, int64_t key, int64_t keys, const bool* visible, int64_t members)
      : query(query),
        count(1),
        key(key),
        keys(keys),
        ahead(keys - 1),
        window(keys),
        group(members),
        rows(members),
        padded(whole_vectors<T>(members)),
        visible(visible) {}

  Block(const Document& of, int64_t first, int64_t queries, int64_t reach, int64_t members) {
    const int64_t position = of.keys - of.queries + first;
    const int64_t hidden = reach && position >= reach ? position - reach + 1 : 0;
    query = of.query + first, count = queries, key = of.key + hidden, keys = position + count - hidden;
    ahead = position - hidden, window = reach && reach < keys ? reach : keys;
    group = members, rows = count * group, padded = whole_vectors<T>(rows);
  }

  int64_t query_of(int64_t row) const { return std::min(row, rows - 1) / group; }

  // Scores of a run of keys: whole vectors with the rows that see any of them.
  Reach rows_seeing(int64_t j, int64_t length, int64_t terms) const {
    const int64_t last = std::min(count, j + length - 1 + window - ahead) * group;
    return {0, terms, first_row(j) / kLanes * kLanes, whole_vectors<T>(last)};
  }

  // Sums over rows, for a run of keys: those that see any.
  Reach over_rows(int64_t j, int64_t length, int64_t columns) const {
    return {first_row(j), std::min(count, j + length - 1 + window - ahead) * group, 0, columns};
  }

  // Sums over the keys [from, to), for a run of rows: those that any sees, counted from `from`.
  Reach over_keys(int64_t row, int64_t length, int64_t from, int64_t to, int64_t columns) const {
    const int64_t begin = std::max(from, ahead + query_of(row) - window + 1);
    const int64_t end = std::min(to, ahead + query_of(row + length - 1) + 1);
    return {begin - from, std::max(begin, end) - from, 0, columns};
  }

  int64_t first_row(int64_t j) const { return std::max<int64_t>(0, j - ahead) * group; }
};

// The rows of one vector: which keys any of them sees, and which all.
template <typename T>
struct Lanes {
  int64_t begin, end, sure, doubtful;  // any: [begin, end), all: [sure, doubtful)
  const bool* visible;
  Vector<T> place, window;

  Lanes(const Block<T>& block, int64_t row) : visible(block.visible) {
    constexpr int64_t kLanes = Simd<T>::kLanes;
    const int64_t low = block.ahead + block.query_of(row), high = block.ahead + block.query_of(row + kLanes - 1);
    begin = std::max<int64_t>(0, low - block.window + 1), end = high + 1;
    sure = std::max<int64_t>(0, high - block.window + 1), doubtful = low + 1;
    window = all_lanes(static_cast<T>(block.window));
    for (int64_t lane = 0; lane < kLanes; ++lane)
      place[lane] = static_cast<T>(block.ahead + block.query_of(row + lane));
  }

  SAMBAY_FN Vector<T> masked(const Vector<T>& scores, int64_t j) const {
    const Vector<T> hidden = all_lanes(-std::numeric_limits<T>::infinity());
    if (visible && !visible[j]) return hidden;
    if (j >= sure && j < doubtful) return scores;
    const Vector<T> behind = place - static_cast<T>(j), zero{};
    return ((behind >= zero) & (behind < window)) ? scores : hidden;
  }
};

// For every vector of rows: `task(lanes, row, begin, end)` with the keys of [from, to) that any of its rows sees; the
// others' scores in `planes` become zero.
template <typename T, size_t N, typename Task>
void for_lanes(const Block<T>& block, int64_t from, int64_t to, const std::array<T*, N>& planes, const Task& task) {
  for (int64_t row = 0; row < block.padded; row += Simd<T>::kLanes) {
    const Lanes<T> lanes(block, row);
    const int64_t begin = std::min(to, std::max(from, lanes.begin)), end = std::max(begin, std::min(to, lanes.end));
    for (T* plane : planes) {
      for (int64_t j = from; j < begin; ++j) store_vector(plane + j * block.padded + row, Vector<T>{});
      for (int64_t j = end; j < to; ++j) store_vector(plane + j * block.padded + row, Vector<T>{});
    }
    if (begin < end) task(lanes, row, begin, end);
  }
}

// `count` rows of one or two heads side by side: in place where they lie so (in whole vectors if `whole`), else copied.
template <typename T, typename E>
Right<T> side_by_side(const Heads<E>& x, int64_t first, int64_t count, int64_t head, int64_t heads, int64_t width,
                      bool whole, T* copy) {
  if constexpr (std::is_same_v<T, E>) {
    const bool fits = !whole || heads * width % Simd<T>::kLanes == 0;
    if ((heads == 1 || x.head == width) && fits) return {x.at(first, head), x.token};
  }
  const int64_t row = whole_vectors<T>(heads * width);
  for (int64_t t = 0; t < count; ++t)
    for (int64_t h = 0; h < heads; ++h) {
      const E* from = x.at(first + t, head + h);
      T* to = copy + t * row + h * width;
      SAMBAY_SIMD
      for (int64_t e = 0; e < width; ++e) to[e] = widen(from[e]);
    }
  return {copy, row};
}

// (rows, width), `row` apart -> (width, padded).
template <typename T>
void transpose(const T* from, int64_t row, int64_t rows, int64_t width, T* to, int64_t padded) {
  constexpr int64_t kRun = 8;
  for (int64_t r = 0; r < rows; r += kRun) {
    const int64_t count = std::min(kRun, rows - r);
    const T* source = from + r * row;
    for (int64_t e = 0; e < width; ++e) {
      T* target = to + e * padded + r;
      if (count == kRun)
        for (int64_t i = 0; i < kRun; ++i) target[i] = source[i * row + e];
      else
        for (int64_t i = 0; i < count; ++i) target[i] = source[i * row + e];
    }
  }
  for (int64_t e = 0; e < width; ++e) std::fill(to + e * padded + rows, to + (e + 1) * padded, T(0));
}

// Sizes that all blocks share.
template <typename E, typename T>
struct Sizes {
  int64_t pairs, group, width, values, whole_width, whole_values;

  explicit Sizes(const AttentionArgs<E, T>& in)
      : pairs(in.key_heads / 2),
        group(in.heads / in.key_heads),
        width(in.width),
        values(2 * width),
        whole_width(whole_vectors<T>(width)),
        whole_values(whole_vectors<T>(values)) {}

  int64_t rows() const { return whole_vectors<T>(std::max(kRows, group)); }

  // Queries of a block: about kRows rows, blocks of one size.
  int64_t queries(int64_t count) const {
    const int64_t most = std::max<int64_t>(1, kRows / group), blocks = (count + most - 1) / most;
    return blocks ? (count + blocks - 1) / blocks : 0;
  }

  // Keys that a block of the longest document sees at most.
  int64_t keys(const AttentionArgs<E, T>& in) const {
    int64_t longest = 0;
    for (int64_t s = 0; s < in.documents; ++s) longest = std::max(longest, Document(in, s).keys);
    const int64_t seen = std::max<int64_t>(1, kRows / group);
    return in.window && in.window < longest ? std::min(longest, in.window + seen) : longest;
  }
};

// Scaled queries of one stripe as rows.
template <typename E, typename T>
void load_queries(const AttentionArgs<E, T>& in, const Block<T>& block, int64_t pair, int64_t stripe, T* to,
                  int64_t row) {
  const T scale = static_cast<T>(in.scale * kLog2E);
  for (int64_t r = 0; r < block.rows; ++r) {
    const int64_t j = pair * block.group + r % block.group;
    const E* from = in.q.at(block.query + r / block.group, 2 * j + stripe);
    SAMBAY_SIMD
    for (int64_t e = 0; e < in.width; ++e) to[r * row + e] = widen(from[e]) * scale;
  }
}

// Scores of the keys [from, to), (keys, rows), by way of the queries (width, rows).
template <typename E, typename T>
void make_scores(const AttentionArgs<E, T>& in, const Block<T>& block, int64_t head, int64_t from, int64_t to,
                 const T* queries, T* scores, T* copy) {
  const Right<T> keys = side_by_side(in.k, block.key + from, to - from, head, 1, in.width, false, copy);
  const Sums<T> found{scores + from * block.padded, block.padded, false};
  product<T>(to - from, {keys.data, keys.row, 1}, {queries, block.padded}, found,
             [&](int64_t j, int64_t length) { return block.rows_seeing(from + j, length, in.width); });
}

// Runs `task(from, to)` over the keys of a block.
template <typename T, typename Task>
void for_keys(const Block<T>& block, const Task& task) {
  for (int64_t from = 0; from < block.keys; from += kKeys) task(from, std::min(block.keys, from + kKeys));
}

template <typename E, typename T>
class Forward {
 public:
  Forward(const AttentionForward<E, T>& given, int64_t most_keys, int64_t rows)
      : args(given), in(given.in), sizes(in) {
    const int64_t plane = most_keys * rows;
    std::tie(queries, across, first, second, top, total, values, copy) = std::tuple_cat(scratch<T, 8>(
        {rows * sizes.whole_width, rows * sizes.width, plane, plane, 2 * rows, 2 * rows, rows * sizes.whole_values,
         kKeys * sizes.whole_values}));
  }

  void run(const Block<T>& block, int64_t pair) {
    std::fill(top, top + 2 * block.padded, -std::numeric_limits<T>::infinity());
    std::fill(total, total + 2 * block.padded, T(0));
    for (int64_t stripe = 0; stripe < 2; ++stripe) softmax(block, pair, stripe);
    const T lambda = *in.lambda;
    for_keys(block, [&](int64_t from, int64_t to) {
      mix(block, from, to, lambda);
      const Right<T> right = side_by_side(in.v, block.key + from, to - from, 2 * pair, 2, in.width, true, copy);
      product<T>(block.rows, {first + from * block.padded, 1, block.padded}, right,
                 {values, sizes.whole_values, from > 0}, [&](int64_t row, int64_t length) {
                   return block.over_keys(row, length, from, to, sizes.whole_values);
                 });
    });
    for (int64_t r = 0; r < block.rows; ++r) finish(block, pair, r);
  }

 private:
  const AttentionForward<E, T>& args;
  const AttentionArgs<E, T>& in;
  const Sizes<E, T> sizes;
  T *queries, *across, *first, *second, *top, *total, *values, *copy;

  // Powers of two of one map's scores below their highest, and their sums.
  void softmax(const Block<T>& block, int64_t pair, int64_t stripe) {
    T *plane = stripe ? second : first, *highest = top + stripe * block.padded, *sums = total + stripe * block.padded;
    load_queries(in, block, pair, stripe, queries, sizes.whole_width);
    transpose(queries, sizes.whole_width, block.rows, in.width, across, block.padded);
    for_keys(block, [&](int64_t from, int64_t to) {
      make_scores(in, block, 2 * pair + stripe, from, to, across, plane, copy);
      for_lanes<T, 0>(block, from, to, {}, [&](const Lanes<T>& lanes, int64_t row, int64_t begin, int64_t end) {
        Vector<T> high = load_vector(highest + row);
        for (int64_t j = begin; j < end; ++j) {
          T* at = plane + j * block.padded + row;
          const Vector<T> score = lanes.masked(load_vector(at), j);
          store_vector(at, score);
          high = score > high ? score : high;
        }
        store_vector(highest + row, high);
      });
    });
    // A row whose scores are all minus infinity has no softmax: it becomes NaN by its sum, which is 0.
    for (int64_t r = 0; r < block.padded; ++r)
      if (highest[r] == -std::numeric_limits<T>::infinity()) highest[r] = T(0);
    for_keys(block, [&](int64_t from, int64_t to) {
      for_lanes<T, 0>(block, from, to, {}, [&](const Lanes<T>&, int64_t row, int64_t begin, int64_t end) {
        const Vector<T> high = load_vector(highest + row);
        Vector<T> sum = load_vector(sums + row);
        for (int64_t j = begin; j < end; ++j) {
          T* at = plane + j * block.padded + row;
          const Vector<T> power = exp2_lanes(load_vector(at) - high);
          store_vector(at, power);
          sum += power;
        }
        store_vector(sums + row, sum);
      });
    });
    for (int64_t r = 0; r < block.padded; ++r) sums[r] = T(1) / sums[r];
  }

  // maps[0] - lambda maps[1] in the first's place.
  void mix(const Block<T>& block, int64_t from, int64_t to, T lambda) {
    for_lanes<T, 1>(block, from, to, {first}, [&](const Lanes<T>&, int64_t row, int64_t begin, int64_t end) {
      const Vector<T> a = load_vector(total + row), b = load_vector(total + block.padded + row) * lambda;
      for (int64_t j = begin; j < end; ++j) {
        const int64_t at = j * block.padded + row;
        store_vector(first + at, load_vector(first + at) * a - load_vector(second + at) * b);
      }
    });
  }

  // The norm of one row, and what the backward needs.
  void finish(const Block<T>& block, int64_t pair, int64_t r) {
    const int64_t token = block.query + r / block.group, j = pair * block.group + r % block.group;
    const T* row = values + r * sizes.whole_values;
    T square = 0;
#pragma omp simd reduction(+ : square)
    for (int64_t e = 0; e < sizes.values; ++e) square += row[e] * row[e];
    const T norm = T(1) / std::sqrt(square / T(sizes.values) + T(in.eps)) * T(1 - in.lambda_init);
    const int64_t place = (token * in.heads / 2 + j) * sizes.values;
    E* out = args.out + place;
    SAMBAY_SIMD
    for (int64_t e = 0; e < sizes.values; ++e) out[e] = narrow<E>(row[e] * norm * in.weight[e]);
    if (!args.mixed) return;  // nobody asks for what the backward needs
    write(args.mixed + place, row, sizes.values, T(1));
    for (int64_t stripe = 0; stripe < 2; ++stripe) {
      T* kept = args.softmax + 2 * (token * in.heads + 2 * j + stripe);
      kept[0] = top[stripe * block.padded + r];
      kept[1] = total[stripe * block.padded + r];
    }
  }
};

// Queries [first, first + count) of a document, whose keys' gradients are summed by one task.
struct Chunk {
  int64_t document, first, count;
  int64_t key, keys;  // first row of k that any of them sees, and how many
  int64_t place;      // of its sums among those that are kept; -1: the document has no other chunk
};

template <typename E, typename T>
class Backward {
 public:
  Backward(const AttentionBackward<E, T>& given, int64_t most_keys, int64_t chunk_keys)
      : args(given), in(given.in), sizes(in) {
    const int64_t rows = sizes.rows(), plane = most_keys * rows, row = sizes.whole_width;
    std::tie(queries, across, upstream, upstream_across, first, second, slopes, mixed, softmax, inner, grad_q, copy,
             own) =
        std::tuple_cat(scratch<T, 13>(
            {2 * rows * row, 2 * rows * sizes.width, rows * sizes.whole_values, rows * sizes.values, plane, plane,
             plane, kKeys * rows, 4 * rows, 2 * rows, 2 * rows * row, kKeys * sizes.whole_values,
             chunk_keys * key_sums(sizes)}));
  }

  // Sums of one key: gradients of both stripes and of the values.
  static int64_t key_sums(const Sizes<E, T>& sizes) { return 2 * sizes.whole_width + sizes.whole_values; }

  // Gradients of a chunk's queries; of its keys in `kept` or, if that is null, where they belong; `sums` gets those of
  // lambda and the weight.
  void run(const Chunk& chunk, int64_t pair, T* kept, T* sums) {
    const Document document(in, chunk.document);
    of_keys = kept ? kept : own;
    of_values = of_keys + 2 * chunk.keys * sizes.whole_width;
    std::fill(of_keys, of_keys + chunk.keys * key_sums(sizes), T(0));
    std::fill(sums, sums + 1 + sizes.values, T(0));
    const int64_t step = sizes.queries(document.queries);
    for (int64_t i = chunk.first; i < chunk.first + chunk.count; i += step) {
      const int64_t count = std::min(step, chunk.first + chunk.count - i);
      block(Block<T>(document, i, count, in.window, sizes.group), chunk, pair, sums);
    }
    if (kept) return;
    for (int64_t j = 0; j < document.keys; ++j) {
      const int64_t at = document.key + j - chunk.key;
      const bool seen = at >= 0 && at < chunk.keys;
      const int64_t next = chunk.keys * sizes.whole_width;
      write_key(args, sizes, document.key + j, pair, seen ? of_keys + at * sizes.whole_width : nullptr, next,
                of_values + at * sizes.whole_values);
    }
  }

  // The gradients of one key and its value from their sums; zero if `keys` is null. `next`: from stripe to stripe.
  static void write_key(const AttentionBackward<E, T>& args, const Sizes<E, T>& sizes, int64_t token, int64_t pair,
                        const T* keys, int64_t next, const T* values) {
    const int64_t place = (token * sizes.pairs + pair) * sizes.values;
    if (!keys) {
      for (int64_t e = 0; e < sizes.values; ++e) {
        args.k[place + e] = narrow<E>(T(0));
        args.v[place + e] = narrow<E>(T(0));
      }
      return;
    }
    for (int64_t stripe = 0; stripe < 2; ++stripe)
      write(args.k + place + stripe * sizes.width, keys + stripe * next, sizes.width, T(1 / kLog2E));
    write(args.v + place, values, sizes.values, T(1));
  }

 private:
  const AttentionBackward<E, T>& args;
  const AttentionArgs<E, T>& in;
  const Sizes<E, T> sizes;
  T *queries, *across, *upstream, *upstream_across, *first, *second, *slopes, *mixed, *softmax, *inner, *grad_q, *copy;
  T *own, *of_keys, *of_values;

  void block(const Block<T>& block, const Chunk& chunk, int64_t pair, T* sums) {
    const int64_t offset = block.key - chunk.key, width = sizes.whole_width;
    load(block, pair, sums + 1);
    std::fill(inner, inner + 2 * block.padded, T(0));
    for_keys(block, [&](int64_t from, int64_t to) {
      remake(block, pair, from, to);
      product<T>(to - from, {mixed, block.padded, 1}, {upstream, sizes.whole_values},
                 {of_values + (offset + from) * sizes.whole_values, sizes.whole_values, true},
                 [&](int64_t j, int64_t length) { return block.over_rows(from + j, length, sizes.whole_values); });
    });
    for_keys(block, [&](int64_t from, int64_t to) {
      for (int64_t stripe = 0; stripe < 2; ++stripe) {
        T* plane = (stripe ? second : first) + from * block.padded;
        slope(block, stripe, from, to);
        product<T>(to - from, {plane, block.padded, 1}, {queries + stripe * sizes.rows() * width, width},
                   {of_keys + (stripe * chunk.keys + offset + from) * width, width, true},
                   [&](int64_t j, int64_t length) { return block.over_rows(from + j, length, width); });
        const Right<T> keys =
            side_by_side(in.k, block.key + from, to - from, 2 * pair + stripe, 1, in.width, true, copy);
        product<T>(block.rows, {plane, 1, block.padded}, keys,
                   {grad_q + stripe * sizes.rows() * width, width, from > 0},
                   [&](int64_t row, int64_t length) { return block.over_keys(row, length, from, to, width); });
      }
    });
    T of_lambda = 0;
    for (int64_t r = 0; r < block.rows; ++r) of_lambda -= inner[block.padded + r];
    sums[0] += of_lambda;
    store(block, pair);
  }

  // Queries, the softmax's figures, and the gradient below the norm.
  void load(const Block<T>& block, int64_t pair, T* of_weight) {
    const int64_t rows = sizes.rows(), width = sizes.whole_width;
    for (int64_t stripe = 0; stripe < 2; ++stripe) {
      T* to = queries + stripe * rows * width;
      load_queries(in, block, pair, stripe, to, width);
      transpose(to, width, block.rows, in.width, across + stripe * rows * in.width, block.padded);
    }
    std::fill(softmax, softmax + 4 * block.padded, T(0));
    T* part = mixed;  // free until there are scores
    std::fill(part, part + sizes.values, T(0));
    for (int64_t r = 0; r < block.rows; ++r) {
      const int64_t token = block.query + r / block.group, j = pair * block.group + r % block.group;
      const T* kept = args.softmax + 2 * (token * in.heads + 2 * j);
      for (int64_t i = 0; i < 4; ++i) softmax[i * block.padded + r] = kept[i];
      below_norm((token * in.heads / 2 + j) * sizes.values, upstream + r * sizes.whole_values, part);
    }
    for (int64_t e = 0; e < sizes.values; ++e) of_weight[e] += part[e];
    transpose(upstream, sizes.whole_values, block.rows, sizes.values, upstream_across, block.padded);
  }

  // y = x r w c with r = (mean(x^2) + eps)^(-1/2), c = 1 - lambda_init: gradients of x and, added up, of w.
  void below_norm(int64_t place, T* to, T* of_weight) {
    const E *grad = args.grad + place, *mixture = args.mixed + place;
    T square = 0, along = 0;
#pragma omp simd reduction(+ : square, along)
    for (int64_t e = 0; e < sizes.values; ++e) {
      const T x = widen(mixture[e]);
      square += x * x;
      along += x * widen(grad[e]) * in.weight[e];
    }
    const T norm = T(1) / std::sqrt(square / T(sizes.values) + T(in.eps)), constant = T(1 - in.lambda_init);
    const T pull = norm * norm * along / T(sizes.values);
    SAMBAY_SIMD
    for (int64_t e = 0; e < sizes.values; ++e) {
      const T x = widen(mixture[e]), g = widen(grad[e]);
      to[e] = constant * norm * (g * in.weight[e] - x * pull);
      of_weight[e] += constant * norm * (g * x);
    }
  }

  // Both maps of the keys [from, to), their difference, the difference's gradient, and its products with the maps.
  void remake(const Block<T>& block, int64_t pair, int64_t from, int64_t to) {
    const int64_t rows = sizes.rows(), padded = block.padded;
    for (int64_t stripe = 0; stripe < 2; ++stripe)
      make_scores(in, block, 2 * pair + stripe, from, to, across + stripe * rows * in.width, stripe ? second : first,
                  copy);
    const Right<T> values = side_by_side(in.v, block.key + from, to - from, 2 * pair, 2, in.width, false, copy);
    product<T>(to - from, {values.data, values.row, 1}, {upstream_across, padded},
               {slopes + from * padded, padded, false},
               [&](int64_t j, int64_t length) { return block.rows_seeing(from + j, length, sizes.values); });
    const T lambda = *in.lambda;
    T* const mixture = mixed - from * padded;
    for_lanes<T, 3>(block, from, to, {first, second, mixture}, [&](const Lanes<T>& lanes, int64_t row, int64_t begin,
                                                                int64_t end) {
      Vector<T> kept[4], sum0 = load_vector(inner + row), sum1 = load_vector(inner + padded + row);
      for (int i = 0; i < 4; ++i) kept[i] = load_vector(softmax + i * padded + row);
      for (int64_t j = begin; j < end; ++j) {
        const int64_t at = j * padded + row;
        const Vector<T> a = exp2_lanes(lanes.masked(load_vector(first + at), j) - kept[0]) * kept[1];
        const Vector<T> b = exp2_lanes(lanes.masked(load_vector(second + at), j) - kept[2]) * kept[3];
        const Vector<T> slope = load_vector(slopes + at);
        store_vector(first + at, a);
        store_vector(second + at, b);
        store_vector(mixture + at, a - b * lambda);
        sum0 += a * slope;
        sum1 += b * slope;
      }
      store_vector(inner + row, sum0);
      store_vector(inner + padded + row, sum1);
    });
  }

  // The gradient of one map's scores in the map's place.
  void slope(const Block<T>& block, int64_t stripe, int64_t from, int64_t to) {
    T* plane = stripe ? second : first;
    const T factor = stripe ? -*in.lambda : T(1);
    for_lanes<T, 0>(block, from, to, {}, [&](const Lanes<T>&, int64_t row, int64_t begin, int64_t end) {
      const Vector<T> mean = load_vector(inner + stripe * block.padded + row);
      for (int64_t j = begin; j < end; ++j) {
        const int64_t at = j * block.padded + row;
        store_vector(plane + at, load_vector(plane + at) * (load_vector(slopes + at) - mean) * factor);
      }
    });
  }

  void store(const Block<T>& block, int64_t pair) {
    for (int64_t r = 0; r < block.rows; ++r) {
      const int64_t token = block.query + r / block.group, j = pair * block.group + r % block.group;
      for (int64_t stripe = 0; stripe < 2; ++stripe)
        write(args.q + (token * in.heads + 2 * j + stripe) * in.width,
              grad_q + (stripe * sizes.rows() + r) * sizes.whole_width, in.width, static_cast<T>(in.scale));
    }
  }
};

// Exact whatever the threads: a task is done by one thread, in one order.
template <typename Make, typename Task>
void run_tasks(int64_t tasks, int64_t work, int threads, const Make& make, const Task& task) {
  const int used = work < kSmall ? 1 : static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(tasks, 1)));
#pragma omp parallel num_threads(used) if (used > 1)
  {
    FlushDenormals guard;
    auto worker = make();
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < tasks; ++i) task(worker, tasks - 1 - i);  // a document's last blocks see the most keys
    if (memory.bytes > kKept) memory.release();
  }
}

// Pairs of a query and a key, about, times the heads' width: below kSmall threads cost more than they give.
template <typename E, typename T>
int64_t work_of(const AttentionArgs<E, T>& in) {
  const int64_t keys = in.window ? std::min<int64_t>(in.window, in.borders_k[in.documents]) : 64;
  return in.borders_q[in.documents] * keys * in.heads;
}

template <typename E, typename T>
void attention_forward(const AttentionForward<E, T>& args, int threads) {
  const AttentionArgs<E, T>& in = args.in;
  const Sizes<E, T> sizes(in);
  std::vector<Block<T>> blocks;
  for (int64_t s = 0; s < in.documents; ++s) {
    const Document document(in, s);
    const int64_t step = sizes.queries(document.queries);
    for (int64_t i = 0; i < document.queries; i += step)
      blocks.emplace_back(document, i, std::min(step, document.queries - i), in.window, sizes.group);
  }
  const int64_t keys = sizes.keys(in);
  run_tasks(static_cast<int64_t>(blocks.size()) * sizes.pairs, work_of(in), threads,
            [&] { return Forward<E, T>(args, keys, sizes.rows()); },
            [&](Forward<E, T>& worker, int64_t i) { worker.run(blocks[i / sizes.pairs], i % sizes.pairs); });
}

// The keys that a sequence's token sees: those that are hidden at the start, as where shorter prompts are padded, are no
// work. A sequence that may see none, an idle place in a batch, sees all.
template <typename E, typename T>
Block<T> seen_by(const AttentionStep<E, T>& args, int64_t row, int64_t members) {
  const bool* visible = args.mask ? args.mask + row * args.mask_row : nullptr;
  int64_t hidden = 0;
  if (visible) {
    const void* found = std::memchr(visible, true, args.keys);
    hidden = found ? static_cast<const bool*>(found) - visible : 0;
    const bool whole = !found || !std::memchr(visible + hidden, false, args.keys - hidden);
    visible = whole ? nullptr : visible + hidden;
  }
  return {row, row * args.row_keys + hidden, args.keys - hidden, visible, members};
}

template <typename E, typename T>
void attention_step(const AttentionStep<E, T>& args, int threads) {
  const AttentionForward<E, T> forward{args.in, args.out, nullptr, nullptr};
  const Sizes<E, T> sizes(args.in);
  const int64_t rows = args.in.documents, work = rows * args.keys * args.in.heads;
  run_tasks(rows * sizes.pairs, work, threads,
            [&] { return Forward<E, T>(forward, args.keys, whole_vectors<T>(sizes.group)); },
            [&](Forward<E, T>& worker, int64_t i) {
              worker.run(seen_by(args, i / sizes.pairs, sizes.group), i % sizes.pairs);
            });
}

// Chunks of queries of every document; the cut depends on its own length, the window and the heads.
template <typename E, typename T>
std::vector<Chunk> chunks_of(const AttentionArgs<E, T>& in, const Sizes<E, T>& sizes, int64_t& kept) {
  std::vector<Chunk> chunks;
  kept = 0;
  for (int64_t s = 0; s < in.documents; ++s) {
    const Document document(in, s);
    const int64_t step = std::max<int64_t>(1, sizes.queries(document.queries));
    const bool narrow = in.window && in.window < document.keys;  // sums overlap at the chunks' edges only
    const int64_t least = narrow ? std::max(kChunkQueries, in.window) : kChunkQueries;
    const int64_t most = narrow ? document.queries : std::max<int64_t>(2, kChunks / sizes.pairs);
    const int64_t wanted = std::max<int64_t>(1, std::min(most, document.queries / least));
    const int64_t length = std::max<int64_t>(1, (document.queries + wanted * step - 1) / (wanted * step)) * step;
    for (int64_t i = 0; i == 0 || i < document.queries; i += length) {
      const int64_t count = std::min(length, document.queries - i);
      const Block<T> seen(document, i, count, in.window, sizes.group);
      const bool alone = length >= document.queries;
      chunks.push_back({s, i, count, seen.key, count ? seen.keys : 0, alone ? -1 : kept});
      if (!alone) kept += seen.keys;
    }
  }
  return chunks;
}

// Adds up a run of keys' sums of all chunks of a document, in the chunks' order, and writes the gradients.
template <typename E, typename T>
void sum_chunks(const AttentionBackward<E, T>& args, const Sizes<E, T>& sizes, const std::vector<Chunk>& chunks,
                size_t chunk, const T* kept, int64_t pair, int64_t first, int64_t last) {
  const int64_t each = Backward<E, T>::key_sums(sizes), width = sizes.whole_width;
  std::vector<T> sums(each);
  for (int64_t token = first; token < last; ++token) {
    std::fill(sums.begin(), sums.end(), T(0));
    for (size_t c = chunk; c < chunks.size() && chunks[c].document == chunks[chunk].document; ++c) {
      const int64_t at = token - chunks[c].key, keys = chunks[c].keys;
      if (at < 0 || at >= keys) continue;
      const T* from = kept + (chunks[c].place * sizes.pairs + pair * keys) * each;
      for (int64_t stripe = 0; stripe < 2; ++stripe)
        for (int64_t e = 0; e < width; ++e) sums[stripe * width + e] += from[(stripe * keys + at) * width + e];
      for (int64_t e = 0; e < sizes.whole_values; ++e)
        sums[2 * width + e] += from[2 * keys * width + at * sizes.whole_values + e];
    }
    Backward<E, T>::write_key(args, sizes, token, pair, sums.data(), width, sums.data() + 2 * width);
  }
}

template <typename E, typename T>
void attention_backward(const AttentionBackward<E, T>& args, int threads) {
  const AttentionArgs<E, T>& in = args.in;
  const Sizes<E, T> sizes(in);
  int64_t rows = 0, longest = 0;
  const std::vector<Chunk> chunks = chunks_of(in, sizes, rows);
  const int64_t pairs = sizes.pairs, row = 1 + sizes.values, tasks = static_cast<int64_t>(chunks.size()) * pairs;
  const int64_t keys = sizes.keys(in), each = Backward<E, T>::key_sums(sizes);
  std::vector<T> kept(rows * pairs * each), sums(tasks * row);
  for (const Chunk& chunk : chunks)
    if (chunk.place < 0) longest = std::max(longest, chunk.keys);
  run_tasks(tasks, work_of(in), threads, [&] { return Backward<E, T>(args, keys, longest); },
            [&](Backward<E, T>& worker, int64_t i) {
              const Chunk& chunk = chunks[i / pairs];
              T* place = chunk.place < 0 ? nullptr : &kept[(chunk.place * pairs + i % pairs * chunk.keys) * each];
              worker.run(chunk, i % pairs, place, &sums[i * row]);
            });
  struct Run {
    size_t chunk;
    int64_t first, last;
  };
  std::vector<Run> runs;
  for (size_t c = 0; c < chunks.size(); ++c) {
    if (chunks[c].place < 0 || chunks[c].first > 0) continue;
    const Document document(in, chunks[c].document);
    for (int64_t j = 0; j < document.keys; j += kSumKeys)
      runs.push_back({c, document.key + j, document.key + std::min(document.keys, j + kSumKeys)});
  }
  run_tasks(static_cast<int64_t>(runs.size()) * pairs, work_of(in), threads, [] { return 0; },
            [&](int, int64_t i) {
              const Run& run = runs[i / pairs];
              sum_chunks(args, sizes, chunks, run.chunk, kept.data(), i % pairs, run.first, run.last);
            });
  for (int64_t e = 0; e < row; ++e) {
    double total = 0;
    for (int64_t i = 0; i < tasks; ++i) total += static_cast<double>(sums[i * row + e]);
    (e ? args.weight[e - 1] : *args.lambda) = static_cast<T>(total);
  }
}

}  // namespace
}  // namespace sambay

#define SAMBAY_EXPORT(E, T, suffix)                                                                                  \
  extern "C" void sambay_attention_forward_##suffix(const sambay::AttentionForward<E, T>* args, int threads) {       \
    sambay::attention_forward(*args, threads);                                                                       \
  }                                                                                                                  \
  extern "C" void sambay_attention_backward_##suffix(const sambay::AttentionBackward<E, T>* args, int threads) {     \
    sambay::attention_backward(*args, threads);                                                                      \
  }                                                                                                                  \
  extern "C" void sambay_attention_step_##suffix(const sambay::AttentionStep<E, T>* args, int threads) {             \
    sambay::attention_step(*args, threads);                                                                          \
  }

SAMBAY_EXPORT(float, float, f32)
SAMBAY_EXPORT(double, double, f64)
SAMBAY_EXPORT(sambay::BFloat16, float, bf16)
