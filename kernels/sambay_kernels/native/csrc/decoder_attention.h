// A decoding step's differential attention over rings and pages.
//
// A task is a piece of a sequence's places, cut by their numbers alone, and a pair of key heads with all queries that
// read it. Pieces are added up in their order. A ring is a page of its own. Pages get the keys and values of all rows
// before any is read; a ring's places are taken again as a run goes on, so a run's tokens are read where its rows have
// them, and the last ones go into the ring when all have been read.
#pragma once

#include "decoder.h"

namespace sambay {
namespace {

constexpr int64_t kPiece = 512;      // places of a task
constexpr int64_t kTaskPlaces = 32;  // how many places a task costs beside its own
constexpr int64_t kFetched = 16;     // places ahead that are fetched

// Keys and values of a layer: (pages, key heads, size, width), pages by a sequence's list.
template <typename S>
struct Places {
  S *keys, *values;
  int64_t heads, size, width;
  const int32_t* pages;  // of the sequence
  int64_t seen, next;    // how many places it sees, and where its new token stands

  // Where the places [from, to) of a head lie that begins here.
  void list(const S* head, int64_t from, int64_t to, const S** place) const {
    for (int64_t j = from; j < to;) {
      const int64_t run = std::min(to - j, size - j % size);
      const S* begin = head + offset(j);
      for (int64_t i = 0; i < run; ++i) *place++ = begin + i * width;
      j += run;
    }
  }
  int64_t offset(int64_t j) const { return (pages[j / size] * heads * size + j % size) * width; }
  int64_t of_head(int64_t head) const { return head * size * width; }
};

// A vector's worth of a row as it is read: of bfloat16 pairs, which are two vectors.
template <typename S>
using Read = std::conditional_t<std::is_same_v<S, BFloat16>, Pairs, Vector<Compute<S>>>;

template <typename S>
class Attention {
 public:
  using T = Compute<S>;
  static constexpr int64_t kLanes = Simd<T>::kLanes;
  static constexpr int64_t kRead = kLanes * kSideBySide<S>;  // elements of a vector's worth of a row
  static_assert(kFetched >= kLanes && kPiece % kLanes == 0, "scores are made a vector at a time");

  Attention(const DecoderRows<S>& given, const RowOrder<S>& order, Room& room, int64_t workers)
      : rows(given),
        model(given.model),
        pairs(model.key_heads / 2),
        group(pairs ? model.heads / model.key_heads : 0),
        width(model.width),
        padded((width + kRead - 1) / kRead * kRead),
        part(2 * group * (2 + 2 * padded)),
        scratch_row(2 * group * (padded + kPiece)),
        first_piece(room.take<int64_t>(rows.count + 1)),
        ring_page(room.take<int32_t>(rows.count)) {
    int64_t pieces = 0, unwanted_sees = rows.slots.ring;
    for (int64_t i = 0; i < order.last_kept; ++i)
      if (model.layers[i].mixer == kAttention && !model.layers[i].window) unwanted_sees = INT64_MAX;
    auto wanted = order.wanted.begin();
    for (int64_t r = 0; r < rows.count; ++r) {
      const bool is_wanted = wanted != order.wanted.end() && *wanted == r;
      const int64_t tokens = rows.before[r] + 1, seen = is_wanted ? tokens : std::min(tokens, unwanted_sees);
      if (first_piece) first_piece[r] = pieces, ring_page[r] = static_cast<int32_t>(rows.slot[r]);
      pieces += pieces_of(seen);
      wanted += is_wanted;
    }
    if (first_piece) first_piece[rows.count] = pieces;
    parts = room.take<T>(pieces * pairs * part);
    scratch = room.take<T>(workers * scratch_row);
  }

  // This worker's share of the rows' keys and values, into pages.
  void keep(const Worker& worker, const DecoderLayer<S>& layer) const {
    for (int64_t r = worker.first(rows.count); r < worker.last(rows.count); ++r) {
      const Places<S> at = places(layer, r);
      for (int64_t pair = 0; pair < pairs; ++pair) write_new(at, r, pair, at.offset(at.next));
    }
  }

  // This worker's share of the tasks: the maps' parts are made.
  void attend(const Worker& worker, const DecoderLayer<S>& layer, const Chosen& chosen) const {
    int64_t total = 0, cost = 0;
    for (int64_t i = 0; i < chosen.count; ++i) total += cost_of(places(layer, chosen.row[i]).seen);
    const int64_t first = worker.first(total), last = worker.last(total);
    for (int64_t i = 0; i < chosen.count && cost < last; ++i) {
      const int64_t all = cost_of(places(layer, chosen.row[i]).seen);
      cost = cost + all <= first ? cost + all : read_share(worker, layer, chosen, i, cost, first, last);
    }
  }

