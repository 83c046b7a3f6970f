#include "sparse_conv2d.h"

#include "padding.h"
#include "vector.h"

namespace sparse_gen::SPARSE_GEN_ISA {

namespace {

inline long long smaller(long long a, long long b) { return a < b ? a : b; }
inline long long larger(long long a, long long b) { return a > b ? a : b; }

// Rows are short: a call of memcpy or memset costs as much as what it moves.
template <class T>
void clear(T* to, long long count) {
  for (long long i = 0; i < count; i += kWidth<T>) store_part(to + i, typename Vector<T>::type{}, count - i);
}

template <class T>
void take(T* __restrict to, const T* __restrict from, long long count, long long step) {
  long long i = 0;
  if (step == 1) {
    for (; i + kWidth<T> <= count; i += kWidth<T>) store_to(to + i, load_from(from + i));
    if (i < count) store_part(to + i, load_part(from + i, count - i), count - i);
  } else {
    for (; i < count; ++i) to[i] = from[2 * i];
  }
}

// With the step as a constant and no overlap the compiler makes vectors of these.
template <class T>
void add(T* __restrict to, const T* __restrict from, long long count, long long step) {
  if (step == 1) {
    for (long long i = 0; i < count; ++i) to[i] += from[i];
  } else {
    for (long long i = 0; i < count; ++i) to[2 * i] += from[i];
  }
}

// Where position i of a padded axis comes from; -1 for a zero.
inline long long origin(const ConvShape& s, long long i, long long length) {
  return padded_origin(i - s.padding, length, s.padding, s.mode);
}

// Columns begin .. end - 1 of every stride-th padded column from `offset` on lie inside the image.
struct Inside {
  long long begin, end;

