// What the convolutions on AMX tiles share: the weight as an operand of theirs.
#pragma once

#include <algorithm>
#include <vector>

#include "amx/split.h"
#include "binding.h"
#include "cpu/isa.h"

namespace sparse_gen {

inline void check_amx() {
  STD_TORCH_CHECK(instruction_set() == InstructionSet::amx,
                  "expected a processor with AMX tiles of bfloat16, got one without, choose another layout");
}

constexpr int64_t kTile = amx::kTile;
constexpr int64_t kTileRows = 2 * kTile;  // that one product works on at a time
constexpr int64_t kTileMargin = 2 * kTile;

// Elements of a row of a product, whose last tiles may end behind it: an odd number of cache lines.
inline int64_t split_plane(int64_t elements) { return ((elements + kTileMargin + 15) / 16 | 1) * 16; }

inline int64_t tile_blocks(int64_t rows) { return (rows + kTile - 1) / kTile; }

// The weight as a right operand: rows of the result, whose element (row, channel, tap) is weight[row_at[row] +
// channel_at[channel] + tap_at[tap]]. They come in groups that begin with a fresh tile; by default all of them are one.
class SplitWeight {
 public:
  amx::Depth depth;

  SplitWeight(const float* weight, const std::vector<int>& row_at, const std::vector<int>& channel_at,
              const std::vector<int>& tap_at, char* to, int64_t group = 0)
      : depth(channel_at.size()), block_(bytes_of_16_rows(channel_at.size(), tap_at.size())), data_(to) {
    const int64_t rows = row_at.size();
    if (group == 0) group = rows;
    const int64_t blocks = tile_blocks(group), groups = (rows + group - 1) / group;
    torch::stable::parallel_for(0, groups * blocks, 1, [&](int64_t first, int64_t last) {
      for (int64_t n = first; n < last; ++n) {
        const int64_t begin = n / blocks * group + n % blocks * kTile;
        const int64_t end = std::min(n / blocks * group + group, rows);
        amx::pack_weight(depth, weight, std::clamp<int64_t>(end - begin, 0, kTile), row_at.data() + std::min(begin, rows),
                         channel_at.data(), tap_at.size(), tap_at.data(), to + n * block_);
      }
    });
  }

  static int64_t bytes_of_16_rows(int64_t channels, int64_t taps) {
    return amx::Depth(channels).weight_tiles() * taps * amx::kTileBytes;
  }

  // c (rows × columns, c_stride apart) = the product of `rows` rows from tile `block` on with the pixels; up to a whole
  // tile, rows that are missing are written.
  void multiply(const char* pixels, const std::vector<amx::Step>& steps, int64_t block, int64_t rows, int64_t columns,
                float* c, int64_t c_stride) const {
    amx::multiply_pixels(depth, {pixels, 64, kTile * 64}, {data_ + block * block_, 64, block_}, steps.data(),
                         steps.size(), columns, tile_blocks(rows), c, c_stride);
  }

 private:
  int64_t block_;
  const char* data_;
};

inline std::vector<amx::Step> split_steps(const amx::Depth& depth, int64_t pixels, const std::vector<long long>& tap_at) {
  std::vector<amx::Step> steps(depth.blocks() * tap_at.size() * depth.products());
  amx::plan_steps(depth, pixels, tap_at.size(), tap_at.data(), steps.data());
  return steps;
}

// 0, step, 2 · step, …
inline std::vector<int> every(int64_t step, int64_t count) {
  std::vector<int> places(count);
  for (int64_t n = 0; n < count; ++n) places[n] = n * step;
  return places;
}

}  // namespace sparse_gen