  // This worker's share of the results: parts added up, maps subtracted, normalised, into `attended`; of a run's last
  // tokens, keys and values into rings.
  void finish(const Worker& worker, const DecoderLayer<S>& layer, const Chosen& chosen) const {
    for (int64_t unit = worker.first(chosen.count * pairs); unit < worker.last(chosen.count * pairs); ++unit) {
      const int64_t i = unit / pairs, r = chosen.row[i], pair = unit % pairs;
      T* whole = part_of(r, 0, pair);
      const Places<S> at = places(layer, r);
      const int64_t pieces = pieces_of(at.seen);
      for (int64_t row = 0; row < 2 * group; ++row) add_up(r, pair, pieces, row, whole);
      for (int64_t g = 0; g < group; ++g)
        subtract(layer, sums(whole, g), sums(whole, group + g), rows.attended.at(i) + (pair * group + g) * 2 * width);
      if (layer.window && rows.run_after[r] < layer.window) write_new(at, r, pair, at.offset(at.next));
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

  static int64_t pieces_of(int64_t seen) { return (seen - 1) / kPiece + 1; }

  int64_t cost_of(int64_t seen) const { return pairs * (seen + pieces_of(seen) * kTaskPlaces); }

  // Those pieces and pairs of a row that lie in a share of the costs; returns the cost behind them.
  int64_t read_share(const Worker& worker, const DecoderLayer<S>& layer, const Chosen& chosen, int64_t i, int64_t cost,
                     int64_t first, int64_t last) const {
    const Places<S> at = places(layer, chosen.row[i]);
    for (int64_t from = 0; from < at.seen; from += kPiece)
      for (int64_t pair = 0; pair < pairs; ++pair) {
        const int64_t to = std::min(at.seen, from + kPiece);
        if (cost >= first && cost < last) task(worker, layer, chosen, at, i, pair, from, to);
        cost += to - from + kTaskPlaces;
      }
    return cost;
  }

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

  void task(const Worker& worker, const DecoderLayer<S>& layer, const Chosen& chosen, const Places<S>& at, int64_t i,
            int64_t pair, int64_t from, int64_t to) const {
    const int64_t r = chosen.row[i];
    const S* list[kPiece + kFetched];
    T* scores = scratch + worker.index * scratch_row;
    S* queries = reinterpret_cast<S*>(scores + 2 * group * kPiece);
    T* of = part_of(r, from / kPiece, pair);
    load_queries(rows.qkv.at(layer.own_keys ? r : i), pair, queries);
    const int64_t count = to - from;
    for (int64_t side = 0; side < 2; ++side) {
      list_places(layer, at, r, at.keys, model.heads, 2 * pair + side, from, to, list);
      for (int64_t j = 0; j < count; j += kLanes)
        score(list + j, count - j, queries + side * group * padded, scores + side * group * kPiece + j);
    }
    for (int64_t row = 0; row < 2 * group; ++row)
      powers(scores + row * kPiece, whole_vectors<T>(count), of[row], of[2 * group + row]);
    for (int64_t side = 0; side < 2; ++side) {
      list_places(layer, at, r, at.values, model.heads + model.key_heads, 2 * pair + side, from, to, list);
      for (int64_t row = 0; row < 2 * group; row += kSumRows)
        sum_values_of(std::min(kSumRows, 2 * group - row), list, count, scores + row * kPiece,
                      sums(of, row) + side * padded);
    }
  }

  // Where a head's keys or values at the places [from, to) lie, and beyond them the last one again: `kept` in rings or
  // pages, those of the run up to row r still in its rows, behind `heads_before` heads.
  void list_places(const DecoderLayer<S>& layer, const Places<S>& at, int64_t r, const S* kept, int64_t heads_before,
                   int64_t head, int64_t from, int64_t to, const S** list) const {
    at.list(kept + at.of_head(head), from, to, list);
    if (layer.window) {
      const S* newest = rows.qkv.at(r) + (heads_before + head) * width;
      const int64_t oldest = at.next - std::min(rows.run_before[r], at.seen - 1);
      for (int64_t j = std::max(from, oldest); j < std::min(to, at.next + 1); ++j)
        list[j - from] = newest - (at.next - j) * rows.qkv.row;
      for (int64_t j = std::max(from, oldest + layer.window); j < to; ++j)
        list[j - from] = newest - (at.next + layer.window - j) * rows.qkv.row;
    }
    std::fill_n(list + (to - from), kFetched, list[to - from - 1]);
  }

  void write_new(const Places<S>& at, int64_t r, int64_t pair, int64_t offset) const {
    const S *keys = rows.qkv.at(r) + model.heads * width, *values = keys + model.key_heads * width;
    for (int64_t head = 2 * pair; head < 2 * pair + 2; ++head) {
      std::copy_n(keys + head * width, width, at.keys + at.of_head(head) + offset);
      std::copy_n(values + head * width, width, at.values + at.of_head(head) + offset);
    }
  }

  // Row s * group + g: the query of map s of the pair's g-th pair of heads.
  void load_queries(const S* from, int64_t pair, S* to) const {
    for (int64_t row = 0; row < 2 * group; ++row, to += padded) {
      std::copy_n(from + (2 * (pair * group + row % group) + row / group) * width, width, to);
      std::fill(to + width, to + padded, S{});
    }
  }

  Read<S> read(const S* row, int64_t e) const { return load_first<Read<S>>(row + e, width - e); }

  // Scores, in powers of two, of a vector of places of which `count` are real: (queries, kPiece).
  void score(const S* const* keys, int64_t count, const S* queries, T* scores) const {
    const T scale = static_cast<T>(kLog2E / std::sqrt(static_cast<double>(width)));
    for (int64_t i = 0; i < kLanes; ++i) fetch(keys[std::min(i + kLanes, count)], width);
    for (int64_t row = 0; row < group; ++row) {
      Vector<T> found[kLanes] = {};
      for (int64_t e = 0; e < padded; e += kRead) {
        const Read<S> query = load_first<Read<S>>(queries + row * padded + e, kRead);
        for (int64_t i = 0; i < kLanes; ++i)
          found[i] = add_products(found[i], query, read(keys[i], e));
      }
      Vector<T> sums = scale * sums_of_lanes<T>(found);
      for (int64_t i = count; i < kLanes; ++i) sums[i] = -std::numeric_limits<T>::infinity();
      store_vector(scores + row * kPiece, sums);
    }
  }

  static constexpr int64_t kSumRows = 4;

  // Values (as they are read: bfloat16's even elements before the odd ones) times factors, for some rows.
  template <int Rows = kSumRows>
  void sum_values_of(int64_t count_rows, const S* const* values, int64_t count, const T* factors,
                     T* to) const {
    if constexpr (Rows > 1)
      if (count_rows < Rows) return sum_values_of<Rows - 1>(count_rows, values, count, factors, to);
    constexpr int64_t kWhole = 2;
    int64_t e = 0;
    for (; e + kWhole * kRead <= width; e += kWhole * kRead)
      sum_values<Rows, kWhole, false>(values, e, count, factors, to + e);
    for (; e + kRead <= width; e += kRead) sum_values<Rows, 1, false>(values, e, count, factors, to + e);
    if (e < width) sum_values<Rows, 1, true>(values, e, count, factors, to + e);
  }

  template <int Rows, int Reads, bool Part>
  void sum_values(const S* const* values, int64_t column, int64_t count, const T* factors, T* to) const {
    constexpr int kVectors = Reads * static_cast<int>(kSideBySide<S>);
    Vector<T> found[Rows][kVectors] = {};
    for (int64_t j = 0; j < count; ++j) {
      fetch(values[j + kFetched] + column, Reads * kRead);
      const S* row = values[j] + column;
      Vector<T> of[kVectors];
      for (int n = 0; n < Reads; ++n) {
        const Read<S> next = load_first<Read<S>>(row + n * kRead, Part ? width % kRead : kRead);
        if constexpr (std::is_same_v<S, BFloat16>)
          of[2 * n] = evens(next), of[2 * n + 1] = odds(next);
        else
          of[n] = next;
      }
      for (int i = 0; i < Rows; ++i)
        for (int n = 0; n < kVectors; ++n) found[i][n] += factors[i * kPiece + j] * of[n];
    }
    for (int i = 0; i < Rows; ++i)
      for (int n = 0; n < kVectors; ++n) store_vector(to + i * 2 * padded + n * kLanes, found[i][n]);
  }

  // Where sum_values leaves an element of a row.
  static int64_t left_at(int64_t e) {
    if constexpr (std::is_same_v<S, BFloat16>) return e / kRead * kRead + e % 2 * kLanes + e % kRead / 2;
    return e;
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
        out[side * width + e] = narrow<S>(first[side * padded + left_at(e)] * scale * layer.subln[side * width + e]);
  }
};

}  // namespace
}  // namespace sambay
