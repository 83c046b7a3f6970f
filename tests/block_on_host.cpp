// Runs what the threads of csrc/cuda/block_sparse_conv2d.cu do on the host, as cuda_on_host.cpp does for the others.
// Arguments are the product, the element type and integers; the arrays come through stdin and go to stdout as raw bytes.
#include <cstring>
#include <string>

#include "cuda/block_sparse_conv2d_gradient_body.h"
#include "cuda/chunks.h"
#include "on_host.h"

using namespace sparse_gen::cuda;

namespace {

// sum += a · b as mma.sync.m16n8k8 does it, with what 32 lanes hold: see products.h.
template <class A, class B, class Sum>
void multiply_by_warp(const A& a, const B& b, const Sum& sum) {
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column) {
      float total = 0;
      for (int k = 0; k < 8; ++k)
        total += a(row % 8 * 4 + k % 4, row / 8 + k / 4 * 2) * b(column * 4 + k % 4, k / 4);
      sum(row % 8 * 4 + column / 2, row / 8 * 2 + column % 2) += total;
    }
}

template <class Body>
void multiply(const Body&, std::vector<typename Body::State>& states, int warp, int group,
              const std::vector<HaloFragment<TensorCores, Body::kWidth / 8>>& fragments) {
  constexpr int N = Body::kWidth / 8;
  for (int i = 0; i < 2; ++i)
    for (int n = 0; n < N; ++n)
      multiply_by_warp([&](int lane, int r) { return fragments[lane].pixels[i][r]; },
                       [&](int lane, int r) { return fragments[lane].weights[n][r]; },
                       [&](int lane, int r) -> float& {
                         return states[warp * kWarp + lane].sum[group][(i * N + n) * 4 + r];
                       });
}

template <class Body>
void multiply(const Body&, std::vector<typename Body::State>& states, int warp, int n,
              const std::vector<GradientFragment<TensorCores, Body::kWidth / 8>>& fragments) {
  for (int i = 0; i < Body::kWidth / 8; ++i)
    multiply_by_warp([&](int lane, int r) { return fragments[lane].columns[r]; },
                     [&](int lane, int r) { return fragments[lane].gradient[i][r]; },
                     [&](int lane, int r) -> float& { return states[warp * kWarp + lane].sum[n][i * 4 + r]; });
}

template <class Body, class Fragment>
void multiply(const Body& body, std::vector<typename Body::State>& states, int warp, int n,
              const std::vector<Fragment>& fragments) {
  for (int lane = 0; lane < kWarp; ++lane) body.multiply(fragments[lane], states[warp * kWarp + lane].sum[n]);
}

// As much as the launch asks for, which has to fit on a multiprocessor twice: see sparse_gen/ops/block_halo.py.
std::vector<float> shared_memory(long long bytes, int most) {
  if (bytes > most) std::exit(4);
  return poisoned<float>(bytes / (long long)sizeof(float));
}

// The kernel `halo_convolution`.
template <class Body>
void halo_convolution(const Body& body) {
  std::vector<typename Body::State> states(kHaloThreads);
  std::vector<typename Body::Fragment> fragments(kWarp);
  for (long long block = 0; block < body.blocks(); ++block) {
    auto tile = shared_memory((long long)body.lists.chunk * body.plane * sizeof(float), 48 << 10);
    for (int t = 0; t < kHaloThreads; ++t) body.begin((int)block, t, states[t]);
    for (int chunk = body.first_chunk(states[0]); chunk < body.end_chunk(states[0]); ++chunk) {
      if (body.start(chunk, 0, states[0]) == body.start(chunk, Body::kGroups, states[0])) continue;
      for (int t = 0; t < kHaloThreads; ++t) body.stage(chunk, t, states[t], tile.data());
      for (int warp = 0; warp < kHaloWarps; ++warp)
        for (int group = 0; group < Body::kGroups; ++group)
          for (int step = body.start(chunk, group, states[0]); step < body.start(chunk, group + 1, states[0]); ++step) {
            for (int lane = 0; lane < kWarp; ++lane)
              body.load(step, states[warp * kWarp + lane], tile.data(), fragments[lane]);
            multiply(body, states, warp, group, fragments);
          }
    }
    for (auto& state : states) body.finish(state);
  }
}

// The kernel `halo_weight_gradient`.
template <class Body>
void halo_weight_gradient(const Body& body) {
  std::vector<typename Body::State> states(kHaloThreads);
  std::vector<typename Body::Fragment> fragments(kWarp);
  for (long long block = 0; block < body.blocks(); ++block) {
    auto shared = shared_memory(body.shared_bytes(), 96 << 10);
    for (int t = 0; t < kHaloThreads; ++t) body.begin((int)block, t, states[t]);
    for (int t = 0; t < kHaloThreads; ++t) body.name_channels(t, states[t], shared.data());
    for (int tile = body.first_tile(states[0]); tile < body.end_tile(states[0]); ++tile) {
      for (int t = 0; t < kHaloThreads; ++t) body.stage(tile, t, states[t], shared.data());
      for (int warp = 0; warp < kHaloWarps; ++warp)
        for (int n = 0; n < Body::kPieces && body.piece(n, states[warp * kWarp]) < states[0].end; ++n)
          for (int first = states[warp * kWarp].share * 8; first < kGradientPixels; first += body.shares * 8) {
            for (int lane = 0; lane < kWarp; ++lane)
              body.load(n, first, states[warp * kWarp + lane], shared.data(), fragments[lane]);
            multiply(body, states, warp, n, fragments);
          }
    }
    for (auto& state : states) body.finish(state);
  }
}

template <class Body>
void each(const Body& body) {
  for (long long i = 0; i < body.count(); ++i) body.run(i);
}

