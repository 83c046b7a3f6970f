#include "split.h"

#include <immintrin.h>

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

// A square of 16 × 16, its rows one after the other, transposed. Loads bring quarters of the rows to their lanes: that
// saves a half of the shuffles, of which a core does one a cycle.
inline void turn(const float* square, float* to, long long to_stride) {
  for (long long quarter = 0; quarter < 4; ++quarter) {
    __m512i rows[4];
    for (long long i = 0; i < 4; ++i) {
      const __m128i* from = (const __m128i*)(square + i * 16 + quarter * 4);  // every fourth row is 16 vectors on
      __m512i row = _mm512_castsi128_si512(_mm_load_si128(from));
      row = _mm512_inserti32x4(row, _mm_load_si128(from + 16), 1);
      row = _mm512_inserti32x4(row, _mm_load_si128(from + 32), 2);
      rows[i] = _mm512_inserti32x4(row, _mm_load_si128(from + 48), 3);
    }
    const __m512i a = _mm512_unpacklo_epi32(rows[0], rows[1]), b = _mm512_unpackhi_epi32(rows[0], rows[1]);
    const __m512i c = _mm512_unpacklo_epi32(rows[2], rows[3]), d = _mm512_unpackhi_epi32(rows[2], rows[3]);
    float* own = to + quarter * 4 * to_stride;
    _mm512_storeu_si512(own, _mm512_unpacklo_epi64(a, c));
    _mm512_storeu_si512(own + to_stride, _mm512_unpackhi_epi64(a, c));
    _mm512_storeu_si512(own + 2 * to_stride, _mm512_unpacklo_epi64(b, d));
    _mm512_storeu_si512(own + 3 * to_stride, _mm512_unpackhi_epi64(b, d));
  }
}

inline __mmask16 first_lanes(long long count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }

}  // namespace

void pack_pixels(const Depth& depth, const float* from, long long stride, long long columns, void* to,
                 long long pixels) {
  const long long parts = depth.pixel_parts();
  alignas(64) float squares[kParts][16 * 16] = {};
  for (long long block = 0; block < depth.blocks(); ++block) {
    char* own = (char*)to + block * parts * pixels * 64;
    const long long first = block * kTile, count = depth.pairs() - first < kTile ? depth.pairs() - first : kTile;
    for (long long x = 0; x < columns; x += 16) {
      const __mmask16 there = first_lanes(columns - x);
      for (long long pair = 0; pair < kTile; ++pair) {
        const float* row = from + 2 * (first + pair) * stride + x;
        const bool both = 2 * (first + pair) + 1 < depth.channels;
        const Parts p = pair < count ? pairs_of(_mm512_maskz_loadu_ps(there, row),
                                                _mm512_maskz_loadu_ps(both ? there : 0, row + (both ? stride : 0)))
                                     : Parts{};
        if (!depth.narrow()) {
          _mm512_store_si512(squares[0] + pair * 16, p.high);
          _mm512_store_si512(squares[1] + pair * 16, p.middle);
          _mm512_store_si512(squares[2] + pair * 16, p.low);
        } else if (pair < count) {
          _mm512_store_si512(squares[0] + pair * 16, p.low);
          _mm512_store_si512(squares[0] + (count + pair) * 16, p.high);
          _mm512_store_si512(squares[1] + pair * 16, p.high);
          _mm512_store_si512(squares[1] + (count + pair) * 16, p.middle);
        }
      }
      for (long long part = 0; part < parts; ++part) {
        turn(squares[part], (float*)(own + (part * pixels + x) * 64), 16);
      }
    }
  }
}

