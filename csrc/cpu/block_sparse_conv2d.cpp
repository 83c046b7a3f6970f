#include "block_sparse_conv2d.h"

#include "vector.h"

namespace sparse_gen::SPARSE_GEN_ISA {

namespace {

// Pixels are in the lanes. Output channels in the lanes (16 × 1 blocks, 12 pixels, every input broadcast into its
// product) gave 117 GFLOP/s on one core where this gives 161: 128 to 128 channels, 3 × 3, 64², density 0.05.
//
// Output channels worked off together, and sums held in registers: 8 × 3 vectors of 32 registers (AVX-512) or 4 × 3
// of 16, and as many for fewer channels.
constexpr int kRows = SPARSE_GEN_VECTOR_BYTES == 64 ? 8 : 4;
constexpr int kSums = 3 * kRows;

// x - 0 is x for every x, so that this is one broadcast from memory; x + 0 is not, for -0, and stays an addition and a
// broadcast on the very ports that the multiplications need (half the speed, measured).
template <class T>
inline typename Vector<T>::type broadcast_from(const T* p) {
  return *p - typename Vector<T>::type{};
}

constexpr int smaller(int a, int b) { return a < b ? a : b; }

template <int N>
struct Constant {
  static constexpr int value = N;
};

// Calls body(rows, r) for the rows r .. r + rows - 1 of a block row, as many at once as there are and fit.
template <class Body>
inline void for_each_rows(long long height, const Body& body) {
  long long r = 0;
  for (; r + kRows <= height; r += kRows) body(Constant<kRows>{}, r);
  if (height - r >= 4 && kRows > 4) body(Constant<4>{}, r), r += 4;
  if (height - r >= 2) body(Constant<2>{}, r), r += 2;
  if (height - r >= 1) body(Constant<1>{}, r);
}

// Where the positions of one tile are stored; -1 for a position that is not.
template <class T>
struct TileMap {
  static constexpr long long kVectors = kBlockTile / kWidth<T>;
  long long place[kBlockTile];
  bool whole[kVectors];

  TileMap(const BlockOutput<T>& out, long long begin, long long end) {
    long long y = begin / out.row, x = begin % out.row;
    for (long long i = 0; i < kBlockTile; ++i) {
      place[i] = begin + i < end && x < out.columns ? y * out.columns + x : -1;
      if (++x == out.row) x = 0, ++y;
    }
    for (long long v = 0; v < kVectors; ++v) {
      const long long first = place[v * kWidth<T>], last = place[(v + 1) * kWidth<T> - 1];
      whole[v] = first >= 0 && last == first + kWidth<T> - 1;
    }
  }
};

template <class T, int Rows, int Vectors>
void correlate_vectors(const long long* offset, const T* value, long long height, long long count, const T* source,
                       const T* bias, T* out, long long stride, const long long* place, const bool* whole) {
  using V = typename Vector<T>::type;
  V sum[Rows][Vectors];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
    const V begin = V{} + (bias ? bias[r] : 0);
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) sum[r][v] = begin;
  }
  for (long long k = 0; k < count; ++k, value += height) {
    const T* from = source + offset[k];
    V input[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) input[v] = load_from(from + v * kWidth<T>);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const V weight = broadcast_from(value + r);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sum[r][v] += weight * input[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
    T* to = out + r * stride;
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      const long long* at = place + v * kWidth<T>;
      if (whole[v]) {
        store_to(to + at[0], sum[r][v]);
        continue;
      }
      T lanes[kWidth<T>];
      store_to(lanes, sum[r][v]);
      for (int lane = 0; lane < kWidth<T>; ++lane)
        if (at[lane] >= 0) to[at[lane]] = lanes[lane];
    }
  }
}

// Rows × one tile.
template <class T, int Rows>
void correlate_rows(const long long* offset, const T* value, long long height, long long count, const T* source,
                    const T* bias, T* out, long long stride, const TileMap<T>& map) {
  constexpr int kVectors = smaller(kSums / Rows, 6);
  static_assert(TileMap<T>::kVectors % kVectors == 0, "a tile is whole steps");
  for (int v = 0; v < TileMap<T>::kVectors; v += kVectors)
    correlate_vectors<T, Rows, kVectors>(offset, value, height, count, source + v * kWidth<T>, bias, out, stride,
                                         map.place + v * kWidth<T>, map.whole + v);
}

