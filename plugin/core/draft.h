// A stage of the persistent kernel while its table is being made: what it does, and which memory that reads and writes.
#pragma once
#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "stream.h"

namespace ggml_tp {

struct Span {
    u64 begin, end;
    bool meets(const Span& o) const { return begin < o.end && o.begin < end; }
};
inline Span span_of(const void* data, i64 bytes) { return {reinterpret_cast<u64>(data), reinterpret_cast<u64>(data) + static_cast<u64>(bytes)}; }
inline Span span_of(const View& v) {
    i64 bytes = v.type == kF16 || v.type == kBF16 ? 2 : v.type == kI64 ? 8 : 4;
    for (int d = 0; d < 4; ++d) bytes += (v.ne[d] - 1) * v.nb[d];
    return span_of(v.data, bytes);
}
inline bool meet(const std::vector<Span>& a, const std::vector<Span>& b) {
    return std::any_of(a.begin(), a.end(), [&](const Span& x) { return std::any_of(b.begin(), b.end(), [&](const Span& y) { return x.meets(y); }); });
}

/// One stage of one rank while the table is being made.
struct Draft {
    i32 kind = kStreamProduct, count = 0;
    std::vector<char> body;
    std::vector<Span> reads, writes;

    template <class T>
    static Draft of(i32 kind, const T& body) {
        static_assert(sizeof(T) <= sizeof(StreamStage::body));
        Draft d;
        d.kind = kind;
        d.body.resize(sizeof body);
        std::memcpy(d.body.data(), &body, sizeof body);
        return d;
    }
    template <class T>
    T get() const {
        T out;
        std::memcpy(&out, body.data(), sizeof out);
        return out;
    }
    template <class T>
    void set(const T& value) {
        std::memcpy(body.data(), &value, sizeof value);
    }
};
/// Stages of one rank that become fewer.
struct Join {
    std::vector<size_t> taken;                      // those that go, in order
    std::vector<std::pair<size_t, Draft>> changed;  // what others become, which read what is right for them
    std::vector<std::pair<size_t, Span>> left;      // what is written no more, by whom: it must have been for these stages alone

    const Draft* change_of(size_t i) const {
        for (const auto& [at, draft] : changed)
            if (at == i) return &draft;
        return nullptr;
    }
    bool takes(size_t i) const { return std::binary_search(taken.begin(), taken.end(), i); }
    /// Whether other ranks' stages become the same.
    bool is_like(const Join& other) const {
        return taken == other.taken && std::equal(changed.begin(), changed.end(), other.changed.begin(), other.changed.end(),
                                                  [](const auto& a, const auto& b) { return a.first == b.first; });
    }
};

/// The last stage before `end` that writes any of it; none: stages.size().
inline size_t writer_of(const std::vector<Draft>& stages, const Span& span, size_t end) {
    while (end-- > 0)
        if (meet({span}, stages[end].writes)) return end;
    return stages.size();
}
/// The body of stages[i], if there is one of that kind.
template <class T>
std::optional<T> body_of(const std::vector<Draft>& stages, size_t i, i32 kind) {
    return i < stages.size() && stages[i].kind == kind ? std::optional(stages[i].get<T>()) : std::nullopt;
}

using Rows = std::vector<const char*>;  // of each head
/// Element i1, i2, i3 = `row` of dims 1..3, counted through.
inline const char* row_at(const View& v, i64 row) {
    return v.data + row % v.ne[1] * v.nb[1] + row / v.ne[1] % v.ne[2] * v.nb[2] + row / (v.ne[1] * v.ne[2]) * v.nb[3];
}
/// Bytes from each to the next, of one or none 0.
inline std::optional<i64> step_of(const Rows& rows) {
    const i64 step = rows.size() > 1 ? rows[1] - rows[0] : 0;
    for (size_t h = 1; h < rows.size(); ++h)
        if (rows[h] - rows[h - 1] != step) return std::nullopt;
    return step;
}

inline bool is_vector(const View& v, i64 n) {
    return v.type == kF32 && v.ne[0] == n && v.ne[1] * v.ne[2] * v.ne[3] == 1 && v.nb[0] == 4 && reinterpret_cast<u64>(v.data) % 16 == 0;
}
/// n elements side by side, whatever the dimensions.
inline bool is_packed(const View& v, i64 n) {
    return v.type == kF32 && v.nb[0] == 4 && v.ne[0] * v.ne[1] == n && v.ne[2] * v.ne[3] == 1 && (v.ne[1] == 1 || v.nb[1] == v.ne[0] * 4);
}
/// All elements, of four bytes, side by side, in the order of their indices.
inline bool is_dense_words(const View& v) {
    i64 next = 4;
    for (int d = 0; d < 4; ++d) {
        if (v.ne[d] > 1 && v.nb[d] != next) return false;
        next *= v.ne[d];
    }
    return v.type == kF32 || v.type == kI32;
}
inline bool is_dense(const View& v) { return v.type == kF32 && is_dense_words(v); }

/// What a store of one row writes, as an attention sees it: whether these are rows of its K or V.
inline bool cache_of(const SetRowsArgs& store, const View& seen, StreamOwnToken::Cache& to) {
    const View& y = store.y;
    const i64 from = seen.data - y.data, d = seen.ne[0], heads = seen.ne[2];
    if (y.type != kF16 || y.nb[0] != 2 || store.row_period || y.ne[0] != d * heads || (heads > 1 && seen.nb[2] != d * 2) || seen.nb[1] != y.nb[1] ||
        y.nb[1] <= 0 || from % y.nb[1])
        return false;
    if ((store.idx.type != kI64 && store.idx.type != kI32) || store.n_rows >= i64{1} << 31) return false;
    to = {y.data, store.idx.data, y.nb[1], store.n_rows, from / y.nb[1], store.idx.type, 0};
    return true;
}

/// A part becomes two, of which the first has `rows` rows: models have gates and ups, or queries, keys and values, in one matrix. Where they are the parts
/// that they were, or there is no room for one more, nothing happens.
inline void split_part(StreamProduct& p, int part, i64 rows) {
    StreamPart& first = p.part[part];
    if (p.n_parts == 3 || rows <= 0 || rows >= first.n) return;
    for (int i = p.n_parts++; i > part + 1; --i) p.part[i] = p.part[i - 1];
    StreamPart& second = p.part[part + 1];
    second = first;
    first.n = static_cast<i32>(rows), second.n -= static_cast<i32>(rows);
    second.w += rows * p.row_bytes;
    second.y += rows;
    for (float** more : {&second.copy, &second.raw})
        if (*more) *more += rows;
    if (second.bias) second.bias += rows;
}

}  // namespace ggml_tp