void pack_weight(const Depth& depth, const float* weight, long long columns, const int* column_at,
                 const int* channel_at, long long taps, const int* tap_at, void* to) {
  alignas(64) int places[16] = {};
  for (long long n = 0; n < columns; ++n) places[n] = column_at[n];
  const __m512i at = _mm512_load_si512(places);
  const __mmask16 there = first_lanes(columns);
  const long long pairs = depth.pairs();
  for (long long block = 0; block < depth.blocks(); ++block)
    for (long long row = 0; row < kTile; ++row) {
      const long long pair = block * kTile + row;
      const bool first = pair < pairs, second = 2 * pair + 1 < depth.channels;
      if (depth.narrow() && !first) break;
      for (long long tap = 0; tap < taps; ++tap) {
        char* tile = (char*)to + (block * taps + tap) * kParts * kTileBytes + row * 64;
        const auto gathered = [&](bool inside, long long channel) {
          return inside ? _mm512_mask_i32gather_ps(_mm512_setzero_ps(), there, at,
                                                   weight + channel_at[channel] + tap_at[tap], 4)
                        : _mm512_setzero_ps();
        };
        const Parts parts = pairs_of(gathered(first, 2 * pair), gathered(second, 2 * pair + 1));
        if (!depth.narrow()) {
          _mm512_store_si512(tile, parts.high);
          _mm512_store_si512(tile + kTileBytes, parts.middle);
          _mm512_store_si512(tile + 2 * kTileBytes, parts.low);
          continue;
        }
        // Against pixels as low and high: high and low; as high and middle: high twice, then middle twice.
        const auto both = [&](long long n, __m512i above, __m512i below) {
          _mm512_store_si512(tile + n * kTileBytes, above);
          _mm512_store_si512(tile + n * kTileBytes + pairs * 64, below);
        };
        both(0, parts.high, parts.low);
        both(1, parts.high, parts.high);
        both(2, parts.middle, parts.middle);
      }
    }
}

void plan_steps(const Depth& depth, long long pixels, long long taps, const long long* tap_at, Step* steps) {
  constexpr long long high = 0, middle = 1, low = 2;
  for (long long block = 0; block < depth.blocks(); ++block)
    for (long long tap = 0; tap < taps; ++tap) {
      const auto step = [&](long long left, long long right, bool load_a, bool load_b) {
        *steps++ = {((block * depth.pixel_parts() + left) * pixels + tap_at[tap]) * 64,
                    ((block * taps + tap) * kParts + right) * kTileBytes, load_a, load_b};
      };
      if (depth.narrow()) {
        step(0, 0, true, true);
        step(1, 1, true, true);
        step(1, 2, false, true);
        continue;
      }
      step(low, high, true, true);
      step(high, high, true, false);
      step(high, low, false, true);
      step(high, middle, false, true);
      step(middle, middle, true, false);
      step(middle, high, false, true);
    }
}

void pack_rows(const float* from, long long stride, long long rows, long long columns, unsigned short* to,
               long long plane, long long part) {
  for (long long row = 0; row < rows; ++row) {
    const float* own = from + row * stride;
    unsigned short* at = to + row * plane;
    for (long long x = 0; x < columns; x += 32) {
      const __m512 first = _mm512_maskz_loadu_ps(first_lanes(columns - x), own + x);
      const __m512 second = _mm512_maskz_loadu_ps(first_lanes(columns - x - 16), own + x + 16);
      const Parts parts = neighbours_of(first, second);
      _mm512_storeu_si512(at + x, parts.high);
      _mm512_storeu_si512(at + part + x, parts.middle);
      _mm512_storeu_si512(at + 2 * part + x, parts.low);
    }
  }
}

void pack_transposed(const float* from, long long stride, long long rows, long long there, long long columns,
                     void* to) {
  const long long part = row_tiles(rows, columns) * kTileBytes, across = (columns + 31) / 32;
  alignas(64) float square[3][16 * 16];
  for (long long block = 0; block * 16 < rows; ++block)
    for (long long x = 0; x < columns; x += 32) {
      for (long long row = 0; row < 16; ++row) {
        const bool inside = block * 16 + row < rows;
        const float* own = from + (block * 16 + row) * stride + x;
        const Parts parts = inside ? neighbours_of(_mm512_maskz_loadu_ps(first_lanes(there - x), own),
                                                   _mm512_maskz_loadu_ps(first_lanes(there - x - 16), own + 16))
                                   : Parts{};
        _mm512_store_si512(square[0] + row * 16, parts.high);
        _mm512_store_si512(square[1] + row * 16, parts.middle);
        _mm512_store_si512(square[2] + row * 16, parts.low);
      }
      for (long long p = 0; p < kParts; ++p) {
        turn(square[p], (float*)((char*)to + p * part + (block * across + x / 32) * kTileBytes), 16);
      }
    }
}

