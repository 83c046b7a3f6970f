// Where the pixels of an image that was up-sampled ×2 and padded come from, and how its small image is dealt to lanes.
#pragma once

#include "host_device.h"
#include "padded_axis.h"

namespace sparse_gen::cuda {

// Places in ops/convolution.py's UPSAMPLE.
enum Upsampling : int { kNearest = 1, kBilinear = 2, kBilinearCorners = 3 };

// How far from its own a small pixel is that an up-sampled one sees through a kernel with this padding.
SPARSE_GEN_HD int halo_of(int padding, int upsample) { return upsample == kNearest ? (padding + 1) / 2 : padding / 2 + 1; }

// What one padded position of an up-sampled axis is made of: up to two small ones.
template <class T>
struct Sources {
  int near, second;
  T near_factor, second_factor;

  SPARSE_GEN_HD T factor_of(int at) const {
    return (near == at ? near_factor : T(0)) + (second == at ? second_factor : T(0));
  }
};

template <class T>
struct UpAxis {
  int length, padding, mode, upsample;  // of the small image
  T step;

  SPARSE_GEN_HD static UpAxis of(int length, int padding, int mode, int upsample) {
    return {length, padding, mode, upsample, T(1) / T(2 * length - 1)};
  }

  // How much of position `up` is its second source, which stands before an even position's own and behind an odd one's.
  // At the ends that one does not exist: it is the first once more, whatever its share.
  SPARSE_GEN_HD T share(int up) const {
    if (upsample == kBilinear) return T(0.25);
    const int near = up >> 1;
    return T(up & 1 ? length - 1 - near : near) * step;
  }

  SPARSE_GEN_HD Sources<T> sources(int position) const {
    const int up = padded_origin(position, 2 * length, padding, mode);
    if (up < 0) return {0, 0, T(0), T(0)};
    const int near = up >> 1, second = up & 1 ? near + 1 : near - 1;
    if (upsample == kNearest || second < 0 || second >= length) return {near, near, T(1), T(0)};
    const T of_second = share(up);
    return {near, second, T(1) - of_second, of_second};
  }
};

constexpr int kStripRows = 4;

// The small image, cut into strips of kStripRows rows and those laid end to end: a warp is a window on this line, and a
// lane one column of one strip. Windows overlap by the columns that their neighbours need; only strips that break off
// are cut short, so that this costs 2 lanes of 32 at any width.
struct Strips {
  int height, width, halo;

  struct Place {
    int top, column;
    bool inside;  // this window's own, not seen by it for its neighbours' sake
  };

  SPARSE_GEN_HD int strips() const { return round_up_quotient(height, kStripRows); }
  SPARSE_GEN_HD int positions() const { return strips() * width; }
  SPARSE_GEN_HD int own() const { return kWarp - 2 * halo; }
  SPARSE_GEN_HD int windows() const { return round_up_quotient(positions(), own()); }
  SPARSE_GEN_HD Place place(int window, int lane) const {
    const int at = window * own() + lane - halo, last = positions() - 1;
    const int position = at < 0 ? 0 : at > last ? last : at;
    return {position / width * kStripRows, position % width, at <= last && lane >= halo && lane < kWarp - halo};
  }
};

}  // namespace sparse_gen::cuda
