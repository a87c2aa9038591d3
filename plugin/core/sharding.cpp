#include "sharding.h"

#include <algorithm>
#include <cmath>

namespace ggml_tp {

std::string Sharding::to_text() const {
    if (kind == kReplicated) return "replicated";
    if (kind == kPartial) return "partial";
    std::string out = "sharded axis " + std::to_string(axis);
    for (int i = 0; i < n_segments(); ++i) {
        if (i) out += " |";
        for (const Range& range : segment(i).ranges) out += " [" + std::to_string(range.begin) + "," + std::to_string(range.end) + ")";
    }
    return out;
}

Ranges scaled(const Ranges& ranges, i64 factor) {
    Ranges out = ranges;
    for (Range& range : out) range = {range.begin * factor, range.end * factor};
    return out;
}

Ranges moved(const Ranges& ranges, i64 by) {
    Ranges out = ranges;
    for (Range& range : out) range = {range.begin + by, range.end + by};
    return out;
}

bool overlap(const Sharding& sharding) {
    for (int s = 0; s < sharding.n_segments(); ++s) {
        i64 end = 0;
        for (const Range& range : sharding.segment(s).ranges) {
            if (range.size() && range.begin < end) return true;
            if (range.size()) end = range.end;
        }
    }
    return false;
}

Ranges owned_once(const Ranges& ranges) {
    Ranges out;
    i64 taken = 0;
    for (const Range& range : ranges) {
        out.push_back({std::max(taken, range.begin), std::max(taken, range.end)});
        taken = out.back().end;
    }
    return out;
}

bool is_whole(const Ranges& ranges, i64 n) {
    return std::all_of(ranges.begin(), ranges.end(), [&](const Range& range) { return range == Range{0, n}; });
}

Ranges divide(i64 total, i64 grain, int n_ranks, const std::vector<double>& split) {
    const i64 units = (total + grain - 1) / grain;
    double sum = 0, before = 0;
    for (int r = 0; r < n_ranks; ++r) sum += split.empty() ? 1.0 : split[r];
    Ranges out(n_ranks);
    i64 begin = 0;
    for (int r = 0; r < n_ranks; ++r) {
        before += split.empty() ? 1.0 : split[r];
        i64 end = r + 1 == n_ranks ? units : static_cast<i64>(std::llround(units * (before / sum)));
        end = std::clamp(end, begin, units);
        out[r] = {std::min(begin * grain, total), std::min(end * grain, total)};
        begin = end;
    }
    return out;
}

namespace {
/// The same tensor with ne[0] counting units; nullopt when it ends within one.
std::optional<Strided> in_units(Strided t) {
    if (t.ne[0] % t.unit_elems) return std::nullopt;
    t.ne[0] /= t.unit_elems;
    t.unit_elems = 1;
    return t;
}
}  // namespace

std::optional<Extent> extent_of(const Sharding& sharding, const Strided& t) {
    if (sharding.kind != Sharding::kSharded) return std::nullopt;
    if (t.unit_elems > 1) {
        const auto units = in_units(t);
        if (!units || !sharding.rest.empty()) return std::nullopt;
        Sharding of_units = sharding;
        if (sharding.axis == 0)
            for (Range& range : of_units.ranges) {
                if (range.begin % t.unit_elems || range.end % t.unit_elems) return std::nullopt;
                range = {range.begin / t.unit_elems, range.end / t.unit_elems};
            }
        return extent_of(of_units, *units);
    }
    const int a = sharding.axis;
    const i64 unit = t.nb[a];
    // The axis repeats with the smallest stride above it; with none, the axis spans everything that there is.
    i64 period = unit * t.ne[a];
    for (int d = 0; d < 4; ++d) {
        if (d == a || t.ne[d] == 1) continue;
        if (t.nb[d] < unit) {
            if (t.nb[d] * t.ne[d] > unit) return std::nullopt;  // interleaved with the axis
        } else if (t.nb[d] % period != 0) {
            return std::nullopt;
        }
    }
    const i64 start = t.offset % period;
    if (start != 0) return std::nullopt;  // an axis that does not begin where its root's period begins
    Extent out{period, scaled(sharding.ranges, unit)};
    for (const Ranges& ranges : sharding.rest) out.rest.push_back(scaled(ranges, unit));
    return out;
}

std::optional<Sharding> sharding_of(const Extent& extent, const Strided& view) {
    if (view.unit_elems > 1) {
        const auto units = in_units(view);
        auto out = units ? sharding_of(extent, *units) : std::nullopt;
        if (out && out->axis == 0) {
            out->ranges = scaled(out->ranges, view.unit_elems);
            for (Ranges& ranges : out->rest) ranges = scaled(ranges, view.unit_elems);
        }
        return out;
    }
    const i64 period = extent.period_bytes;
    // Dimensions at or above the period repeat it; below it, the widest stride is the sharded axis if the rest fits inside one step.
    int axis = -1;
    for (int d = 0; d < 4; ++d) {
        if (view.ne[d] == 1 || view.nb[d] >= period) {
            if (view.ne[d] != 1 && view.nb[d] % period != 0) return std::nullopt;
            continue;
        }
        if (axis < 0 || view.nb[d] > view.nb[axis]) axis = d;
    }
    if (axis < 0) {
        // Everything below the period is a single position: choose an axis of one element that sits exactly on an ownership step.
        for (int d = 0; d < 4 && axis < 0; ++d)
            if (view.ne[d] == 1 && view.nb[d] < period) axis = d;
        if (axis < 0) return std::nullopt;
    }
    const i64 step = view.nb[axis];
    i64 inner = view.elem_bytes;
    for (int d = 0; d < 4; ++d)
        if (d != axis && view.ne[d] > 1 && view.nb[d] < period) inner += (view.ne[d] - 1) * view.nb[d];
    if (inner > step && view.ne[axis] > 1) return std::nullopt;
    const i64 start = view.offset % period;
    if (start + (view.ne[axis] - 1) * step + inner > period) return std::nullopt;
    // Segments that the view has no index of drop out: what is seen of Q, K and V side by side is often one of them.
    std::vector<Ranges> segments;
    std::vector<char> owned(static_cast<size_t>(view.ne[axis]) + 1, 0);
    for (int s = 0; s < extent.n_segments(); ++s) {
        Ranges seen;
        bool any = false;
        for (const Range& bytes : extent.segment(s)) {
            i64 begin = bytes.begin <= start ? 0 : (bytes.begin - start + step - 1) / step;
            i64 end = bytes.end < start + inner ? 0 : (bytes.end - start - inner) / step + 1;
            begin = std::min(begin, view.ne[axis]);
            end = std::min(end, view.ne[axis]);
            if (end < begin || bytes.size() == 0) end = begin;
            any |= end > begin;
            seen.push_back({begin, end});
            for (i64 i = begin; i < end; ++i) owned[static_cast<size_t>(i)] = 1;
        }
        if (any || extent.rest.empty()) segments.push_back(std::move(seen));
    }
    for (i64 i = 0; i < view.ne[axis]; ++i)
        if (!owned[static_cast<size_t>(i)]) return std::nullopt;
    Sharding out = sharded(axis, std::move(segments.front()));
    out.rest.assign(std::make_move_iterator(segments.begin() + 1), std::make_move_iterator(segments.end()));
    return out;
}

}  // namespace ggml_tp