  Inside(const ConvShape& s, long long offset, long long count) {
    begin = smaller(count, larger(0, (s.padding - offset + s.stride - 1) / s.stride));
    end = larger(begin, smaller(count, (s.width + s.padding - offset + s.stride - 1) / s.stride));
  }
};

template <class T>
void input(const ConvShape& s, const T* x, long long x_plane, long long x_pitch, const Load<T>* load, long long channels,
           long long first, long long last, long long copies, long long width, long long pitch, T* to, T* room) {
  const long long rows = last - first + s.shifts_h() - 1, copy_stride = s.stride * rows * pitch;
  for (long long c = 0; c < channels; ++c, x += x_plane, to += copies * copy_stride)
    for (long long phase = 0; phase < s.stride; ++phase)
      for (long long row = 0; row < rows; ++row) {
        const long long y = origin(s, s.stride * (first + row) + phase, s.height);
        T* copy = to + (phase * rows + row) * pitch;
        if (y < 0) {
          for (long long kx = 0; kx < copies; ++kx) clear(copy + kx * copy_stride, pitch);
          continue;
        }
        const T* from = x + y * x_pitch;
        if (load) {
          apply_load(from, room, s.width, load[c]);
          from = room;
        }
        for (long long kx = 0; kx < copies; ++kx, copy += copy_stride) {
          const Inside inside(s, kx, width);
          const auto border = [&](long long i) {
            const long long at = origin(s, s.stride * i + kx, s.width);
            copy[i] = at < 0 ? 0 : from[at];
          };
          for (long long i = 0; i < inside.begin; ++i) border(i);
          take(copy + inside.begin, from + s.stride * inside.begin + kx - s.padding, inside.end - inside.begin, s.stride);
          for (long long i = inside.end; i < width; ++i) border(i);
          clear(copy + width, pitch - width);
        }
      }
}

template <class T>
void gradient(const ConvShape& s, const T* grad_out, long long channels, long long first, long long last,
              long long copies, long long shift, long long pitch, T* to) {
  const long long above = s.shifts_h() - 1, height = s.out_h(), width = s.out_w();
  for (long long c = 0; c < channels; ++c, grad_out += height * width)
    for (long long lead = shift; lead < shift + copies; ++lead)
      for (long long y = first - above; y < last; ++y, to += pitch) {
        if (y < 0 || y >= height) {
          clear(to, pitch);
          continue;
        }
        clear(to, lead);
        take(to + lead, grad_out + y * width, width, 1);
        clear(to + lead + width, pitch - lead - width);
      }
}

template <class T>
void fold(const ConvShape& s, const T* padded, long long plane_stride, long long pitch, long long first,
          long long channels, long long begin, long long end, T* grad_x) {
  for (long long c = 0; c < channels; ++c, grad_x += s.height * s.width)
    for (long long y = begin; y < end; ++y) {
      const long long at = origin(s, y, s.height);
      if (at < 0) continue;
      T* row = grad_x + at * s.width;
      for (long long phase = 0; phase < s.stride; ++phase) {
        const T* from = padded + ((c * s.stride + y % s.stride) * s.stride + phase) * plane_stride +
                        (y / s.stride - first) * pitch;
        const Inside inside(s, phase, s.columns());
        add(row + s.stride * inside.begin + phase - s.padding, from + inside.begin, inside.end - inside.begin, s.stride);
        const auto border = [&](long long i) {
          const long long x = origin(s, s.stride * i + phase, s.width);
          if (x >= 0) row[x] += from[i];
        };
        for (long long i = 0; i < inside.begin; ++i) border(i);
        for (long long i = inside.end; i < s.columns(); ++i) border(i);
      }
    }
}

template <class T>
void copy(const T* from, long long from_stride, long long from_pitch, T* to, long long to_stride, long long to_pitch,
          long long channels, long long rows, long long width, const T* bias) {
  for (long long c = 0; c < channels; ++c)
    for (long long y = 0; y < rows; ++y) {
      const T* __restrict source = from + c * from_stride + y * from_pitch;
      T* __restrict target = to + c * to_stride + y * to_pitch;
      const T b = bias ? bias[c] : T(0);
      for (long long x = 0; x < width; ++x) target[x] = source[x] + b;
      clear(target + width, to_pitch - width);
    }
}

}  // namespace

void shift_input(const ConvShape& s, const float* x, long long x_plane, long long x_pitch, const Load<float>* load,
                 long long channels, long long first, long long last, long long copies, long long width, long long pitch,
                 float* to, float* room) {
  input(s, x, x_plane, x_pitch, load, channels, first, last, copies, width, pitch, to, room);
}
void shift_input(const ConvShape& s, const double* x, long long x_plane, long long x_pitch, const Load<double>* load,
                 long long channels, long long first, long long last, long long copies, long long width, long long pitch,
                 double* to, double* room) {
  input(s, x, x_plane, x_pitch, load, channels, first, last, copies, width, pitch, to, room);
}
void shift_gradient(const ConvShape& s, const float* grad_out, long long channels, long long first, long long last,
                    long long copies, long long shift, long long pitch, float* to) {
  gradient(s, grad_out, channels, first, last, copies, shift, pitch, to);
}
void shift_gradient(const ConvShape& s, const double* grad_out, long long channels, long long first, long long last,
                    long long copies, long long shift, long long pitch, double* to) {
  gradient(s, grad_out, channels, first, last, copies, shift, pitch, to);
}
void fold_rows(const ConvShape& s, const float* padded, long long plane_stride, long long pitch, long long first,
               long long channels, long long begin, long long end, float* grad_x) {
  fold(s, padded, plane_stride, pitch, first, channels, begin, end, grad_x);
}
void fold_rows(const ConvShape& s, const double* padded, long long plane_stride, long long pitch, long long first,
               long long channels, long long begin, long long end, double* grad_x) {
  fold(s, padded, plane_stride, pitch, first, channels, begin, end, grad_x);
}
void copy_rows(const float* from, long long from_stride, long long from_pitch, float* to, long long to_stride,
               long long to_pitch, long long channels, long long rows, long long width, const float* bias) {
  copy(from, from_stride, from_pitch, to, to_stride, to_pitch, channels, rows, width, bias);
}
void copy_rows(const double* from, long long from_stride, long long from_pitch, double* to, long long to_stride,
               long long to_pitch, long long channels, long long rows, long long width, const double* bias) {
  copy(from, from_stride, from_pitch, to, to_stride, to_pitch, channels, rows, width, bias);
}

}  // namespace sparse_gen::SPARSE_GEN_ISA