void plan_column_steps(long long columns, long long a_part, long long b_part, Step* steps) {
  for (long long block = 0; block * 32 < columns; ++block) {
    const auto step = [&](long long left, long long right, bool load_a, bool load_b) {
      *steps++ = {left * a_part + block * 64, right * b_part + block * kTileBytes, load_a, load_b};
    };
    step(2, 0, true, true);
    step(1, 0, true, false);
    step(0, 0, true, false);
    step(0, 2, false, true);
    step(0, 1, false, true);
    step(1, 1, true, false);
  }
}

namespace {

struct alignas(64) TileSizes {
  unsigned char palette = 1, start = 0, reserved[14] = {};
  unsigned short row_bytes[16] = {};
  unsigned char rows[16] = {};
};

// Tiles 0 to 3 are sums; 4 and 5 hold the left or right factors of which there are more, 6 and 7 the others.
}  // namespace

Tiles::Tiles(long long tile_pairs) {
  TileSizes sizes;
  for (int tile = 0; tile < 8; ++tile) {
    const bool left = tile >= 6, right = tile >= 4 && tile < 6;
    sizes.row_bytes[tile] = left ? 4 * tile_pairs : 64;
    sizes.rows[tile] = right ? tile_pairs : 16;
  }
  asm volatile("" ::: "memory");  // GCC 12 takes the intrinsic to read no more than eight bytes
  _tile_loadconfig(&sizes);
}

Tiles::~Tiles() { _tile_release(); }

namespace {

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

// One block of columns by itself: its three parts stay while four blocks of pixels go by. Sums are added up in the
// steps' order, and lie 256 elements apart.
#define ZEROS    \
  _tile_zero(0); \
  _tile_zero(1); \
  _tile_zero(2); \
  _tile_zero(3)
#define ALL_FOUR(move) \
  move(0, c, 64);       \
  move(1, c + 256, 64); \
  move(2, c + 512, 64); \
  move(3, c + 768, 64)
#define EACH(of) of(0); of(1); of(2); of(3)
#define PIXELS(n, at) _tile_loadd(7, (const char*)a.data + n * a.block + steps[at].a, a.stride)
#define ONE(n) PIXELS(n, 0); P(n, 7, 4)
#define THREE(n) PIXELS(n, 1); P(n, 7, 4); P(n, 7, 5); P(n, 7, 6)
#define TWO(n) PIXELS(n, 4); P(n, 7, 6); P(n, 7, 4)
#define NARROW(n) PIXELS(n, 1); P(n, 7, 5); P(n, 7, 6)

void four_by_one(const Operand& a, const Operand& b, const Step* steps, long long count, bool narrow, float* c) {
  const char* right = (const char*)b.data;
  ZEROS;
  if (narrow) {
    for (const Step* end = steps + count; steps != end; steps += 3) {
      _tile_loadd(4, right + steps[0].b, 64);
      _tile_loadd(5, right + steps[1].b, 64);
      _tile_loadd(6, right + steps[2].b, 64);
      EACH(ONE);
      EACH(NARROW);
    }
  } else {
    for (const Step* end = steps + count; steps != end; steps += 6) {
      _tile_loadd(4, right + steps[0].b, 64);
      _tile_loadd(5, right + steps[2].b, 64);
      _tile_loadd(6, right + steps[3].b, 64);
      EACH(ONE);
      EACH(THREE);
      EACH(TWO);
    }
  }
  ALL_FOUR(_tile_stored);
}

#undef NARROW
#undef TWO
#undef THREE
#undef ONE
#undef PIXELS

#define COLUMNS(n, at) _tile_loadd(7, b[n] + steps[at].b, 64)
#define THREE(n) COLUMNS(n, 0); P(n, 6, 7); P(n, 5, 7); P(n, 4, 7)
#define ONE(n) COLUMNS(n, 3); P(n, 4, 7)
#define TWO(n) COLUMNS(n, 4); P(n, 4, 7); P(n, 5, 7)

void one_by_four(const Operand& a, const char* const* b, const Step* steps, long long count, float* c, bool add) {
  if (add) {
    ALL_FOUR(_tile_loadd);
  } else {
    ZEROS;
  }
  const char* left = (const char*)a.data;
  for (const Step* end = steps + count; steps != end; steps += 6) {
    _tile_loadd(6, left + steps[0].a, a.stride);
    _tile_loadd(5, left + steps[1].a, a.stride);
    _tile_loadd(4, left + steps[2].a, a.stride);
    EACH(THREE);
    EACH(ONE);
    EACH(TWO);
  }
  ALL_FOUR(_tile_stored);
}

#undef TWO
#undef ONE
#undef THREE
#undef COLUMNS
#undef EACH
#undef ALL_FOUR
#undef ZEROS

#undef P
#undef B
#undef A
#undef LAST
#undef FIRST
#undef AT
#undef SPARSE_GEN_KERNEL

auto kernel_of(bool two_rows, bool two_columns) {
  return two_rows ? (two_columns ? two_by_two : two_by_one) : two_columns ? one_by_two : one_by_one;
}

}  // namespace

