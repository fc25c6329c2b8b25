// A decoding step's differential attention over rings and pages.
//
// A task is a piece of a sequence's places, cut by their numbers alone, and a pair of key heads with all queries that
// read it. Pieces are added up in their order. A ring is a page of its own.
#pragma once

#include "decoder.h"

namespace sambay {
namespace {

constexpr int64_t kPiece = 512;     // places of a task
constexpr int64_t kCopied = 64;     // keys or values that are widened or padded at once
constexpr int64_t kTaskPlaces = 32;  // how many places a task costs beside its own

// Keys and values of a layer: (pages, key heads, size, width), pages by a sequence's list.
template <typename S>
struct Places {
  S *keys, *values;
  int64_t heads, size, width;
  const int32_t* pages;  // of the sequence
  int64_t seen, next;    // how many places it sees, and where its new token stands

  int64_t offset(int64_t head, int64_t place) const {
    return ((pages[place / size] * heads + head) * size + place % size) * width;
  }
};

template <typename S>
class Attention {
 public:
  using T = Compute<S>;
  static constexpr int64_t kLanes = Simd<T>::kLanes;

  Attention(const DecoderRows<S>& given, Room& room, int64_t workers)
      : rows(given),
        model(given.model),
        pairs(model.key_heads / 2),
        group(pairs ? model.heads / model.key_heads : 0),
        width(model.width),
        padded(whole_vectors<T>(width)),
        part(2 * group * (2 + 2 * padded)),
        scratch_row((2 * group * (padded + kPiece) + kCopied * padded + kLanes) / kLanes * kLanes),
        first_piece(room.take<int64_t>(rows.count + 1)),
        ring_page(room.take<int32_t>(rows.count)) {
    int64_t pieces = 0;
    for (int64_t r = 0; r < rows.count; ++r) {
      const int64_t tokens = rows.slots.lengths[rows.slot[r]] + 1;
      if (first_piece) first_piece[r] = pieces, ring_page[r] = static_cast<int32_t>(rows.slot[r]);
      pieces += (tokens + kPiece - 1) / kPiece;
    }
    if (first_piece) first_piece[rows.count] = pieces;
    parts = room.take<T>(pieces * pairs * part);
    scratch = room.take<T>(workers * scratch_row);
  }

  // This worker's share of the tasks: keys and values are written, and the maps' parts made.
  void attend(const Worker& worker, const DecoderLayer<S>& layer) const {
    int64_t total = 0, cost = 0;
    for (int64_t r = 0; r < rows.count; ++r) total += cost_of(places(layer, r).seen);
    const int64_t first = worker.first(total), last = worker.last(total);
    for (int64_t r = 0; r < rows.count && cost < last; ++r) {
      const Places<S> at = places(layer, r);
      if (cost + cost_of(at.seen) <= first) {
        cost += cost_of(at.seen);
        continue;
      }
      for (int64_t from = 0; from < at.seen; from += kPiece)
        for (int64_t pair = 0; pair < pairs; ++pair) {
          const int64_t to = std::min(at.seen, from + kPiece);
          if (cost >= first && cost < last) task(worker, layer, at, r, pair, from, to);
          cost += to - from + kTaskPlaces;
        }
    }
  }

  // This worker's share of the results: parts added up, maps subtracted, normalised, into `attended`.
  void finish(const Worker& worker, const DecoderLayer<S>& layer) const {
    for (int64_t unit = worker.first(rows.count * pairs); unit < worker.last(rows.count * pairs); ++unit) {
      const int64_t r = unit / pairs, pair = unit % pairs;
      T* whole = part_of(r, 0, pair);
      const int64_t pieces = (places(layer, r).seen + kPiece - 1) / kPiece;
      for (int64_t row = 0; row < 2 * group; ++row) add_up(r, pair, pieces, row, whole);
      for (int64_t g = 0; g < group; ++g)
        subtract(layer, sums(whole, g), sums(whole, group + g), rows.attended.at(r) + (pair * group + g) * 2 * width);
    }
  }

