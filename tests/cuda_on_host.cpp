// Runs what csrc/cuda's threads do on the host, block by block and thread by thread: the tests compile this with the
// address sanitizer and compare with the reference. Arguments are a name, the element type and the integers of the
// shape; the arrays come through stdin and go to stdout as raw bytes.
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

#include "cuda/concrete_mask_body.h"
#include "cuda/sparse_conv2d_body.h"
#include "cuda/sparse_upsample_conv2d_gradient_body.h"
#include "on_host.h"

using namespace sparse_gen::cuda;

namespace {

// The kernel `convolve` of sparse_conv2d.cu.
template <class Body>
void convolve(const Body& body) {
  for (long long block = 0; block < body.blocks(); ++block) {
    std::vector<typename Body::State> states(kThreads);
    for (int t = 0; t < kThreads; ++t) body.begin((int)block, t, states[t]);
    for (int step = 0; step < states[0].group.steps(); ++step) {
      typename Body::Shared shared;
      std::memset((void*)&shared, 0xff, sizeof shared);
      for (int t = 0; t < kThreads; ++t) body.stage(t, step, states[t], shared);
      for (int t = 0; t < kThreads; ++t) body.accumulate(step, shared, states[t]);
    }
    for (int t = 0; t < kThreads; ++t) body.finish(states[t]);
  }
}

// The kernel `weight_gradient` of sparse_conv2d.cu.
template <class T, class Body>
void weight_gradient(const Body& body) {
  for (long long block = 0; block < body.blocks(); ++block) {
    std::vector<typename Body::State> states(kWarp);
    for (int lane = 0; lane < kWarp; ++lane) body.begin((int)block, lane, states[lane]);
    for (int warp = 0; warp < Body::kWarps; ++warp)
      for (long long k = states[0].group.begin + warp; k < states[0].group.end; k += Body::kWarps) {
        T sums[kWarp];
        for (int lane = 0; lane < kWarp; ++lane) sums[lane] = body.dot(k, states[lane]);
        for (int apart = kWarp / 2; apart; apart /= 2)
          for (int lane = 0; lane < apart; ++lane) sums[lane] += sums[lane + apart];
        states[0].partial[k] = sums[0];
      }
  }
}

template <class T, int ConvPixels, int GradientPixels, class Loads>
void convolution(const std::vector<int>& n) {
  const ConvShape s{n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10]};
  const int row = s.width + n[11], plane = s.height * row + n[11];  // what lies between rows and planes
  const long long size = (long long)s.experiments * s.in_channels * s.plane();
  const long long out_size = (long long)s.experiments * s.out_channels * s.out_plane();
  const auto pixels = input<T>((long long)s.experiments * s.in_channels * plane);
  const auto loads = input<T>((long long)s.experiments * s.in_channels * 5);
  const Image<T> x{pixels.data(), loads.data(), (long long)s.in_channels * plane, plane, row};
  const auto values = input<T>((long long)s.experiments * s.kept);
  const auto bias = input<T>((long long)s.experiments * s.out_channels), gradient = input<T>(out_size);
  const auto taps = input<int>(4LL * s.kept);
  const auto by_output = input<long long>(s.out_channels + 1);
  const auto by_input = input<long long>((long long)s.in_channels * s.stride * s.stride + 1);
  const auto order = input<long long>(s.kept);
  const ConvPattern pattern{taps.data(), by_output.data(), by_input.data(), order.data()};

  auto out = poisoned<T>(out_size), grad_x = poisoned<T>(size), grad_values = poisoned<T>(values.size());
  convolve(ForwardBlock<T, ConvPixels, Loads>{s, pattern, x, values.data(), bias.data(), out.data()});
  convolve(InputGradientBlock<T, ConvPixels>{s, pattern, gradient.data(), values.data(), grad_x.data()});

  WeightGradientWarp<T, GradientPixels, Loads> body{s, pattern, gradient.data(), x, nullptr};
  const int chunks = body.chunks();
  auto partial = poisoned<T>((long long)s.experiments * chunks * s.kept);
  body.partial = partial.data();
  weight_gradient<T>(body);
  for (int e = 0; e < s.experiments; ++e)
    for (int k = 0; k < s.kept; ++k)
      grad_values[(long long)e * s.kept + k] =
          (T)sum_of_chunks(partial.data() + (long long)e * chunks * s.kept + k, 0, chunks, s.kept);
  output(out);
  output(grad_x);
  output(grad_values);
}

