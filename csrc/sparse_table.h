// Kept weights in the order in which the kernels of cpu/sparse_rows.h read them.
#pragma once

#include <cstdint>

#include "binding.h"
#include "cpu/sparse_rows.h"
#include "scratch.h"

namespace sparse_gen {

// A sparse matrix whose columns, the source rows, are cut into blocks that fit the first-level cache: row g of block b
// is row b * groups + g of rows().
template <class T>
class SparseTable {
 public:
  // Weights order[start[g]] .. order[start[g + 1] - 1] belong to group g, sorted by block; no order means none is needed.
  // The table lies in the calling thread's scratch memory.
  SparseTable(int table_slot, int value_slot, int64_t groups, int64_t blocks, const int64_t* start, const int64_t* order)
      : groups_(groups), blocks_(blocks), start_(start), order_(order) {
    slots_ = first_slot(groups);
    begin_ = scratch<int>(table_slot, 2 * groups * blocks + slots_);
    end_ = begin_ + groups * blocks;
    offset_ = end_ + groups * blocks;
    value_ = scratch<T>(value_slot, slots_);
  }

  // Reads one experiment's values; block(k) and offset(k) say where weight k belongs.
  template <class Block, class Offset>
  void fill(const T* values, const Block& block, const Offset& offset) {
    torch::stable::parallel_for(0, groups_, 4, [&](int64_t first, int64_t last) {
      for (int64_t g = first; g < last; ++g) {
        int64_t k = start_[g], slot = first_slot(g);
        for (int64_t b = 0; b < blocks_; ++b) {
          begin_[b * groups_ + g] = slot;
          for (; k < start_[g + 1] && block(at(k)) == b; ++k, ++slot) {
            offset_[slot] = offset(at(k));
            value_[slot] = values[at(k)];
          }
          end_[b * groups_ + g] = slot;
          for (; slot % kRowGroup; ++slot) offset_[slot] = 0;
        }
      }
    });
  }

  SparseRows<T> rows() const { return {begin_, end_, offset_, value_}; }
  int64_t slots() const { return slots_; }
  // Where group g's weights begin, those of all its blocks.
  int64_t first_slot(int64_t g) const {
    const int64_t slot = start_[g] + g * blocks_ * (kRowGroup - 1);
    return (slot + kRowGroup - 1) / kRowGroup * kRowGroup;
  }
  int64_t begin(int64_t block, int64_t group) const { return begin_[block * groups_ + group]; }

  // Adds up `count` arrays of slots() elements and puts the sums into the order of the values.
  void collect(const T* sums, int64_t count, T* result) const {
    torch::stable::parallel_for(0, groups_, 4, [&](int64_t first, int64_t last) {
      for (int64_t g = first; g < last; ++g) {
        int64_t k = start_[g];
        for (int64_t b = 0; b < blocks_; ++b)
          for (int64_t slot = begin_[b * groups_ + g]; slot < end_[b * groups_ + g]; ++slot, ++k) {
            T sum = sums[slot];
            for (int64_t n = 1; n < count; ++n) sum += sums[n * slots_ + slot];
            result[at(k)] = sum;
          }
      }
    });
  }

 private:
  int64_t at(int64_t k) const { return order_ ? order_[k] : k; }

  int64_t groups_, blocks_, slots_;
  const int64_t *start_, *order_;
  int *begin_, *end_, *offset_;
  T* value_;
};

}  // namespace sparse_gen