 private:
  const DecoderRows<S>& rows;
  const Decoder<S>& model;
  const int64_t pairs, group, width, padded;
  const int64_t part;  // of a task: highest score and sum of each query, then its sums of values
  const int64_t scratch_row;
  int64_t* first_piece;
  int32_t* ring_page;
  T *parts, *scratch;

  int64_t cost_of(int64_t seen) const { return pairs * (seen + (seen + kPiece - 1) / kPiece * kTaskPlaces); }

  T* part_of(int64_t r, int64_t piece, int64_t pair) const {
    return parts + ((first_piece[r] + piece) * pairs + pair) * part;
  }

  T* sums(T* of, int64_t row) const { return of + 4 * group + row * 2 * padded; }

  Places<S> places(const DecoderLayer<S>& layer, int64_t r) const {
    const DecoderSlots<S>& in = rows.slots;
    const int64_t before = rows.before[r];
    if (layer.window) {
      const int64_t layers = layer.place * in.slots * model.key_heads * in.ring * width;
      return {in.ring_keys + layers, in.ring_values + layers, model.key_heads, in.ring, width, ring_page + r,
              std::min(before + 1, layer.window), before % layer.window};
    }
    const int64_t layers = layer.place * in.pages * model.key_heads * in.page_size * width;
    return {in.page_keys + layers, in.page_values + layers, model.key_heads, in.page_size, width,
            in.table + rows.slot[r] * in.listed, before + 1, before};
  }

  void task(const Worker& worker, const DecoderLayer<S>& layer, const Places<S>& at, int64_t r, int64_t pair,
            int64_t from, int64_t to) const {
    if (layer.own_keys && at.next >= from && at.next < to) write_new(at, r, pair);
    T *queries = scratch + worker.index * scratch_row, *scores = queries + 2 * group * padded;
    T *copy = scores + 2 * group * kPiece, *of = part_of(r, from / kPiece, pair);
    load_queries(r, pair, queries);
    for (int64_t j = from; j < to; j += kLanes) score(at, pair, j, std::min(kLanes, to - j), queries, scores + j - from, copy);
    for (int64_t row = 0; row < 2 * group; ++row)
      powers(scores + row * kPiece, whole_vectors<T>(to - from), of[row], of[2 * group + row]);
    std::fill(sums(of, 0), sums(of, 2 * group), T(0));
    for (int64_t j = from; j < to;) {
      const int64_t run = std::min({to - j, kCopied, at.size - j % at.size});
      for (int64_t side = 0; side < 2; ++side) {
        const Right<T> values = widened(at.values + at.offset(2 * pair + side, j), run, copy);
        product<T>(2 * group, {scores + j - from, kPiece, 1}, values, {sums(of, 0) + side * padded, 2 * padded, true},
                   [&](int64_t, int64_t) { return Reach{0, run, 0, padded}; });
      }
      j += run;
    }
  }

  void write_new(const Places<S>& at, int64_t r, int64_t pair) const {
    const S *keys = rows.qkv.at(r) + model.heads * width, *values = keys + model.key_heads * width;
    for (int64_t head = 2 * pair; head < 2 * pair + 2; ++head) {
      const int64_t to = at.offset(head, at.next);
      std::copy_n(keys + head * width, width, at.keys + to);
      std::copy_n(values + head * width, width, at.values + to);
    }
  }

  // Row s * group + g: the query of map s of the pair's g-th pair of heads, scaled to powers of two.
  void load_queries(int64_t r, int64_t pair, T* to) const {
    const T scale = static_cast<T>(kLog2E / std::sqrt(static_cast<double>(width)));
    for (int64_t row = 0; row < 2 * group; ++row, to += padded) {
      const S* from = rows.qkv.at(r) + (2 * (pair * group + row % group) + row / group) * width;
      for (int64_t e = 0; e < width; ++e) to[e] = widen(from[e]) * scale;
      std::fill(to + width, to + padded, T(0));
    }
  }

  // Rows side by side, in whole vectors: in place where they lie so.
  Right<T> widened(const S* from, int64_t count, T* copy) const {
    if constexpr (std::is_same_v<S, T>)
      if (padded == width) return {from, width};
    for (int64_t j = 0; j < count; ++j) {
      T* to = copy + j * padded;
      SAMBAY_SIMD
      for (int64_t e = 0; e < width; ++e) to[e] = widen(from[j * width + e]);
      std::fill(to + width, to + padded, T(0));
    }
    return {copy, padded};
  }

