// Aligned scratch memory that frees itself; empty where there was none to be had.
#pragma once

#include <stddef.h>
#include <stdlib.h>

namespace tpk::TPK_ISA {

template <class T>
class Scratch {
public:
    explicit Scratch(ptrdiff_t size)
        : data_(static_cast<T*>(aligned_alloc(64, (static_cast<size_t>(size) * sizeof(T) / 64 + 1) * 64))) {}
    ~Scratch() { free(data_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    explicit operator bool() const { return data_ != nullptr; }
    T* get() const { return data_; }

private:
    T* data_;
};

}  // namespace tpk::TPK_ISA
