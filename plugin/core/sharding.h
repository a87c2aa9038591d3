// How one tensor lies on the ranks, in two equivalent forms:
// Sharding, by ggml axis and elements (what rules reason about), and Extent, by bytes of a root allocation (what memory and
// views reason about). A view's Sharding follows from its root's Extent by strides alone, so views, reshapes, permutes and
// transposes need no rule of their own.
#pragma once
#include "args.h"
#include <optional>
#include <string>
#include <vector>

namespace ggml_tp {

struct Range {
    i64 begin = 0, end = 0;
    i64 size() const { return end - begin; }
    bool operator==(const Range&) const = default;
};
using Ranges = std::vector<Range>;  // one per rank; may be empty, uneven, and overlap

struct Sharding {
    enum Kind { kReplicated, kSharded, kPartial } kind = kReplicated;
    int axis = 0;              // kSharded: the ggml axis
    Ranges ranges;             // kSharded: elements along that axis; of the first segment, where there are several
    std::vector<Ranges> rest;  // of further segments: Q, K and V side by side, each divided for itself
    bool operator==(const Sharding&) const = default;
    int n_segments() const { return 1 + static_cast<int>(rest.size()); }
    /// This and nothing else of it, as a Sharding of one segment.
    Sharding segment(int i) const { return i == 0 ? Sharding{kind, axis, ranges, {}} : Sharding{kind, axis, rest[static_cast<size_t>(i) - 1], {}}; }
    std::string to_text() const;
};

inline Sharding replicated() { return {}; }
inline Sharding partial() { return {Sharding::kPartial, 0, {}, {}}; }
inline Sharding sharded(int axis, Ranges ranges, std::vector<Ranges> rest = {}) { return {Sharding::kSharded, axis, std::move(ranges), std::move(rest)}; }

/// Rank r owns bytes [ranges[r].begin, ranges[r].end) of every period of an allocation. Or, of a Partial: every rank holds a summand of all.
struct Extent {
    i64 period_bytes = 0;
    Ranges ranges;
    bool is_partial = false;
    std::vector<Ranges> rest = {};  // of further segments
    bool operator==(const Extent&) const = default;
    int n_segments() const { return 1 + static_cast<int>(rest.size()); }
    const Ranges& segment(int i) const { return i == 0 ? ranges : rest[static_cast<size_t>(i) - 1]; }
};

/// Bytes of a root allocation and how they are divided: all of them, or one of the results that an op puts one behind the other into a tensor.
struct Part {
    Range bytes;
    Extent extent;
    bool operator==(const Part&) const = default;
};

/// Shape and place of a tensor inside its root allocation (bytes from the root's first byte).
struct Strided {
    i64 ne[4], nb[4];
    i64 offset = 0;
    i64 elem_bytes = 1;  // bytes of one step along ne[0]'s smallest unit (a block for quantised types)
    i64 unit_elems = 1;  // elements of that unit: nb[0] is a unit's, ne[0] and shardings count elements
};

/// The Extent of a root in which `tensor` is sharded; nullopt when no single period describes it.
std::optional<Extent> extent_of(const Sharding& sharding, const Strided& tensor);

/// The Sharding of a view of a root with this Extent; nullopt when the view mixes owned and foreign bytes within an index.
std::optional<Sharding> sharding_of(const Extent& extent, const Strided& view);

/// `total` divided among ranks in multiples of `grain` (the last piece may be ragged), proportionally to `split` (empty: evenly).
Ranges divide(i64 total, i64 grain, int n_ranks, const std::vector<double>& split);

/// Ranges scaled by a factor, and moved.
Ranges scaled(const Ranges& ranges, i64 factor);
Ranges moved(const Ranges& ranges, i64 by);
/// Whether two ranks have some of the same; ranges that do not follow the ranks' order count as that.
bool overlap(const Sharding& sharding);
/// What each rank has that no rank before it has: together everything once. Ranges follow the ranks' order.
Ranges owned_once(const Ranges& ranges);
/// Whether every rank has all n.
bool is_whole(const Ranges& ranges, i64 n);

}  // namespace ggml_tp
