// Memory that a kernel works in.
#pragma once
#include <memory>
#include <optional>

#include "../check.h"

namespace qk {

// One allocation, cut into pieces that start on cache lines.
class Scratch {
 public:
  int64_t reserve(int64_t bytes) {
    const int64_t at = size_;
    size_ += layout::round_up(bytes, 64);
    return at;
  }
  // What a decode step needs lies in memory that each thread keeps: asking torch for it takes 4 us,
  // as long as a small matrix.
  void allocate(const Tensor& like) {
    constexpr int64_t kept = 256 << 10;
    if (size_ <= kept) {
      thread_local std::unique_ptr<char[]> memory(new char[kept + 64]);
      base_ =
          reinterpret_cast<char*>(layout::round_up(reinterpret_cast<intptr_t>(memory.get()), 64));
      return;
    }
    store_ = empty_on(like, {size_}, ScalarType::Byte);
    base_ = mutable_data<char>(*store_);
  }
  template <class T = void>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(base_ + offset);
  }

 private:
  int64_t size_ = 0;
  std::optional<Tensor> store_;
  char* base_ = nullptr;
};

}  // namespace qk
