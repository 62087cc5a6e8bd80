// Ctrl-C while a native call runs. A call only computes into memory that Python owns, so it can stop anywhere: its
// loops ask `interrupted()` once a step and return where it says so.
//
// Only Python knows of a signal, and only the thread that has called can ask it. So that thread, which always has a
// share of the work, asks a few times a second; the others read what came of it.
#pragma once

#include <stdint.h>

namespace tpk {

// A call that can be interrupted, on the thread that makes it, from its beginning to its end.
class Interruptible {
public:
    // asks: whether to stop.
    explicit Interruptible(bool (*asks)());
    ~Interruptible();
    Interruptible(const Interruptible&) = delete;
    Interruptible& operator=(const Interruptible&) = delete;

    bool stopped() const { return __atomic_load_n(&stop_, __ATOMIC_RELAXED); }

private:
    friend class Listener;

    bool (*const asks_)();
    Interruptible* const outer_;  // of the same thread: a signal's handler may call too
    bool stop_ = false;           // by several threads
    int64_t due_ = 0;             // when the calling thread asks next, in nanoseconds; 0: not settled
};

// Taken before a team begins to work, on the thread that calls.
Interruptible* running_call();

// One thread's part of a call, while it works for it.
class Listener {
public:
    explicit Listener(Interruptible* call);
    ~Listener();
    Listener(const Listener&) = delete;
    Listener& operator=(const Listener&) = delete;

    // Whether to stop; once it is, it stays so. Most times but a count: it has to cost nothing in the shortest loops.
    __attribute__((always_inline)) bool interrupted() { return --wait_ < 0 && look(); }

private:
    bool look();

    Interruptible* const call_;
    Listener* const before_;
    const bool asks_;
    long wait_ = 1, interval_ = 1;  // how many steps pass without a look at the clock
    int64_t looked_ = 0;
};

// This thread's; there is one wherever kernels run.
Listener& listener();

static inline bool interrupted() { return listener().interrupted(); }

}  // namespace tpk
