// A tile of an image with the halo that windows reach, in shared memory: staged once for all weights that read it.
#pragma once

#include "host_device.h"
#include "padded_axis.h"

namespace sparse_gen::cuda {

constexpr int kHaloWarps = 8, kHaloThreads = kHaloWarps * kWarp;

// The outputs of a tile and what their windows see. With a step of 2 a row's even columns stand before its odd ones:
// then too neighbouring outputs read neighbouring words.
struct HaloTile {
  int columns_log, rows;  // outputs; 8, 16 or 32 columns, so that eight pixels from a multiple of eight are of one row
  int step, window_h, window_w;

  SPARSE_GEN_HD int columns() const { return 1 << columns_log; }
  SPARSE_GEN_HD int halo_h() const { return (rows - 1) * step + window_h; }
  SPARSE_GEN_HD int halo_w() const { return (columns() - 1) * step + window_w; }
  SPARSE_GEN_HD int half() const { return round_up_quotient(halo_w(), step); }
  SPARSE_GEN_HD int row() const { return half() * step; }
  SPARSE_GEN_HD int place(int y, int x) const { return y * row() + (x & (step - 1)) * half() + (x >> (step - 1)); }
  // The upper left corner of a pixel's window.
  SPARSE_GEN_HD int base(int pixel) const {
    return (pixel >> columns_log) * step * row() + (pixel & (columns() - 1));
  }
  // From a channel to the next: so many words beyond a multiple of the 32 banks.
  SPARSE_GEN_HD int plane(int beyond) const {
    const int size = halo_h() * row();
    return size + ((beyond - size) & 31);
  }

  SPARSE_GEN_HD int tiles_down(int height) const { return round_up_quotient(height, rows); }
  SPARSE_GEN_HD int tiles_across(int width) const { return round_up_quotient(width, columns()); }

  // Of so many pixels, as wide as an image of this width has a use for.
  static HaloTile of(int pixels, int width, int step, int window_h, int window_w) {
    const int columns_log = width > 16 ? 5 : width > 8 ? 4 : 3;
    return {columns_log, pixels >> columns_log, step, window_h, window_w};
  }
};

// Channels that lie one behind the other, padded by index.
struct HaloImage {
  const float* data;
  int height, width, padding, mode;
};

// One thread's part of so many channels; the tile's halo begins at row `top` and column `left` of the image. A team of
// threads takes every fourth channel, so that what a thread works out of its pixels serves many channels, and reads eight
// of them before it writes the first.
template <class Product>
SPARSE_GEN_HD void stage_halo(int thread, const HaloTile& tile, const HaloImage& image, int channels, int top, int left,
                              int plane, float* to) {
  constexpr int kTeams = 4, kTeam = kHaloThreads / kTeams, kAtOnce = 8;
  const int halo_w = tile.halo_w(), pixels = tile.halo_h() * halo_w, image_plane = image.height * image.width;
  for (int pixel = thread % kTeam; pixel < pixels; pixel += kTeam) {
    const int row = pixel / halo_w, column = pixel - row * halo_w;
    const int y = padded_origin(top + row, image.height, image.padding, image.mode);
    const int x = padded_origin(left + column, image.width, image.padding, image.mode);
    const bool there = y >= 0 && x >= 0;
    const float* from = image.data + (there ? y * image.width + x : 0);
    float* at = to + tile.place(row, column);
    for (int first = thread / kTeam; first < channels; first += kTeams * kAtOnce) {
      float value[kAtOnce];
      SPARSE_GEN_UNROLL
      for (int n = 0; n < kAtOnce; ++n) {
        const int channel = first + n * kTeams;
        value[n] = there && channel < channels ? read(from + channel * image_plane) : 0.0f;
      }
      SPARSE_GEN_UNROLL
      for (int n = 0; n < kAtOnce; ++n) {
        const int channel = first + n * kTeams;
        if (channel < channels) at[channel * plane] = Product::rounded(value[n]);
      }
    }
  }
}

}  // namespace sparse_gen::cuda
