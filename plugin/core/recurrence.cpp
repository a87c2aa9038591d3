#include "recurrence.h"

#include <algorithm>

namespace ggml_tp {
namespace {

using abi::Op;
using R = Recurrence;

constexpr Recurrence kRows[] = {
    {Op::SSM_SCAN, {{R::kState, 2}, {R::kHeads, 1}, {R::kHeads, 0}, {R::kHeads, 1}, {R::kGroups, 1}, {R::kGroups, 1}, {}}, 1, false},
    {Op::GATED_DELTA_NET, {{R::kGroups, 1}, {R::kGroups, 1}, {R::kHeads, 1}, {R::kHeads, 1}, {R::kHeads, 1}, {R::kState}}, 2, true},
    {Op::GATED_LINEAR_ATTN, {{R::kHeads, 1}, {R::kHeads, 1}, {R::kHeads, 1}, {R::kHeads, 1}, {R::kState}}, 1, false},
    {Op::RWKV_WKV6, {{R::kHeads, 1}, {R::kHeads, 1}, {R::kHeads, 1}, {R::kHeads, 1}, {R::kHeads, 1}, {R::kState}}, 1, false},
    {Op::RWKV_WKV7, {{R::kHeads, 1}, {R::kHeads, 1}, {R::kHeads, 1}, {R::kHeads, 1}, {R::kHeads, 1}, {R::kHeads, 1}, {R::kState}}, 3, false},
};

}  // namespace

const Recurrence* recurrence_of(Op op) {
    for (const Recurrence& row : kRows)
        if (row.op == op) return &row;
    return nullptr;
}

Ranges divide_channels(i64 n, int n_ranks, const std::vector<double>& split) {
    constexpr i64 kTogether = 32;  // a cut inside a block of the weights that multiply them is stored twice
    return divide(n, n % kTogether ? 1 : kTogether, n_ranks, split);
}

RecurrentHeads::RecurrentHeads(const Graph& graph, const Tensor& t) : graph_(graph), t_(t), op_(*recurrence_of(t.op)) {
    const Tensor& v = source(op_.values);
    n_head_ = v.ne[op_.sources[op_.values].axis];
    row_ = v.ne[0];
    state_row_ = t.op == Op::SSM_SCAN ? source(0).ne[0] : row_;
    y_bytes_ = v.elems() * 4;
}

i64 RecurrentHeads::repeats(int i) const {
    const Tensor& root = graph_.tensors[static_cast<size_t>(source(i).root)];
    if (root.op != Op::REPEAT) return 1;
    return root.elems() / std::max<i64>(graph_.tensors[static_cast<size_t>(root.src[0])].elems(), 1);
}

Ranges RecurrentHeads::divide(int n_ranks, const std::vector<double>& split) const {
    if (row_ == 1) return divide_channels(n_head_, n_ranks, split);
    i64 groups = n_head_;
    for (int i = 0; i < 7; ++i) {
        if (op_.sources[i].lies != R::kGroups) continue;
        // Tiled groups lie across any range of heads; repeated ones, side by side, do not.
        groups = std::min(groups, op_.tiled ? n_groups(i) / repeats(i) : n_groups(i));
        if (op_.tiled && n_groups(i) != n_head_) groups = n_head_;
    }
    return divide_heads(n_head_, groups, n_ranks, split).q;
}

std::optional<Sharding> RecurrentHeads::needs(int i, const Ranges& heads) const {
    const R::Source& s = op_.sources[i];
    const Tensor& x = source(i);
    switch (s.lies) {
        case R::kWhole: return replicated();
        case R::kHeads: return x.ne[s.axis] == n_head_ ? std::optional(sharded(s.axis, heads)) : std::nullopt;
        case R::kState: {
            Extent extent{n_head_ * row_ * state_row_ * 4, scaled(heads, row_ * state_row_ * 4)};
            Strided at_start = x.strided();
            at_start.offset = 0;
            return sharding_of(extent, at_start);
        }
        default: break;
    }
    const i64 n = n_groups(i), of_a_group = n_head_ / n, copies = repeats(i);
    Ranges groups;
    for (const Range& h : heads) {
        if (h.size() == 0) groups.push_back({0, 0});
        else if (!op_.tiled) groups.push_back({h.begin / of_a_group, (h.end - 1) / of_a_group + 1});
        else if (n == n_head_) groups.push_back({h.begin / copies * copies, (h.end + copies - 1) / copies * copies});
        else if (h.size() >= n || h.begin % n > (h.end - 1) % n) groups.push_back({0, n});
        else groups.push_back({h.begin % n, (h.end - 1) % n + 1});
    }
    return sharded(s.axis, groups);
}

std::vector<Part> RecurrentHeads::parts(const Ranges& heads) const {
    const i64 y_head = row_ * 4, state_head = y_head * state_row_;
    return {{{0, y_bytes_}, {n_head_ * y_head, scaled(heads, y_head)}}, {{y_bytes_, t_.bytes}, {n_head_ * state_head, scaled(heads, state_head)}}};
}

}  // namespace ggml_tp
