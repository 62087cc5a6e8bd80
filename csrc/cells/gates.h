// What gated cells share.
#pragma once

#include "../common/matrix.h"
#include "../common/tanh.h"

namespace tpk::TPK_ISA {

template <class T, class V>
inline V sigmoid(V x) {
    return T(0.5) * tanh<T>(T(0.5) * x) + T(0.5);
}

template <class V>
inline V root_of(V x) {
    for (size_t i = 0; i < sizeof(x) / sizeof(x[0]); ++i) x[i] = root(x[i]);
    return x;
}

}  // namespace tpk::TPK_ISA