  // Scores of a vector of places from `j` on, `count` of them real: (queries, kPiece).
  void score(const Places<S>& at, int64_t pair, int64_t j, int64_t count, const T* queries, T* scores, T* copy) const {
    for (int64_t side = 0; side < 2; ++side) {
      const T* keys[kLanes];
      for (int64_t i = 0; i < kLanes;) {
        const int64_t place = j + std::min(i, count - 1);
        const int64_t run = i < count ? std::min(count - i, at.size - place % at.size) : kLanes - i;
        const Right<T> found = widened(at.keys + at.offset(2 * pair + side, place), i < count ? run : 1, copy + i * padded);
        for (int64_t k = 0; k < run; ++k) keys[i + k] = found.data + (i < count ? k : 0) * found.row;
        i += run;
      }
      for (int64_t row = side * group; row < (side + 1) * group; ++row) {
        Vector<T> found = products(queries + row * padded, keys);
        for (int64_t i = count; i < kLanes; ++i) found[i] = -std::numeric_limits<T>::infinity();
        store_vector(scores + row * kPiece, found);
      }
    }
  }

  SAMBAY_FN Vector<T> products(const T* query, const T* const* keys) const {
    Vector<T> found[kLanes] = {};
    for (int64_t e = 0; e < padded; e += kLanes) {
      const Vector<T> factors = load_vector(query + e);
      for (int64_t i = 0; i < kLanes; ++i) found[i] += factors * load_vector(keys[i] + e);
    }
    return sums_of_lanes<T>(found);
  }

  // Scores become powers of two below the highest; their sum.
  static void powers(T* scores, int64_t count, T& highest, T& sum) {
    Vector<T> high = load_vector(scores), total{};
    for (int64_t j = kLanes; j < count; j += kLanes) {
      const Vector<T> other = load_vector(scores + j);
      high = other > high ? other : high;
    }
    highest = high[0];
    for (int64_t lane = 1; lane < kLanes; ++lane) highest = std::max<T>(highest, high[lane]);
    for (int64_t j = 0; j < count; j += kLanes) {
      const Vector<T> power = exp2_lanes(load_vector(scores + j) - highest);
      store_vector(scores + j, power);
      total += power;
    }
    sum = sum_of_lanes<T>(total);
  }

  // A query's parts become, in the first of them, the values' mean.
  void add_up(int64_t r, int64_t pair, int64_t pieces, int64_t row, T* whole) const {
    T highest = whole[row], total = 0;
    for (int64_t piece = 1; piece < pieces; ++piece) highest = std::max(highest, part_of(r, piece, pair)[row]);
    T* to = sums(whole, row);
    for (int64_t piece = 0; piece < pieces; ++piece) {
      T* of = part_of(r, piece, pair);
      const T factor = exp2_of(of[row] - highest), *from = sums(of, row);
      total += factor * of[2 * group + row];
      SAMBAY_SIMD
      for (int64_t e = 0; e < 2 * padded; ++e) to[e] = piece ? to[e] + factor * from[e] : factor * from[e];
    }
    SAMBAY_SIMD
    for (int64_t e = 0; e < 2 * padded; ++e) to[e] = divide(to[e], total);
  }

  // (first - lambda second), normalised by its root mean square; both in two padded halves.
  void subtract(const DecoderLayer<S>& layer, T* first, const T* second, S* out) const {
    const T lambda = static_cast<T>(layer.lambda);
    T square = 0;
    for (int64_t e = 0; e < 2 * padded; ++e) {
      first[e] -= lambda * second[e];
      square += first[e] * first[e];
    }
    const T scale = 1 / std::sqrt(square / static_cast<T>(2 * width) + T(1e-5));
    for (int64_t side = 0; side < 2; ++side)
      for (int64_t e = 0; e < width; ++e)
        out[side * width + e] = narrow<S>(first[side * padded + e] * scale * layer.subln[side * width + e]);
  }
};

}  // namespace
}  // namespace sambay
