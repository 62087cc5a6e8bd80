// Aligned scratch memory, kept for the next call of the same thread; empty where there was none to be had.
#pragma once

#include <stddef.h>
#include <stdlib.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace tpk::TPK_ISA {

// What a thread's last calls took. Given back to the system it would come back page by page, each a fault that costs
// as much as thousands of multiply-adds.
class KeptMemory {
public:
    ~KeptMemory() {
        for (Block& block : blocks_) free(block.memory);
    }

    struct Block {
        void* memory = nullptr;
        size_t bytes = 0;
    };

    Block take(size_t bytes) {
        for (Block& block : blocks_) {
            // A block much too large is left for the call that needed it.
            if (block.memory && block.bytes >= bytes && block.bytes <= 4 * bytes) {
                const Block taken = block;
                block = {};
                return taken;
            }
        }
        return {allocate(bytes), bytes};
    }

    void keep(const Block& block) {
        if (!block.memory || block.bytes > largest) return free(block.memory);
        Block& place = blocks_[next_++ % count];
        free(place.memory);
        place = block;
    }

private:
    static constexpr unsigned count = 8;
#ifdef __SANITIZE_ADDRESS__  // sees the end of a block only where it was allocated for the call
    static constexpr size_t largest = 0;
#else
    static constexpr size_t largest = 32 << 20;
#endif
    static constexpr size_t huge_page = 2 << 20;

    // Large blocks lie in huge pages where the system has them: each row of a large matrix is in another small page,
    // and a product down its columns would wait for the addresses of all of them.
    static void* allocate(size_t bytes) {
        if (bytes < 2 * huge_page) return aligned_alloc(64, bytes);
        void* memory = aligned_alloc(huge_page, (bytes + huge_page - 1) / huge_page * huge_page);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
        if (memory) madvise(memory, bytes, MADV_HUGEPAGE);  // advice: without it all still works
#endif
        return memory;
    }

    Block blocks_[count];
    unsigned next_ = 0;
};

inline KeptMemory& kept_memory() {
    static thread_local KeptMemory memory;
    return memory;
}

template <class T>
class Scratch {
public:
    explicit Scratch(ptrdiff_t size)
        : block_(kept_memory().take((static_cast<size_t>(size) * sizeof(T) / 64 + 1) * 64)) {}
    ~Scratch() { kept_memory().keep(block_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    explicit operator bool() const { return block_.memory != nullptr; }
    T* get() const { return static_cast<T*>(block_.memory); }

private:
    KeptMemory::Block block_;
};

}  // namespace tpk::TPK_ISA
