#pragma once

#include "moe/indexed_vector.hpp"
#include "moe/kernels/simd.hpp"
#include "moe/matrix.hpp"

/// \file
/// The load of experts behind two levels of gates, with `a` groups of `b` experts each:
///
///     Load_H[i,j] = Loadprimary_i · Load_i(X_i)_j / |X_i|, 0 where X_i is empty       [S17 eq. 14]
///
/// X_i are the tokens of group i, whose number has no gradient.

namespace moe::detail {

/// load (a·b) = Load_H, from the loads of the groups (a), those of the experts in them (a·b) and |X_i| (a).
template <class Scalar>
void hierarchical_load(const Vector<Scalar>& groups, const Vector<Scalar>& members,
                       const IndexedVector<Index>& group_tokens, Vector<Scalar>& load) {
  resize_to_zero(load, members.size());
  const Index size = members.size() / groups.size();
  for (Index i = 0; i < groups.size(); ++i) {
    if (group_tokens[i] == 0) continue;
    const Scalar share = groups[i] / static_cast<Scalar>(group_tokens[i]);
    for (Index j = i * size; j < (i + 1) * size; ++j) load[j] = share * members[j];
  }
}

/// With l = ∂L/∂Load_H: dLoadprimary_i += Σ_j l_ij·Load_i(X_i)_j / |X_i| and
/// dLoad_i(X_i)_j += l_ij·Loadprimary_i / |X_i|.
template <class Scalar>
void hierarchical_load_backward(const Vector<Scalar>& groups, const Vector<Scalar>& members,
                                const IndexedVector<Index>& group_tokens,
                                const Vector<Scalar>& dload, Vector<Scalar>& dgroups,
                                Vector<Scalar>& dmembers) {
  const Index size = members.size() / groups.size();
  for (Index i = 0; i < groups.size(); ++i) {
    if (group_tokens[i] == 0) continue;
    const Index first = i * size;
    const auto tokens = static_cast<Scalar>(group_tokens[i]);
    dgroups[i] += dot(size, dload.data() + first, members.data() + first) / tokens;
    const Scalar share = groups[i] / tokens;
    for (Index j = first; j < first + size; ++j) dmembers[j] += share * dload[j];
  }
}

}  // namespace moe::detail
