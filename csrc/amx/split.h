// Products of matrices of floats on AMX tiles, which multiply bfloat16 and add in float32.
//
// A float is the exact sum of three bfloat16, `high` + `middle` + `low`, of eight bits of its 24 each. Of the nine
// products of two such sums the six largest are added up; what the others hold is below 2^-22 of the result. So the
// error is that of float32's own sums. One tile product is 16 × 16 × 32 multiplications: six of them take a half of
// the time that AVX-512 takes for the same floats.
//
// Compiled for AMX alone; whoever calls it asks check_amx() first.
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

  Operand from(long long blocks) const { return {(const char*)data + blocks * block, stride, block}; }
};

// Depth that lies in `channels`: two by two, sixteen pairs to a block.
struct Depth {
  long long channels;

  explicit Depth(long long channels) : channels(channels) {}
  long long pairs() const { return (channels + 1) / 2; }
  // Few channels: two parts of all of them go through one tile, and three products instead of six do.
  bool narrow() const { return pairs() <= kTile / 2; }
  long long tile_pairs() const { return narrow() ? 2 * pairs() : pairs() < kTile ? pairs() : kTile; }
  long long blocks() const { return (pairs() + kTile - 1) / kTile; }
  long long products() const { return narrow() ? 3 : 6; }
  // Tiles that hold the parts of one block: of a pixel's (low and high, high and middle if narrow), of a weight's.
  long long pixel_parts() const { return narrow() ? 2 : kParts; }
  long long weight_tiles() const { return blocks() * kParts; }
  // Bytes of the pixels of a left operand.
  long long pixel_bytes(long long pixels) const { return blocks() * pixel_parts() * pixels * 64; }
};

// The left operand, a row for every pixel: `columns` elements of every channel, one channel every `stride`, for each
// block and part. `pixels` lie from one part to the next, a multiple of 16 and not less than `columns`. A tap sees a row
// as many rows on as it sees pixels on: no shift moves a tile off its cache lines, which would halve its speed.
void pack_pixels(const Depth&, const float* from, long long stride, long long columns, void* to, long long pixels);

// The right operand, 16 columns at a time: for each block of the depth and tap its parts. Element (channel, column, tap)
// is weight[column_at[column] + channel_at[channel] + tap_at[tap]]; `columns` from 1 to 16, the others are zeros.
void pack_weight(const Depth&, const float* weight, long long columns, const int* column_at, const int* channel_at, long long taps, const int* tap_at, void* to);

// The steps of such a product, depth.blocks() * taps * depth.products() of them; a tap sees the pixels tap_at on.
void plan_steps(const Depth&, long long pixels, long long taps, const long long* tap_at, Step* steps);

// c (columns × length, a column every c_stride) = the product of `length` pixels × 16 column_blocks, turned. Of a column
// nothing behind `length` is written.
void multiply_pixels(const Depth&, const Operand& pixels, const Operand& weight, const Step* steps, long long count, long long length, long long column_blocks, float* c, long long c_stride);

// For sums over columns: `rows` rows of `columns` elements as the parts of a left operand, a row of bfloat16 every
// `plane`, a part every `part` elements, with zeros behind each row up to a multiple of 32.
void pack_rows(const float* from, long long stride, long long rows, long long columns, unsigned short* to, long long plane, long long part);

// And as a right operand, a row for every two columns: for each part and 16 rows, 32 columns a tile. Rows that are
// missing are zeros, as are columns behind `there`. A part takes row_tiles(rows, columns) * kTileBytes.
void pack_transposed(const float* from, long long stride, long long rows, long long there, long long columns, void* to);
constexpr long long row_tiles(long long rows, long long columns) { return (rows + 15) / 16 * ((columns + 31) / 32); }

// The six steps of every 32 columns; count = 6 * ((columns + 31) / 32).
void plan_column_steps(long long columns, long long a_part, long long b_part, Step* steps);

// A sum's squares of 16 × 16: a row every `stride` elements, the next 16 rows and columns where these say.
struct Sums {
  float* data;
  long long stride, row_block, column_block;
};

// A thread's tiles, of tile_pairs along the depth, for as long as this lives: what tile_product needs.
class Tiles {
 public:
  explicit Tiles(long long tile_pairs);
  ~Tiles();
};

// c (16 row_blocks × 16 column_blocks) = or += the sum over the steps.
void tile_product(const Operand& a, const Operand& b, const Step* steps, long long count, long long row_blocks, long long column_blocks, const Sums& c, bool add);

// The same for one block of rows and four of columns, which begin at b[0] to b[3], with plan_column_steps' steps. The
// squares lie one behind the other. So every tile is loaded once, where tile_product loads most of them for two products.
void tile_product_of_four(const Operand& a, const char* const* b, const Step* steps, long long count, float* c, bool add);

// The gradient of a weight (out × in × taps) as squares of 16 by 16 channels: for each 16 of the output, tap and 16 of
// the input one; channels that are missing are there.
struct WeightSquares {
  long long out, in, taps;

  long long in_blocks() const { return (in + 15) / 16; }
  long long at(long long out_block, long long tap) const { return (out_block * taps + tap) * in_blocks() * 256; }
  long long size() const { return at((out + 15) / 16, 0); }
};

// The output channels first .. last - 1 of `to` = the sum of `count` such gradients, one every size().
void collect_squares(const WeightSquares&, const float* squares, long long count, long long first, long long last, float* to);

}  // namespace sparse_gen::amx