void tile_product(const Operand& a, const Operand& b, const Step* steps, long long count, long long row_blocks,
                  long long column_blocks, const Sums& c, bool add) {
  for (long long row = 0; row < row_blocks; row += 2)
    for (long long column = 0; column < column_blocks; column += 2) {
      const Sums sums{c.data + row * c.row_block + column * c.column_block, c.stride, c.row_block, c.column_block};
      kernel_of(row + 1 < row_blocks, column + 1 < column_blocks)(a.from(row), b.from(column), steps, count, sums, add);
    }
}

void tile_product_of_four(const Operand& a, const char* const* b, const Step* steps, long long count, float* c,
                          bool add) {
  one_by_four(a, b, steps, count, c, add);
}

void multiply_pixels(const Depth& depth, const Operand& pixels, const Operand& weight, const Step* steps,
                     long long count, long long length, long long column_blocks, float* c, long long c_stride) {
  const Tiles tiles(depth.tile_pairs());
  const long long pixel_blocks = (length + kTile - 1) / kTile;
  alignas(64) float squares[4 * 256], turned[256];
  const Sums sums{squares, 16, 512, 256};
  const auto give = [&](const float* square, long long column, long long pixel) {
    float* to = c + column * kTile * c_stride + pixel * kTile;
    if ((pixel + 1) * kTile <= length) return turn(square, to, c_stride);
    turn(square, turned, kTile);
    for (long long n = 0; n < kTile; ++n)
      _mm512_mask_storeu_ps(to + n * c_stride, first_lanes(length - pixel * kTile), _mm512_load_ps(turned + n * kTile));
  };
  for (long long column = 0; column < column_blocks; column += 2) {
    const bool columns = column + 1 < column_blocks;
    long long pixel = 0;
    // Its tiles have left and right factors of one shape alone.
    for (; !columns && depth.tile_pairs() == kTile && pixel + 4 <= pixel_blocks; pixel += 4) {
      four_by_one(pixels.from(pixel), weight.from(column), steps, count, depth.narrow(), squares);
      for (long long n = 0; n < 4; ++n) give(squares + n * 256, column, pixel + n);
    }
    for (; pixel < pixel_blocks; pixel += 2) {
      const bool rows = pixel + 1 < pixel_blocks;
      kernel_of(rows, columns)(pixels.from(pixel), weight.from(column), steps, count, sums, false);
      for (long long n = 0; n < 1 + rows; ++n)
        for (long long m = 0; m < 1 + columns; ++m) give(squares + (2 * n + m) * 256, column + m, pixel + n);
    }
  }
}

void collect_squares(const WeightSquares& s, const float* squares, long long count, long long first, long long last,
                     float* to) {
  alignas(64) float square[16 * 16], turned[16 * 16];
  for (long long o = first; o < last; ++o)
    for (long long block = 0; block < s.in_blocks(); ++block)
      for (long long tap = 0; tap < s.taps; tap += 16) {
        for (long long i = 0; i < 16; ++i) {
          __m512 sum = _mm512_setzero_ps();
          const float* own = squares + s.at(o / 16, tap + i) + block * 256 + o % 16 * 16;
          if (tap + i < s.taps)
            for (long long n = 0; n < count; ++n) sum = _mm512_add_ps(sum, _mm512_loadu_ps(own + n * s.size()));
          _mm512_store_ps(square + i * 16, sum);
        }
        turn(square, turned, 16);
        for (long long i = 0; i < 16 && block * 16 + i < s.in; ++i)
          _mm512_mask_storeu_ps(to + (o * s.in + block * 16 + i) * s.taps + tap, first_lanes(s.taps - tap),
                                _mm512_load_ps(turned + i * 16));
      }
}

}  // namespace sparse_gen::amx
