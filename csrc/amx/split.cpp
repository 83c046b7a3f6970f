#include "split.h"

#include "../cpu/shuffle.h"

namespace sparse_gen::amx {

namespace {

// The upper halves of floats are bfloat16, cut off: what is left over is exact in the next part.
struct Parts {
  __m512i high, middle, low;
};

inline Parts parts_of(__m512 x) {
  const __m512i upper = _mm512_set1_epi32((int)0xffff0000);
  const __m512i high = _mm512_and_si512(_mm512_castps_si512(x), upper);
  const __m512 rest = _mm512_sub_ps(x, _mm512_castsi512_ps(high));
  const __m512i middle = _mm512_and_si512(_mm512_castps_si512(rest), upper);
  const __m512i low = _mm512_castps_si512(_mm512_sub_ps(rest, _mm512_castsi512_ps(middle)));
  return {high, middle, low};
}

// Pairs of bfloat16 from the upper halves of two floats, the first one below.
inline __m512i pair_of(__m512i first, __m512i second) {
  // 0xe4 takes the first operand's bits where the mask is set and the other's elsewhere.
  return _mm512_ternarylogic_epi32(second, _mm512_srli_epi32(first, 16), _mm512_set1_epi32((int)0xffff0000), 0xe4);
}

inline Parts pairs_of(__m512 first, __m512 second) {
  const Parts a = parts_of(first), b = parts_of(second);
  return {pair_of(a.high, b.high), pair_of(a.middle, b.middle), pair_of(a.low, b.low)};
}

// 32 neighbours as bfloat16, in their order.
inline Parts neighbours_of(__m512 first, __m512 second) {
  alignas(64) static const unsigned short odd[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                     33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  const __m512i upper = _mm512_load_si512(odd);
  const Parts a = parts_of(first), b = parts_of(second);
  return {_mm512_permutex2var_epi16(a.high, upper, b.high), _mm512_permutex2var_epi16(a.middle, upper, b.middle),
          _mm512_permutex2var_epi16(a.low, upper, b.low)};
}

// Places of the parts among the planes: with low first, low and high as well as high and middle are neighbours.
constexpr long long kLow = 0, kHigh = 1, kMiddle = 2;

inline __mmask16 first_lanes(long long count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }

}  // namespace

void pack_weight(const Depth& depth, const float* weight, long long rows, const int* row_at, const int* channel_at,
                 long long taps, const int* tap_at, void* to) {
  const long long pairs = depth.pairs();
  for (long long block = 0; block < depth.blocks(); ++block) {
    const long long first = depth.first_pair(block);
    alignas(64) int even_at[16], odd_at[16];
    __mmask16 even_there = 0, odd_there = 0;
    for (long long lane = 0; lane < 16; ++lane) {
      const long long channel = 2 * (first + lane);
      const bool fresh = first + lane >= block * kTile;
      const bool even = fresh && channel < depth.channels, odd = fresh && channel + 1 < depth.channels;
      even_at[lane] = even ? channel_at[channel] : 0;
      odd_at[lane] = odd ? channel_at[channel + 1] : 0;
      even_there |= (__mmask16)even << lane;
      odd_there |= (__mmask16)odd << lane;
    }
    const __m512i even = _mm512_load_si512(even_at), odd = _mm512_load_si512(odd_at);
    char* tiles = (char*)to + block * taps * kParts * kTileBytes;
    for (long long row = 0; row < 16; ++row)
      for (long long tap = 0; tap < taps; ++tap) {
        char* at = tiles + tap * kParts * kTileBytes + row * 64;
        Parts parts{};
        if (row < rows) {
          const float* own = weight + row_at[row] + tap_at[tap];
          parts = pairs_of(_mm512_mask_i32gather_ps(_mm512_setzero_ps(), even_there, even, own, 4),
                           _mm512_mask_i32gather_ps(_mm512_setzero_ps(), odd_there, odd, own, 4));
        }
        if (!depth.narrow()) {
          _mm512_store_si512(at, parts.high);
          _mm512_store_si512(at + kTileBytes, parts.middle);
          _mm512_store_si512(at + 2 * kTileBytes, parts.low);
          continue;
        }
        // Rows of two parts: high and low for the planes low and high; high twice and middle twice for high and middle.
        const __mmask16 half = first_lanes(pairs);
        const auto both = [&](long long tile, __m512i left, __m512i right) {
          _mm512_mask_storeu_epi32(at + tile * kTileBytes, half, left);
          _mm512_mask_storeu_epi32(at + tile * kTileBytes + 4 * pairs, half, right);
        };
        both(0, parts.high, parts.low);
        both(1, parts.high, parts.high);
        both(2, parts.middle, parts.middle);
      }
  }
}

void pack_planes(const Depth& depth, const float* from, long long stride, long long columns, unsigned* to,
                 long long plane) {
  const long long part = depth.pairs() * plane;
  for (long long pair = 0; pair < depth.pairs(); ++pair) {
    const float *first = from + 2 * pair * stride, *second = first + stride;
    const bool alone = 2 * pair + 1 == depth.channels;
    unsigned* own = to + pair * plane;
    for (long long x = 0; x < columns; x += 16) {
      const __mmask16 there = first_lanes(columns - x);
      const Parts parts =
          pairs_of(_mm512_maskz_loadu_ps(there, first + x), _mm512_maskz_loadu_ps(alone ? 0 : there, second + x));
      _mm512_storeu_si512(own + kLow * part + x, parts.low);
      _mm512_storeu_si512(own + kHigh * part + x, parts.high);
      _mm512_storeu_si512(own + kMiddle * part + x, parts.middle);
    }
  }
}

void plan_steps(const Depth& depth, long long plane, long long taps, const long long* tap_at, Step* steps) {
  const long long part = depth.pairs() * plane;
  for (long long block = 0; block < depth.blocks(); ++block)
    for (long long tap = 0; tap < taps; ++tap) {
      const long long a = (block * taps + tap) * kParts * kTileBytes;
      const long long b = depth.first_pair(block) * plane + tap_at[tap];
      const auto step = [&](long long left, long long right, bool load_a, bool load_b) {
        *steps++ = {a + left * kTileBytes, 4 * (b + right * part), load_a, load_b};
      };
      if (depth.narrow()) {
        step(0, kLow, true, true);
        step(1, kHigh, true, true);
        step(2, kHigh, true, false);
        continue;
      }
      constexpr long long high = 0, middle = 1, low = 2;  // of the left operand
      step(high, kLow, true, true);
      step(high, kHigh, false, true);
      step(low, kHigh, true, false);
      step(middle, kHigh, true, false);
      step(middle, kMiddle, false, true);
      step(high, kMiddle, true, false);
    }
}

void pack_rows(const float* from, long long stride, long long rows, long long columns, long long zeros,
               unsigned short* to, long long plane, long long part) {
  for (long long row = 0; row < rows; ++row) {
    const float* own = from + row * stride;
    unsigned short* at = to + row * plane;
    for (long long x = 0; x < columns + zeros; x += 32) {
      const __m512 first = _mm512_maskz_loadu_ps(first_lanes(columns - x), own + x);
      const __m512 second = _mm512_maskz_loadu_ps(first_lanes(columns - x - 16), own + x + 16);
      const Parts parts = neighbours_of(first, second);
      _mm512_storeu_si512(at + x, parts.high);
      _mm512_storeu_si512(at + part + x, parts.middle);
      _mm512_storeu_si512(at + 2 * part + x, parts.low);
    }
  }
}

void pack_transposed(const float* from, long long stride, long long rows, long long columns, void* to) {
  const long long part = row_tiles(rows, columns) * kTileBytes, across = (columns + 31) / 32;
  alignas(64) float square[3][16 * 16], turned[16 * 16];
  for (long long block = 0; block * 16 < rows; ++block)
    for (long long x = 0; x < columns; x += 32) {
      for (long long row = 0; row < 16; ++row) {
        const bool there = block * 16 + row < rows;
        const float* own = from + (block * 16 + row) * stride + x;
        const Parts parts =
            there ? neighbours_of(_mm512_maskz_loadu_ps(first_lanes(columns - x), own),
                                  _mm512_maskz_loadu_ps(first_lanes(columns - x - 16), own + 16))
                  : Parts{};
        _mm512_store_si512(square[0] + row * 16, parts.high);
        _mm512_store_si512(square[1] + row * 16, parts.middle);
        _mm512_store_si512(square[2] + row * 16, parts.low);
      }
      for (long long p = 0; p < kParts; ++p) {
        transpose(square[p], 16, 16, 16, turned, 16);
        __builtin_memcpy((char*)to + p * part + (block * across + x / 32) * kTileBytes, turned, kTileBytes);
      }
    }
}

void plan_column_steps(long long columns, long long a_part, long long b_part, Step* steps) {
  for (long long block = 0; block * 32 < columns; ++block) {
    const auto step = [&](long long left, long long right, bool load_a, bool load_b) {
      *steps++ = {left * a_part + block * 64, right * b_part + block * kTileBytes, load_a, load_b};
    };
    // Rows begin anywhere in a cache line, so that theirs are the dearer loads: three of them, four of the others.
    step(2, 0, true, true);
    step(0, 0, true, false);
    step(0, 2, false, true);
    step(0, 1, false, true);
    step(1, 1, true, false);
    step(1, 0, false, true);
  }
}

namespace {

struct alignas(64) TileSizes {
  unsigned char palette = 1, start = 0, reserved[14] = {};
  unsigned short row_bytes[16] = {};
  unsigned char rows[16] = {};
};

// Tiles 0 to 3 are sums; 4 and 5 hold the left or right factors of which there are more, 6 and 7 the others.
void choose_sizes(long long tile_pairs) {
  TileSizes sizes;
  for (int tile = 0; tile < 8; ++tile) {
    const bool left = tile >= 6, right = tile >= 4 && tile < 6;
    sizes.row_bytes[tile] = left ? 4 * tile_pairs : 64;
    sizes.rows[tile] = right ? tile_pairs : 16;
  }
  asm volatile("" ::: "memory");  // GCC 12 takes the intrinsic to read no more than eight bytes
  _tile_loadconfig(&sizes);
}

// The names of tiles must be written out: no templates.
#define SPARSE_GEN_KERNEL(name, BEGIN, LOAD_A, LOAD_B, PRODUCTS, END)                                            \
  void name(const Operand& a, const Operand& b, const Step* steps, long long count, const Sums& c, bool add) {  \
    BEGIN;                                                                                                      \
    for (const Step* step = steps; step != steps + count; ++step) {                                             \
      const char *left = (const char*)a.data + step->a, *right = (const char*)b.data + step->b;                 \
      if (step->load_b) { LOAD_B; }                                                                             \
      if (step->load_a) { LOAD_A; }                                                                             \
      PRODUCTS;                                                                                                 \
    }                                                                                                           \
    END;                                                                                                        \
  }
#define AT(row, column) (c.data + row * c.row_block + column * c.column_block)
#define FIRST(tile, row, column)                   \
  if (add)                                         \
    _tile_loadd(tile, AT(row, column), 4 * c.stride); \
  else                                             \
    _tile_zero(tile)
#define LAST(tile, row, column) _tile_stored(tile, AT(row, column), 4 * c.stride)
#define A(tile, n) _tile_loadd(tile, left + n * a.block, a.stride)
#define B(tile, n) _tile_loadd(tile, right + n * b.block, b.stride)
#define P _tile_dpbf16ps

SPARSE_GEN_KERNEL(two_by_two, FIRST(0, 0, 0); FIRST(1, 0, 1); FIRST(2, 1, 0); FIRST(3, 1, 1), A(6, 0); A(7, 1),
                  B(4, 0); B(5, 1), P(0, 6, 4); P(1, 6, 5); P(2, 7, 4); P(3, 7, 5),
                  LAST(0, 0, 0); LAST(1, 0, 1); LAST(2, 1, 0); LAST(3, 1, 1))
SPARSE_GEN_KERNEL(two_by_one, FIRST(0, 0, 0); FIRST(2, 1, 0), A(6, 0); A(7, 1), B(4, 0), P(0, 6, 4); P(2, 7, 4),
                  LAST(0, 0, 0); LAST(2, 1, 0))
SPARSE_GEN_KERNEL(one_by_two, FIRST(0, 0, 0); FIRST(1, 0, 1), A(6, 0), B(4, 0); B(5, 1), P(0, 6, 4); P(1, 6, 5),
                  LAST(0, 0, 0); LAST(1, 0, 1))
SPARSE_GEN_KERNEL(one_by_one, FIRST(0, 0, 0), A(6, 0), B(4, 0), P(0, 6, 4), LAST(0, 0, 0))

#undef P
#undef B
#undef A
#undef LAST
#undef FIRST
#undef AT
#undef SPARSE_GEN_KERNEL

}  // namespace

void tile_product(const Operand& a, const Operand& b, const Step* steps, long long count, long long tile_pairs,
                  long long row_blocks, long long column_blocks, const Sums& c, bool add) {
  choose_sizes(tile_pairs);
  for (long long row = 0; row < row_blocks; row += 2)
    for (long long column = 0; column < column_blocks; column += 2) {
      const Operand left{(const char*)a.data + row * a.block, a.stride, a.block};
      const Operand right{(const char*)b.data + column * b.block, b.stride, b.block};
      const Sums sums{c.data + row * c.row_block + column * c.column_block, c.stride, c.row_block, c.column_block};
      const bool rows = row + 1 < row_blocks, columns = column + 1 < column_blocks;
      const auto kernel = rows ? (columns ? two_by_two : two_by_one) : columns ? one_by_two : one_by_one;
      kernel(left, right, steps, count, sums, add);
    }
  _tile_release();
}

void collect_squares(const WeightSquares& s, const float* squares, long long count, long long begin, long long end,
                     float* to) {
  alignas(64) float square[16 * 16], turned[16 * 16];
  for (long long first = begin; first < end; first += 16)
    for (long long block = 0; block < s.row_blocks(); ++block) {
      for (long long i = 0; i < 16; ++i) {
        __m512 sum = _mm512_setzero_ps();
        const long long channel = (first + i) / s.taps, tap = (first + i) % s.taps;
        const float* own = squares + s.at(channel / 16, tap) + block * 256 + channel % 16 * 16;
        if (first + i < end)
          for (long long n = 0; n < count; ++n) sum = _mm512_add_ps(sum, _mm512_loadu_ps(own + n * s.size()));
        _mm512_store_ps(square + i * 16, sum);
      }
      transpose(square, 16, 16, 16, turned, 16);
      for (long long i = 0; i < 16 && block * 16 + i < s.rows; ++i)
        _mm512_mask_storeu_ps(to + (block * 16 + i) * s.channels * s.taps + first, first_lanes(end - first),
                              _mm512_load_ps(turned + i * 16));
    }
}

}  // namespace sparse_gen::amx