// Calls `work` with the states and the shared memory of every block of sparse_upsample_conv2d.cu, before it is finished.
template <class Body, class Work>
void up_blocks(const Body& body, const Work& work) {
  const int threads = body.warps * kWarp;
  const auto shared = std::make_unique<typename Body::Shared>();
  std::vector<typename Body::State> states(threads);
  for (long long block = 0; block < body.blocks(); ++block) {
    std::memset((void*)shared.get(), 0xff, sizeof *shared);
    for (int t = 0; t < threads; ++t) body.begin((int)block, t, states[t]);
    for (int chunk = 0; chunk < body.chunks(); ++chunk) work(chunk, states, *shared);
    for (auto& state : states) body.finish(state);
  }
}

// The kernel `up_forward`.
template <class T, class Body>
void up_forward(const Body& body) {
  up_blocks(body, [&](int chunk, auto& states, auto& shared) {
    for (auto& state : states) body.stage_image(chunk, state, shared);
    for (int warp = 0; warp < body.warps; ++warp) {
      auto* lanes = &states[warp * kWarp];
      for (int segment = 0; segment < body.segments(lanes[0]); ++segment) {
        for (int lane = 0; lane < kWarp; ++lane) body.stage_weights(segment, lanes[lane], shared);
        for (int kx = 0; kx < body.s.kernel; ++kx) {
          bool any = false;
          for (int lane = 0; lane < kWarp; ++lane) any = body.add_rows(kx, segment, shared, lanes[lane]);
          const auto from = [&](T, int row, int lane) { return lanes[lane].rows[row]; };
          for (int lane = 0; lane < kWarp && any; ++lane) body.add_columns(kx, from, lanes[lane]);
        }
      }
    }
  });
}

// The kernel `up_backward`.
template <class T, class Body>
void up_backward(const Body& body) {
  up_blocks(body, [&](int chunk, auto& states, auto& shared) {
    for (int n = 0; n < body.units_of(chunk); ++n) {
      auto* lanes = &states[n % body.warps * kWarp];
      for (int lane = 0; lane < kWarp; ++lane) body.add_rows(chunk * body.a_chunk() + n, lanes[lane]);
      const auto from = [&](T, int row, int lane) { return lanes[lane].half[row / 2][row % 2]; };
      for (int kx = 0; kx < body.s.kernel; ++kx)
        for (int lane = 0; lane < kWarp; ++lane) body.add_columns(n, kx, from, lanes[lane], shared);
    }
    for (int warp = 0; warp < body.warps; ++warp) {
      auto* lanes = &states[warp * kWarp];
      for (int c = 0; c < Body::kChannels; ++c)
        for (bool more = lanes[0].at[c] < lanes[0].end[c]; more;) {
          const int at = lanes[0].at[c];
          for (int lane = 0; lane < kWarp; ++lane) body.stage_weights(chunk, at, lanes[0].end[c], lanes[lane], shared);
          for (int n = 0; n < Body::kBatch && more; n += Body::kAtOnce) {
            int count = 0;
            for (int lane = 0; lane < kWarp; ++lane) count = body.multiply(c, n, shared, lanes[lane]);
            lanes[0].at[c] += count;
            more = count == Body::kAtOnce;
            for (int k = 0; k < count; ++k) {
              T sum = 0;
              for (int lane = 0; lane < kWarp; ++lane) sum += lanes[lane].dot[k];
              body.store_dot(n + k, sum, shared, lanes[0]);
            }
          }
        }
    }
  });
}

