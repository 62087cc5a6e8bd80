#include "interrupt.h"

#include <chrono>

namespace tpk {

namespace {

thread_local Interruptible* called = nullptr;  // by this thread
thread_local Listener* listening = nullptr;

constexpr int64_t between_questions = 100'000'000, between_looks = 1'000'000;

int64_t nanoseconds() { return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

Interruptible::Interruptible(bool (*asks)()) : asks_(asks), outer_(called) { called = this; }

Interruptible::~Interruptible() { called = outer_; }

Interruptible* running_call() { return called; }

Listener::Listener(Interruptible* call) : call_(call), before_(listening), asks_(call == called) { listening = this; }

Listener::~Listener() { listening = before_; }

// The clock costs more than the count: it is looked at about once a millisecond, whatever a step takes.
bool Listener::look() {
    wait_ = 0;
    if (call_->stopped()) return true;
    const int64_t now = nanoseconds();
    if (now - looked_ < between_looks)
        interval_ *= 2;
    else if (interval_ > 1)
        interval_ /= 2;
    looked_ = now;
    wait_ = interval_;
    if (asks_ && now >= call_->due_) {
        if (call_->due_ != 0 && call_->asks_()) __atomic_store_n(&call_->stop_, true, __ATOMIC_RELAXED);
        call_->due_ = nanoseconds() + between_questions;
    }
    if (call_->stopped()) wait_ = 0;
    return call_->stopped();
}

Listener& listener() { return *listening; }

}  // namespace tpk
