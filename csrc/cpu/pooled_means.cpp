#include "pooled_means.h"

#include "padding.h"
#include "vector.h"

namespace sparse_gen::SPARSE_GEN_ISA {

namespace {

// The row of the image that padded row i shows, -1 for zeros.
inline long long image_row(const PaddedImage& p, long long i) {
  return padded_origin(i - p.padding, p.height, p.padding, p.mode);
}

// Calls f(padded column, column of the image, -1 for a zero) for the columns of the padding.
template <class F>
inline void for_border(const PaddedImage& p, F f) {
  for (long long i = 0; i < p.padding; ++i) f(i, padded_origin(i - p.padding, p.width, p.padding, p.mode));
  for (long long i = p.width + p.padding; i < p.width + 2 * p.padding; ++i)
    f(i, padded_origin(i - p.padding, p.width, p.padding, p.mode));
}

template <class T>
void add_two(const T* __restrict a, const T* __restrict b, T* __restrict to, long long count) {
  for (long long i = 0; i < count; ++i) to[i] = a[i] + b[i];
}

template <class T>
void means_of_neighbours(const T* __restrict sums, T* __restrict to, long long count) {
  for (long long i = 0; i < count; ++i) to[i] = T(0.25) * (sums[i] + sums[i + 1]);
}

template <class T>
void accumulate(const T* __restrict from, T* __restrict to, long long count) {
  for (long long i = 0; i < count; ++i) to[i] += from[i];
}

// The rows of an image, each read through the load once while its neighbours are asked for in turn.
template <class T>
class LoadedRows {
 public:
  LoadedRows(const T* x, long long width, const Load<T>* load, T* room) : x_(x), width_(width), load_(load), room_(room) {}

  const T* row(long long y) {
    if (!load_) return x_ + y * width_;
    const int slot = y & 1;
    T* to = room_ + slot * width_;
    if (held_[slot] != y) apply_load(x_ + y * width_, to, width_, *load_);
    held_[slot] = y;
    return to;
  }

 private:
  const T* x_;
  long long width_;
  const Load<T>* load_;
  T* room_;
  long long held_[2] = {-1, -1};
};

template <class T>
void forward(const PaddedImage& p, const T* x, const Load<T>* load, T* means, T* sums) {
  LoadedRows<T> image(x, p.width, load, sums + p.width + 2 * p.padding);
  for (long long r = 0; r < p.rows(); ++r) {
    // Sums of two padded rows; at a zero row the other one alone.
    const long long upper = image_row(p, r), lower = image_row(p, r + 1);
    const T* rows[2];
    int found = 0;
    if (upper >= 0) rows[found++] = image.row(upper);
    if (lower >= 0) rows[found++] = image.row(lower);
    T* inside = sums + p.padding;
    if (found == 2)
      add_two(rows[0], rows[1], inside, p.width);
    else
      for (long long i = 0; i < p.width; ++i) inside[i] = found ? rows[0][i] : T(0);
    for_border(p, [&](long long i, long long column) { sums[i] = column < 0 ? T(0) : inside[column]; });
    means_of_neighbours(sums, means + r * p.columns(), p.columns());
  }
}

template <class T>
void gradient(const PaddedImage& p, const T* grad_means, T* grad_x, T* sums) {
  for (long long i = 0; i < p.height * p.width; ++i) grad_x[i] = 0;
  const long long columns = p.columns();
  for (long long r = 0; r < p.rows(); ++r) {
    // What each column of both padded rows gets.
    const T* g = grad_means + r * columns;
    sums[0] = T(0.25) * g[0];
    means_of_neighbours(g, sums + 1, columns - 1);
    sums[columns] = T(0.25) * g[columns - 1];
    T* inside = sums + p.padding;
    for_border(p, [&](long long i, long long column) {
      if (column >= 0) inside[column] += sums[i];
    });
    const long long upper = image_row(p, r), lower = image_row(p, r + 1);
    if (upper >= 0) accumulate(inside, grad_x + upper * p.width, p.width);
    if (lower >= 0) accumulate(inside, grad_x + lower * p.width, p.width);
  }
}

}  // namespace

void pooled_means(const PaddedImage& p, const float* x, const Load<float>* load, float* means, float* scratch) {
  forward(p, x, load, means, scratch);
}
void pooled_means(const PaddedImage& p, const double* x, const Load<double>* load, double* means, double* scratch) {
  forward(p, x, load, means, scratch);
}
void pooled_means_gradient(const PaddedImage& p, const float* grad_means, float* grad_x, float* scratch) {
  gradient(p, grad_means, grad_x, scratch);
}
void pooled_means_gradient(const PaddedImage& p, const double* grad_means, double* grad_x, double* scratch) {
  gradient(p, grad_means, grad_x, scratch);
}

}  // namespace sparse_gen::SPARSE_GEN_ISA