template <class T, bool Linear>
void up_convolution(const std::vector<int>& n) {
  const UpShape s{n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9]};
  const int loaded = n[10], warps = n[11];
  const long long size = (long long)s.experiments * s.in_channels * s.plane();
  const long long out_size = (long long)s.experiments * s.out_channels * s.out_plane();
  const auto pixels = input<T>(size), loads = input<T>((long long)s.experiments * s.in_channels * 5);
  const SmallImage<T> x{pixels.data(), loaded ? loads.data() : nullptr};
  const auto values = input<T>((long long)s.experiments * s.kept);
  const auto bias = input<T>((long long)s.experiments * s.out_channels), gradient = input<T>(out_size);
  const auto taps = input<int>(4LL * s.kept);
  const auto by_tap = input<long long>((long long)s.out_channels * s.taps() + 1), tap_order = input<long long>(s.kept);
  const auto by_input = input<long long>(s.in_channels + 1LL), input_order = input<long long>(s.kept);
  const TapPattern pattern{taps.data(), by_tap.data(), tap_order.data(), by_input.data(), input_order.data()};

  auto out = poisoned<T>(out_size);
  up_forward<T>(UpForward<T, Linear>{s, pattern, x, values.data(), bias.data(), out.data(), warps});
  output(out);
  // As many channels a warp as the launcher gives it, and one.
  const auto backward = [&](auto body) {
    auto grad_x = poisoned<T>(size), grad_values = poisoned<T>(values.size());
    const int windows = body.strips().windows();
    auto partial = poisoned<T>((long long)s.experiments * windows * s.kept);
    body.grad_x = grad_x.data();
    body.partial = partial.data();
    up_backward<T>(body);
    for (int e = 0; e < s.experiments; ++e)
      for (int k = 0; k < s.kept; ++k)
        grad_values[(long long)e * s.kept + k] =
            (T)sum_of_chunks(partial.data() + (long long)e * windows * s.kept + k, 0, windows, s.kept);
    output(grad_x);
    output(grad_values);
  };
  backward(UpBackward<T, Linear, 1>{s, pattern, gradient.data(), x, values.data(), nullptr, nullptr, warps});
  backward(UpBackward<T, Linear, kGradientChannels>{s, pattern, gradient.data(), x, values.data(), nullptr, nullptr, warps});
}

template <class T>
void mask(const std::vector<int>& n) {
  const int experiments = n[0], numel = n[1], shared = n[2];
  const long long count = (long long)experiments * numel;
  auto logits = input<T>(count), exp_avg = input<T>(count), exp_avg_sq = input<T>(count);
  const auto weight = input<T>(shared ? numel : count), gradient = input<T>(count), grad_soft = input<T>(count);
  const auto seeds = input<long long>(experiments), step = input<long long>(1);
  const auto numbers = input<double>(7);
  auto soft = poisoned<T>(count), masked = poisoned<T>(count), next = poisoned<T>(count);
  auto grad_logits = poisoned<T>(count), grad_weight = poisoned<T>(count);

  const Rows rows{experiments, numel, shared ? 0 : numel};
  const Draw draw{seeds.data(), step.data(), n[3], 1 / numbers[0]};
  const SampleBody<T> sample{rows, draw, logits.data(), weight.data(), soft.data(), masked.data()};
  const GradientBody<T> backward{rows,        1 / numbers[0],     grad_soft.data(),  gradient.data(), weight.data(),
                                 soft.data(), grad_logits.data(), grad_weight.data()};
  const UpdateBody<T> update{rows,
                             draw,
                             logits.data(),
                             exp_avg.data(),
                             exp_avg_sq.data(),
                             next.data(),
                             weight.data(),
                             gradient.data(),
                             AdamNumbers::of(numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], numbers[6])};
  const AdamStep<T> adam(update.adam, step[0]);
  const bool whole = rows.whole();
  for (long long group = 0; group < rows.groups(); ++group) {
    if (whole) {
      sample.template run<true>(group);
      backward.template run<true>(group);
      update.template run<true>(group, adam);
    } else {
      sample.template run<false>(group);
      backward.template run<false>(group);
      update.template run<false>(group, adam);
    }
  }
  for (const auto* array : {&soft, &masked, &grad_logits, &grad_weight, &logits, &exp_avg, &exp_avg_sq, &next})
    output(*array);
}

template <class T>
void run(const std::string& name, const std::vector<int>& numbers) {
  if (name == "few_pixels") return convolution<T, kFewConvPixels, kFewGradientPixels, NoLoad<T>>(numbers);
  if (name == "many_pixels") return convolution<T, kManyConvPixels, kManyGradientPixels, NoLoad<T>>(numbers);
  if (name == "few_pixels_loaded") return convolution<T, kFewConvPixels, kFewGradientPixels, Load<T>>(numbers);
  if (name == "many_pixels_loaded") return convolution<T, kManyConvPixels, kManyGradientPixels, Load<T>>(numbers);
  if (name == "nearest") return up_convolution<T, false>(numbers);
  if (name == "bilinear") return up_convolution<T, true>(numbers);
  mask<T>(numbers);
}

}  // namespace

int main(int count, char** arguments) {
  std::vector<int> numbers;
  for (int i = 3; i < count; ++i) numbers.push_back(std::atoi(arguments[i]));
  if (std::string(arguments[2]) == "double")
    run<double>(arguments[1], numbers);
  else
    run<float>(arguments[1], numbers);
}
