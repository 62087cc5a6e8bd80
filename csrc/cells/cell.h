// What a cell is: what happens between two products with the recurrent weight. Everything else exists once, in
// ../recurrence.
//
//   forward:  state_t, kept_t   = forward(u_t, W h_{t-1}, bias, state_{t-1})
//   adjoint:  δ_t, into_t, past = back(μ_t, step t)                Wᵀ of all gates' `into`, and past, go back
//   inverse:  sent, by, scale   = term<inverse>(λ_t, step t)       by + scale Σ_k P_k sent_k goes back
//   Jacobian: ∂h_t/∂h_{t-1}     = diag(d) + Σ_k diag(slopes_k) W_k with d, slopes = linear(step t)
//
// A state has parts, of which the first is h; so have displacements, adjoints and `by`. The products are of the first
// part; `past` goes to the last.
//
// A cell is a struct of these four functions of vectors, of any width, and of
//
//   gates         how many matrices W is made of
//   states        how many parts a state has: one, or two, of which the second is also the last array that is kept
//   kept          how many arrays of a step forward keeps for backward
//   passes_by     whether anything goes back past the products: else past and d are zero
//   into_is_delta whether W multiplies what the input's share is added to, so that `into` is δ
//   has(inverse)  which inverses there are
//   form(inverse) what the term of an inverse of its own, not "none", "identity" or "jacobian", is made of
#pragma once

#include "../common/rule.h"
#include "../common/vector.h"

namespace tpk::TPK_ISA {

template <class V, int count>
struct Several {
    V of[count > 0 ? count : 1];
    V& operator[](int k) { return of[k]; }
    const V& operator[](int k) const { return of[k]; }
};

template <class V, class... Others>
inline Several<V, 1 + sizeof...(Others)> several(V first, Others... others) {
    return {{first, others...}};
}

template <class Cell, class V>
struct Forward {
    Several<V, Cell::states> state;
    Several<V, Cell::kept> kept;
};

// What backward knows of a step.
template <class Cell, class V>
struct Step {
    Several<V, Cell::states> before;
    V after;  // h_t
    Several<V, Cell::kept> kept;
    Several<V, Cell::gates> u;  // for the inverse "direct" only
};

template <class Cell, class V>
struct Adjoint {
    Several<V, Cell::gates> delta, into;
    V past;
};

// At most one product a gate.
template <class Cell, class V>
struct Term {
    Several<V, Cell::gates> sent;
    Several<V, Cell::states> by;
    V scale;
};

template <class Cell, class V>
struct Linear {
    V d;
    Several<V, Cell::gates> slopes;
};

// What a term's first part is made of. Without a scale the products are added to `by`, one after another; with one they
// are summed up first. A second part is `by` alone.
struct Form {
    int products;
    bool by, scale;
};

}  // namespace tpk::TPK_ISA
