// Memory that kernels work in.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace ddpm_fast {

// Floats, aligned to cache lines, that a thread keeps from call to call: fresh pages cost more than what is done in them.
class Scratch {
 public:
  float* get(int64_t elements) {
    if (elements > size_) {
      data_.reset();  // before the new one is asked for, so that both are never held
      data_.reset(static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>((elements + 15) / 16) * 64)));
      size_ = data_ ? elements : 0;
      if (!data_) throw std::bad_alloc();
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> data_;
  int64_t size_ = 0;
};

}  // namespace ddpm_fast