// Adds up (E, parts, size) as add_chunks.h does.
std::vector<float> added(const std::vector<float>& parts, int experiments, int count, long long size) {
  std::vector<float> sums((long long)experiments * size);
  for (int e = 0; e < experiments; ++e)
    for (long long i = 0; i < size; ++i)
      sums[e * size + i] = (float)sum_of_chunks(parts.data() + e * count * size + i, 0, count, (int)size);
  return sums;
}

struct Lists {
  std::vector<int> codes, slots, starts;
  HaloLists lists;

  // Integers: columns, starts, chunk, width, block; then the arrays.
  Lists(const int* n, int channels) : codes(input<int>(n[0])), slots(input<int>((long long)n[0] * n[3])),
                                      starts(input<int>(n[1])) {
    const int groups = (channels + n[4] - 1) / n[4] * ((n[4] + n[3] - 1) / n[3]);
    lists = {codes.data(), slots.data(), starts.data(), n[0], n[2], groups, n[3], n[4]};
  }
};

template <class Product, int N>
void convolve(const HaloPass& pass, const HaloLists& lists, int kept,
              const std::vector<float>& values, const float* bias, int splits,
              std::vector<float>& out) {
  auto packed = poisoned<float>((long long)pass.experiments * lists.columns * lists.width);
  std::vector<int> places(lists.columns);
  const int plane = pass.tile.plane(kForwardBanks);
  const PlaceBody place{lists.codes, lists.columns, plane, pass.tile, places.data()};
  each(PackBody<Product>{lists, place, pass.experiments, kept, values.data(), packed.data()});
  halo_convolution(HaloConvolution<Product, N>{pass, lists, plane, packed.data(), bias, places.data(), out.data(), splits});
}

template <class Product>
void convolve(const HaloPass& pass, const HaloLists& lists, int kept,
              const std::vector<float>& values, const float* bias, int splits,
              std::vector<float>& out) {
  if (lists.width == 8) return convolve<Product, 1>(pass, lists, kept, values, bias, splits, out);
  if (lists.width == 16) return convolve<Product, 2>(pass, lists, kept, values, bias, splits, out);
  if constexpr (Product::kByWarp) convolve<Product, 4>(pass, lists, kept, values, bias, splits, out);
}

template <class Product, int N>
void weight_gradient(const ConvShape& s, const HaloRounds& lists, const std::vector<float>& x,
                     const std::vector<float>& gradient) {
  using Body = HaloWeightGradient<Product, N>;
  const HaloTile tile = gradient_tile(s);
  const int plane = tile.plane(kGradientBanks), splits = gradient_splits(s, lists), shares = gradient_shares<Body>(lists);
  std::vector<int> places(lists.columns);
  each(PlaceBody{lists.codes, lists.columns, plane, tile, places.data()});
  auto parts = poisoned<float>((long long)s.experiments * splits * shares * s.kept);
  halo_weight_gradient(Body{s, lists, tile, plane, x.data(), gradient.data(), places.data(), parts.data(), splits, shares});
  output(added(parts, s.experiments, splits * shares, s.kept));
}

template <class Product>
void run(const std::vector<int>& n) {
  const ConvShape s{n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10]};
  const long long size = (long long)s.experiments * s.in_channels * s.plane();
  const long long out_size = (long long)s.experiments * s.out_channels * s.out_plane();
  const auto x = input<float>(size), values = input<float>((long long)s.experiments * s.kept);
  const auto bias = input<float>((long long)s.experiments * s.out_channels), gradient = input<float>(out_size);
  const Lists forward(&n[11], s.out_channels), backward(&n[16], s.in_channels);

  {
    const HaloPass pass = forward_pass(s, x.data());
    const int splits = halo_splits(pass, forward.lists);
    auto parts = poisoned<float>(parts_size(pass, splits));
    convolve<Product>(pass, forward.lists, s.kept, values, bias.data(), splits, parts);
    output(added(parts, s.experiments, splits, (long long)s.out_channels * s.out_plane()));
  }
  {
    const HaloPass pass = input_gradient_pass(s, gradient.data());
    const int splits = halo_splits(pass, backward.lists);
    auto parts = poisoned<float>(parts_size(pass, splits));
    convolve<Product>(pass, backward.lists, s.kept, values, nullptr, splits, parts);
    if (folds(s)) {
      auto grad_x = poisoned<float>(size);
      each(FoldPadding{s, parts.data(), splits, grad_x.data()});
      output(grad_x);
    } else {
      output(added(parts, s.experiments, splits, (long long)s.in_channels * s.plane()));
    }
  }
  // Integers: columns, pieces, rounds, chunk, slab, most, width, block.
  const int* m = &n[21];
  const auto codes = input<int>(m[0]), slots = input<int>((long long)m[0] * m[6]), pieces = input<int>(m[1]);
  const auto rounds = input<int>(4LL * m[2]);
  const int groups = (s.out_channels + m[7] - 1) / m[7] * ((m[7] + m[6] - 1) / m[6]);
  const HaloRounds lists{codes.data(), slots.data(), pieces.data(), rounds.data(), m[0], m[3],
                         groups,       m[4],         m[6],          m[7],          m[2], m[5]};
  if (m[6] == 8) return weight_gradient<Product, 1>(s, lists, x, gradient);
  if (m[6] == 16) return weight_gradient<Product, 2>(s, lists, x, gradient);
  if constexpr (Product::kByWarp) weight_gradient<Product, 4>(s, lists, x, gradient);
}

}  // namespace

int main(int count, char** arguments) {
  std::vector<int> numbers;
  for (int i = 3; i < count; ++i) numbers.push_back(std::atoi(arguments[i]));
  if (std::string(arguments[1]) == "tf32")
    run<TensorCores>(numbers);
  else
    run<ThreadByThread>(numbers);
}