// A block row's channels, its first column and the number of columns, and its first weight.
template <class T>
struct BlockRow {
  long long channel, height, column, count, weight;

  BlockRow(const BlockColumns<T>& blocks, long long b)
      : channel(b * blocks.height),
        height(channel + blocks.height < blocks.channels ? blocks.height : blocks.channels - channel),
        column(blocks.start[b]),
        count(blocks.start[b + 1] - column),
        weight(column * blocks.height) {}
};

template <class T>
void correlate(const BlockColumns<T>& blocks, const T* source, const BlockOutput<T>& out, long long first,
               long long last, long long begin, long long end) {
  // Block rows inside: a tile's inputs from all channels then stay in the nearest caches.
  for (long long i = begin; i < end; i += kBlockTile) {
    const TileMap<T> map(out, i, end);
    for (long long b = first; b < last; ++b) {
      const BlockRow<T> row(blocks, b);
      for_each_rows(row.height, [&](auto rows, long long r) {
        const long long channel = row.channel + r;
        correlate_rows<T, rows.value>(blocks.offset + row.column, blocks.value + row.weight + r, row.height, row.count, source + i,
                                      out.bias ? out.bias + channel : nullptr, out.data + channel * out.stride,
                                      out.stride, map);
      });
    }
  }
}

// Adds one tap's columns to the sums, `Vectors` vectors a channel. The gradients of the block row's planes are held in
// registers for all columns; a sum is read and written once a column instead of once a weight.
template <class T, int Rows, int Vectors>
void gather_columns(const T* grad, long long stride, const T* value, long long height, const long long* channel,
                    long long count, T* sums) {
  using V = typename Vector<T>::type;
  V held[Rows][Vectors];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) held[r][v] = load_from(grad + r * stride + v * kWidth<T>);
  }
  for (long long k = 0; k < count; ++k, value += height) {
    T* to = sums + channel[k] * (Vectors * kWidth<T>);
    V sum[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) sum[v] = load_from(to + v * kWidth<T>);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const V weight = broadcast_from(value + r);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sum[v] += weight * held[r][v];
    }
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) store_to(to + v * kWidth<T>, sum[v]);
  }
}

template <class T, int Vectors>
void gather(const BlockColumns<T>& blocks, const BlockTap* taps, long long count, const long long* channel,
            const T* grad, long long grad_stride, T* out, long long channels, long long stride, long long begin,
            long long end, T* sums) {
  constexpr long long kStep = Vectors * kWidth<T>;
  static_assert(kBlockTile % kStep == 0, "a tile is whole steps");
  for (long long i = begin; i < end; i += kStep) {
    __builtin_memset(sums, 0, channels * kStep * sizeof(T));
    for (long long t = 0; t < count; ++t) {
      const BlockTap& tap = taps[t];
      const BlockRow<T> row(blocks, tap.row);
      const T* value = blocks.value + row.weight + (tap.first - row.column) * row.height;
      for_each_rows(row.height, [&](auto rows, long long r) {
        if constexpr (rows.value * Vectors <= kSums)
          gather_columns<T, rows.value, Vectors>(grad + tap.offset + r * grad_stride + i, grad_stride, value + r,
                                                 row.height, channel + tap.first, tap.last - tap.first, sums);
      });
    }
    for (long long c = 0; c < channels; ++c)
      __builtin_memcpy(out + c * stride + i, sums + c * kStep, kStep * sizeof(T));
  }
}

template <class T, int Bytes>
struct Part {
  typedef T type __attribute__((vector_size(Bytes)));
};

// Half onto half: lane after lane took as long as the products.
template <class T, int Bytes>
inline T sum_lanes(typename Part<T, Bytes>::type v) {
  if constexpr (Bytes == 2 * sizeof(T)) {
    return v[0] + v[1];
  } else {
    typename Part<T, Bytes / 2>::type halves[2];
    __builtin_memcpy(halves, &v, Bytes);
    return sum_lanes<T, Bytes / 2>(halves[0] + halves[1]);
  }
}

