// Products of matrices of floats on AMX tiles, which multiply bfloat16 and add in float32.
//
// A float is the exact sum of three bfloat16, `high` + `middle` + `low`, of eight bits of its 24 each. Of the nine
// products of two such sums the six largest are added up; what the others hold is below 2^-22 of the result. So the
// error is that of float32's own sums. One tile product is 16 × 16 × 32 multiplications: six of them take a half of
// the time that AVX-512 takes for the same floats.
//
// Compiled for AMX alone and called where amx_usable() says so.
#pragma once

namespace sparse_gen::amx {

constexpr long long kTile = 16;          // rows and columns of a sum, pairs of elements along the depth
constexpr long long kTileBytes = 1024;
constexpr long long kParts = 3;

// Where the tiles of one product lie, in bytes from the operands' beginnings. A tile that is there already is not
// loaded again.
struct Step {
  long long a, b;
  bool load_a, load_b;
};

struct Operand {
  const void* data;
  long long stride, block;  // bytes to a tile's next row, and to the tiles of the next 16 rows or columns of the sum
};

// Depth that lies in planes: `channels` of them, two by two in pairs, the parts of all pairs one after the other.
struct Depth {
  long long channels;

  explicit Depth(long long channels) : channels(channels) {}
  long long pairs() const { return (channels + 1) / 2; }
  // Few channels: two parts of all of them go through one tile, and three products instead of six do.
  bool narrow() const { return pairs() <= kTile / 2; }
  long long tile_pairs() const { return narrow() ? 2 * pairs() : pairs() < kTile ? pairs() : kTile; }
  long long blocks() const { return narrow() ? 1 : (pairs() + kTile - 1) / kTile; }
  // The last block ends at the last pair and repeats pairs of the one before, with zeros as their weights.
  long long first_pair(long long block) const {
    const long long last = pairs() - kTile;
    return narrow() || last < 0 ? 0 : block * kTile < last ? block * kTile : last;
  }
  long long products() const { return narrow() ? 3 : 6; }
  long long tiles() const { return blocks() * kParts; }  // of the left operand, for 16 rows and one tap
  long long planes() const { return kParts * pairs(); }
};

// The left operand, 16 rows at a time: for each block of the depth and tap its parts. Element (row, channel, tap) is
// weight[row_at[row] + channel_at[channel] + tap_at[tap]]; `rows` from 1 to 16, the others are zeros.
void pack_weight(const Depth&, const float* weight, long long rows, const int* row_at, const int* channel_at, long long taps, const int* tap_at, void* to);

// The right operand: `columns` elements of every channel, one channel every `stride`; pairs of elements, a plane of them
// every `plane`. Up to 16 elements behind the last column are written.
void pack_planes(const Depth&, const float* from, long long stride, long long columns, unsigned* to, long long plane);

// The steps of such a product, depth.blocks() * taps * depth.products() of them; a tap sees the planes tap_at elements
// on.
void plan_steps(const Depth&, long long plane, long long taps, const long long* tap_at, Step* steps);

// For sums over columns: `rows` rows of `columns` elements as the parts of a left operand, a row of bfloat16 every
// `plane`, a part every `part` elements, with `zeros` or up to 31 more of them behind each row.
void pack_rows(const float* from, long long stride, long long rows, long long columns, long long zeros, unsigned short* to, long long plane, long long part);

// And as a right operand: for each part and 16 rows, tiles of 32 columns; rows and columns that are missing are zeros.
// A part takes row_tiles(rows, columns) * kTileBytes.
void pack_transposed(const float* from, long long stride, long long rows, long long columns, void* to);
constexpr long long row_tiles(long long rows, long long columns) { return (rows + 15) / 16 * ((columns + 31) / 32); }

// The six steps of every 32 columns; count = 6 * ((columns + 31) / 32).
void plan_column_steps(long long columns, long long a_part, long long b_part, Step* steps);

// A sum's squares of 16 × 16: a row every `stride` elements, the next 16 rows and columns where these say.
struct Sums {
  float* data;
  long long stride, row_block, column_block;
};

// c (16 row_blocks × 16 column_blocks) = or += the sum over the steps; tile_pairs along the depth.
void tile_product(const Operand& a, const Operand& b, const Step* steps, long long count, long long tile_pairs, long long row_blocks, long long column_blocks, const Sums& c, bool add);

// The gradient of a weight (rows × in × taps) as squares of 16 channels of its input by 16 of its rows, for each 16
// channels, tap and 16 rows one; rows and channels that are missing are there.
struct WeightSquares {
  long long rows, channels, taps;

  long long row_blocks() const { return (rows + 15) / 16; }
  long long at(long long channel_block, long long tap) const { return (channel_block * taps + tap) * row_blocks() * 256; }
  long long size() const { return at((channels + 15) / 16, 0); }
};

// Columns begin .. end - 1 of `to` (rows × (in · taps)) = the sum of `count` such gradients, one every size().
void collect_squares(const WeightSquares&, const float* squares, long long count, long long begin, long long end, float* to);

}  // namespace sparse_gen::amx