// Several columns share the loads of the gradient, and its rows those of the input.
template <class T, int Rows, int Columns>
void dot_columns(const T* grad, int vectors, const T* source, const long long* offset, long long height,
                 typename Vector<T>::type* sums) {
  using V = typename Vector<T>::type;
  V sum[Columns][Rows];
#pragma GCC unroll 8
  for (int c = 0; c < Columns; ++c) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) sum[c][r] = sums[c * height + r];
  }
  for (int v = 0; v < vectors; ++v) {
    V input[Columns];
#pragma GCC unroll 8
    for (int c = 0; c < Columns; ++c) input[c] = load_from(source + offset[c] + v * kWidth<T>);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      V held = load_from(grad + r * kBlockDotTile + v * kWidth<T>);
#if defined(__AVX512F__)
      asm("" : "+v"(held));  // else GCC loads it once a column, and the loads take longer than the products
#endif
#pragma GCC unroll 8
      for (int c = 0; c < Columns; ++c) sum[c][r] += held * input[c];
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < Columns; ++c) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) sums[c * height + r] = sum[c][r];
  }
}

template <class T>
void dot(const BlockColumns<T>& blocks, const T* source, const T* grad, long long grad_stride, long long length,
         long long first, long long last, T* result, void* scratch) {
  using V = typename Vector<T>::type;
  V* sums = (V*)scratch;
  alignas(64) T tile[kRows * kBlockDotTile];
  for (long long b = first; b < last; ++b) {
    const BlockRow<T> row(blocks, b);
    for (long long j = 0; j < row.count * row.height; ++j) sums[j] = V{};
    for (long long i = 0; i < length; i += kBlockDotTile) {
      const long long count = length - i < kBlockDotTile ? length - i : kBlockDotTile;
      const int vectors = (int)((count + kWidth<T> - 1) / kWidth<T>);
      for_each_rows(row.height, [&](auto rows, long long r) {
        // Copied: loads that cross no line, and zeros behind the end.
        for (int copied = 0; copied < rows.value; ++copied) {
          T* to = tile + copied * kBlockDotTile;
          __builtin_memcpy(to, grad + (row.channel + r + copied) * grad_stride + i, count * sizeof(T));
          for (long long z = count; z < vectors * kWidth<T>; ++z) to[z] = 0;
        }
        constexpr int kColumns = smaller(kSums / rows.value, 4);
        const long long* offset = blocks.offset + row.column;
        V* sum = sums + r;
        long long k = 0;
        for (; k + kColumns <= row.count; k += kColumns)
          dot_columns<T, rows.value, kColumns>(tile, vectors, source + i, offset + k, row.height, sum + k * row.height);
        for (; k < row.count; ++k)
          dot_columns<T, rows.value, 1>(tile, vectors, source + i, offset + k, row.height, sum + k * row.height);
      });
    }
    for (long long j = 0; j < row.count * row.height; ++j)
      result[row.weight + j] += sum_lanes<T, SPARSE_GEN_VECTOR_BYTES>(sums[j]);
  }
}

}  // namespace

#define SPARSE_GEN_BLOCK_DEFINE(T)                                                                                  \
  void block_correlate(const BlockColumns<T>& blocks, const T* source, const BlockOutput<T>& out, long long first,  \
                       long long last, long long begin, long long end) {                                            \
    correlate(blocks, source, out, first, last, begin, end);                                                        \
  }                                                                                                                 \
  void block_gather(const BlockColumns<T>& blocks, const BlockTap* taps, long long count, const long long* channel, \
                    const T* grad, long long grad_stride, T* out, long long channels, long long stride,             \
                    long long begin, long long end, T* scratch) {                                                   \
    if (blocks.height >= kRows)                                                                                     \
      gather<T, 3>(blocks, taps, count, channel, grad, grad_stride, out, channels, stride, begin, end, scratch);    \
    else                                                                                                            \
      gather<T, kRows == 8 ? 6 : 3>(blocks, taps, count, channel, grad, grad_stride, out, channels, stride, begin,  \
                                    end, scratch);                                                                  \
  }                                                                                                                 \
  void block_dot(const BlockColumns<T>& blocks, const T* source, const T* grad, long long grad_stride,              \
                 long long length, long long first, long long last, T* result, void* scratch) {                     \
    dot(blocks, source, grad, grad_stride, length, first, last, result, scratch);                                   \
  }
SPARSE_GEN_BLOCK_DEFINE(float)
SPARSE_GEN_BLOCK_DEFINE(double)

}  // namespace sparse_gen::SPARSE_GEN_ISA
